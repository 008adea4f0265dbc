"""A relay as a process, for the benchmark: for each line on its standard input it prints what it has done so far."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations import connect
from dispytch_integrations.outbox import Relay, RelayOptions
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox


async def main() -> None:
    """Relay until the standard input is closed."""
    url, database = sys.argv[1:]
    engine = create_async_engine(database)
    brokers = connect(url)
    async with brokers:
        relay = Relay(SQLAlchemyOutbox(engine).store(), brokers.brokers, RelayOptions(poll_interval=0.05, lease=10.0))
        running = asyncio.create_task(relay.run())
        while await asyncio.to_thread(sys.stdin.readline):
            counts = relay.counts
            told = {"sent": counts.sent, "statements": counts.fetches + counts.settles, "rss": _rss()}
            print(json.dumps(told), flush=True)
        relay.stop()
        await running
    await engine.dispose()


def _rss() -> int:
    """KiB of this process in memory."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


if __name__ == "__main__":
    asyncio.run(main())
