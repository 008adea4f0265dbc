"""Messages left to an event loop: delivered in the order they came, while whoever left them goes on."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import NamedTuple

from dispytch_integrations._outlet import Outlet
from dispytch_integrations.errors import BrokerUnavailableError, NotStartedError, ProducerTimeout
from dispytch_integrations.message import Message

__all__ = ["Handoff", "LeftMessage"]


class LeftMessage(NamedTuple):
    """A message, where it goes, and the context of whoever left it."""

    outlet: Outlet
    message: Message
    context: Context


class Handoff:
    """Takes messages from threads and delivers them on `loop`; what became of each is told to `settle`.

    `settle(left, error)` is called once for every message, with None or its error, on the loop's thread or in the one
    that left it; it must be quick. `bound(alias)`: how many messages may wait for a broker's confirmation; one more
    waits for room within the broker's timeout, and fails after that.

    Threads that leave messages at the same time share one wake-up of the loop, and their messages one batch.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settle: Callable[[LeftMessage, Exception | None], None],
        bound: Callable[[str], int],
    ) -> None:
        self._loop = loop
        self._settle = settle
        self._bound = bound
        self._queue: deque[LeftMessage] = deque()
        self._woken = False
        self._pending: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """Messages that are neither confirmed nor given up."""
        return self._pending.total()

    def put(self, left: Sequence[LeftMessage]) -> None:
        """Leave messages; returns at once, unless too many wait."""
        for each in left:
            if self._make_room(each):
                self._queue.append(each)
        # After the appends: the loop clears the flag before it looks at the queue, so that none is left behind.
        if self._queue and not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._begin)
            except RuntimeError:
                self._woken = False
                self._give_up()

    def flush(self, timeout: float) -> bool:
        """Wait until nothing is pending, at most `timeout` seconds; was that reached?"""
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending, timeout)

    def _make_room(self, left: LeftMessage) -> bool:
        alias, timeout = left.outlet.alias, left.outlet.timeout
        bound = self._bound(alias)
        with self._changed:
            if self._pending[alias] < bound or self._changed.wait_for(lambda: self._pending[alias] < bound, timeout):
                self._pending[alias] += 1
                return True
        self._settle(
            left,
            BrokerUnavailableError(
                f"{left.message!r} was not sent: {bound} messages wait for broker {alias!r} already, and none was "
                f"confirmed within {timeout} s; it is slower than they come, or hangs"
            ),
        )
        return False

    def _begin(self) -> None:
        self._woken = False
        batches: dict[Outlet, list[LeftMessage]] = {}
        while self._queue:
            left = self._queue.popleft()
            batches.setdefault(left.outlet, []).append(left)
        for outlet, batch in batches.items():
            task = self._loop.create_task(self._deliver(outlet, batch), name=f"dispytch left to {outlet.alias}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, outlet: Outlet, batch: list[LeftMessage]) -> None:
        outcomes: Sequence[Exception | None] = [
            ProducerTimeout(f"{left.message!r} was not confirmed when the process ended: it may have been delivered")
            for left in batch
        ]
        try:
            outcomes = await outlet.deliver([left.message for left in batch])
        except Exception as exc:  # What hinders all of them is the outcome of each.
            outcomes = [exc] * len(batch)
        finally:
            self._end(outlet.alias, batch, outcomes)

    def _give_up(self) -> None:
        """The loop is closed: nothing that waits will be sent."""
        while self._queue:
            left = self._queue.popleft()
            error = NotStartedError(f"{left.message!r} was not sent: the connections of this process are closed")
            self._end(left.outlet.alias, [left], [error])

    def _end(self, alias: str, batch: Sequence[LeftMessage], outcomes: Sequence[Exception | None]) -> None:
        for left, error in zip(batch, outcomes, strict=True):
            self._settle(left, error)
        with self._changed:
            self._pending[alias] -= len(batch)
            self._changed.notify_all()
