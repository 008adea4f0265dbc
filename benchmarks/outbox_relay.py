"""A relay as a process, for the benchmarks: it prints what it has done when it is asked on its standard input."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations import connect
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.outbox import Relay, RelayOptions
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox

__all__ = ["Confirmed"]


class Confirmed(Hook):
    """Notes when what was confirmed, on the monotonic clock, which all processes share."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def sent(self, message: Message) -> None:
        self.at[message.id] = time.monotonic()


async def _main() -> None:
    """Relay until the standard input is closed. A hook is called for each event only if latency is what is measured."""
    url, database, measures, given = sys.argv[1:]
    options: dict[str, Any] = json.loads(given)
    engine = create_async_engine(database)
    confirmed = Confirmed()
    brokers = connect(url, hooks=[confirmed] if measures == "latency" else [])
    async with brokers:
        relay = Relay(SQLAlchemyOutbox(engine).store(), brokers.brokers, RelayOptions(**options))
        running = asyncio.create_task(relay.run())
        while asked := await asyncio.to_thread(sys.stdin.readline):
            counts = relay.counts
            statements = counts.fetches + counts.settles
            told = {"sent": counts.sent, "statements": statements, "rss": _rss(), "cpu": time.process_time()}
            print(json.dumps(confirmed.at if asked.strip() == "confirmed" else told), flush=True)
        relay.stop()
        await running
    await engine.dispose()


def _rss() -> int:
    """KiB of this process in memory."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


if __name__ == "__main__":
    asyncio.run(_main())
