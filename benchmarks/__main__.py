"""Run the benchmarks and print one table: `python -m benchmarks [--quick] [topic ...]`."""

from __future__ import annotations

import argparse
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.harness import HEADER, QUICK, show

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
    "production",
    "catalog",
)


def main() -> None:
    """Parse the command line, run each topic, print its rows as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="topic", help=f"default: all of {', '.join(TOPICS)}")
    parser.add_argument("--quick", action="store_true", help="smaller counts, to try it (outbox)")
    arguments = parser.parse_args()
    unknown = [topic for topic in arguments.topics if topic not in TOPICS]
    if unknown:
        parser.error(f"unknown topic {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    if arguments.quick:
        os.environ[QUICK] = "1"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    print(f"Python {platform.python_version()}, {machine}; x: rate in units of the baseline's, 1 is equal")
    print(HEADER, flush=True)
    # Each in a process of its own: Django is configured once in one, and what one topic leaves burdens no other.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for _ in processes.map(show, arguments.topics or TOPICS):
            pass


if __name__ == "__main__":
    main()
