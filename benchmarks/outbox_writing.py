"""The outbox where events are written: what it adds to a transaction, and how long until the broker has them."""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, Integer, String, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from benchmarks.harness import Row, interleaved, is_quick, ratio
from benchmarks.outbox_relay import Confirmed
from benchmarks.outbox_rows import fill
from dispytch_integrations import EventBase, connect
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.outbox import RelayOptions
from dispytch_integrations.outbox._sql import EVENTS
from dispytch_integrations.outbox.store import OutboxStore
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit
from tests.support.outboxes import Database

__all__ = [
    "PER_SECOND",
    "commits",
    "configure_django",
    "cost",
    "create_shop",
    "django_store",
    "latency",
    "percentiles",
]

PER_SECOND = 200
_SECONDS = 2 if is_quick() else 10
_TRANSACTIONS, _ROUNDS = (100, 3) if is_quick() else (300, 9)


class Placed(EventBase):
    """What a shop tells."""

    __route__ = KafkaEventRoute(topic="bench-outbox-placed")
    __ordering_key__ = "{order_id}"
    order_id: int
    customer: str


class Base(DeclarativeBase):
    """Tables of the shop."""


class Order(Base):
    """A row of the shop itself."""

    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    customer: Mapped[str] = mapped_column(String(100))


def create_shop(database: Database) -> None:
    """Make the shop's table."""
    Base.metadata.create_all(database.engine)


# -- from the commit to the broker ---------------------------------------------------------------------------------


async def latency(url: str, database: Database) -> AsyncIterator[Row]:
    """An app that relays its own events: milliseconds from the return of the commit to the broker's confirmation."""
    await fill(database, None)
    confirmed = Confirmed()
    committed = await commits(url, database, confirmed=confirmed)
    p50, p99 = percentiles(committed, confirmed.at)
    what = f"outbox, relayed in the process that commits, {PER_SECOND}/s: commit to broker"
    yield Row(what=f"{what}, p50", measured=p50, unit="ms", reach="<= 10")
    yield Row(what=f"{what}, p99", measured=p99, unit="ms", reach="<= 50")


async def commits(
    url: str, database: Database, *, options: RelayOptions | None = None, confirmed: Confirmed | None = None
) -> dict[str, float]:
    """Commit a row and an event, so many times per second; return when which event was, on the monotonic clock.

    `confirmed`: relay in this process, until all is noted there; None: another process relays.
    """
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    outbox = SQLAlchemyOutbox(engine, relay="external" if confirmed is None else "embedded", options=options)
    session_of = async_sessionmaker(engine)
    bind(session_of, outbox)
    committed: dict[str, float] = {}

    async def transaction(number: int) -> None:
        async with session_of() as session:
            session.add(Order(customer="someone"))
            event_id = emit_on_commit(session, Placed(order_id=number, customer="someone"))
            await session.commit()
            committed[event_id] = time.monotonic()

    async with connect(url, outbox=outbox, hooks=[] if confirmed is None else [confirmed]):
        for number in range(20):  # Connections are made, topics are found.
            await transaction(-1 - number)
        await asyncio.sleep(1)
        start, count = time.monotonic(), PER_SECOND * _SECONDS
        tasks: list[asyncio.Task[None]] = []
        for number in range(count):
            await asyncio.sleep(max(start + number / PER_SECOND - time.monotonic(), 0))
            tasks.append(asyncio.create_task(transaction(number)))
        await asyncio.gather(*tasks)
        if confirmed is not None:
            async with asyncio.timeout(10):
                while len(confirmed.at) < len(committed):
                    await asyncio.sleep(0.05)
    await engine.dispose()
    return committed


def percentiles(committed: dict[str, float], confirmed: dict[str, float]) -> tuple[float, float]:
    """The 50th and the 99th of the milliseconds between them; the first 20 are to warm up."""
    waits = sorted((confirmed[each] - at) * 1000 for each, at in list(committed.items())[20:])
    return waits[len(waits) // 2], waits[len(waits) * 99 // 100]


# -- what a transaction costs --------------------------------------------------------------------------------------


async def cost(url: str, database: Database) -> AsyncIterator[Row]:
    """A transaction with a row and an event, beside the same two inserts written by hand, and the row alone."""
    async_engine = create_async_engine(database.url("postgresql+asyncpg"))
    outbox = SQLAlchemyOutbox(async_engine, relay="external")
    async with connect(url, outbox=outbox):
        yield _cost_row("SQLAlchemy async", await _cost_async(async_engine, outbox))
    await async_engine.dispose()
    engine = create_engine(database.url("postgresql+psycopg"))
    outbox = SQLAlchemyOutbox(engine, relay="external")
    async with connect(url, outbox=outbox):
        yield _cost_row("SQLAlchemy sync", await asyncio.to_thread(_cost_sync, engine, outbox))
    engine.dispose()
    yield _cost_row("Django", await asyncio.to_thread(_cost_django))


def _by_hand(number: int) -> dict[str, Any]:
    """What one would write into a table of one's own: no limits checked, no hash, the identity as headers."""
    event_id = secrets.token_hex(16)
    headers = {
        "ce_specversion": "1.0",
        "ce_type": "Placed",
        "ce_source": "/benchmarks",
        "content-type": "application/json",
        "ce_id": event_id,
        "ce_time": datetime.now(UTC).isoformat(),
    }
    return {
        "event_id": event_id,
        "type": "Placed",
        "broker": "default",
        "destination": "bench-outbox-placed",
        "ordering_key": str(number),
        "headers": json.dumps(headers),
        "properties": "{}",
        "payload": Placed(order_id=number, customer="someone").model_dump_json().encode(),
        "content_type": "application/json",
        "format": 1,
        "lane": number,
        "shard": number % 64,
        "created_ms": time.time_ns() // 1_000_000,
        "state": 0,
        "state_ms": 0,
        "attempts": 0,
        "next_try_ms": 0,
    }


_COLUMNS = list(_by_hand(0))
_INSERT = f"insert into {EVENTS} ({', '.join(_COLUMNS)})"
_BY_HAND = text(f"{_INSERT} values ({', '.join(f':{column}' for column in _COLUMNS)})")
"""The quickest that SQLAlchemy has: neither the ORM nor its expressions have a part in it."""


async def _cost_async(engine: AsyncEngine, outbox: SQLAlchemyOutbox) -> dict[str, list[float]]:
    session_of = async_sessionmaker(engine)
    bind(session_of, outbox)

    async def alone() -> None:
        for _ in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))

    async def by_hand() -> None:
        for number in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))
                await session.flush()
                await session.execute(_BY_HAND, _by_hand(number))

    async def ours() -> None:
        for number in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))
                emit_on_commit(session, Placed(order_id=number, customer="someone"))

    return await interleaved({"alone": alone, "by hand": by_hand, "ours": ours}, rounds=_ROUNDS)


def _cost_sync(engine: Engine, outbox: SQLAlchemyOutbox) -> dict[str, list[float]]:
    session_of = sessionmaker(engine)
    bind(session_of, outbox)

    def alone(number: int) -> None:
        with session_of.begin() as session:
            session.add(Order(customer="someone"))

    def by_hand(number: int) -> None:
        with session_of.begin() as session:
            session.add(Order(customer="someone"))
            session.flush()
            session.execute(_BY_HAND, _by_hand(number))

    def ours(number: int) -> None:
        with session_of.begin() as session:
            session.add(Order(customer="someone"))
            emit_on_commit(session, Placed(order_id=number, customer="someone"))

    return _in_turn({"alone": alone, "by hand": by_hand, "ours": ours})


def _in_turn(contestants: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """`interleaved` without an event loop."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(_ROUNDS + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            for number in range(_TRANSACTIONS):
                run(number)
            if round_:  # The first is to warm up.
                times[name].append(time.perf_counter() - started)
    return times


def _cost_row(name: str, times: dict[str, list[float]]) -> Row:
    alone, hand, own = (statistics.median(times[each]) / _TRANSACTIONS * 1000 for each in ("alone", "by hand", "ours"))
    return Row(
        what=f"outbox, a transaction with one event, time of the same by hand: {name}",
        measured=1 / ratio(times, "ours", "by hand"),
        unit="x",
        reach="<= 1.3",
        note=f"{own:.2f} ms, by hand {hand:.2f}, without the event {alone:.2f}",
    )


# -- Django --------------------------------------------------------------------------------------------------------


def configure_django(database: Database, url: str) -> None:
    """Django in this process, with the same database and its outbox; its tables are there."""
    import django
    from django.conf import settings

    location = database.url("postgresql")
    settings.configure(
        SECRET_KEY="benchmark",
        INSTALLED_APPS=["dispytch_integrations.django", "dispytch_integrations.django.outbox"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": location.host,
                "PORT": location.port,
                "USER": location.username,
                "PASSWORD": location.password,
                "NAME": location.database,
                "CONN_MAX_AGE": None,
            }
        },
        DISPYTCH={"default": {"URL": url}},
        USE_TZ=True,
    )
    django.setup()


def django_store() -> OutboxStore:
    """The store of Django's outbox."""
    from dispytch_integrations.django.outbox.store import DjangoStore

    return DjangoStore()


def _cost_django() -> dict[str, list[float]]:
    from django.db import connection, transaction

    from dispytch_integrations.django import emit_on_commit as emit_on_commit_of_django

    insert = f"{_INSERT} values ({', '.join(['%s'] * len(_COLUMNS))})"

    def store() -> None:
        with connection.cursor() as cursor:
            cursor.execute("insert into shop_order (customer) values (%s) returning id", ["someone"])
            cursor.fetchone()

    def alone(number: int) -> None:
        with transaction.atomic():
            store()

    def by_hand(number: int) -> None:
        with transaction.atomic():
            store()
            with connection.cursor() as cursor:
                cursor.execute(insert, list(_by_hand(number).values()))

    def ours(number: int) -> None:
        with transaction.atomic():
            store()
            emit_on_commit_of_django(Placed(order_id=number, customer="someone"))

    before = _stored()
    times = _in_turn({"alone": alone, "by hand": by_hand, "ours": ours})
    stored, expected = _stored() - before, 2 * (_ROUNDS + 1) * _TRANSACTIONS
    connection.close()
    assert stored == expected, f"{stored} events were stored instead of {expected}"
    return times


def _stored() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"select count(*) from {EVENTS}")
        return int(cursor.fetchone()[0])
