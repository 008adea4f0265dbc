"""`make test-kill`: many rounds, on every database and every broker; prints what became of the events.

python -m tests.kill --rounds 100 --seed 1 --only postgresql-kafka
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.kill.arena import Arena, Verdict

_LAP = 25
"""Rounds between two verdicts."""
_PAIRS = {
    "postgresql-kafka": 1.0,
    "mariadb-kafka": 0.2,
    "sqlite-kafka": 0.2,
    "postgresql-rabbitmq": 0.2,
    "postgresql-redis": 0.2,
}
"""Which database with which broker, and the share of the rounds."""


async def _lap(pair: str, rounds: int, seed: int) -> Verdict:
    database, _, broker = pair.partition("-")
    async with Arena(database, broker, seed=seed) as arena:
        await arena.rounds(rounds)
        return await arena.verdict()


async def _outage(seconds: float, seed: int) -> bool:
    """The broker away under load; False: something was lost or charged with an attempt, or memory grew."""
    async with Arena("postgresql", "kafka", seed=seed) as arena:
        await arena.work(5.0)
        before = arena.relay_memory()
        attempts = await arena.outage(seconds)
        after = arena.relay_memory()
        verdict = await arena.verdict()
    print(
        f"broker away for {seconds:g} s: {verdict.committed} events committed, {len(verdict.lost)} lost, "
        f"{len(verdict.left)} left or dead, {attempts} attempts charged at most, {verdict.duplicates} duplicates; "
        f"a relay's memory {before} MiB before, {after} MiB after",
        flush=True,
    )
    return verdict.is_good and attempts == 0 and after - before < 30


def main() -> int:
    """Run; return 1 when an event was lost, made up, overtaken or left."""
    parser = argparse.ArgumentParser(prog="make test-kill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds with PostgreSQL and Kafka; others get a fifth")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="of the first lap")
    parser.add_argument("--only", choices=list(_PAIRS), action="append", help="may be given several times")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without a broker, first; 0: none")
    options = parser.parse_args()
    bad = 0
    if options.outage:
        bad += not asyncio.run(_outage(options.outage, options.seed))
    totals: dict[str, list[Verdict]] = {}
    for pair in options.only or _PAIRS:
        rounds = max(round(options.rounds * (1.0 if options.only else _PAIRS[pair])), 1)
        for number, start in enumerate(range(0, rounds, _LAP)):
            seed = options.seed + number
            began = time.monotonic()
            verdict = asyncio.run(_lap(pair, min(_LAP, rounds - start), seed))
            print(f"{pair} (seed {seed}, {time.monotonic() - began:.0f} s): {verdict}", flush=True)
            totals.setdefault(pair, []).append(verdict)
            bad += not verdict.is_good
    print()
    for pair, verdicts in totals.items():
        committed, duplicates = sum(each.committed for each in verdicts), sum(each.duplicates for each in verdicts)
        print(
            f"{pair:20} {sum(each.rounds for each in verdicts):4} rounds  {committed:7} events  "
            f"{sum(len(each.lost) for each in verdicts)} lost  "
            f"{sum(len(each.from_rollbacks) for each in verdicts)} of rolled-back transactions  "
            f"{sum(len(each.out_of_order) for each in verdicts)} out of order  "
            f"{duplicates} duplicates ({duplicates / max(committed, 1):.2%}), "
            f"{sum(each.late for each in verdicts)} of them after a later event of their key"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
