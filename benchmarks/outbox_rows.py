"""The rows that the outbox's benchmarks start from: made once, as an emit makes them, and copied before each run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import asyncpg

from benchmarks.harness import is_quick
from dispytch_integrations import EventBase, connect
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.outbox._sql import EVENTS, INSERTED
from dispytch_integrations.outbox.record import record_of
from tests.support.outboxes import Database

__all__ = ["BACKLOG", "KEYS", "TOPIC", "Stored", "connected", "fill", "insert_all", "store_source"]

TOPIC = "bench-outbox"
KEYS = 1000
BACKLOG = int(os.environ.get("OUTBOX_EVENTS") or (20_000 if is_quick() else 200_000))

_COLUMNS = ", ".join(INSERTED)
_EMPTY = "state, state_ms, attempts, next_try_ms"


class Stored(EventBase):
    """An event of 100 bytes."""

    __route__ = KafkaEventRoute(topic=TOPIC)
    __ordering_key__ = "customer-{customer}"
    customer: int
    note: str = "x" * 70


async def connected(database: Database) -> Any:
    """A connection of asyncpg, which nobody else uses."""
    return await asyncpg.connect(database.url("postgresql").render_as_string(hide_password=False))


async def store_source(
    database: Database, table: str, url: str, event: Callable[[int], EventBase], count: int = BACKLOG
) -> None:
    """Make a table of `count` rows; `url`: "memory://kafka", since they are prepared and not sent."""
    connection = await connected(database)
    await connection.execute(f"create table {table} as select {_COLUMNS} from {EVENTS} limit 0")
    async with connect(url, source="/benchmarks") as emitter:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            records = [record_of(emitter.prepare(event(number))[1]) for number in numbers]
            rows = [tuple(getattr(record, column) for column in INSERTED) for record in records]
            await connection.copy_records_to_table(table, records=rows, columns=INSERTED)
    await connection.close()


async def fill(database: Database, table: str | None) -> None:
    """Let the outbox hold the rows of a table, or none."""
    connection = await connected(database)
    await connection.execute(f"truncate {EVENTS}")
    if table is not None:
        await insert_all(connection, table)
    await connection.execute(f"analyze {EVENTS}")
    # The checkpoint of what was written now is nobody's merit and nobody's fault.
    await connection.execute("checkpoint")
    await connection.close()


async def insert_all(connection: Any, table: str, event_id: str = "event_id") -> None:
    """Commit all rows of a table to the outbox."""
    read = _COLUMNS.replace("event_id", event_id)
    await connection.execute(f"insert into {EVENTS} ({_COLUMNS}, {_EMPTY}) select {read}, 0, 0, 0, 0 from {table}")
