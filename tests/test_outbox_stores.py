"""The stores of this package on the databases they are for: all that the public contract asks, and more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import ClassVar

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations._sqlalchemy_store import (
    AsyncStore,
    SyncStore,
    store_of,
)
from dispytch_integrations.outbox.record import FORMAT, SHARDS, Record
from dispytch_integrations.outbox.store import Failure, OutboxStore, Query
from dispytch_integrations.testing.outbox_contract import Insert, OutboxStoreContract
from tests.support.outboxes import Database, record, temporary_database


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Database]]:
    with (
        temporary_database("postgresql") as postgresql,
        temporary_database("mysql") as mysql,
        temporary_database("sqlite", tmp_path_factory.mktemp("outbox")) as sqlite,
    ):
        yield {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}


class _SQLAlchemyStore(OutboxStoreContract):
    driver: ClassVar[str]
    asynchronous: ClassVar[bool] = True

    @pytest.fixture
    def database(self, databases: dict[str, Database]) -> Database:
        database = databases[self.driver.partition("+")[0]]
        database.empty()
        return database

    @pytest.fixture
    async def store(self, database: Database) -> AsyncIterator[OutboxStore]:
        if self.asynchronous:
            engine = create_async_engine(database.url(self.driver))
            store: OutboxStore = store_of(engine)
            assert isinstance(store, AsyncStore)
            await store.open()
            yield store
            await store.close()
            await engine.dispose()
            return
        sync_engine = create_engine(database.url(self.driver))
        store = store_of(sync_engine)
        assert isinstance(store, SyncStore)
        await store.open()
        yield store
        await store.close()
        sync_engine.dispose()

    @pytest.fixture
    def insert(self, database: Database) -> Insert:
        async def insert(records: Sequence[Record]) -> None:
            await asyncio.to_thread(database.insert, records)

        return insert

    @pytest.fixture
    def notify(self, database: Database) -> Insert:
        async def notify(records: Sequence[Record]) -> None:
            await asyncio.to_thread(database.insert, records, notify=True)

        return notify

    async def test_an_open_transaction_is_not_waited_for(self, store: OutboxStore, database: Database) -> None:
        """A slow transaction of the app must not stop the relay; its rows come when they are committed."""
        if database.kind == "sqlite":
            pytest.skip("SQLite has one writer: the relay waits for it, as every other writer does")
        with database.engine.connect() as slow:
            database.insert([record(1, "anna")], on=slow)
            await asyncio.to_thread(database.insert, [record(2, "bob")])
            query = Query(shards=range(SHARDS), brokers=["default"], format=FORMAT, limit=10)
            fetched = await asyncio.wait_for(store.fetch(query), 5)
            assert [each.ordering_key for each in fetched.records] == ["bob"]
            await asyncio.wait_for(store.settle([fetched.records[0].id], [], "delete"), 5)
            slow.commit()
        assert [each.ordering_key for each in (await store.fetch(query)).records] == ["anna"]

    async def test_no_transaction_is_left_open(self, store: OutboxStore, database: Database) -> None:
        """A relay that waits for its broker must hold neither locks nor a snapshot: vacuum would stand still."""
        await asyncio.to_thread(database.insert, [record(1)])
        query = Query(shards=range(SHARDS), brokers=["default"], format=FORMAT, limit=10)
        [fetched] = (await store.fetch(query)).records
        await store.settle([], [Failure(fetched.id, 1, 0.0, "refused")], "delete")
        await store.renew("a", 1.0)
        if database.kind == "postgresql":
            [(count,)] = database.all(
                "select count(*) from pg_stat_activity where datname = current_database() and xact_start is not null "
                "and pid <> pg_backend_pid()"
            )
            assert count == 0
        # Nobody is in the way of a lock on everything.
        locks = {
            "postgresql": "lock table dispytch_outbox_event in access exclusive mode nowait",
            "mysql": "alter table dispytch_outbox_event wait 1 comment = 'locked'",
            "sqlite": "update dispytch_outbox_event set attempts = attempts",
        }
        await asyncio.to_thread(database.run, locks[database.kind])

    async def test_its_clock_is_the_databases_own(self, store: OutboxStore, database: Database) -> None:
        """Times are compared with each other, in whole milliseconds: the zone of a session must not matter."""
        await asyncio.to_thread(database.insert, [record(1)])
        query = Query(shards=range(SHARDS), brokers=["default"], format=FORMAT, limit=10)
        [fetched] = (await store.fetch(query)).records
        await store.settle([], [Failure(fetched.id, 1, 100.0, "refused")], "delete")
        [(next_try,)] = database.all("select next_try_ms from dispytch_outbox_event")
        seconds = {
            "postgresql": "select extract(epoch from now())",
            "mysql": "select unix_timestamp(now(6))",
            "sqlite": "select strftime('%s', 'now')",
        }
        [(now,)] = database.all(seconds[database.kind])
        assert abs(next_try / 1000 - 100 - float(now)) < 5

    async def test_it_survives_a_connection_that_is_cut(self, store: OutboxStore, database: Database) -> None:
        """A database that was restarted is used again, over a new connection, after one error at most."""
        if database.kind == "sqlite":
            pytest.skip("SQLite has no connection to cut")
        await store.leases()
        if database.kind == "postgresql":
            database.all(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
                "and pid <> pg_backend_pid()"
            )
        else:
            ids = database.all(
                "select id from information_schema.processlist where db = database() and id <> connection_id()"
            )
            for (number,) in ids:
                database.run(f"kill {number}")
        with pytest.raises(Exception) as cut:  # noqa: PT011  # whichever the driver has for it
            await store.leases()
        assert "PendingRollback" not in type(cut.value).__name__, "what the database said is what operators need"
        assert len(await store.leases()) == SHARDS


class TestAsyncpg(_SQLAlchemyStore):
    driver = "postgresql+asyncpg"
    listens = True


class TestPsycopgAsync(_SQLAlchemyStore):
    driver = "postgresql+psycopg"
    listens = True


class TestPsycopg(_SQLAlchemyStore):
    driver = "postgresql+psycopg"
    asynchronous = False
    listens = True


class TestAsyncmy(_SQLAlchemyStore):
    driver = "mysql+asyncmy"


class TestPymysql(_SQLAlchemyStore):
    driver = "mysql+pymysql"
    asynchronous = False


class TestAiosqlite(_SQLAlchemyStore):
    driver = "sqlite+aiosqlite"


class TestPysqlite(_SQLAlchemyStore):
    driver = "sqlite+pysqlite"
    asynchronous = False
