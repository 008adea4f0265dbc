"""Outboxes for tests: databases of our own on real servers, records, and brokers that fail when they are told to."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from dispytch_integrations._broker import Broker
from dispytch_integrations._sqlalchemy_store import AsyncStore, OnSQLAlchemy, SyncStore, insert_of, outbox_tables
from dispytch_integrations.backend import Backend, BrokerOptions
from dispytch_integrations.errors import ProducerTimeout
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import Record, record_of
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.outbox.store import Failure
from dispytch_integrations.producer import Producer

__all__ = [
    "Database",
    "FakeBackend",
    "FakeProducer",
    "Watched",
    "eventually",
    "message",
    "opened",
    "record",
    "relaying",
    "started",
    "temporary_database",
    "unavailable",
]

# -- databases -----------------------------------------------------------------------------------------------------

_PORTS = {"postgresql": 5432, "mysql": 3306}
_USERS = {"postgresql": "postgres", "mysql": "root"}
_SYNC_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite+pysqlite"}


class Database:
    """A database of our own with the outbox's tables. `url`: for a driver of SQLAlchemy, "postgresql+asyncpg"."""

    def __init__(self, kind: str, location: URL) -> None:
        self.kind = kind
        self._location = location
        self.engine: Engine = create_engine(self.url(_SYNC_DRIVERS[kind]), pool_pre_ping=True)
        """A synchronous engine, to look and to write with."""
        notifies = (False, True) if kind == "postgresql" else (False,)
        self._inserts = {notify: insert_of(self.engine, None, notify=notify) for notify in notifies}

    def url(self, driver: str) -> URL:
        return self._location.set(drivername=driver)

    def create_tables(self) -> None:
        metadata = MetaData()
        outbox_tables(metadata)
        metadata.create_all(self.engine)

    def insert(self, records: Sequence[Record], *, on: Connection | None = None, notify: bool = False) -> None:
        """Store records: in a transaction of its own, or in that of `on`; with `notify` relays are told."""
        if on is None:
            with self.engine.begin() as connection:
                self.insert(records, on=connection, notify=notify)
            return
        for sql, parameters in self._inserts[notify](records):
            OnSQLAlchemy(on).run(sql, parameters)

    def empty(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text("delete from dispytch_outbox_event"))
            connection.execute(text("delete from dispytch_outbox_shard"))

    def run(self, sql: str, **parameters: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(sql), parameters)

    def all(self, sql: str, **parameters: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(sql), parameters)]

    def count(self, where: str = "1 = 1") -> int:
        [(count,)] = self.all(f"select count(*) from dispytch_outbox_event where {where}")
        return int(count)


@contextmanager
def temporary_database(kind: str, directory: Path | None = None) -> Generator[Database, None, None]:
    """A database that is there as long as the block: "postgresql", "mysql" (a MariaDB), or "sqlite", a file."""
    if kind == "sqlite":
        assert directory is not None
        database = Database(kind, make_url(f"sqlite:///{directory / 'outbox.db'}"))
        database.create_tables()
        yield database
        database.engine.dispose()
        return
    server = "MARIADB" if kind == "mysql" else "POSTGRESQL"
    given = {name: os.environ.get(f"TEST_{server}_{name}", "") for name in ("HOST", "PORT", "USER", "PASSWORD")}
    host, port = given["HOST"] or "127.0.0.1", int(given["PORT"] or _PORTS[kind])
    if not _listens(host, port):
        unavailable(f"no {server} at {host}:{port}; TEST_{server}_HOST names another")
    name = f"t{secrets.token_hex(6)}"
    location = URL.create(kind, given["USER"] or _USERS[kind], given["PASSWORD"] or None, host, port, name)
    admin_url = URL.create(
        _SYNC_DRIVERS[kind],
        *(location.username, location.password, host, port),
        "postgres" if kind == "postgresql" else None,
    )
    admin = create_engine(admin_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"create database {name}" + (" character set utf8mb4" if kind == "mysql" else "")))
    try:
        database = Database(kind, location.set(database=name))
        database.create_tables()
        yield database
        database.engine.dispose()
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"drop database {name}" + (" with (force)" if kind == "postgresql" else "")))


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def unavailable(reason: str) -> NoReturn:
    """Skip; fail in CI."""
    # As for brokers: in CI a skip would be a hole that nobody sees.
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason} (CI=true: nothing is skipped)", pytrace=False)
    pytest.skip(reason)


# -- records -------------------------------------------------------------------------------------------------------


def message(
    number: int = 0,
    key: str | None = None,
    *,
    broker: str = "default",
    destination: str = "orders",
    id: str | None = None,
    payload: bytes | None = b"",
    headers: Mapping[str, Any] | None = None,
    properties: Mapping[str, Any] | None = None,
) -> Message:
    """A message whose payload is its number."""
    return Message(
        id or secrets.token_hex(16),
        "shop.order.placed",
        broker,
        destination,
        key,
        dict(headers or {}),
        dict(properties or {}),
        str(number).encode() if payload == b"" else payload,
        "application/json",
    )


def record(number: int = 0, key: str | None = None, **given: Any) -> Record:
    """The same, as it is stored."""
    return record_of(message(number, key, **given))


# -- brokers -------------------------------------------------------------------------------------------------------


class FakeProducer(Producer):
    """Takes messages, unless it is told otherwise."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        """Confirmed, in order."""
        self.tried: list[tuple[Message, float]] = []
        """Each attempt, and when it was, on the monotonic clock."""
        self.answer: Callable[[Message], Exception | None] = lambda message: None
        """What a message is answered with."""
        self.delay: Callable[[Message], float] = lambda message: 0.0
        """Seconds until it is answered: a delivery takes as long as its slowest message."""
        self.silent = False
        """Does it take messages and confirm none?"""
        self.gate = asyncio.Event()
        """Cleared: nothing is answered until it is set."""
        self.gate.set()

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        raise NotImplementedError

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        started = time.monotonic()
        self.tried += [(each, started) for each in messages]
        delay = max(self.delay(each) for each in messages)
        if self.silent:
            await asyncio.sleep(timeout or 0)
            return [ProducerTimeout("not confirmed") for _ in messages]
        if delay:
            await asyncio.sleep(delay)
        await self.gate.wait()
        outcomes = [self.answer(each) for each in messages]
        self.sent += [each for each, error in zip(messages, outcomes, strict=True) if error is None]
        return outcomes

    def numbers(self, key: str | None = None) -> list[int]:
        """What was confirmed, in order: of one key, or of all."""
        return [int(each.payload or b"-1") for each in self.sent if key is None or each.ordering_key == key]

    def attempts(self, number: int) -> list[float]:
        """When a message was tried."""
        return [when for each, when in self.tried if each.payload == str(number).encode()]


class FakeBackend(Backend):
    """A broker that can be down: `up = False`, and its pings and starts fail."""

    transport: ClassVar[str] = "memory"

    def __init__(self) -> None:
        self.fake = FakeProducer()
        self.producer = self.fake
        self.up = True
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        await self.ping()

    async def stop(self) -> None:
        pass

    async def ping(self) -> None:
        if not self.up:
            raise ConnectionError("the fake broker is down")

    @property
    def address(self) -> str:
        return "fake://broker"


@asynccontextmanager
async def started(*, timeout: float = 0.3, **backends: FakeBackend) -> AsyncGenerator[dict[str, Broker]]:
    """Brokers by alias, connected."""
    options = BrokerOptions(timeout=timeout, shutdown_timeout=0.2)
    brokers = {alias: Broker(alias, backend, options) for alias, backend in backends.items()}
    for broker in brokers.values():
        await broker.begin(5.0)
    try:
        yield brokers
    finally:
        for broker in brokers.values():
            await broker.stop()


# -- stores that fail ----------------------------------------------------------------------------------------------


class Watched:
    """A store whose calls are counted, and fail or are slow when they are told to, by the method's name."""

    def __init__(self, store: AsyncStore | SyncStore) -> None:
        self._store = store
        self.calls = Counter[str]()
        self.fail = Counter[str]()
        """How often a method still fails, without having done anything."""
        self.lose = Counter[str]()
        """How often a method still fails after it has done its work: the answer is lost."""
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        """Awaited before the method is called."""
        self.after: dict[str, Callable[[], Awaitable[object]]] = {}
        """Awaited before its result is returned."""
        self.failures: list[Failure] = []
        """What was settled as failed."""

    @property
    def address(self) -> str:
        return self._store.address

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, name)

        async def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name in self.before:
                await self.before[name]()
            if self.fail[name] > 0:
                self.fail[name] -= 1
                raise OSError("the database is away")
            if name == "settle":
                self.failures += arguments[1]
            result = await method(*arguments)
            if name in self.after:
                await self.after[name]()
            if self.lose[name] > 0:
                self.lose[name] -= 1
                raise OSError("the database is away")
            return result

        return call


# -- relays --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(store: AsyncStore | SyncStore) -> AsyncGenerator[AsyncStore | SyncStore]:
    """A store that is open."""
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def relaying(
    store: Any, brokers: Mapping[str, Broker], *, name: str | None = None, **options: Any
) -> AsyncGenerator[Relay]:
    """A relay that runs; ended well at the end of the block."""
    given: dict[str, Any] = {"lease": 2.0, "backoff": 0.05, **options}
    relay = Relay(store, brokers, RelayOptions(**given), name=name)
    running = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        relay.stop()
        await asyncio.wait_for(running, 10)


async def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until something has become true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not become true within {seconds:g} s")
        await asyncio.sleep(0.005)
