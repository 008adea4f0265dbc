"""Relays as processes: four against one, the memory of one, and how soon it hears of a commit."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Row, is_quick
from benchmarks.outbox_rows import BACKLOG, connected, fill, insert_all
from benchmarks.outbox_writing import PER_SECOND, commits, percentiles
from dispytch_integrations.outbox import RelayOptions
from dispytch_integrations.outbox._sql import CHANNEL, LEASES
from tests.support.outboxes import Database

__all__ = ["latency_of_another", "memory", "several"]

ROUNDS = 1 if is_quick() else 3
MANY = 5 * BACKLOG
"""One million, unless it is quick."""
_SHARES = f"select count(*) from {LEASES} where owner is not null group by owner"


class _Relay:
    """One in a process of its own (outbox_relay.py)."""

    def __init__(self, process: Any) -> None:
        self._process = process

    async def counts(self) -> dict[str, Any]:
        """What it has done so far, its memory in KiB, and its seconds of CPU."""
        found: dict[str, Any] = await self._asked("counts")
        return found

    async def confirmed(self) -> dict[str, float]:
        """When what was confirmed, on the monotonic clock."""
        found: dict[str, float] = await self._asked("confirmed")
        return found

    async def _asked(self, what: str) -> Any:
        self._process.stdin.write(f"{what}\n".encode())
        return json.loads(await self._process.stdout.readline())


@asynccontextmanager
async def _relay(url: str, database: Database, measures: str = "", **options: Any) -> AsyncGenerator[_Relay, None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.outbox_relay", url),
        database.url("postgresql+asyncpg").render_as_string(hide_password=False),
        measures,
        json.dumps(options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    assert process.stdin is not None
    try:
        relay = _Relay(process)
        await relay.counts()
        yield relay
    finally:
        process.stdin.close()
        await process.wait()


async def several(url: str, database: Database) -> AsyncIterator[Row]:
    """One relay, then four; each waits with its share of the shards when the backlog is committed."""
    runs: dict[int, list[_Run]] = {1: [], 4: []}
    for _ in range(ROUNDS):
        for count in (1, 4):
            runs[count].append(await _with_relays(url, database, count))
    one, four = (BACKLOG / min(run.seconds for run in runs[count]) / 1000 for count in (1, 4))
    what = f"outbox, backlog of {BACKLOG:,}"
    yield Row(what=f"{what}: one relay process, from the commit on", measured=one, unit="k/s")
    cpu = [statistics.median(run.cpu for run in runs[count]) * 1e6 / BACKLOG for count in (1, 4)]
    yield Row(
        what=f"{what}: four relay processes against one",
        measured=statistics.median(a.seconds / b.seconds for a, b in zip(runs[1], runs[4], strict=True)),
        unit="x",
        reach=">= 1.0",
        note=f"{four:.0f} k/s; {os.cpu_count()} cores for relays, database and broker; the relays use {cpu[1]:.0f} "
        f"us per event, one {cpu[0]:.0f}",
    )
    statements = [statistics.median(run.statements for run in runs[count]) * 1000 / BACKLOG for count in (1, 4)]
    yield Row(
        what=f"{what}: statements per event, four relays against one",
        measured=statements[1] / statements[0],
        unit="x",
        reach="<= 1.1",
        note=f"{statements[1]:.2f} per 1,000 events, one relay {statements[0]:.2f}",
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """From the commit of the backlog until all of it is sent and deleted. `cpu`: seconds, the relays' alone."""

    seconds: float
    statements: int
    cpu: float


async def _with_relays(url: str, database: Database, count: int) -> _Run:
    await fill(database, None)
    connection = await connected(database)
    try:
        async with _several(url, database, count) as relays:
            shares = [64 // count] * count
            async with asyncio.timeout(60):
                while [row[0] for row in await connection.fetch(_SHARES)] != shares:
                    await asyncio.sleep(0.1)
            before = [await relay.counts() for relay in relays]
            async with connection.transaction():
                await insert_all(connection, "source_keys")
                await connection.execute(f"notify {CHANNEL}")
            started = time.perf_counter()
            while True:
                after = [await relay.counts() for relay in relays]
                if sum(each["sent"] for each in after) >= BACKLOG:
                    break
                await asyncio.sleep(0.02)
            seconds = time.perf_counter() - started
            statements, cpu = (
                sum(last[name] - first[name] for last, first in zip(after, before, strict=True))
                for name in ("statements", "cpu")
            )
            return _Run(seconds, statements, cpu)
    finally:
        await connection.close()


@asynccontextmanager
async def _several(url: str, database: Database, count: int) -> AsyncGenerator[list[_Relay], None]:
    if count == 0:
        yield []
        return
    async with _relay(url, database, notify=True) as first, _several(url, database, count - 1) as others:
        yield [first, *others]


async def memory(url: str, database: Database) -> AsyncIterator[Row]:
    """The relay's memory over a backlog of a million: resident, with Python, SQLAlchemy, asyncpg and aiokafka in it."""
    await fill(database, None)
    resident: list[tuple[int, int]] = []
    async with _relay(url, database, notify=True) as relay:
        await asyncio.sleep(1)
        idle = (await relay.counts())["rss"]
        connection = await connected(database)
        async with connection.transaction():
            for number in range(5):
                await insert_all(connection, "source_keys", f"event_id || '-{number}'")
            await connection.execute(f"notify {CHANNEL}")
        await connection.close()
        started = time.perf_counter()
        sent = 0
        while sent < MANY:
            counts = await relay.counts()
            sent = counts["sent"]
            resident.append((sent, counts["rss"]))
            await asyncio.sleep(0.1)
        seconds = time.perf_counter() - started
    first = max(rss for sent, rss in resident if sent < MANY // 2) / 1024
    second = max(rss for sent, rss in resident if sent >= MANY // 2) / 1024
    yield Row(
        what=f"outbox, backlog of {MANY:,}: resident memory of the relay's process, at most",
        measured=max(first, second),
        unit="MiB",
        reach="<= 100",
        note=f"idle {idle / 1024:.0f}; Python and all libraries in it; about {MANY / seconds / 1000:.0f} k/s",
    )
    yield Row(
        what=f"outbox, backlog of {MANY:,}: the same, second half against the first",
        measured=second / first,
        unit="x",
        reach="<= 1.05",
        note=f"{first:.1f} MiB, then {second:.1f}",
    )


async def latency_of_another(url: str, database: Database) -> AsyncIterator[Row]:
    """From the commit in one process to the broker by a relay in another: woken by NOTIFY, and polling."""
    for notify in (True, False):
        await fill(database, None)
        async with _relay(url, database, "latency", notify=notify) as relay:
            options = RelayOptions(notify=notify)
            committed = await commits(url, database, options=options)
            async with asyncio.timeout(10):
                while len(confirmed := await relay.confirmed()) < len(committed):
                    await asyncio.sleep(0.1)
        p50, p99 = percentiles(committed, confirmed)
        name = "woken by NOTIFY" if notify else "polling"
        what = f"outbox, a relay in another process, {name}, {PER_SECOND}/s: commit to broker"
        yield Row(what=f"{what}, p50", measured=p50, unit="ms")
        yield Row(what=f"{what}, p99", measured=p99, unit="ms")
