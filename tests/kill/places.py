"""Databases and brokers for the kill tests: each of its own, reached through a proxy that breaks connections."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Engine, create_engine, text

from tests.kill.programs import accounts, engine_of, metadata
from tests.support.arrivals import Arrivals, KafkaArrivals, RabbitMQArrivals, RedisArrivals
from tests.support.brokers import AMQP_GREETING, RabbitMQ, Redis, Tansu, answers
from tests.support.proxy import TCPProxy

__all__ = ["DATABASES", "Database", "MariaDB", "Place", "PostgreSQL", "ProxiedKafka", "SQLite"]


def _setting(server: str, name: str, default: str) -> str:
    return os.environ.get(f"TEST_{server}_{name}", default)


class Database(ABC):
    """A database with the tables of the test, empty. `proxy`: what the processes go through; None: it is a file."""

    proxy: TCPProxy | None = None

    def __init__(self) -> None:
        self.name = f"dispytch_kill_{secrets.token_hex(4)}"
        self.engine: Engine

    @abstractmethod
    async def open(self) -> None:
        """Create it; raises the driver's error when there is no server."""

    @abstractmethod
    async def close(self) -> None:
        """Drop it."""

    @property
    @abstractmethod
    def writers(self) -> str:
        """The URL for writers."""

    @property
    @abstractmethod
    def relays(self) -> list[str]:
        """URLs for relays: with a driver for asyncio, and without."""

    def make_tables(self, keys: int) -> None:
        """Tables, and one account for each key."""
        metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            connection.execute(accounts.insert(), [{"name": f"key{number}", "number": 0} for number in range(keys)])


class _Server(Database):
    def __init__(self, server: str, user: str, port: int) -> None:
        super().__init__()
        host = _setting(server, "HOST", "127.0.0.1")
        password = _setting(server, "PASSWORD", "")
        self._user = _setting(server, "USER", user) + (f":{password}" if password else "")
        self._port = int(_setting(server, "PORT", str(port)))
        self._host = host
        self.proxy = TCPProxy(host, self._port)

    def _url(self, scheme: str, name: str, *, proxied: bool) -> str:
        host, port = ("127.0.0.1", self.proxy.port) if proxied and self.proxy else (self._host, self._port)
        return f"{scheme}://{self._user}@{host}:{port}/{name}"

    def _run(self, scheme: str, name: str, sql: str) -> None:
        engine = create_engine(self._url(scheme, name, proxied=False), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(sql))
        engine.dispose()


class PostgreSQL(_Server):
    def __init__(self) -> None:
        super().__init__("POSTGRESQL", "postgres", 5432)

    async def open(self) -> None:
        await asyncio.to_thread(self._run, "postgresql+psycopg", "postgres", f"create database {self.name}")
        self.engine = create_engine(self._url("postgresql+psycopg", self.name, proxied=False))

    async def close(self) -> None:
        self.engine.dispose()
        await asyncio.to_thread(self._run, "postgresql+psycopg", "postgres", f"drop database {self.name} with (force)")

    @property
    def writers(self) -> str:
        return self._url("postgresql+psycopg", self.name, proxied=True)

    @property
    def relays(self) -> list[str]:
        return [self._url(f"postgresql+{driver}", self.name, proxied=True) for driver in ("asyncpg", "psycopg")]


class MariaDB(_Server):
    def __init__(self) -> None:
        super().__init__("MARIADB", "root", 3306)

    async def open(self) -> None:
        await asyncio.to_thread(self._run, "mysql+pymysql", "", f"create database {self.name}")
        self.engine = create_engine(self._url("mysql+pymysql", self.name, proxied=False))

    async def close(self) -> None:
        self.engine.dispose()
        await asyncio.to_thread(self._run, "mysql+pymysql", "", f"drop database {self.name}")

    @property
    def writers(self) -> str:
        return self._url("mysql+pymysql", self.name, proxied=True)

    @property
    def relays(self) -> list[str]:
        return [self._url(f"mysql+{driver}", self.name, proxied=True) for driver in ("asyncmy", "pymysql")]


class SQLite(Database):
    async def open(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dispytch-kill-")
        self._file = Path(self._directory.name) / "kill.db"
        self.engine = engine_of(f"sqlite:///{self._file}")

    async def close(self) -> None:
        self.engine.dispose()
        self._directory.cleanup()

    @property
    def writers(self) -> str:
        return f"sqlite:///{self._file}"

    @property
    def relays(self) -> list[str]:
        return [f"sqlite+aiosqlite:///{self._file}", f"sqlite:///{self._file}"]


DATABASES: dict[str, Callable[[], Database]] = {"postgresql": PostgreSQL, "mariadb": MariaDB, "sqlite": SQLite}


class ProxiedKafka(Tansu):
    """A broker that tells its clients to come through a proxy, or, at another port, directly."""

    advertised_port = 0

    def command(self) -> list[str]:
        command = super().command()
        command[-1] = f"tcp://127.0.0.1:{self.advertised_port}"
        return command


class Place:
    """A broker with a topic, stream or queue. `url`: through the proxy; `arrivals`: what has come, read directly."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"kill{secrets.token_hex(5)}"
        self.proxy: TCPProxy
        self.arrivals: Arrivals
        self.broker: Any = None
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Start the broker, unless the machine's own RabbitMQ is used."""
        await getattr(self, f"_open_{self.kind}")()

    async def close(self) -> None:
        """Stop it."""
        await asyncio.to_thread(self.arrivals.close)
        await self._stack.aclose()

    async def _through_proxy(self, port: int) -> None:
        self.proxy = await self._stack.enter_async_context(TCPProxy("127.0.0.1", port))

    async def _open_kafka(self) -> None:
        self.broker = broker = ProxiedKafka()
        self._stack.callback(broker.close)
        await self._through_proxy(broker.port)
        broker.advertised_port = self.proxy.port
        await asyncio.to_thread(broker.start)
        self.url = f"kafka://127.0.0.1:{self.proxy.port}"
        self.arrivals = await asyncio.to_thread(KafkaArrivals, self.url, self.name)

    async def _open_redis(self) -> None:
        self.broker = broker = Redis()
        self._stack.callback(broker.close)
        await asyncio.to_thread(broker.start)
        await self._through_proxy(broker.port)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"
        self.arrivals = await asyncio.to_thread(RedisArrivals, broker.url, self.name)

    async def _open_rabbitmq(self) -> None:
        url = os.environ.get("RABBITMQ_URL")
        if url is None and answers(5672, AMQP_GREETING):
            url = "amqp://guest:guest@127.0.0.1:5672/"
        if url is None:
            self.broker = RabbitMQ()
            self._stack.callback(self.broker.close)
            await asyncio.to_thread(self.broker.start)
            url = self.broker.url
        parts = urlsplit(url)
        await self._through_proxy(parts.port or 5672)
        self.url = f"amqp://{parts.username or 'guest'}:{parts.password or 'guest'}@127.0.0.1:{self.proxy.port}/"
        self.arrivals = await asyncio.to_thread(RabbitMQArrivals, url, self.name)
