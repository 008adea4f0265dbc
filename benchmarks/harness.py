"""What the benchmarks share: rows of a table, and measuring several contestants in turn."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["HEADER", "QUICK", "Row", "interleaved", "is_quick", "ratio", "show"]

QUICK = "BENCH_QUICK"
"""An environment variable; set: smaller counts, where a topic knows any."""
HEADER = f"{'what':<84} {'measured':>14}  {'to reach':<9} {'':<7} note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    measured: float
    unit: str
    """"x" for a ratio of rates to the raw client (higher is better), "us", "ms"."""
    reach: str = ""
    """The figure to reach, as text: ">= 0.9"."""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Is it? None: there is nothing to reach."""
        if not self.reach:
            return None
        sign, figure = self.reach.split()
        return self.measured >= float(figure) if sign == ">=" else self.measured <= float(figure)

    def __str__(self) -> str:
        digits = 0 if self.measured >= 1000 else 2
        measured = "-" if math.isnan(self.measured) else f"{self.measured:,.{digits}f} {self.unit}"
        reached = {None: "", True: "reached", False: "MISSED"}[self.reached]
        return f"{self.what:<84} {measured:>14}  {self.reach:<9} {reached:<7} {self.note}".rstrip()


async def interleaved(
    contestants: Mapping[str, Callable[[], Awaitable[object]]], *, rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds each contestant took, per round; they run in turn, so that a noisy machine is noisy for all."""
    for run in contestants.values():
        await run()  # warm up
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            await run()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, list[float]], name: str, baseline: str) -> float:
    """Rate of `name` over rate of `baseline`: the median over rounds; above 1 is faster."""
    return statistics.median(base / own for own, base in zip(times[name], times[baseline], strict=True))


def show(topic: str) -> None:
    """Run one topic and print its rows as they come; called in a process of its own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Databases and brokers of its own go with it.
    asyncio.run(_show(import_module(f"benchmarks.{topic}").run()))


async def _show(found: Any) -> None:
    if isinstance(found, AsyncIterator):
        async for row in found:
            print(row, flush=True)
    else:
        for row in await found:
            print(row, flush=True)


def is_quick() -> bool:
    """Was a quick run asked for, to try the benchmarks and not to measure?"""
    return bool(os.environ.get(QUICK))
