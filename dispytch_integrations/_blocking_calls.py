"""Work handed to an event loop from threads, and from other event loops, which wait for its outcome."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar

from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, NotStartedError, ProducerTimeout

__all__ = ["Calls", "refuse_patched_threads"]

_T = TypeVar("_T")

_GRACE = 1.0
"""Seconds beyond the work's own deadline after which the loop itself is given up."""
_LOOK = 0.5
"""Seconds between two looks at whether the loop is still there."""


class Calls:
    """The calls to one event loop. Threads that call at the same time share one wake-up of it.

    Waking a loop is a system call and a switch of threads: most of what a hand-off costs.
    """

    __slots__ = ("_loop", "_waiting", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[_Call[Any]] = deque()
        self._woken = False

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]], *, limit: float | None) -> _T:
        """Run `work` on the loop, in a copy of the caller's context; return its result, or raise what it raises.

        `limit`: seconds after which the work ends by itself (None: it may last). A loop that lets it last longer is
        stuck: then the call is given up. Raises BrokerUnavailableError when the work was never begun,
        ProducerTimeout when it was, NotStartedError when the loop does not run.
        """
        call = _BlockingCall(work, copy_context())
        self._hand_over(call)
        ended = False
        try:
            self._wait(call, limit)
            ended = True
        finally:
            # Whatever ends the wait, Ctrl-C too, ends the work.
            if not ended and not self._withdraw(call):
                self._cancel(call)
        return call.outcome()

    async def arun(self, work: Callable[[], Coroutine[Any, Any, _T]], *, limit: float | None) -> _T:
        """`run` for a caller on another event loop, which goes on meanwhile; cancelled, the work is cancelled."""
        if not self._loop.is_running():
            raise self._gone()
        call = _AwaitedCall(work, copy_context())
        self._hand_over(call)
        try:
            async with asyncio.timeout(None if limit is None else limit + _GRACE):
                await call.done
        except TimeoutError:
            raise self._stuck(call, limit) from None
        finally:
            ended = call.done.done() and not call.done.cancelled()
            if not ended and not self._withdraw(call):
                self._cancel(call)
        return call.outcome()

    def _hand_over(self, call: _Call[Any]) -> None:
        self._waiting.append(call)
        # After the append: the loop clears the flag before it looks at the queue, so no call is left behind.
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._begin)
            except RuntimeError:
                self._woken = False  # The loop is closed; whoever waits finds that out.

    def _begin(self) -> None:
        self._woken = False
        while True:
            try:
                call = self._waiting.popleft()
            except IndexError:  # Empty, or the last one was withdrawn meanwhile.
                return
            call.task = self._loop.create_task(call.run(), context=call.context)

    def _wait(self, call: _BlockingCall[Any], limit: float | None) -> None:
        if not self._loop.is_running():
            raise self._gone()
        # One system call in the usual case; the clock is read only when it gets late.
        if call.done.acquire(timeout=_LOOK):
            return
        end = None if limit is None else time.monotonic() + limit + _GRACE - _LOOK
        while not call.done.acquire(timeout=_LOOK):
            if not self._loop.is_running():
                raise self._gone()
            if end is not None and time.monotonic() >= end:
                raise self._stuck(call, limit)

    def _withdraw(self, call: _Call[Any]) -> bool:
        try:
            self._waiting.remove(call)
        except ValueError:
            return False
        return True

    def _cancel(self, call: _Call[Any]) -> None:
        def cancel() -> None:
            if call.task is not None:
                call.task.cancel()

        try:
            self._loop.call_soon_threadsafe(cancel)
        except RuntimeError:
            pass  # The loop is closed: nothing runs on it.

    def _stuck(self, call: _Call[Any], limit: float | None) -> Exception:
        if self._withdraw(call):
            return BrokerUnavailableError(
                f"nothing was sent: the event loop took no work for {limit} s; something blocks it, likely a "
                f"synchronous call in a coroutine or hook (python -X dev names it)"
            )
        return ProducerTimeout(
            f"not confirmed within {limit} s, and the event loop itself does not answer: it may have been delivered; "
            f"something blocks the loop, likely a synchronous call in a coroutine or hook (python -X dev names it)"
        )

    def _gone(self) -> NotStartedError:
        return NotStartedError(
            "the event loop of the emitter's connection is not running: the app has shut down or not started yet; "
            "emit between its start-up and its shutdown"
        )


class _Call(Generic[_T]):
    """One call: what to run, and what became of it."""

    __slots__ = ("context", "error", "result", "task", "work")

    result: _T

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]], context: Context) -> None:
        self.work = work
        self.context = context
        self.task: asyncio.Task[None] | None = None
        self.error: Exception | None = None

    def finish(self) -> None:
        """Let whoever waits go on; called on the loop."""
        raise NotImplementedError

    async def run(self) -> None:
        """Run the work and let whoever waits go on, whatever happened."""
        try:
            self.result = await self.work()
        except Exception as exc:
            self.error = exc
        finally:
            self.finish()

    def outcome(self) -> _T:
        """The work's result; raises what it raised."""
        error, self.error = self.error, None  # Else the traceback's frame and the error keep each other alive.
        if error is not None:
            try:
                raise error
            finally:
                del error
        try:
            return self.result
        except AttributeError:
            raise ProducerTimeout(
                "the event loop ended before the confirmation: it may have been delivered; the app was shutting down"
            ) from None


class _BlockingCall(_Call[_T]):
    """A call whose outcome a thread waits for."""

    __slots__ = ("done",)

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]], context: Context) -> None:
        super().__init__(work, context)
        # A bare lock, held until the outcome is there: an Event or a Future costs several of them.
        self.done = threading.Lock()
        self.done.acquire()

    def finish(self) -> None:
        self.done.release()


class _AwaitedCall(_Call[_T]):
    """A call whose outcome a task of another event loop awaits."""

    __slots__ = ("done", "loop")

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]], context: Context) -> None:
        super().__init__(work, context)
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()

    def finish(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            pass  # The caller's loop is closed: nobody waits any more.

    def _wake(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def refuse_patched_threads() -> None:
    """Raise ConfigurationError where no event loop can run in a thread: gevent, eventlet, uWSGI without threads."""
    # uWSGI puts this module there. Its older versions hold the GIL between requests, unless told otherwise.
    if getattr(sys.modules.get("uwsgi"), "has_threads", True) == 0:
        raise ConfigurationError(
            "uWSGI runs without Python threads, so the emitter's event loop would stand still between requests, and "
            "events with it; start uWSGI with --enable-threads"
        )
    by = _patched_by()
    if by is None:
        return
    raise ConfigurationError(
        f"threads are patched by {by}, so the emitter's event loop cannot have a thread of its own; use another kind "
        f"of worker (gunicorn --worker-class gthread, celery --pool prefork or threads), or emit from a process that "
        f"is not patched"
    )


def _patched_by() -> str | None:
    # Only what is imported already can have patched anything.
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None
