"""The emitter for synchronous code (scripts, Celery, Flask, `def` routes): where threads and event loops meet."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from inspect import isawaitable
from typing import Any, TypeVar

from dispytch_integrations._blocking_calls import Calls, refuse_patched_threads
from dispytch_integrations._outlet import OnTimeout, Outlet
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import DispytchError, ProducerTimeout, WrongLoopError, WrongProcessError
from dispytch_integrations.events import EventBase
from dispytch_integrations.message import Message

__all__ = ["BlockingEmitter"]

_Callback = TypeVar("_Callback", bound=OnTimeout)


class BlockingEmitter:
    """Emits events from threads over the connections of an event loop that runs in another thread.

    `emitter`: whose connections are used; `loop`: the event loop they belong to. `connect_blocking` gives you a
    ready one, with a loop of its own; BlockingEmitterDep one over a FastAPI app's. Any number of threads may share it.

    Events are prepared in the calling thread: validation, `before_send` hooks and context variables are the caller's.
    The hooks `sent` and `failed` run on the loop's thread, in a copy of the caller's context, and must not block.

    Raises ConfigurationError where gevent or eventlet has patched threads.
    """

    def __init__(self, emitter: EventEmitter, loop: asyncio.AbstractEventLoop) -> None:
        refuse_patched_threads()
        self._emitter = emitter
        self._calls = Calls(loop)
        self._pid = os.getpid()
        self._on_timeout: OnTimeout | None = None

    def emit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        """Send one event; return when the broker has confirmed it.

        `headers`: metadata beside the payload, str to str (numbers, UUIDs, dates, dicts become text).

        Raises what `EventEmitter.emit` raises: ProducerTimeout, UnroutableError, BrokerUnavailableError, RouteError,
        HeaderError, NotStartedError; further WrongLoopError when called where an event loop runs, which it would
        block, and WrongProcessError in a forked child of the process that opened the connection.
        """
        self._check_place("emit")
        outlet, message = self._emitter.prepare(event, headers)

        async def deliver() -> Exception | None:
            return (await outlet.deliver((message,)))[0]

        error = self._calls.run(deliver, limit=outlet.timeout)
        if error is not None:
            self._report(outlet, message, error)

    def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """Send many events at once; return when the broker has confirmed them all.

        Events of one ordering key keep their order; the others may overtake each other. `headers` go with each.
        All are prepared before the first is sent: when one cannot be prepared, none is sent.

        Raises one ExceptionGroup with the error of each event that failed; each has a note that names its event.
        """
        self._check_place("emit_many")
        emitter = self._emitter
        prepared = emitter.prepare_many(events, headers)
        if not prepared:
            return
        limit = _longest(outlet.timeout for outlet, _ in prepared)
        failures: list[Exception] = []
        for outlet, message, error in self._calls.run(lambda: emitter.attempt_many(prepared), limit=limit):
            try:
                self._report(outlet, message, error)
            except Exception as exc:
                exc.add_note(repr(message))
                failures.append(exc)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(prepared)} events were not confirmed", failures)

    def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """Ask every broker for an answer, in parallel; by alias None, or what is wrong.

        `timeout`: seconds; None: each broker's own. Raises as `EventEmitter.ping`, and as `emit` for the place.
        """
        self._check_place("ping")
        return self._calls.run(lambda: self._emitter.ping(timeout=timeout), limit=timeout)

    def on_timeout(self, callback: _Callback) -> _Callback:
        """Call `callback(event)` for each event that is not confirmed in time, instead of raising or logging.

        A decorator. A plain function runs in the thread that emits, so it may block and use a database; a coroutine
        function runs on the loop's thread while the emitting thread waits for it. What it raises, the emit raises.
        Callbacks given to the underlying emitter or to `connect_blocking(on_timeout=...)` are called the same way.
        """
        self._on_timeout = callback
        return callback

    def _report(self, outlet: Outlet, message: Message, error: Exception) -> None:
        callback = self._on_timeout or self._emitter.timeout_callback(outlet)
        event = message.event
        if callback is None or event is None or not isinstance(error, ProducerTimeout):
            raise error
        result = callback(event)
        if isawaitable(result):
            # How long a callback may take is its author's business.
            self._calls.run(lambda: _awaited(result), limit=None)

    def _check_place(self, method: str) -> None:
        if self._pid != os.getpid():
            self._forked()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        raise WrongLoopError(
            f"{method}() was called where an event loop is running, and would block it: write "
            f"`await emitter.{method}(...)` with the async emitter of connect() or EmitterDep, "
            f"or go to a thread: `await asyncio.to_thread(emitter.{method}, ...)`"
        )

    def _forked(self) -> None:
        raise WrongProcessError(
            f"the emitter's connection was opened in process {self._pid}, before a fork; "
            f"open one in this process: call connect_blocking() or start the app after the fork"
        )


async def _awaited(awaitable: Any) -> None:
    await awaitable


def _longest(timeouts: Iterable[float | None]) -> float | None:
    longest = 0.0
    for timeout in timeouts:
        if timeout is None:
            return None
        longest = max(longest, timeout)
    return longest
