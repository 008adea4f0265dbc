"""The outbox in a database of SQLAlchemy: its tables, and its store on a synchronous or an asynchronous engine."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar, cast

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    CursorResult,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    TextClause,
    inspect,
    text,
)
from sqlalchemy.dialects.mysql import LONGBLOB
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool, SingletonThreadPool, StaticPool

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._sql import CHANNEL, EVENTS, LEASES, Insert, SQLStore
from dispytch_integrations.outbox._sql import Connection as OnConnection
from dispytch_integrations.outbox._sql_store import OutboxInSQL
from dispytch_integrations.outbox.record import MAX_NAME
from dispytch_integrations.outbox.threads import OneThread, listen_blocking, no_listener, shut_down

__all__ = [
    "AsyncStore",
    "OnSQLAlchemy",
    "SyncStore",
    "address_of",
    "check",
    "insert_of",
    "outbox_tables",
    "require_room",
    "sql_of",
    "store_of",
]

_T = TypeVar("_T")


def outbox_tables(metadata: MetaData, schema: str | None = None) -> tuple[Table, Table]:
    """The outbox's two tables, added to your metadata, in plain types of SQLAlchemy: (events, shards).

        outbox_tables(Base.metadata)

    `Base.metadata.create_all()` makes them, and `alembic revision --autogenerate` writes a migration that does not
    import us. `schema`: that of the tables; None: the metadata's, or the connection's. Called again, the same tables.

    Raises ConfigurationError for what is no MetaData.
    """
    given: Any = metadata
    if not isinstance(given, MetaData):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        written = f"{name}.metadata" if isinstance(getattr(given, "metadata", None), MetaData) else "Base.metadata"
        raise ConfigurationError(f"outbox_tables takes MetaData, not {name}; write outbox_tables({written})")
    found = metadata.tables.get(_key(metadata, schema, EVENTS))
    if found is not None:
        return found, metadata.tables[_key(metadata, schema, LEASES)]
    number = BigInteger()
    events = Table(
        EVENTS,
        metadata,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("event_id", String(MAX_NAME), nullable=False, unique=True),
        Column("type", String(MAX_NAME), nullable=False),
        Column("broker", String(MAX_NAME), nullable=False),
        Column("destination", Text, nullable=False),
        Column("ordering_key", Text),
        Column("headers", Text, nullable=False),
        Column("properties", Text, nullable=False),
        Column("payload", LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb")),
        Column("content_type", String(MAX_NAME), nullable=False),
        Column("format", SmallInteger, nullable=False),
        Column("lane", number, nullable=False),
        Column("shard", SmallInteger, nullable=False),
        Column("created_ms", number, nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("state_ms", number, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("next_try_ms", number, nullable=False),
        Column("last_error", Text),
        Index(f"{EVENTS}_state", "state", "id"),
        schema=schema,
        # An id is never given twice: what was read and is deleted by its id is the same row.
        sqlite_autoincrement=True,
    )
    shards = Table(
        LEASES,
        metadata,
        Column("shard", SmallInteger, primary_key=True, autoincrement=False),
        Column("owner", String(MAX_NAME)),
        Column("until_ms", number, nullable=False),
        Column("wanted_by", String(MAX_NAME)),
        Column("wanted_ms", number, nullable=False),
        Column("heartbeat_ms", number),
        schema=schema,
    )
    return events, shards


def _key(metadata: MetaData, schema: str | None, name: str) -> str:
    schema = schema or metadata.schema
    return f"{schema}.{name}" if schema else name


def sql_of(engine: Engine | AsyncEngine, schema: str | None) -> SQLStore:
    """The SQL for an engine's database. Raises ConfigurationError for a database that the outbox does not know."""
    prefix = _prefix(engine, schema)
    return SQLStore(engine.dialect.name, prefix + EVENTS, prefix + LEASES)


def insert_of(engine: Engine | AsyncEngine, schema: str | None, *, notify: bool) -> Insert:
    """The INSERT for an engine's database. Raises ConfigurationError for a database that the outbox does not know."""
    return Insert(engine.dialect.name, _prefix(engine, schema) + EVENTS, notify=notify)


def _prefix(engine: Engine | AsyncEngine, schema: str | None) -> str:
    return f"{engine.dialect.identifier_preparer.quote_schema(schema)}." if schema else ""


def store_of(engine: Engine | AsyncEngine, schema: str | None = None) -> AsyncStore | SyncStore:
    """The store in an engine's database: on the event loop, or on a thread of its own.

    It keeps one connection of the engine's pool. Raises ConfigurationError for a database that cannot hold an outbox.
    """
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        raise ConfigurationError(
            f"the engine has one connection for all, or for a thread ({type(engine.pool).__name__}, as with SQLite in "
            f"memory), and a relay needs one of its own; use a file: sqlite:///outbox.db"
        )
    if isinstance(engine, AsyncEngine):
        return AsyncStore(engine, schema)
    return SyncStore(engine, schema)


def require_room(engine: Engine | AsyncEngine, relay: int) -> None:
    """Raise ConfigurationError when an engine's pool has no connection left beside those that a relay keeps.

    On a synchronous engine it takes its own out of the pool.
    """
    pool: Any = engine.pool
    if not isinstance(pool, QueuePool) or isinstance(engine, Engine):
        return
    size, overflow = pool.size(), pool._max_overflow
    if size > 0 and overflow >= 0 and size + overflow <= relay:
        raise ConfigurationError(
            f"the engine's pool has {size + overflow} connections at most (pool_size={size}, max_overflow={overflow}), "
            f"and the embedded relay keeps {relay}: nothing is left for the app; write pool_size={relay + 1} or more, "
            f"or relay='external'"
        )


async def check(engine: Engine | AsyncEngine, schema: str | None) -> None:
    """Look once whether an outbox is there. Raises ConfigurationError when it is not, and what the database raises."""
    sql = sql_of(engine, schema)
    if isinstance(engine, AsyncEngine):
        async with engine.connect() as connection:
            await connection.run_sync(_check, sql, schema)
        return

    def look() -> None:
        with engine.connect() as connection:
            _check(connection, sql, schema)

    thread = OneThread("dispytch outbox looks")
    try:
        await thread.run(look)
    finally:
        thread.end()


@lru_cache(maxsize=256)
def _text(sql: str) -> TextClause:
    return text(sql)


_SHORT = 4000
"""Characters of a text that is kept: on MySQL longer ones have lists of ids in them, and differ each time."""
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_][a-z_0-9]*)")


class OnSQLAlchemy:
    """Runs the outbox's SQL on a connection of SQLAlchemy."""

    __slots__ = ("connection",)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def query(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows of a SELECT."""
        return cast("Sequence[Sequence[Any]]", self._execute(sql, parameters).all())

    def run(self, sql: str, parameters: Mapping[str, Any]) -> int:
        """How many rows were touched."""
        return self._execute(sql, parameters).rowcount

    def _execute(self, sql: str, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        connection = self.connection
        if len(sql) < _SHORT or connection.dialect.name not in ("mysql", "mariadb"):
            return connection.execute(_text(sql), parameters)
        # Past SQLAlchemy's caches, in which hundreds of such texts would stay.
        return connection.exec_driver_sql(_PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%")), dict(parameters))


def _check(connection: Connection, sql: SQLStore, schema: str | None) -> None:
    """Raise ConfigurationError when the tables are missing, or the database cannot be written to."""
    inspector = inspect(connection)
    missing = [name for name in (EVENTS, LEASES) if not inspector.has_table(name, schema=schema)]
    if missing:
        where = f" in schema {schema!r}" if schema else ""
        raise ConfigurationError(
            f"the outbox's tables are missing{where} in {address_of(connection.engine)}: {' and '.join(missing)}; "
            f"write outbox_tables(metadata) beside your tables, and create them (metadata.create_all, or an Alembic "
            f"revision)"
        )
    sql.check_writable(OnSQLAlchemy(connection))


def address_of(engine: Engine | AsyncEngine) -> str:
    """A database for logs and errors, without secrets."""
    url = engine.url
    host = f"{url.host or ''}{f':{url.port}' if url.port else ''}"
    return f"{url.get_backend_name()}://{host}/{url.database or ''}"


class AsyncStore(OutboxInSQL):
    """An OutboxStore on an AsyncEngine; keeps one connection of its pool from `open` to `close`."""

    def __init__(self, engine: AsyncEngine, schema: str | None = None) -> None:
        super().__init__(sql_of(engine, schema))
        self._engine = engine
        self._schema = schema
        self._connection: AsyncConnection | None = None
        self._lock = asyncio.Lock()

    @property
    def address(self) -> str:
        """The database for logs, without secrets."""
        return address_of(self._engine)

    async def open(self) -> None:
        """As OutboxStore.open."""
        await self._run(lambda connection: _check(connection, self.sql, self._schema))

    async def close(self) -> None:
        """Give the connection back."""
        async with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()

    async def on_connection(self, function: Callable[[OnConnection], _T]) -> _T:
        """Call the function on the kept connection."""
        return await self._run(lambda connection: function(OnSQLAlchemy(connection)))

    async def listen(self, wake: Callable[[], None]) -> None:
        """As OutboxStore.listen, with asyncpg and psycopg."""
        async with self._engine.connect() as made:
            connection = await made.execution_options(isolation_level="AUTOCOMMIT")
            try:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                if hasattr(driver, "add_listener"):
                    await _listen_asyncpg(driver, wake)
                elif hasattr(driver, "notifies"):
                    await driver.execute(f"listen {CHANNEL}")
                    wake()
                    async for _ in driver.notifies():
                        wake()
                else:
                    raise no_listener(self._engine.dialect.driver)
            finally:
                await _thrown_away(connection)

    async def _run(self, function: Callable[[Connection], _T]) -> _T:
        async with self._lock:
            connection = self._connection
            if connection is None:
                connection = self._connection = await _autocommitting(self._engine)
            try:
                return await connection.run_sync(function)
            except BaseException:
                self._connection = None
                await _thrown_away(connection)
                raise


async def _autocommitting(engine: AsyncEngine) -> AsyncConnection:
    """A connection on which each statement commits by itself: no transaction is open while a broker is waited for."""
    connection = await engine.connect()
    try:
        return await connection.execution_options(isolation_level="AUTOCOMMIT")
    except BaseException:  # A cancellation, too: nobody else knows of it yet.
        await _thrown_away(connection)
        raise


async def _listen_asyncpg(driver: Any, wake: Callable[[], None]) -> None:
    ended = asyncio.Event()

    def end(connection: Any) -> None:
        ended.set()

    def notified(*notification: Any) -> None:
        wake()

    driver.add_termination_listener(end)
    await driver.add_listener(CHANNEL, notified)
    wake()
    await ended.wait()
    raise ConnectionError("the connection that listens was closed")


async def _thrown_away(connection: AsyncConnection) -> None:
    """Close a connection of which it is not known what state it is in."""
    with suppress(Exception):  # The database is gone, and so is the connection.
        await asyncio.shield(_invalidated(connection))


async def _invalidated(connection: AsyncConnection) -> None:
    await connection.invalidate()
    await connection.close()


class SyncStore(OutboxInSQL):
    """An OutboxStore on an Engine; keeps a thread, and a connection of its own, from `open` to `close`.

    The connection is made by the engine's pool, and detached from it. A pool would clean it up wherever it is
    collected: in a forked child over the very socket on which the parent's relay works.
    """

    def __init__(self, engine: Engine, schema: str | None = None) -> None:
        super().__init__(sql_of(engine, schema))
        self._engine = engine
        self._schema = schema
        # Of the thread: one that was left behind in a dead connection keeps it, the next one has its own.
        self._kept = threading.local()
        self._driver: Any = None
        """The driver's connection that the thread works on. Kept, so that a forked child does not close it."""
        self._thread = OneThread("dispytch outbox", self._drop, lambda: shut_down(self._driver))

    @property
    def address(self) -> str:
        """The database for logs, without secrets."""
        return address_of(self._engine)

    async def open(self) -> None:
        """As OutboxStore.open."""
        await self._thread.run(lambda: self._run(lambda connection: _check(connection, self.sql, self._schema)))

    async def close(self) -> None:
        """Give the connection back, and end the thread."""
        await self._thread.run(self._drop)
        self._thread.end()

    async def on_connection(self, function: Callable[[OnConnection], _T]) -> _T:
        """Call the function on the kept connection, in the thread."""
        return await self._thread.run(lambda: self._run(lambda connection: function(OnSQLAlchemy(connection))))

    async def listen(self, wake: Callable[[], None]) -> None:
        """As OutboxStore.listen, with psycopg."""
        thread, stopped = OneThread("dispytch outbox listens"), threading.Event()
        try:
            await thread.wait(lambda: self._listen(wake, stopped))
        finally:
            stopped.set()
            thread.end()

    def _listen(self, wake: Callable[[], None], stopped: threading.Event) -> None:
        connection = self._connected()
        driver: Any = connection.connection.dbapi_connection
        try:
            if not hasattr(driver, "notifies"):
                raise no_listener(self._engine.dialect.driver)
            listen_blocking(driver, wake, stopped)
        finally:
            _close(connection, driver)

    def _connected(self) -> Connection:
        connection = self._engine.connect()
        try:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()
        except BaseException:
            connection.close()
            raise
        return connection

    def _run(self, function: Callable[[Connection], _T]) -> _T:
        connection: Connection | None = getattr(self._kept, "connection", None)
        if connection is None:
            connection = self._kept.connection = self._connected()
            self._driver = self._kept.driver = connection.connection.dbapi_connection
        try:
            return function(connection)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        """Close the thread's connection, if it has one."""
        connection: Connection | None = getattr(self._kept, "connection", None)
        self._kept.connection = None
        if connection is not None:
            _close(connection, self._kept.driver)


def _close(connection: Connection, driver: Any) -> None:
    """Close a detached connection and the driver's, whatever state they are in."""
    # Not asked of the connection: one that has failed would connect anew to tell.
    with suppress(Exception):  # The database is gone, and so is the connection.
        driver.close()
    with suppress(Exception):
        connection.invalidate()
        connection.close()
