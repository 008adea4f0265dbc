"""Which lanes (broker, destination, key) a relay leaves alone, so that nothing overtakes a message that failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from dispytch_integrations.outbox.store import HeldUp

__all__ = ["LONGEST_PAUSE", "Lanes"]

LONGEST_PAUSE = 5.0
"""Seconds after which a lane is looked at again, since somebody may have requeued what holds it up."""
_HELD_UP_SECONDS = 1.0
"""How often the store is asked which lanes are held up."""


class Lanes:
    """Those that are blocked here, for a while, and those that are held up, as the store has told.

    What is read from the store tells as well which lane is held up: it is asked only so that thousands of them do not
    fill each batch.
    """

    def __init__(self) -> None:
        self.blocked: dict[int, float] = {}
        """Until when a lane is left alone, on the monotonic clock."""
        self._held_up: frozenset[int] = frozenset()
        self._next_question: float | None = 0.0  # None: there was none, and nothing has failed since

    def block(self, lane: int, seconds: float) -> None:
        """Leave a lane alone."""
        self.blocked[lane] = time.monotonic() + min(seconds, LONGEST_PAUSE)

    def free(self, now: float) -> None:
        """Those whose time is over may go on."""
        for lane in [lane for lane, until in self.blocked.items() if until <= now]:
            del self.blocked[lane]

    def left_alone(self, others: Iterable[int]) -> Sequence[int]:
        """What is not to be read: these, and others."""
        return sorted(self._held_up.union(others, self.blocked))

    def ask_soon(self) -> None:
        """Something has failed: there is a lane that is held up."""
        if self._next_question is None:
            self._next_question = time.monotonic() + _HELD_UP_SECONDS

    def ask_now(self) -> None:
        """Shards have come, of which nothing is known."""
        self._next_question = 0.0

    def to_be_asked(self, now: float) -> bool:
        """Is it time to ask the store: at the start, when shards have come, and while there are any?"""
        return self._next_question is not None and now >= self._next_question

    def learn(self, held_up: HeldUp, now: float) -> None:
        """What the store has answered to a question of `now`."""
        took = time.monotonic() - now
        self._held_up = frozenset(held_up.lanes)
        pause = 0.0 if held_up.seconds is None else min(max(held_up.seconds, 0.001), _HELD_UP_SECONDS)
        # Of a hundred thousand lanes the question takes long, and is not to be all that is done.
        self._next_question = None if held_up.seconds is None else now + took + max(pause, 5 * took)

    def wait(self, limit: float, now: float) -> float:
        """For how long there is nothing to do here: `limit` seconds at most."""
        if self.blocked:
            limit = min(limit, max(min(self.blocked.values()) - now, 0.001))
        if self._next_question is not None:
            limit = min(limit, max(self._next_question - now, 0.001))
        return limit
