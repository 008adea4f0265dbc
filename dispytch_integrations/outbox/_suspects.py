"""Which message breaks the connection? Those that were under way when it broke are sent again apart, in ever smaller
groups, so that one that breaks it each time holds up nobody else for long, and is the only one whose attempts count.

    the broker does not answer a ping      an outage: the relay waits, and no attempt is counted
    it does, and a message has failed      the first time is free, since connections break without any message's fault;
                                           then it travels in half of its group, and alone it is counted
    it does, but takes nothing of a kind   (a partition without a leader): tried again later, and never counted
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from dispytch_integrations.errors import BrokerUnavailableError, NotStartedError, ProducerTimeout, UnconfirmedError
from dispytch_integrations.outbox.record import Record

__all__ = ["Suspects", "Verdict", "hints_at_outage"]

_FREE_SECONDS = 30.0
"""After the groups of one broker have travelled apart, they do not do so for that long: it slows down the rest."""
_MOST = 20_000
"""How many are remembered; rows that another relay has sent are never heard of again."""

Verdict = Literal["counted", "again", "later"]
"""What follows from a failure: an attempt is counted; it is sent again at once; or after a pause, with none counted."""


class _Suspect:
    __slots__ = ("breaks", "size", "strikes")

    def __init__(self) -> None:
        self.strikes = 0
        self.size = 0  # how many may travel with it; 0: any number
        self.breaks = False  # has it broken a connection alone?


class Suspects:
    """Remembers messages that failed although their broker answers. `isolation`: seconds for which those of one
    broker travel apart, and the rest waits, each time.
    """

    def __init__(self, isolation: float) -> None:
        self._isolation = isolation
        self._known: dict[int, _Suspect] = {}
        self._since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def group_of(self, record: Record) -> int:
        """With how many others at most it travels, and nothing else beside them; 0: as any message."""
        suspect = self._known.get(record.id)
        if suspect is None or suspect.size == 0:
            return 0
        return suspect.size if suspect.breaks or self._isolates(record.broker) else 0

    def strikes(self, record: Record) -> int:
        """How often it has failed although its broker answered."""
        suspect = self._known.get(record.id)
        return 0 if suspect is None else suspect.strikes

    def clear(self, record_id: int) -> None:
        """It was delivered, or is dead."""
        self._known.pop(record_id, None)

    def judge(self, records: Sequence[Record], outcomes: Sequence[Exception | None]) -> list[Verdict | None]:
        """What follows for each message of a delivery, whose broker has just answered a ping. None: it did not fail
        in a way that hints at an outage.
        """
        broke = any(
            isinstance(error, UnconfirmedError) and not isinstance(error, ProducerTimeout) for error in outcomes
        )
        apart = broke or (None not in outcomes and not all(isinstance(error, ProducerTimeout) for error in outcomes))
        if apart:
            self._begin(records[0].broker)
        return [
            self._judge_one(record, error, len(records), apart=apart) if hints_at_outage(error) else None
            for record, error in zip(records, outcomes, strict=True)
        ]

    def _judge_one(self, record: Record, error: Exception | None, together: int, *, apart: bool) -> Verdict:
        suspect = self._known.get(record.id)
        if suspect is None:
            suspect = self._known[record.id] = _Suspect()
            while len(self._known) > _MOST:
                del self._known[next(iter(self._known))]
        suspect.strikes += 1
        if isinstance(error, ProducerTimeout):
            return "again" if suspect.strikes == 1 else "counted"
        alone = together == 1
        if not isinstance(error, UnconfirmedError):  # Nothing was sent.
            if alone or not apart or not self._isolates(record.broker):
                return "later"
            suspect.size = max(together // 2, 1)
            return "again"
        if suspect.strikes > 1 and (alone or not self._isolates(record.broker)):
            suspect.breaks = alone
            return "counted"
        suspect.size = max(together // 2, 1)
        return "again"

    def _isolates(self, broker: str) -> bool:
        since = self._since.get(broker)
        return since is not None and time.monotonic() - since < self._isolation

    def _begin(self, broker: str) -> None:
        now, since = time.monotonic(), self._since.get(broker)
        if since is None or now - since > self._isolation + _FREE_SECONDS:
            self._since[broker] = now


def hints_at_outage(error: Exception | None) -> bool:
    """May the broker be what failed, and not the message?"""
    return isinstance(error, (BrokerUnavailableError, NotStartedError, UnconfirmedError))
