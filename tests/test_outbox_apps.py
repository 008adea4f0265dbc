"""The outbox in an app: from the request to the broker, through starts, stops and outages; here and in real servers."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis as RedisClient
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from dispytch_integrations import connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, StartupError
from dispytch_integrations.outbox import relay as relay_module
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit
from tests.support.arrivals import KafkaArrivals
from tests.support.brokers import Redis, free_port
from tests.support.outboxes import Database, eventually, temporary_database
from tests.support.proxy import TCPProxy
from tests.support.servers import Server, Shop, serving
from tests.support.sessions import ASYNCHRONOUS, Placed, session_factory

DRIVERS = ["postgresql+asyncpg", "postgresql+psycopg"]


@pytest.fixture(scope="module")
def _database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        database.run("create table placed (number int primary key)")
        yield database


@pytest.fixture
def database(_database: Database) -> Database:
    _database.empty()
    _database.run("delete from placed")
    return _database


@pytest.fixture
async def redis(redis_url: str, unique: str) -> AsyncIterator[RedisClient]:
    async with RedisClient.from_url(redis_url, decode_responses=True) as client:
        yield client
        await client.delete(unique)


def _serving(
    app: str, folder: Path, database: Database, *, broker: str, name: str, relay: str = "embedded"
) -> AbstractAsyncContextManager[Server]:
    environment = {
        "TEST_BROKER": broker,
        "TEST_STREAM": name,
        "TEST_DATABASE_URL": database.url("postgresql+asyncpg").render_as_string(hide_password=False),
        "TEST_RELAY": relay,
    }
    command = ["uvicorn", f"tests.apps.outbox:{app}", "--host", "127.0.0.1", "--port", "{port}"]
    return serving([sys.executable, "-m", *command], folder, environment)


# -- real servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", ["app", "wrapped"], ids=["emitter_lifespan", "EmitterMiddleware"])
async def test_a_deploy_in_the_middle_of_the_load_loses_nothing(
    app: str, database: Database, kafka_url: str, unique: str, tmp_path: Path
) -> None:
    """What was committed is at the broker, or in the table for the next process; its shards are free at once."""
    async with _serving(app, tmp_path, database, broker=kafka_url, name=unique) as server:
        shop = Shop(server)
        await shop.place_first("commit")
        load = [asyncio.create_task(shop.place_until_closed("commit")) for _ in range(8)]
        await shop.wait_for(200)
        server.terminate()
        await asyncio.wait_for(asyncio.gather(*load), 20)
        await server.exit_code(20)
        assert shop.failed == [], server.output()
        assert "Traceback" not in server.output()
    assert database.all("select count(*) from dispytch_outbox_shard where owner is not null") == [(0,)]
    committed = {number for (number,) in database.all("select number from placed")}
    assert shop.placed <= committed
    async with _serving(app, tmp_path, database, broker=kafka_url, name=unique) as server:
        await eventually(lambda: database.count() == 0, 20)
        server.terminate()
        await server.exit_code(20)
    arrivals = KafkaArrivals(kafka_url, unique)
    try:
        assert set(await asyncio.to_thread(arrivals.numbers, len(committed))) == committed
    finally:
        arrivals.close()


async def test_relayed_elsewhere_the_server_opens_no_connection(
    database: Database, redis_url: str, unique: str, tmp_path: Path
) -> None:
    """Hundreds of web processes cost the broker nothing; who emits directly there reads what to write."""
    address = urlsplit(redis_url)
    async with (
        TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy,
        _serving(
            "app", tmp_path, database, broker=f"redis://127.0.0.1:{proxy.port}", name=unique, relay="external"
        ) as server,
    ):
        shop = Shop(server)
        await shop.place_first("commit")
        await asyncio.gather(*(shop.place("commit") for _ in range(20)))
        await shop.place("direct")
        assert shop.failed == [500]
        assert "its outbox is relayed by another one; write emit_on_commit(...)" in server.output()
        assert proxy.accepted == 0
        assert database.count() == len(shop.placed) == 21


# -- starts and stops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_an_app_starts_while_its_broker_is_down(
    driver: str,
    database: Database,
    own_redis: Callable[..., Redis],
    unique: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The broker's outage is not the shop's: orders are taken, and their events go out when it is back."""
    broker = await asyncio.to_thread(own_redis)
    await asyncio.to_thread(broker.stop)
    caplog.set_level(logging.WARNING)
    async with session_factory(database, driver) as (factory, engine):
        outbox = SQLAlchemyOutbox(engine)
        bind(factory, outbox)
        before = time.monotonic()
        async with connect(broker.url, outbox=outbox, prefix=unique, timeout=1.0) as emitter:
            assert time.monotonic() - before < 5
            [told] = [each.getMessage() for each in caplog.records if "starts without" in each.getMessage()]
            assert "the app starts without broker 'default'" in told
            assert "Connect call failed" in told, "why, too"
            await _place(factory, driver, 1)
            with pytest.raises(BrokerUnavailableError):
                await emitter.emit(Placed(number=2))
            assert database.count() == 1
            await asyncio.to_thread(broker.start)
            await eventually(lambda: database.count() == 0, 20)
        async with RedisClient.from_url(broker.url) as client:
            assert await client.xlen(f"{unique}orders") == 1


async def test_required_brokers_are_required_with_an_outbox_too(database: Database) -> None:
    """Who emits directly as well may insist on the broker."""
    async with session_factory(database, "postgresql+asyncpg") as (_, engine):
        url = f"redis://127.0.0.1:{free_port()}"
        with pytest.raises(StartupError, match="not connected within startup_timeout"):
            await connect(url, outbox=SQLAlchemyOutbox(engine), required=True, startup_timeout=0.3).start()


async def test_a_wrong_password_is_told_at_the_start_with_an_outbox_too(
    database: Database, own_redis: Callable[..., Redis]
) -> None:
    """A mistake in the settings never mends itself: events would wait for ever, and only a log line would say so."""
    broker = await asyncio.to_thread(own_redis, password="hunter2")
    address = urlsplit(broker.url)
    async with session_factory(database, "postgresql+asyncpg") as (_, engine):
        brokers = connect(f"redis://:wrong@127.0.0.1:{address.port}", outbox=SQLAlchemyOutbox(engine))
        with pytest.raises(ConfigurationError, match="password"):
            await brokers.start()
        assert [each.state for each in brokers.brokers.values()] == ["stopped"]


async def test_the_relay_ends_before_the_brokers(database: Database) -> None:
    """The other way round the last events of a deploy would fail, and be sent again by the next process."""
    async with session_factory(database, "postgresql+asyncpg") as (factory, engine):
        outbox = SQLAlchemyOutbox(engine)
        bind(factory, outbox)
        brokers = connect("memory://", outbox=outbox)
        states: list[tuple[str, int, Any, int]] = []
        owned = "select count(*) from dispytch_outbox_shard where owner is not null"

        def changed(broker: Any) -> None:
            states.append((broker.state, len(outbox.relays), database.all(owned)[0][0], database.count()))

        brokers.on_change = changed
        async with brokers:
            await eventually(lambda: database.all(owned) == [(64,)])
            await _place(factory, "postgresql+asyncpg", *range(500))
            producer: Any = brokers.producers["default"]
            await eventually(lambda: len(producer.sent) > 0)
        assert [state for state, *_ in states] == ["starting", "up", "stopping", "stopped"]
        assert states[2] == ("stopping", 0, 0, 500 - len(producer.sent))


@pytest.mark.parametrize("relay", ["embedded", "external"])
def test_a_script_with_an_outbox(relay: Any, database: Database) -> None:
    """A Celery task or a script commits with the same call; its process relays, or leaves it to another."""
    engine = create_engine(database.url("postgresql+psycopg"))
    factory = sessionmaker(engine)
    outbox = SQLAlchemyOutbox(engine, relay=relay)
    bind(factory, outbox)
    brokers = connect_blocking("memory://", outbox=outbox)
    with brokers:
        with factory.begin() as session:
            emit_on_commit(session, [Placed(number=number) for number in range(3)])
        if relay == "external":
            assert database.count() == 3
        else:
            end = time.monotonic() + 10
            while database.count() and time.monotonic() < end:
                time.sleep(0.01)
            assert database.count() == 0
    engine.dispose()


# -- NOTIFY --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", [*DRIVERS, "postgresql+psycopg_async"])
async def test_another_processes_commit_wakes_the_relay(
    driver: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `notify` a relay sends at once what others have committed; without, it finds it at its next look."""
    monkeypatch.setattr(relay_module, "_FIRST_POLL", 60.0)
    options = RelayOptions(poll_interval=60.0, notify=True)
    async with (
        session_factory(database, driver) as (_, engine),
        session_factory(database, "postgresql+psycopg") as (others, other_engine),
    ):
        bind(others, writing := SQLAlchemyOutbox(other_engine, "external", options=options))
        brokers = connect("memory://", outbox=SQLAlchemyOutbox(engine, options=options))
        listens = "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen %'"
        async with brokers, connect("memory://", outbox=writing):
            producer: Any = brokers.producers["default"]
            await eventually(lambda: database.all(listens) == [(1,)])
            for number in range(1, 4):
                await _place(others, "postgresql+psycopg", number)
                await eventually(lambda number=number: len(producer.sent) == number, 5)  # type: ignore[misc]
            with others() as session:
                emit_on_commit(session, Placed(number=4))
                session.rollback()
            # One that does not notify is not heard: it was NOTIFY that has woken it.
            quiet = SQLAlchemyOutbox(other_engine, "external")
            async with connect("memory://", outbox=quiet):
                bind(others, quiet)
                await _place(others, "postgresql+psycopg", 5)
                await asyncio.sleep(0.5)
                assert (len(producer.sent), database.count()) == (3, 1)


async def _place(factory: Any, driver: str, *numbers: int) -> None:
    if driver in ASYNCHRONOUS:
        async with factory.begin() as session:
            await session.execute(text("select 1"))
            emit_on_commit(session, [Placed(number=number) for number in numbers])
        return

    def place() -> None:
        with factory.begin() as session:
            emit_on_commit(session, [Placed(number=number) for number in numbers])

    await asyncio.to_thread(place)
