"""Run the benchmarks and print one table: `python -m benchmarks [topic ...]`."""

from __future__ import annotations

import argparse
import asyncio
import platform
from importlib import import_module

from benchmarks.harness import Row

TOPICS = ("emitter", "imports", "kafka", "rabbitmq", "redis_bench", "fastapi_route", "blocking", "django_bench")


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
    for topic in arguments.topics or TOPICS:
        for row in asyncio.run(import_module(f"benchmarks.{topic}").run()):
            print(_line(row), flush=True)


def _line(row: Row) -> str:
    measured = f"{row.measured:.2f} {row.unit}"
    return f"{row.what:<78} {measured:>12}  {row.reach:<10} {row.note}".rstrip()


if __name__ == "__main__":
    main()
