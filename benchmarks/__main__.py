"""Run the benchmarks and print one table: `python -m benchmarks [topic ...]`."""

from __future__ import annotations

import argparse
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.harness import Row, measured

TOPICS = (
    "emitter",
    "imports",
    "kafka",
    "rabbitmq",
    "redis_bench",
    "fastapi_route",
    "blocking",
    "django_bench",
    "outbox",
)


def main() -> None:
    """Parse the command line, run each topic, print its rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="topic", help=f"default: all of {', '.join(TOPICS)}")
    arguments = parser.parse_args()
    unknown = [topic for topic in arguments.topics if topic not in TOPICS]
    if unknown:
        parser.error(f"unknown topic {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    print(f"Python {platform.python_version()}, {platform.machine()}; x: rate in units of the baseline's, 1 is equal")
    print(f"{'what':<78} {'measured':>12}  {'to reach':<10} note")
    # Each in a process of its own: Django is configured once in one, and what one topic leaves burdens no other.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for rows in processes.map(measured, arguments.topics or TOPICS):
            for row in rows:
                print(_line(row), flush=True)


def _line(row: Row) -> str:
    measured = f"{row.measured:.2f} {row.unit}"
    return f"{row.what:<78} {measured:>12}  {row.reach:<10} {row.note}".rstrip()


if __name__ == "__main__":
    main()
