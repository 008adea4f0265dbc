"""A backlog, relayed by one process: beside a bare loop that one would write by hand, and to other brokers."""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
import statistics
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import aio_pika
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.harness import Row, is_quick, ratio
from benchmarks.outbox_rows import BACKLOG, KEYS, TOPIC, connected, fill, store_source
from benchmarks.outbox_writing import django_store
from dispytch_integrations import EventBase, connect
from dispytch_integrations._broker import Broker
from dispytch_integrations.outbox import Relay
from dispytch_integrations.outbox._sql import EVENTS
from dispytch_integrations.outbox.store import OutboxStore
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox
from tests.support.brokers import Redis
from tests.support.outboxes import Database

__all__ = ["backlog", "to_others"]

ROUNDS = 2 if is_quick() else 5
OTHERS = 4000 if is_quick() else 40_000
"""Rows for the other brokers, which are slower."""
_BATCH = 2000
_REACH = {"SQLAlchemy async": ">= 20", "SQLAlchemy sync": ">= 15", "Django": ">= 15"}


async def backlog(
    kafka: Callable[[], AbstractContextManager[str]], database: Database, table: str, keys: str
) -> AsyncIterator[Row]:
    """The bare loop, then the relay on each kind of store; `kafka`: a broker for a round, since it forgets nothing."""
    async_engine = create_async_engine(database.url("postgresql+asyncpg"))
    sync_engine = create_engine(database.url("postgresql+psycopg"))
    stores: Mapping[str, Callable[[], OutboxStore]] = {
        "SQLAlchemy async": lambda: SQLAlchemyOutbox(async_engine).store(),
        "SQLAlchemy sync": lambda: SQLAlchemyOutbox(sync_engine).store(),
        "Django": django_store,
    }
    times: dict[str, list[float]] = {name: [] for name in ("bare", *stores)}
    for _ in range(ROUNDS):
        with kafka() as url:
            brokers = connect(url)
            async with brokers:
                contestants = {"bare": _bare(url, database)}
                contestants |= {name: _relayed(store, brokers.brokers) for name, store in stores.items()}
                for name, contestant in contestants.items():
                    times[name].append(await _timed(contestant, database, table))
    await async_engine.dispose()
    sync_engine.dispose()
    what = f"outbox, backlog of {BACKLOG:,}, {keys}"
    yield Row(what=f"{what}: a bare loop (asyncpg, send_batch)", measured=_rate(times["bare"]), unit="k/s")
    for name in stores:
        yield Row(
            what=f"{what}: {name}",
            measured=_rate(times[name]),
            unit="k/s",
            reach=_REACH[name] if table == "source_keys" else "",
            note=f"{ratio(times, name, 'bare'):.2f} x the bare loop; median {_median(times[name]):.0f} k/s",
        )


def _rate(times: list[float], count: int = BACKLOG) -> float:
    """Thousands per second in the best round, which other processes disturbed least."""
    return count / min(times) / 1000


def _median(times: list[float]) -> float:
    return BACKLOG / statistics.median(times) / 1000


async def _timed(contestant: Callable[[], Awaitable[None]], database: Database, table: str) -> float:
    await fill(database, table)
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    await contestant()
    seconds = time.perf_counter() - started
    gc.unfreeze()
    return seconds


def _relayed(
    store: Callable[[], OutboxStore], brokers: Mapping[str, Broker], count: int = BACKLOG
) -> Callable[[], Awaitable[None]]:
    async def relay() -> None:
        relay = Relay(store(), brokers)
        await relay.drain()
        assert relay.counts.sent == count, relay.counts

    return relay


def _bare(url: str, database: Database) -> Callable[[], Awaitable[None]]:
    """What one would write in an hour: no leases, no failures, no second process; order per key in good times."""

    async def relay() -> None:
        connection = await connected(database)
        client: Any = AIOKafkaProducer(
            bootstrap_servers=url.removeprefix("kafka://"), acks="all", max_batch_size=262_144
        )
        await client.start()
        partitions = sorted(await client.partitions_for(TOPIC))
        while rows := await connection.fetch(
            f"select id, ordering_key, headers, payload from {EVENTS} where state = 0 order by id limit {_BATCH}"
        ):
            batches: dict[int, Any] = {}
            futures: list[Any] = []
            for _, key, headers, payload in rows:
                pairs = [(name, value.encode()) for name, value in json.loads(headers).items()]
                partition = partitions[zlib.crc32(key.encode()) % len(partitions)]
                while True:
                    batch = batches.get(partition)
                    if batch is None:
                        batch = batches[partition] = client.create_batch()
                    if batch.append(key=key.encode(), value=payload, headers=pairs, timestamp=None) is not None:
                        break
                    futures.append(await client.send_batch(batches.pop(partition), TOPIC, partition=partition))
            futures += [await client.send_batch(batch, TOPIC, partition=number) for number, batch in batches.items()]
            await asyncio.gather(*futures)
            await connection.execute(f"delete from {EVENTS} where id = any($1::bigint[])", [row[0] for row in rows])
        await client.stop()
        await connection.close()

    return relay


# -- other brokers -------------------------------------------------------------------------------------------------


async def to_others(rabbitmq: str, database: Database) -> AsyncIterator[Row]:
    """The relay to RabbitMQ and to Redis streams; stated, since their clients set the pace."""
    name = f"bench-outbox-{secrets.token_hex(4)}"

    class ToQueue(EventBase):
        __route__ = RabbitMQEventRoute(exchange="", routing_key=name)
        __ordering_key__ = "customer-{customer}"
        customer: int
        note: str = "x" * 70

    class ToStream(EventBase):
        __route__ = RedisStreamEventRoute(stream="bench-outbox", maxlen=1000)
        __ordering_key__ = "customer-{customer}"
        customer: int
        note: str = "x" * 70

    class ToStreamOneKey(ToStream):
        __ordering_key__ = "one"

    class ToQueueOneKey(ToQueue):
        __ordering_key__ = "one"

    connection = await aio_pika.connect(rabbitmq)
    channel = await connection.channel()
    # Ten messages long: what is measured is not a queue that grows.
    queue = await channel.declare_queue(name, durable=True, arguments={"x-max-length": 10})
    few = OTHERS // 20
    with Redis() as redis:
        yield await _to_other(redis.url, database, f"to Redis streams, {KEYS:,} keys", ToStream, OTHERS)
        yield await _to_other(redis.url, database, "to Redis streams, one key", ToStreamOneKey, few)
    yield await _to_other(rabbitmq, database, f"to RabbitMQ, {KEYS:,} keys", ToQueue, OTHERS // 2)
    yield await _to_other(rabbitmq, database, "to RabbitMQ, one key", ToQueueOneKey, few)
    await queue.delete(if_unused=False, if_empty=False)
    await connection.close()


async def _to_other(url: str, database: Database, what: str, event: type[Any], count: int) -> Row:
    table = f"source_{event.__name__.lower()}"
    transport = event.__route__.transport
    await store_source(database, table, f"memory://{transport}", lambda number: event(customer=number % KEYS), count)
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    brokers = connect(url)
    async with brokers:
        relay = _relayed(lambda: SQLAlchemyOutbox(engine).store(), brokers.brokers, count)
        times = [await _timed(relay, database, table) for _ in range(ROUNDS)]
    await engine.dispose()
    return Row(what=f"outbox, backlog of {count:,}, {what}", measured=_rate(times, count), unit="k/s")
