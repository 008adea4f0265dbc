"""An end for futures that nobody else ends: one timer and a queue ordered by time.

Cheaper than a limit on the waiting task (`_deadlines`), where what is awaited is a future that is ours to end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

__all__ = ["Expired", "Expiry"]


class Expired(TimeoutError):
    """The future's time is over."""


class _Queue:
    """Futures with the same time to live: the first in is the first to expire."""

    __slots__ = ("armed", "items", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self.armed = False

    def sweep(self) -> None:
        items, now = self.items, self.loop.time()
        while items and (items[0][1].done() or items[0][0] <= now):
            future = items.popleft()[1]
            if not future.done():
                future.set_exception(Expired())
        self.armed = bool(items)
        if items:
            self.loop.call_at(items[0][0], self.sweep)


class Expiry:
    """Lets futures of one event loop fail with `Expired` after their time."""

    __slots__ = ("_loop", "_queues")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queues: dict[float, _Queue] = {}

    def watch(self, future: asyncio.Future[Any], timeout: float) -> None:
        """Let `future` fail after `timeout` seconds, unless it is done by then."""
        queue = self._queues.get(timeout)
        if queue is None:
            queue = self._queues[timeout] = _Queue(self._loop)
        items = queue.items
        # Those that are done make room, so that the queue holds what is in flight and not what was within `timeout`.
        while items and items[0][1].done():
            items.popleft()
        when = self._loop.time() + timeout
        items.append((when, future))
        if not queue.armed:
            queue.armed = True
            self._loop.call_at(when, queue.sweep)
