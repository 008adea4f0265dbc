"""Versions side by side: while a deploy goes on, an old relay and a new one share a table, and so do their writers."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations._sqlalchemy_store import AsyncStore, store_of
from dispytch_integrations.outbox.record import ENCODED, FORMAT
from tests.support.outboxes import Database, FakeBackend, eventually, record, relaying, started, temporary_database

NEWER = ENCODED + 1
"""The format of a version of ours that does not exist yet."""


@pytest.fixture(scope="module")
def _database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def database(_database: Database) -> Database:
    _database.empty()
    return _database


@pytest.fixture
async def stores(database: Database) -> AsyncIterator[tuple[AsyncStore, AsyncStore]]:
    """Of the old version and of the new one."""
    engines = [create_async_engine(database.url("postgresql+asyncpg")) for _ in range(2)]
    yield AsyncStore(engines[0]), AsyncStore(engines[1])
    for engine in engines:
        await engine.dispose()


def _store(database: Database, numbers: range, *, format: int = FORMAT, broker: str = "default") -> None:
    records = [record(number, f"key {number % 7} of {format}", broker=broker) for number in numbers]
    for each in records:
        each.format = format
    database.insert(records)


def _told(caplog: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    return [text for text in (each.getMessage() for each in caplog.records) if re.search(pattern, text)]


async def test_two_formats_in_a_blue_green_deploy(
    database: Database, stores: tuple[AsyncStore, AsyncStore], caplog: pytest.LogCaptureFixture
) -> None:
    """The new version's events wait while only the old one relays, are never dead, and nothing is sent twice."""
    caplog.set_level(logging.WARNING)
    blue, green = FakeBackend(), FakeBackend()
    async with started(default=blue) as old_brokers, started(default=green) as new_brokers:
        async with relaying(stores[0], old_brokers, max_attempts=1) as old:
            _store(database, range(100))
            _store(database, range(100, 150), format=NEWER)
            _store(database, range(150, 200))
            await eventually(lambda: database.count(f"format = {FORMAT}") == 0)
            old._housekeeping.due = 0.0  # Looked at once a minute.
            old.wake()
            await eventually(lambda: _told(caplog, "50 events were stored with a codec .* or by a newer version"))
            waiting = database.all("select distinct format, state, attempts, last_error from dispytch_outbox_event")
            assert waiting == [(NEWER, 0, 0, None)]

            # The new version comes up beside the old one, and takes its share of the shards.
            async with relaying(stores[1], new_brokers) as new:
                new._format = NEWER
                await eventually(lambda: new.shards == 32 and old.shards == 32)
                _store(database, range(200, 300))
                _store(database, range(300, 400), format=NEWER)
                await eventually(lambda: database.count(f"format = {FORMAT}") == 0)
                assert all(int(each.payload or b"") not in range(300, 400) for each in blue.fake.sent)
                # The old one is stopped: its shards, and what it left in them, are the new one's.
                old.stop()
                await eventually(lambda: database.count() == 0)
        both = [*blue.fake.numbers(), *green.fake.numbers()]
        assert sorted(both) == list(range(400)), "lost, or sent twice"
        for fake in (blue.fake, green.fake):
            for key in {each.ordering_key for each in fake.sent}:
                assert fake.numbers(key) == sorted(fake.numbers(key))
    assert len(_told(caplog, "newer version")) == 1, "once, and not each minute"


async def test_an_alias_that_only_the_new_version_has(
    database: Database, stores: tuple[AsyncStore, AsyncStore], caplog: pytest.LogCaptureFixture
) -> None:
    """A deploy adds a broker: its events wait for the relay that knows it, while all others go out."""
    caplog.set_level(logging.WARNING)
    blue, green, alerts = FakeBackend(), FakeBackend(), FakeBackend()
    async with started(default=blue) as old_brokers, started(default=green, alerts=alerts) as new_brokers:
        _store(database, range(20), broker="alerts")
        _store(database, range(20, 40))
        async with relaying(stores[0], old_brokers, max_attempts=1):
            await eventually(lambda: _told(caplog, "20 events wait for broker 'alerts'.*it has 'default'"))
            await eventually(lambda: database.count("broker = 'default'") == 0)
            assert database.all("select distinct broker, state, attempts from dispytch_outbox_event") == [
                ("alerts", 0, 0)
            ]
            async with relaying(stores[1], new_brokers):
                await eventually(lambda: 0 < database.count() < 20)  # In the shards that are its own.
                _store(database, range(40, 60))
                await eventually(lambda: database.count("broker = 'default'") == 0)
        async with relaying(stores[1], new_brokers):  # The old one is gone.
            await eventually(lambda: database.count() == 0)
    assert sorted(alerts.fake.numbers()) == list(range(20))
    assert sorted([*blue.fake.numbers(), *green.fake.numbers()]) == list(range(20, 60))


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "sqlite"])
async def test_a_column_of_a_later_version_is_no_matter(kind: str, tmp_path: Path) -> None:
    """The migration goes first: until the last old process is gone, it writes to and reads from the new table."""
    drivers = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite+pysqlite"}
    with temporary_database(kind, tmp_path) as database:
        _store(database, range(5))
        with database.engine.begin() as connection:
            connection.execute(text("alter table dispytch_outbox_event add column trace varchar(100)"))
            connection.execute(text("alter table dispytch_outbox_shard add column note varchar(100)"))
        _store(database, range(5, 10))
        backend = FakeBackend()
        engine = create_engine(database.url(drivers[kind]))
        async with started(default=backend) as brokers, relaying(store_of(engine), brokers):
            await eventually(lambda: database.count() == 0)
        assert sorted(backend.fake.numbers()) == list(range(10))
        engine.dispose()
