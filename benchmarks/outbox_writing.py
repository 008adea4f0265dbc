"""The outbox where events are written: what it adds to a transaction, and how long until the broker has them."""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Integer, MetaData, String, insert, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase, connect
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.outbox._sql import EVENTS
from dispytch_integrations.outbox.store import OutboxStore
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit, outbox_tables
from tests.support.outboxes import Database

__all__ = ["configure_django", "cost", "django_store", "latency"]

_PER_SECOND, _SECONDS = 200, 10
_TRANSACTIONS, _ROUNDS = 300, 9


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


# -- from the commit to the broker ---------------------------------------------------------------------------------


class _Confirmed(Hook):
    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def sent(self, message: Message) -> None:
        self.at[message.id] = time.perf_counter()


async def latency(url: str, database: Database) -> list[Row]:
    """An app that relays its own events: milliseconds from the return of the commit to the broker's confirmation."""
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    async with engine.begin() as connection:
        await connection.execute(text(f"truncate {EVENTS}"))
        await connection.run_sync(Base.metadata.create_all)
    outbox, confirmed = SQLAlchemyOutbox(engine), _Confirmed()
    session_of = async_sessionmaker(engine)
    bind(session_of, outbox)
    committed: dict[str, float] = {}

    async def transaction(number: int) -> None:
        async with session_of() as session:
            session.add(Order(customer="someone"))
            event_id = emit_on_commit(session, Placed(order_id=number, customer="someone"))
            await session.commit()
            committed[event_id] = time.perf_counter()

    async with connect(url, outbox=outbox, hooks=[confirmed]):
        await transaction(-1)
        await asyncio.sleep(1)
        start, count = time.perf_counter(), _PER_SECOND * _SECONDS
        tasks: list[asyncio.Task[None]] = []
        for number in range(count):
            await asyncio.sleep(max(start + number / _PER_SECOND - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(transaction(number)))
        await asyncio.gather(*tasks)
        async with asyncio.timeout(10):
            while len(confirmed.at) < count + 1:
                await asyncio.sleep(0.05)
    await engine.dispose()
    waits = sorted((confirmed.at[each] - at) * 1000 for each, at in list(committed.items())[1:])
    what = f"outbox, embedded in the process that commits, {_PER_SECOND}/s: commit to broker"
    return [
        Row(what=f"{what}, p50", measured=waits[len(waits) // 2], unit="ms", reach="<= 10"),
        Row(what=f"{what}, p99", measured=waits[len(waits) * 99 // 100], unit="ms", reach="<= 50"),
    ]


# -- what a transaction costs --------------------------------------------------------------------------------------


async def cost(url: str, database: Database) -> list[Row]:
    """A transaction with a row and an event, beside the same two inserts written by hand, and the row alone."""
    rows = await _cost_sqlalchemy(url, database)
    rows += await asyncio.to_thread(_cost_django)
    return rows


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


async def _cost_sqlalchemy(url: str, database: Database) -> list[Row]:
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    outbox = SQLAlchemyOutbox(engine, relay="external")
    session_of = async_sessionmaker(engine)
    bind(session_of, outbox)
    events, _ = outbox_tables(MetaData())

    async def alone() -> None:
        for _ in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))

    async def by_hand() -> None:
        for number in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))
                await session.flush()
                await session.execute(insert(events).values(_by_hand(number)))

    async def ours() -> None:
        for number in range(_TRANSACTIONS):
            async with session_of.begin() as session:
                session.add(Order(customer="someone"))
                emit_on_commit(session, Placed(order_id=number, customer="someone"))

    async with connect(url, outbox=outbox):
        times = await interleaved({"alone": alone, "by hand": by_hand, "ours": ours}, rounds=_ROUNDS)
    await engine.dispose()
    return [_cost_row("SQLAlchemy async", times)]


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


def _cost_django() -> list[Row]:
    from django.db import connection, transaction

    from dispytch_integrations.django import emit_on_commit as emit_on_commit_of_django

    columns = list(_by_hand(0))
    by_hand_text = f"insert into {EVENTS} ({', '.join(columns)}) values ({', '.join(['%s'] * len(columns))})"

    def store() -> None:
        with connection.cursor() as cursor:
            cursor.execute("insert into shop_order (customer) values (%s) returning id", ["someone"])
            cursor.fetchone()

    def nothing(number: int) -> None:
        pass

    def by_hand(number: int) -> None:
        with connection.cursor() as cursor:
            cursor.execute(by_hand_text, list(_by_hand(number).values()))

    def ours(number: int) -> None:
        emit_on_commit_of_django(Placed(order_id=number, customer="someone"))

    contestants = {"alone": nothing, "by hand": by_hand, "ours": ours}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    before = _stored()
    for _ in range(_ROUNDS):
        for name, then in contestants.items():
            started = time.perf_counter()
            for number in range(_TRANSACTIONS):
                with transaction.atomic():
                    store()
                    then(number)
            times[name].append(time.perf_counter() - started)
    stored = _stored() - before
    connection.close()
    if stored != 2 * _ROUNDS * _TRANSACTIONS:
        what, note = "outbox, a transaction with one event: Django", f"emit_on_commit stored {stored} events only"
        return [Row(what=what, measured=float("nan"), unit="x", note=note)]
    return [_cost_row("Django", times)]


def _stored() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"select count(*) from {EVENTS}")
        return int(cursor.fetchone()[0])
