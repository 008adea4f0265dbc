"""What the benchmarks share: rows of a table, and measuring several contestants in turn."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

__all__ = ["Row", "interleaved", "measured", "ratio"]


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


def measured(topic: str) -> list[Row]:
    """The rows of one topic; called in a process of its own."""
    rows: list[Row] = asyncio.run(import_module(f"benchmarks.{topic}").run())
    return rows
