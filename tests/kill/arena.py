"""The faults, at random moments, and what must be true in spite of them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from dispytch_integrations._sqlalchemy_store import outbox_tables
from tests.kill import programs
from tests.kill.places import DATABASES, Place
from tests.kill.programs import Job, facts
from tests.support.proxy import TCPProxy

__all__ = ["Arena", "Verdict"]

_WRITERS, _RELAYS = 2, 2
_DRAIN_SECONDS = 40.0
"""How long an outbox may take to be empty once the faults are over."""


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What became of the events. All but `duplicates`, `late` and the counts must be empty."""

    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])
    committed: int = 0
    arrived: int = 0
    duplicates: int = 0
    late: int = 0
    """Duplicates that came after a later event of their key: sent again, or by a relay that had been stopped."""
    lost: list[str] = field(default_factory=list[str])
    from_rollbacks: list[str] = field(default_factory=list[str])
    out_of_order: list[str] = field(default_factory=list[str])
    left: list[str] = field(default_factory=list[str])
    """Rows that are still in the outbox."""

    @property
    def is_good(self) -> bool:
        """Was nothing lost, made up, or overtaken?"""
        return self.committed > 0 and not (self.lost or self.from_rollbacks or self.out_of_order or self.left)

    def __str__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        text = (
            f"{self.rounds} rounds ({faults}): {self.committed} events committed, {len(self.lost)} lost, "
            f"{len(self.from_rollbacks)} of rolled-back transactions, {len(self.out_of_order)} out of order, "
            f"{len(self.left)} left; {self.duplicates} duplicates ({self.duplicates / max(self.committed, 1):.2%}), "
            f"{self.late} of them after a later event of their key"
        )
        for name in ("lost", "from_rollbacks", "out_of_order", "left"):
            if found := getattr(self, name):
                text += f"\n    {name}: {', '.join(found[:10])}"
        return text


class Arena:
    """Writers and relays on one database and one broker.

    async with Arena("postgresql", "kafka", seed=1) as arena:
        await arena.rounds(10)
        verdict = await arena.verdict()
    """

    def __init__(self, database: str, broker: str, *, seed: int | None = None, keys: int = 20) -> None:
        self.seed = seed if seed is not None else random.SystemRandom().randrange(10**6)
        self.database = DATABASES[database]()
        self.place = Place(broker)
        self._keys = keys
        self._chance = random.Random(self.seed)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["tests.kill.warm"])
        self._writers: list[BaseProcess] = []
        self._relays: list[BaseProcess] = []
        self._payloads: list[bytes] = []
        self._reading: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        self._rounds = 0
        self._faults: Counter[str] = Counter()

    async def __aenter__(self) -> Arena:
        if self._reading is None:  # Entered a second time it is open.
            try:
                await self._open()
            except BaseException:
                await self._stack.aclose()
                raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        await self.database.open()
        self._stack.push_async_callback(self.database.close)
        if self.database.proxy is not None:
            await self._stack.enter_async_context(self.database.proxy)
        await asyncio.to_thread(self.database.make_tables, self._keys)
        await self.place.open()
        self._stack.push_async_callback(self.place.close)
        self._stack.callback(self._end)
        self._reading = asyncio.create_task(self._read())
        self._stack.push_async_callback(self._end_reading)
        self._writers = [self._writer() for _ in range(_WRITERS)]
        self._relays = [self._relay(number) for number in range(_RELAYS)]

    # -- processes -----------------------------------------------------------------------------------------------

    def _job(self, database: str) -> Job:
        return Job(database=database, broker=self.place.url, place=self.place.name, keys=self._keys)

    def _started(self, target: Callable[[Job], None], database: str) -> BaseProcess:
        process = self._processes.Process(target=target, args=(self._job(database),), daemon=True)
        process.start()
        return process

    def _writer(self) -> BaseProcess:
        return self._started(programs.write, self.database.writers)

    def _relay(self, number: int) -> BaseProcess:
        return self._started(programs.relay, self.database.relays[number % 2])

    def _end(self) -> None:
        for process in (*self._writers, *self._relays):
            _signal(process, signal.SIGCONT)
            process.kill()
        for process in (*self._writers, *self._relays):
            process.join(10)
        self._writers, self._relays = [], []

    # -- what arrives --------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            more = await asyncio.to_thread(self.place.arrivals._more)
            self._payloads += more
            await asyncio.sleep(0 if more else 0.05)

    async def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    # -- faults --------------------------------------------------------------------------------------------------

    async def rounds(self, count: int) -> None:
        """That many rounds: work for a moment, then one fault, sometimes two at a time."""
        faults: dict[Callable[[], Awaitable[None]], int] = {
            self.kill_relay: 5,
            self.kill_relays: 1,
            self.stop_relay: 2,
            self.kill_writer: 3,
            self.cut_broker: 3,
            self.broker_away: 2,
            self.suspend_relay: 2,
        }
        if self.database.proxy is not None:
            faults |= {self.cut_database: 3, self.database_away: 1}
        for _ in range(count):
            chosen = self._chance.choices(
                list(faults), list(faults.values()), k=2 if self._chance.random() < 0.3 else 1
            )
            await asyncio.gather(*(self._later(fault) for fault in {*chosen}))
            self._rounds += 1

    async def _later(self, fault: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(self._chance.uniform(0.1, 1.2))
        self._faults[getattr(fault, "__name__", "fault").replace("_", " ")] += 1
        await fault()

    async def kill_relay(self) -> None:
        """kill -9; a new one starts at once."""
        number = self._chance.randrange(_RELAYS)
        await self._killed(self._relays, number, lambda: self._relay(number))

    async def kill_relays(self) -> None:
        """kill -9 of both."""
        for number in range(_RELAYS):
            await self._killed(self._relays, number, lambda number=number: self._relay(number))  # type: ignore[misc]

    async def kill_writer(self) -> None:
        """kill -9, in the middle of some transactions."""
        await self._killed(self._writers, self._chance.randrange(_WRITERS), self._writer)

    async def _killed(self, processes: list[BaseProcess], number: int, start: Callable[[], BaseProcess]) -> None:
        process = processes[number]
        process.kill()
        await asyncio.to_thread(process.join)
        processes[number] = await asyncio.to_thread(start)

    async def stop_relay(self) -> None:
        """SIGTERM: it ends by itself, and without an error."""
        number = self._chance.randrange(_RELAYS)
        process = self._relays[number]
        await asyncio.sleep(0.5)  # A process that has just begun does not know the signal yet.
        _signal(process, signal.SIGTERM)
        await asyncio.to_thread(process.join, 8)
        if process.exitcode is None:
            raise AssertionError("a relay did not stop within 8 s of SIGTERM")
        if self._relays[number] is process:
            self._relays[number] = await asyncio.to_thread(self._relay, number)

    async def suspend_relay(self) -> None:
        """SIGSTOP for longer than the lease, then SIGCONT: it goes on in the belief that nothing has happened."""
        process = self._relays[self._chance.randrange(_RELAYS)]
        _signal(process, signal.SIGSTOP)
        await asyncio.sleep(self._job("").lease * self._chance.uniform(1.1, 1.6))
        _signal(process, signal.SIGCONT)

    async def cut_broker(self) -> None:
        """The broker's connections end, three times in a row."""
        await self._cut(self.place.proxy)

    async def cut_database(self) -> None:
        """The database's connections end, those of writers and relays."""
        assert self.database.proxy is not None
        await self._cut(self.database.proxy)

    async def _cut(self, proxy: TCPProxy) -> None:
        for _ in range(self._chance.randint(1, 3)):
            await proxy.cut()
            await asyncio.sleep(self._chance.uniform(0.0, 0.1))

    async def broker_away(self) -> None:
        """The broker refuses connections, or does not answer, for a while."""
        await self._away(self.place.proxy)

    async def database_away(self) -> None:
        """The database refuses connections for a while."""
        assert self.database.proxy is not None
        await self.database.proxy.refuse()
        await asyncio.sleep(self._chance.uniform(0.2, 1.0))
        await self.database.proxy.resume()

    async def _away(self, proxy: TCPProxy) -> None:
        await (proxy.refuse() if self._chance.random() < 0.5 else proxy.stall())
        await asyncio.sleep(self._chance.uniform(0.2, 1.5))
        await proxy.resume()

    async def outage(self, seconds: float) -> int:
        """The broker refuses for half of the time and hangs for the other, under load. Returns the most attempts that
        any event was charged with meanwhile, and until most of the backlog is gone.
        """
        most, proxy = 0, self.place.proxy
        for away in (proxy.refuse, proxy.stall):
            await away()
            end = time.monotonic() + seconds / 2
            while time.monotonic() < end:
                most = max(most, await asyncio.to_thread(self._attempts))
                await asyncio.sleep(0.1)
            await proxy.resume()
        end = time.monotonic() + _DRAIN_SECONDS
        while len(await asyncio.to_thread(self._left)) >= 20 and time.monotonic() < end:
            most = max(most, await asyncio.to_thread(self._attempts))
            await asyncio.sleep(0.1)
        return most

    def relay_memory(self) -> int:
        """MiB that the larger one of the relays has in use."""
        sizes: list[int] = []
        for process in self._relays:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes.append(int(status.partition("VmRSS:")[2].split()[0]) // 1024)
        return max(sizes)

    async def work(self, seconds: float) -> None:
        """Let it run undisturbed."""
        await asyncio.sleep(seconds)

    def _attempts(self) -> int:
        events, _ = outbox_tables(programs.metadata)
        with self.database.engine.connect() as connection:
            return int(connection.execute(select(func.coalesce(func.max(events.c.attempts), 0))).scalar_one())

    # -- the verdict ---------------------------------------------------------------------------------------------

    async def verdict(self) -> Verdict:
        """End the writers, let the relays empty the outbox, and compare what was committed with what has come."""
        for process in self._writers:
            process.kill()
        for process in self._writers:
            await asyncio.to_thread(process.join)
        verdict = Verdict(rounds=self._rounds, faults=self._faults)
        end = time.monotonic() + _DRAIN_SECONDS
        while (left := await asyncio.to_thread(self._left)) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        verdict.left = left
        committed = await asyncio.to_thread(self._committed)
        verdict.committed = len(committed)
        tokens = {token for _, _, token in committed}
        end = time.monotonic() + 10
        while len(tokens - {json.loads(payload)["token"] for payload in self._payloads}) > len(left):
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)  # What should not come has a moment to come.
        self._judge(verdict, committed, [json.loads(payload) for payload in self._payloads])
        return verdict

    def _left(self) -> list[str]:
        events, _ = outbox_tables(programs.metadata)
        with self.database.engine.connect() as connection:
            count = connection.execute(select(func.count()).select_from(events)).scalar_one()
            rows = connection.execute(
                select(events.c.id, events.c.state, events.c.attempts, events.c.last_error).limit(min(count, 20))
            )
            return [str(tuple(row)) for row in rows]

    def _committed(self) -> list[tuple[str | None, int, str]]:
        with self.database.engine.connect() as connection:
            rows = connection.execute(select(facts.c.name, facts.c.number, facts.c.token).order_by(facts.c.id))
            return [(row[0], row[1], row[2]) for row in rows]

    @staticmethod
    def _judge(verdict: Verdict, committed: list[tuple[str | None, int, str]], arrived: list[dict[str, Any]]) -> None:
        names = {token: (name, number) for name, number, token in committed}
        seen: set[str] = set()
        last: dict[str, int] = {}
        for event in arrived:
            token = event["token"]
            if token not in names:
                verdict.from_rollbacks.append(token)
                continue
            name, number = names[token]
            if token in seen:
                verdict.duplicates += 1
                verdict.late += name is not None and number < last[name]
                continue
            seen.add(token)
            if name is None:
                continue
            if number != last.get(name, 0) + 1:
                verdict.out_of_order.append(f"{name}: {number} after {last.get(name, 0)}")
            last[name] = max(number, last.get(name, 0))
        verdict.arrived = len(seen)
        verdict.lost = [f"{name} {number} {token}" for name, number, token in committed if token not in seen]


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, number)
