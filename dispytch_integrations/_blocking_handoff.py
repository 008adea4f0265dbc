"""Messages left to an event loop: delivered in the order they came, while whoever left them goes on.

In order per lane: the broker, the destination and the ordering key. Of each lane one delivery is under way, and what
comes meanwhile is the next one. Transports keep the order within a delivery; of several at once, one may overtake
another that found its topic unknown or its connection not made yet.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import NamedTuple

from dispytch_integrations._outlet import Outlet
from dispytch_integrations.errors import BrokerUnavailableError, NotStartedError, ProducerTimeout
from dispytch_integrations.message import Message

__all__ = ["Handoff", "LeftMessage"]

logger = logging.getLogger("dispytch_integrations.blocking")


class LeftMessage(NamedTuple):
    """A message, where it goes, and the context of whoever left it."""

    outlet: Outlet
    message: Message
    context: Context

    @property
    def lane(self) -> _Lane:
        """Messages of one lane keep their order."""
        return self.outlet, self.message.destination, self.message.ordering_key


_IMMEDIATE_SECONDS = 1.0
"""How long a hand-over to an immediate producer waits at most: hooks may be slow, the connection may be new."""

_Lane = tuple[Outlet, str, "str | None"]


class Handoff:
    """Takes messages from threads and delivers them on `loop`; what became of each is told to `settle`.

    `settle(left, error)` is called once for every message, with None or its error, on the loop's thread or in the one
    that left it; it must be quick. `bound(alias)`: how many messages may wait for a broker's confirmation; one more
    waits for room within the broker's timeout, and fails after that.

    A thread in between wakes the loop. Waking it is a system call that gives the GIL away, and the loop's thread keeps
    it for the whole of a delivery: a request that woke it itself would stand still for 200 to 400 us. Handing over to a
    queue costs it 1 us, and the delivery begins when the request waits for something, or is done.
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
        self._queue: SimpleQueue[LeftMessage | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pending: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lanes: dict[_Lane, list[LeftMessage]] = {}
        """On the loop: the lanes with a delivery under way, and what waits behind it."""

    @property
    def pending(self) -> int:
        """Messages that are neither confirmed nor given up."""
        return self._pending.total()

    def put(self, left: Sequence[LeftMessage]) -> int:
        """Leave messages; returns at once, unless too many wait. Returns how many were taken: all, unless closed.

        For producers that are `immediate`, of memory, it returns when they are delivered.
        """
        taken = self._take(left)
        at_once = {each.outlet.alias for each in left if each.outlet.producer.immediate}
        if at_once and _running_loop() is not self._loop:
            with self._changed:
                self._changed.wait_for(lambda: not any(self._pending[alias] for alias in at_once), _IMMEDIATE_SECONDS)
        return taken

    def _take(self, left: Sequence[LeftMessage]) -> int:
        for number, each in enumerate(left):
            try:
                if not self._queue_when_there_is_room(each):
                    return number
            except BrokerUnavailableError as exc:
                self._tell(each, exc)
        return len(left)

    def close(self) -> None:
        """Take no more messages; the thread ends when it has passed on those that were taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._thread is not None:
                self._queue.put(None)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing is pending, at most `timeout` seconds; was that reached?"""
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending, timeout)

    def _queue_when_there_is_room(self, left: LeftMessage) -> bool:
        alias, timeout = left.outlet.alias, left.outlet.timeout
        bound = self._bound(alias)
        with self._changed:
            if self._pending[alias] >= bound and not self._closed:
                self._changed.wait_for(lambda: self._pending[alias] < bound or self._closed, timeout)
            if self._closed:
                return False
            if self._pending[alias] >= bound:
                raise BrokerUnavailableError(
                    f"{left.message!r} was not sent: {bound} messages wait for broker {alias!r} already, and none was "
                    f"confirmed within {timeout} s; it is slower than they come, or hangs"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="dispytch hand-off", daemon=True)
                thread.start()
                # Only now: where the system refuses a thread, the next message tries again.
                self._thread = thread
            self._pending[alias] += 1
            # Under the lock: what comes after the end of the thread would stay in the queue for ever.
            self._queue.put(left)
        return True

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            try:
                while True:
                    batch.append(self._queue.get_nowait())
            except Empty:
                pass
            messages = [left for left in batch if left is not None]
            try:
                if messages:
                    self._loop.call_soon_threadsafe(self._begin, messages)
            except RuntimeError:
                self._give_up(messages)
            if len(messages) < len(batch):
                return

    def _begin(self, messages: Sequence[LeftMessage]) -> None:
        batches: dict[Outlet, list[LeftMessage]] = {}
        for left in messages:
            behind = self._lanes.get(left.lane)
            if behind is None:
                batches.setdefault(left.outlet, []).append(left)
            else:
                behind.append(left)
        for outlet, batch in batches.items():
            self._lanes.update((left.lane, []) for left in batch)
            task = self._loop.create_task(self._deliver(outlet, batch), name=f"dispytch left to {outlet.alias}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, outlet: Outlet, batch: list[LeftMessage]) -> None:
        goes_on = self._give_up
        outcomes: Sequence[Exception | None] = [
            ProducerTimeout(f"{left.message!r} was not confirmed when the process ended: it may have been delivered")
            for left in batch
        ]
        try:
            outcomes = await outlet.deliver([left.message for left in batch])
            goes_on = self._begin
        except Exception as exc:  # What hinders all of them is the outcome of each.
            outcomes = [exc] * len(batch)
            goes_on = self._begin
        finally:  # Cancelled: the loop ends.
            self._end(outlet.alias, batch, outcomes)
            goes_on([left for lane in {left.lane: None for left in batch} for left in self._lanes.pop(lane)])

    def _give_up(self, messages: Sequence[LeftMessage]) -> None:
        for left in messages:
            self._end(left.outlet.alias, [left], [_closed(left)])

    def _end(self, alias: str, batch: Sequence[LeftMessage], outcomes: Sequence[Exception | None]) -> None:
        for left, error in zip(batch, outcomes, strict=True):
            self._tell(left, error)
        with self._changed:
            self._pending[alias] -= len(batch)
            self._changed.notify_all()

    def _tell(self, left: LeftMessage, error: Exception | None) -> None:
        try:
            self._settle(left, error)
        except Exception:
            logger.exception("what became of %r could not be told: %r", left.message, error)


def _closed(left: LeftMessage) -> NotStartedError:
    return NotStartedError(f"{left.message!r} was not sent: the connections of this process are closed")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
