"""What the processes of the kill tests run: a writer that trades rows for events, and a relay."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from sqlalchemy import BigInteger, Column, Connection, Engine, Integer, MetaData, String, Table, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from dispytch_integrations import EventBase, connect
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_store import outbox_tables, store_of
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute

__all__ = ["Job", "accounts", "engine_of", "facts", "metadata", "relay", "write"]

metadata = MetaData()
accounts = Table(
    "kill_account",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("number", Integer, nullable=False),
)
"""One row for each ordering key: whoever has locked it writes the key's next number."""
facts = Table(
    "kill_fact",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("name", String(40), nullable=True),
    Column("number", Integer, nullable=False),
    Column("token", String(40), nullable=False),
)
"""What has happened: written in the transaction of its event, and so the truth about what must arrive."""
outbox_tables(metadata)

_THREADS = 3
_PAUSE = 0.012
"""Seconds between two transactions of a thread, on average: the test is about faults, not about rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is told. `place`: the topic, stream or queue."""

    database: str
    broker: str
    place: str
    keys: int = 20
    lease: float = 1.6
    timeout: float = 0.7


class KafkaFact(EventBase):
    __route__ = KafkaEventRoute(topic="{place}")
    __ordering_key__ = "{name}"
    place: str = Field(exclude=True)
    name: str
    number: int
    token: str


class KafkaLoose(EventBase):
    __route__ = KafkaEventRoute(topic="{place}")
    place: str = Field(exclude=True)
    token: str


class RabbitMQFact(EventBase):
    __route__ = RabbitMQEventRoute(exchange="amq.topic", routing_key="{place}")
    __ordering_key__ = "{name}"
    place: str = Field(exclude=True)
    name: str
    number: int
    token: str


class RabbitMQLoose(EventBase):
    __route__ = RabbitMQEventRoute(exchange="amq.topic", routing_key="{place}")
    place: str = Field(exclude=True)
    token: str


class RedisFact(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __ordering_key__ = "{name}"
    place: str = Field(exclude=True)
    name: str
    number: int
    token: str


class RedisLoose(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    place: str = Field(exclude=True)
    token: str


_EVENTS: dict[str, tuple[type[Any], type[Any]]] = {
    "kafka": (KafkaFact, KafkaLoose),
    "amqp": (RabbitMQFact, RabbitMQLoose),
    "redis": (RedisFact, RedisLoose),
}


def engine_of(url: str) -> Engine:
    """A synchronous engine; transactions of SQLite lock at their begin, as those that write should."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_size=10)
    engine = create_engine(url, connect_args={"timeout": 10, "check_same_thread": False}, poolclass=QueuePool)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: object) -> None:
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=normal")

    return engine


# -- the writer ----------------------------------------------------------------------------------------------------


def write(job: Job) -> None:
    """Write facts and their events until killed; a lost connection is a transaction that may not have happened."""
    logging.disable(logging.CRITICAL)
    engine = engine_of(job.database)
    outbox = SQLAlchemyOutbox(engine, relay="external")
    brokers = connect(job.broker, outbox=outbox)
    brokers.load()
    for _ in range(_THREADS - 1):
        threading.Thread(target=_write, args=(job, engine, outbox, brokers.emitter), daemon=True).start()
    _write(job, engine, outbox, brokers.emitter)


def _write(job: Job, engine: Engine, outbox: SQLAlchemyOutbox, emitter: EventEmitter) -> None:
    chance = random.Random()
    while True:
        time.sleep(chance.uniform(0.5, 1.5) * _PAUSE)
        try:
            with engine.connect() as connection:
                _transaction(job, connection, outbox, emitter, chance)
        except DBAPIError:
            time.sleep(0.05)


def _transaction(
    job: Job, connection: Connection, outbox: SQLAlchemyOutbox, emitter: EventEmitter, chance: random.Random
) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("begin immediate")
    keyed, loose = _EVENTS[job.broker.partition(":")[0]]
    if chance.random() < 0.2:
        token = secrets.token_hex(8)
        connection.execute(facts.insert().values(name=None, number=0, token=token))
        events = [loose(place=job.place, token=token)]
    else:
        name = f"key{chance.randrange(job.keys)}"
        count = chance.randint(1, 4)
        connection.execute(accounts.update().values(number=accounts.c.number + count).where(accounts.c.name == name))
        [last] = connection.execute(accounts.select().with_only_columns(accounts.c.number).filter_by(name=name)).one()
        made = [
            {"name": name, "number": number, "token": secrets.token_hex(8)}
            for number in range(last - count + 1, last + 1)
        ]
        connection.execute(facts.insert(), made)
        events = [keyed(place=job.place, **fact) for fact in made]
    outbox.insert(connection, [outbox.record_of(emitter.prepare(each)[1]) for each in events])
    if chance.random() < 0.1:
        time.sleep(chance.random() * 0.1)  # Others commit meanwhile: later ids are visible before these.
    if chance.random() < 0.2:
        connection.rollback()
    else:
        connection.commit()


# -- the relay -----------------------------------------------------------------------------------------------------


def relay(job: Job) -> None:
    """Relay until killed, or until SIGTERM, which is a graceful stop."""
    logging.disable(logging.CRITICAL)
    asyncio.run(_relay(job))


async def _relay(job: Job) -> None:
    engine: Engine | AsyncEngine
    is_async = any(driver in job.database for driver in ("asyncpg", "aiosqlite", "asyncmy", "aiomysql"))
    engine = create_async_engine(job.database) if is_async else engine_of(job.database)
    brokers = connect(job.broker, timeout=job.timeout, required=False, shutdown_timeout=1.0)
    await brokers.start()
    options = RelayOptions(lease=job.lease, poll_interval=0.1, backoff=0.1, max_backoff=1.0)
    running = Relay(store_of(engine), brokers.brokers, options)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.stop)
    await running.run()
    await brokers.stop()
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()
