"""The emitter for synchronous code (scripts, Celery, Flask, `def` routes): where threads and event loops meet."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from inspect import isawaitable
from types import TracebackType
from typing import Any, Literal, TypeVar

from dispytch_integrations._blocking_calls import Calls, refuse_patched_threads
from dispytch_integrations._blocking_loop import Opened, loop_thread
from dispytch_integrations._blocking_way import PING_SECONDS, Failed, Prepared, Way, confirmed_of, longest_timeout
from dispytch_integrations._broker import Broker
from dispytch_integrations._misuse import SyncBlock
from dispytch_integrations._outlet import OnTimeout, Outlet
from dispytch_integrations.brokers import Brokers, Outbox, connect
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import (
    DispytchError,
    NotStartedError,
    ProducerTimeout,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import Serializer
from dispytch_integrations.settings import Config

__all__ = ["BlockingBrokers", "BlockingEmitter", "connect_blocking"]

_Callback = TypeVar("_Callback", bound=OnTimeout)
_T = TypeVar("_T")


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
        self._way = Way(emitter, Calls(loop))
        self._pid = os.getpid()
        self._on_timeout: OnTimeout | None = None

    def emit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        """Send one event; return when the broker has confirmed it.

        `headers`: metadata beside the payload, str to str (numbers, UUIDs, dates, dicts become text).

        Raises what `EventEmitter.emit` raises: ProducerTimeout, UnroutableError, BrokerUnavailableError, RouteError,
        HeaderError, NotStartedError; further WrongLoopError when called where an event loop runs, which it would
        block, and WrongProcessError in a forked child of the process that opened the connection.
        """
        emitter, calls = way = self._reach("emit")
        outlet, message = emitter.prepare(event, headers)

        async def deliver() -> Exception | None:
            return (await outlet.deliver((message,)))[0]

        error = calls.run(deliver, limit=outlet.timeout)
        if error is None:
            self._observe(((outlet, message),), ())
            return
        self._observe((), ((outlet, message, error),))
        self._report(way, outlet, message, error)

    def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """Send many events at once; return when the broker has confirmed them all.

        Events of one ordering key keep their order; the others may overtake each other. `headers` go with each.
        All are prepared before the first is sent: when one cannot be prepared, none is sent.

        Raises one ExceptionGroup with the error of each event that failed; each has a note that names its event.
        """
        emitter, calls = way = self._reach("emit_many")
        prepared = emitter.prepare_many(events, headers)
        if not prepared:
            return
        failed = calls.run(lambda: emitter.attempt_many(prepared), limit=longest_timeout(prepared))
        self._observe(confirmed_of(prepared, failed), failed)
        failures: list[Exception] = []
        for outlet, message, error in failed:
            try:
                self._report(way, outlet, message, error)
            except Exception as exc:
                exc.add_note(repr(message))
                failures.append(exc)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(prepared)} events were not confirmed", failures)

    def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """Ask every broker for an answer, in parallel; by alias None, or what is wrong.

        `timeout`: seconds; None: each broker's own. Raises as `EventEmitter.ping`, and as `emit` for the place.
        """
        emitter, calls = self._reach("ping")
        return calls.run(lambda: emitter.ping(timeout=timeout), limit=PING_SECONDS if timeout is None else timeout)

    def on_timeout(self, callback: _Callback) -> _Callback:
        """Call `callback(event)` for each event that is not confirmed in time, instead of raising or logging.

        A decorator. A plain function runs in the thread that emits, so it may block and use a database; a coroutine
        function runs on the loop's thread while the emitting thread waits for it. What it raises, the emit raises.
        Callbacks given to the underlying emitter or to `connect_blocking(on_timeout=...)` are called the same way.
        """
        self._on_timeout = callback
        return callback

    @property
    def producers(self) -> Mapping[str, Producer]:
        """The producer of each broker, by alias; they belong to the loop's thread: look, do not send."""
        return self._reach("producers").emitter.producers

    def _observe(self, confirmed: Sequence[Prepared], failed: Sequence[Failed]) -> None:
        """For integrations: what became of the messages, in the thread that emits, before an error is raised."""

    def _report(self, way: Way, outlet: Outlet, message: Message, error: Exception) -> None:
        callback = self._on_timeout or way.emitter.timeout_callback(outlet)
        event = message.event
        if callback is None or event is None or not isinstance(error, ProducerTimeout):
            raise error
        result = callback(event)
        if isawaitable(result):
            # How long a callback may take is its author's business.
            way.calls.run(lambda: _awaited(result), limit=None)

    def _reach(self, method: str) -> Way:
        """Where to emit; raises when `method` cannot be called here."""
        if self._pid != os.getpid():
            raise WrongProcessError(
                f"the emitter's connection was opened in process {self._pid}, before a fork; "
                f"open one in this process: start the app after the fork, or use connect_blocking()"
            )
        refuse_running_loop(method)
        return self._way


_ENTERED = "`async with connect(...) as emitter:`", "brokers"
"""What to write instead of `start` and `stop`, and what has these methods."""


def refuse_running_loop(method: str, instead: tuple[str, str] | None = None) -> None:
    """Raise WrongLoopError where an event loop runs, which a call of `method` would block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    given = ", ..." if instead is None else ""
    written, owner = instead or (
        f"`await emitter.{method}(...)` with the async emitter of connect() or EmitterDep",
        "emitter",
    )
    raise WrongLoopError(
        f"{method}() was called where an event loop is running, and would block it: write {written}, "
        f"or go to a thread: `await asyncio.to_thread({owner}.{method}{given})`"
    )


class BlockingBrokers(SyncBlock, AbstractContextManager[BlockingEmitter]):
    """The brokers of synchronous code and their one emitter; made by `connect_blocking`.

    Use it as `with`, or call `start` and `stop`. Both are counted: entered twice, it is opened once and closed at the
    second exit. What is still open when the interpreter exits is flushed and closed then, within `shutdown_timeout`.

    All connections of a process share one event loop in a daemon thread, which is started at first use. A forked
    child (multiprocessing, Celery, a preloading server) opens connections of its own at its first emit, within the
    emit's `timeout`; those of the parent are left alone.
    """

    def __init__(self, brokers: Callable[[], Brokers]) -> None:
        self._new_brokers = brokers
        self._users = 0
        self._opened: Opened | None = None
        self._failure: DispytchError | None = None  # Whoever has called start may have gone on, as Celery's signals do.
        self._locks: dict[int, threading.RLock] = {}
        self.emitter: BlockingEmitter = _OwnEmitter(self)
        """The emitter; raises NotStartedError until `start`, and after the last `stop`."""

    def start(self) -> None:
        """Connect to all brokers, in parallel; those that do not answer are tried again until `startup_timeout`.

        Raises ConfigurationError with everything that is wrong in the settings, StartupError when a required broker
        was not reached, WrongLoopError where an event loop is running.
        """
        refuse_running_loop("start", _ENTERED)
        with self._lock:
            if self._opened is None or self._opened.foreign or self._opened.lost:
                try:
                    self._open(wait=True)
                except DispytchError as exc:
                    self._failure = exc
                    raise
            self._failure = None
            self._users += 1

    def stop(self) -> None:
        """Undo one `start`; the last one refuses new emits, waits for those in flight, and closes the connections.

        Harmless when not started. Raises WrongLoopError on the loop's own thread.
        """
        refuse_running_loop("stop", _ENTERED)
        with self._lock:
            if self._users == 0:
                return
            self._users -= 1
            if self._users == 0 and self._opened is not None:
                opened, self._opened = self._opened, None
                opened.close()

    def __enter__(self) -> BlockingEmitter:
        self.start()
        return self.emitter

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def brokers(self) -> Mapping[str, Broker]:
        """The brokers by alias, to look at their state; empty while not started."""
        opened = self._opened
        return {} if opened is None or opened.foreign else opened.brokers.brokers

    def ask(self, question: Callable[[Brokers], Awaitable[_T]], *, limit: float | None) -> _T:
        """For integrations: await `question(brokers)` on the loop's thread, for at most `limit` seconds and some grace.

        Raises NotStartedError, and WrongLoopError where an event loop runs.
        """
        refuse_running_loop("ask")
        opened = self._reach()
        return opened.thread.calls.run(lambda: _of(question(opened.brokers)), limit=limit)

    def _reach(self) -> Opened:
        """What is open in this process; in a forked child of the one that has opened it, connect anew.

        Raises NotStartedError; in a child also ConfigurationError.
        """
        opened = self._opened
        if opened is not None and not opened.foreign and not opened.lost:
            return opened
        with self._lock:
            opened = self._opened
            if opened is None or (opened.lost and not opened.foreign):
                if self._failure is not None:
                    raise NotStartedError(
                        f"the emitter's connection is not open, since start() has failed: {self._failure}"
                    ) from self._failure
                raise NotStartedError(
                    "the emitter's connection is not open: emit inside `with connect_blocking(...) as emitter:`, or "
                    "between start() and stop(); it is closed when the interpreter exits"
                )
            if opened.foreign:
                opened = self._open(wait=False)
            return opened

    def _open(self, *, wait: bool) -> Opened:
        opened = Opened(loop_thread(), self._new_brokers())
        opened.open(wait=wait)
        self._opened = opened
        return opened

    @property
    def _lock(self) -> threading.RLock:
        # One per process: a lock that another thread held at the fork would stay locked in the child for ever.
        return self._locks.setdefault(os.getpid(), threading.RLock())


class _OwnEmitter(BlockingEmitter):
    """The emitter of BlockingBrokers: finds out at each emit what is open in this process."""

    def __init__(self, brokers: BlockingBrokers) -> None:
        self._brokers = brokers
        self._on_timeout = None

    def _reach(self, method: str) -> Way:
        refuse_running_loop(method)
        opened = self._brokers._reach()
        return Way(opened.brokers.emitter, opened.thread.calls)


async def _of(awaitable: Awaitable[_T]) -> _T:
    return await awaitable


async def _awaited(awaitable: Any) -> None:
    await awaitable


def connect_blocking(
    config: Config = None,
    *,
    timeout: float | None = 5.0,
    startup_timeout: float = 30.0,
    shutdown_timeout: float = 10.0,
    required: bool | None = None,
    on_timeout: Literal["raise", "log"] | OnTimeout = "raise",
    source: str | None = None,
    cloudevents: bool | str = True,
    prefix: str = "",
    max_size: int | None = None,
    hooks: Sequence[Hook] = (),
    serializer: Serializer | None = None,
    client: Mapping[str, Any] | None = None,
    outbox: Outbox | None = None,
    **options: Any,
) -> BlockingBrokers:
    """The emitter of one or several brokers for synchronous code, connected inside a `with` block.

        with connect_blocking("kafka://localhost:9092", acks="all") as emitter:
            emitter.emit(OrderPlaced(order_id=1))

    Without `with`, where an app has no end that one could wait for:

        brokers = connect_blocking("kafka://localhost:9092")
        brokers.start()                                 # closed when the interpreter exits, or by brokers.stop()
        brokers.emitter.emit(OrderPlaced(order_id=1))

    All arguments are those of `dispytch_integrations.connect`. Functions among them (a URL, a secret) are called on
    the loop's thread; `on_timeout` in the thread that emits, see `BlockingEmitter.on_timeout`.

    Nothing is read or checked before the start. Raises there ConfigurationError (gevent and eventlet too),
    MissingExtraError, StartupError.
    """

    def brokers() -> Brokers:
        return connect(
            config,
            timeout=timeout,
            startup_timeout=startup_timeout,
            shutdown_timeout=shutdown_timeout,
            required=required,
            on_timeout=on_timeout,
            source=source,
            cloudevents=cloudevents,
            prefix=prefix,
            max_size=max_size,
            hooks=hooks,
            serializer=serializer,
            client=client,
            outbox=outbox,
            **options,
        )

    return BlockingBrokers(brokers)
