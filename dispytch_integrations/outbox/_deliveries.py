"""What travels together: which of the rows that wait can go to their brokers now, and with which others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Container, Sequence

from dispytch_integrations.message import Message
from dispytch_integrations.outbox._suspects import Suspects, Verdict
from dispytch_integrations.outbox.record import Record

__all__ = ["SLOW", "Delivery", "Item", "full_brokers", "next_deliveries", "slow_lanes"]

SLOW = 0.25
"""Seconds after which the lanes of a delivery are left alone, so that others need not wait for it."""
_MOST = 8
"""How many deliveries may be under way to one broker."""
_FIRST, _RETRY, _SUSPECT = range(3)
"""What travels together: first attempts; later ones; those of which one may break the connection."""

Item = tuple[Record, Message]
"""A row, and the message that it holds."""


class Delivery:
    """Messages under way to one broker. `apart`: nothing else travels to it meanwhile."""

    __slots__ = ("alias", "apart", "lanes", "messages", "outcomes", "records", "since", "task", "verdicts")

    def __init__(self, alias: str, items: Sequence[Item], *, apart: bool) -> None:
        self.alias = alias
        self.records = [item[0] for item in items]
        self.messages = [item[1] for item in items]
        self.lanes = {record.lane for record in self.records}
        self.apart = apart
        self.since = time.monotonic()
        self.outcomes: list[Exception | None] = []
        self.verdicts: list[Verdict | None] | None = None
        self.task: asyncio.Task[None]


def slow_lanes(under_way: Collection[Delivery], now: float) -> set[int]:
    """Lanes of deliveries that take long."""
    slow = set[int]()
    for delivery in under_way:
        if now - delivery.since > SLOW:
            slow |= delivery.lanes
    return slow


def full_brokers(under_way: Collection[Delivery]) -> set[str]:
    """Brokers that can take no further delivery."""
    return {alias for alias, count in _counted(under_way).items() if count >= _MOST}


def next_deliveries(
    pending: Sequence[Item], under_way: Collection[Delivery], usable: Container[int], suspects: Suspects
) -> tuple[list[Delivery], list[Item]]:
    """Those to be started, with what waits and whose lane is free; and what goes on waiting, in its order.

    Retries travel apart, so that they hold up nobody else; suspects apart from everything else of their broker.
    `usable`: shards whose lease lasts long enough.
    """
    closed = set[int]()  # Behind one that waits, all of its lane wait.
    for delivery in under_way:
        closed |= delivery.lanes
    groups: dict[tuple[str, int], list[Item]] = {}
    waiting: list[Item] = []
    began: dict[int, int] = {}
    for item in pending:
        record = item[0]
        lane, kind = record.lane, _RETRY if record.attempts > 0 else _FIRST
        if suspects and suspects.group_of(record):
            kind = _SUSPECT
        if lane not in closed and (record.shard not in usable or (lane in began and (kind or began[lane]))):
            closed.add(lane)
        if lane in closed:
            waiting.append(item)
            continue
        began[lane] = kind
        groups.setdefault((record.broker, kind), []).append(item)
    deliveries: list[Delivery] = []
    apart_now = {delivery.alias: delivery.apart for delivery in under_way}
    counts = _counted(under_way)
    for (alias, kind), items in groups.items():
        apart = kind == _SUSPECT
        if (
            counts[alias] >= _MOST
            or apart_now.get(alias)
            or (apart and alias in apart_now)
            or (not apart and (alias, _SUSPECT) in groups)
        ):
            waiting += items
            continue
        if apart:
            size = suspects.group_of(items[0][0])
            items, rest = items[:size], items[size:]
            waiting += rest
        deliveries.append(Delivery(alias, items, apart=apart))
        counts[alias] += 1
    waiting.sort(key=_by_id)
    return deliveries, waiting


def _counted(under_way: Collection[Delivery]) -> Counter[str]:
    """How many deliveries are under way to which broker."""
    return Counter(delivery.alias for delivery in under_way)


def _by_id(item: Item) -> int:
    return item[0].id
