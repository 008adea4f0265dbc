"""The outbox: from PostgreSQL to a Kafka-compatible broker, beside a bare loop and other packages.

Environment: KAFKA_URL and TEST_POSTGRESQL_HOST, _PORT, _USER, _PASSWORD name servers of your own; OUTBOX_PARTS some of
the parts, separated by commas; OUTBOX_EVENTS the backlog (200,000; quick: 20,000); RELIABLE_OUTBOX_PYTHON a Python
(3.12 or newer) that has django-reliable-outbox, psycopg and confluent-kafka, where this one is older.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager

from benchmarks import outbox_backlog, outbox_peers, outbox_processes, outbox_writing
from benchmarks.harness import Row
from benchmarks.outbox_rows import KEYS, Stored, store_source
from tests.support.brokers import Tansu
from tests.support.outboxes import Database, temporary_database

__all__ = ["run"]


async def run() -> AsyncGenerator[Row, None]:
    """All rows, in a database of our own; each part has brokers of its own, which keep what they are sent in memory."""
    parts: Mapping[str, Callable[[Database], AsyncIterator[Row]]] = {
        "backlog": _backlog,
        "relays": _relays,
        "memory": _memory,
        "latency": _latency,
        "cost": _cost,
        "others": _others,
    }
    names = os.environ.get("OUTBOX_PARTS", ",".join(parts)).split(",")
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database("postgresql"))
        outbox_writing.configure_django(database, "memory://kafka")
        outbox_writing.create_shop(database)
        for table, keys in (("source_keys", KEYS), ("source_one", 1)):
            await store_source(database, table, "memory://kafka", _event(keys))
        for name in names:
            async for row in parts[name](database):
                yield row


def _event(keys: int) -> Callable[[int], Stored]:
    return lambda number: Stored(customer=number % keys)


@contextmanager
def _kafka() -> Generator[str, None, None]:
    if url := os.environ.get("KAFKA_URL"):
        yield url
        return
    with Tansu() as broker:
        yield broker.url


async def _backlog(database: Database) -> AsyncIterator[Row]:
    for table, keys in (("source_keys", f"{KEYS:,} keys"), ("source_one", "one key")):
        async for row in outbox_backlog.backlog(_kafka, database, table, keys):
            yield row


async def _relays(database: Database) -> AsyncIterator[Row]:
    with _kafka() as url:
        async for row in outbox_processes.several(url, database):
            yield row


async def _memory(database: Database) -> AsyncIterator[Row]:
    with _kafka() as url:
        async for row in outbox_processes.memory(url, database):
            yield row


async def _latency(database: Database) -> AsyncIterator[Row]:
    with _kafka() as url:
        async for row in outbox_writing.latency(url, database):
            yield row
        async for row in outbox_processes.latency_of_another(url, database):
            yield row


async def _cost(database: Database) -> AsyncIterator[Row]:
    with _kafka() as url:
        async for row in outbox_writing.cost(url, database):
            yield row


async def _others(database: Database) -> AsyncIterator[Row]:
    with _kafka() as kafka, outbox_peers.rabbitmq_with_stomp() as (rabbitmq, stomp):
        async for row in outbox_backlog.to_others(rabbitmq, database):
            yield row
        async for row in outbox_peers.peers(kafka, stomp, database, "source_keys"):
            yield row
