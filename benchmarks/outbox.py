"""The outbox: from PostgreSQL to a Kafka-compatible broker, beside a bare loop and other packages.

Environment: KAFKA_URL and TEST_POSTGRESQL_HOST, _PORT, _USER, _PASSWORD name servers of your own; OUTBOX_EVENTS the
backlog (200,000); OUTBOX_MILLION=1 adds the memory over a backlog of one million, which takes a minute;
RELIABLE_OUTBOX_PYTHON an interpreter (3.12 or newer) that has django-reliable-outbox, psycopg and confluent-kafka.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Any

import asyncpg
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import outbox_peers, outbox_writing
from benchmarks.harness import Row, ratio
from dispytch_integrations import EventBase, connect
from dispytch_integrations._broker import Broker
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.outbox import Relay
from dispytch_integrations.outbox._sql import EVENTS, INSERTED
from dispytch_integrations.outbox.record import record_of
from dispytch_integrations.outbox.store import OutboxStore
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox
from tests.support.brokers import Tansu
from tests.support.outboxes import Database, temporary_database

__all__ = ["run"]

TOPIC = "bench-outbox"
BACKLOG = int(os.environ.get("OUTBOX_EVENTS", "200000"))
KEYS = 1000
ROUNDS = 3
_BATCH = 2000
_COLUMNS = ", ".join(INSERTED)
_EMPTY = "state, state_ms, attempts, next_try_ms"


class Stored(EventBase):
    """An event of 100 bytes."""

    __route__ = KafkaEventRoute(topic=TOPIC)
    __ordering_key__ = "customer-{customer}"
    customer: int
    note: str


async def run() -> list[Row]:
    """All rows; starts a Kafka-compatible broker unless KAFKA_URL names one."""
    rows: list[Row] = []
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database("postgresql"))
        url = os.environ.get("KAFKA_URL") or stack.enter_context(_tansu()).url
        outbox_writing.configure_django(database, url)
        await _store_source(url, database, "source_keys", KEYS)
        await _store_source(url, database, "source_one", 1)
        rows += await _backlog(url, database, "source_keys", f"{KEYS:,} keys")
        rows += await _backlog(url, database, "source_one", "one key")
        rows += await _processes(url, database)
        if os.environ.get("OUTBOX_MILLION"):
            rows += await _memory(url, database)
        rows += await outbox_writing.latency(url, database)
        rows += await outbox_writing.cost(url, database)
        rows += await outbox_peers.rows(url, database, "source_keys")
    return rows


def _tansu() -> Any:
    return Tansu()


# -- the backlog ---------------------------------------------------------------------------------------------------


async def _store_source(url: str, database: Database, table: str, keys: int) -> None:
    """The rows that each contestant finds: made as an emit makes them, kept in the database and not in this process."""
    connection = await _connected(database)
    await connection.execute(f"create table {table} as select {_COLUMNS} from {EVENTS} limit 0")
    async with connect(url, source="/benchmarks") as emitter:
        for start in range(0, BACKLOG, 10_000):
            records = [
                record_of(emitter.prepare(Stored(customer=number % keys, note="x" * 70))[1])
                for number in range(start, min(start + 10_000, BACKLOG))
            ]
            rows = [tuple(getattr(record, column) for column in INSERTED) for record in records]
            await connection.copy_records_to_table(table, records=rows, columns=INSERTED)
    await connection.close()


async def _connected(database: Database) -> Any:
    return await asyncpg.connect(database.url("postgresql").render_as_string(hide_password=False))


async def _fill(database: Database, table: str, times: int = 1) -> None:
    connection = await _connected(database)
    await connection.execute(f"truncate {EVENTS}")
    for number in range(times):
        read = _COLUMNS.replace("event_id", f"event_id || '-{number}'")
        await connection.execute(f"insert into {EVENTS} ({_COLUMNS}, {_EMPTY}) select {read}, 0, 0, 0, 0 from {table}")
    await connection.execute(f"analyze {EVENTS}")
    # The checkpoint of what was written now is nobody's merit and nobody's fault.
    await connection.execute("checkpoint")
    await connection.close()


async def _backlog(url: str, database: Database, table: str, keys: str) -> list[Row]:
    brokers = connect(url)
    async_engine = create_async_engine(database.url("postgresql+asyncpg"))
    sync_engine = create_engine(database.url("postgresql+psycopg"))
    async with brokers:
        contestants: dict[str, Callable[[], Awaitable[None]]] = {
            "bare": lambda: _bare(url, database),
            "SQLAlchemy async": _relayed(lambda: SQLAlchemyOutbox(async_engine).store(), brokers.brokers),
            "SQLAlchemy sync": _relayed(lambda: SQLAlchemyOutbox(sync_engine).store(), brokers.brokers),
            "Django": _relayed(outbox_writing.django_store, brokers.brokers),
        }
        times = await _in_turn(contestants, database, table)
    await async_engine.dispose()
    sync_engine.dispose()
    rows = [
        Row(
            what=f"outbox, backlog of {BACKLOG:,}, {keys}: a bare loop (asyncpg, send_batch)",
            measured=_rate(times["bare"]) / 1000,
            unit="k/s",
        )
    ]
    for name in list(contestants)[1:]:
        reach = ">= 20" if name == "SQLAlchemy async" else ">= 15"
        rows.append(
            Row(
                what=f"outbox, backlog of {BACKLOG:,}, {keys}: {name}",
                measured=_rate(times[name]) / 1000,
                unit="k/s",
                reach=reach if table == "source_keys" else "",
                note=f"{ratio(times, name, 'bare'):.2f} x the bare loop",
            )
        )
    return rows


def _rate(times: list[float]) -> float:
    return BACKLOG / statistics.median(times)


def _relayed(store: Callable[[], OutboxStore], brokers: Mapping[str, Broker]) -> Callable[[], Awaitable[None]]:
    async def relay() -> None:
        relay = Relay(store(), brokers)
        await relay.drain()
        assert relay.counts.sent == BACKLOG

    return relay


async def _in_turn(
    contestants: Mapping[str, Callable[[], Awaitable[None]]], database: Database, table: str
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS + 1):
        for name, contestant in contestants.items():
            await _fill(database, table)
            gc.collect()
            gc.freeze()
            started = time.perf_counter()
            await contestant()
            if number:  # The first is to warm up.
                times[name].append(time.perf_counter() - started)
            gc.unfreeze()
    return times


async def _bare(url: str, database: Database) -> None:
    """What one would write in an hour: no leases, no failures, no second process; order per key in good times."""
    connection = await _connected(database)
    client: Any = AIOKafkaProducer(bootstrap_servers=url.removeprefix("kafka://"), acks="all", max_batch_size=262_144)
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


# -- relays as processes -------------------------------------------------------------------------------------------


async def _processes(url: str, database: Database) -> list[Row]:
    """One relay, then four, each a process that waits with its share of the shards when the backlog is committed."""
    await _fill(database, "source_keys", times=0)
    seconds: dict[int, list[float]] = {1: [], 4: []}
    statements: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(ROUNDS):
        for count in (1, 4):
            taken, used = await _with_processes(url, database, count)
            seconds[count].append(taken)
            statements[count].append(used)
    one, four = (statistics.median(statements[count]) / BACKLOG * 1000 for count in (1, 4))
    what = f"outbox, backlog of {BACKLOG:,}"
    return [
        Row(what=f"{what}: one relay process, from the commit", measured=_rate(seconds[1]) / 1000, unit="k/s"),
        Row(
            what=f"{what}: four relay processes against one",
            measured=statistics.median(a / b for a, b in zip(seconds[1], seconds[4], strict=True)),
            unit="x",
            reach=">= 1.0",
            note=f"{_rate(seconds[4]) / 1000:.0f} k/s; {os.cpu_count()} cores for relays, database and broker",
        ),
        Row(
            what=f"{what}: statements per 1,000 events, four relays",
            measured=four,
            unit="",
            note=f"one: {one:.2f}",
        ),
    ]


async def _with_processes(url: str, database: Database, count: int) -> tuple[float, float]:
    """Seconds from the commit of the backlog until the table is empty, and how many statements that took."""
    relays = [await _relay_process(url, database) for _ in range(count)]
    connection = await _connected(database)
    try:
        async with asyncio.timeout(60):
            while len(await connection.fetch(_SHARES)) != count or await connection.fetchval(_LARGEST) != 64 // count:
                await asyncio.sleep(0.1)
        before = [await _asked(relay) for relay in relays]
        await connection.execute(
            f"insert into {EVENTS} ({_COLUMNS}, {_EMPTY}) select {_COLUMNS}, 0, 0, 0, 0 from source_keys"
        )
        started = time.perf_counter()
        while await connection.fetchval(f"select exists (select from {EVENTS})"):
            await asyncio.sleep(0.05)
        seconds = time.perf_counter() - started
        after = [await _asked(relay) for relay in relays]
        assert sum(each["sent"] for each in after) == BACKLOG
        return seconds, sum(a["statements"] - b["statements"] for a, b in zip(after, before, strict=True))
    finally:
        await connection.close()
        for relay in relays:
            relay.stdin.close()
            await relay.wait()


_SHARES = "select owner from dispytch_outbox_shard where owner is not null group by owner"
_LARGEST = "select max(count) from (select count(*) from dispytch_outbox_shard group by owner) as shares"


async def _relay_process(url: str, database: Database) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.outbox_relay", url),
        database.url("postgresql+asyncpg").render_as_string(hide_password=False),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    await _asked(process)
    return process


async def _asked(relay: Any) -> dict[str, int]:
    """What a relay has done so far, and its memory."""
    relay.stdin.write(b"\n")
    answer: dict[str, int] = json.loads(await relay.stdout.readline())
    return answer


async def _memory(url: str, database: Database) -> list[Row]:
    times = -(-1_000_000 // BACKLOG)
    await _fill(database, "source_keys", times=0)
    relay = await _relay_process(url, database)
    connection = await _connected(database)
    await asyncio.sleep(1)
    before = await _asked(relay)
    await _fill(database, "source_keys", times=times)
    highest: list[int] = []
    started = time.perf_counter()
    while await connection.fetchval(f"select exists (select from {EVENTS})"):
        await asyncio.sleep(0.2)
        highest.append((await _asked(relay))["rss"])
    seconds = time.perf_counter() - started
    relay.stdin.close()
    await relay.wait()
    await connection.close()
    half = len(highest) // 2
    return [
        Row(
            what=f"outbox, backlog of {times * BACKLOG:,}: memory of the relay, at most",
            measured=max(highest) / 1024,
            unit="MiB",
            reach="<= 100",
            note=f"idle {before['rss'] / 1024:.0f}, first half {max(highest[:half]) / 1024:.0f}, second half "
            f"{max(highest[half:]) / 1024:.0f} MiB; {times * BACKLOG / seconds / 1000:.0f} k/s",
        )
    ]
