"""The event loop of a process's synchronous code: one daemon thread, shared, closed when the interpreter exits."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import ParamSpec, TypeVar

from dispytch_integrations._blocking_calls import Calls, refuse_patched_threads
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import DispytchError, NotStartedError

__all__ = ["LoopThread", "Opened", "loop_thread"]

logger = logging.getLogger("dispytch_integrations.blocking")

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SETTINGS = 30.0
"""Seconds that reading the settings may take, a client library's import included."""
_LATE = ("concurrent.futures.thread", "encodings.idna")
"""What asyncio imports to look up a host, in its thread: see Backend.modules."""
_CLOSING = 3.0
"""Seconds beyond `shutdown_timeout` that closing may take."""


class Opened:
    """Brokers that this process opens on its loop thread.

    `pid`: the process; in a forked child of it, nothing of this may be touched.
    """

    def __init__(self, thread: LoopThread, brokers: Brokers) -> None:
        self.pid = os.getpid()
        self.thread = thread
        self.brokers = brokers
        self._starting: asyncio.Task[None] | None = None

    def open(self, *, wait: bool) -> None:
        """Connect; without `wait` only until the brokers are known, while the connections are made in the background.

        Raises ConfigurationError, StartupError.
        """
        calls, ready = self.thread.calls, False
        self.thread.opened.add(self)
        try:
            if wait:
                calls.run(self._begin, limit=_SETTINGS)
                timeouts = [broker.options.startup_timeout for broker in self.brokers.brokers.values()]
                calls.run(self._finish, limit=max(timeouts, default=0.0) + _CLOSING)
            else:
                calls.run(lambda: self.brokers.start(wait=False), limit=_SETTINGS)
            ready = True
        finally:
            if not ready:
                self.thread.opened.discard(self)

    def close(self) -> None:
        """Flush and close within `shutdown_timeout`. In a forked child nothing is touched: it is the parent's."""
        if not self.foreign and not self.thread.gone:
            self.thread.close([self])

    @property
    def foreign(self) -> bool:
        """Did another process open them, before a fork?"""
        return self.pid != os.getpid()

    @property
    def lost(self) -> bool:
        """Has the loop ended? Then they are of no more use."""
        return self.thread.gone

    async def _begin(self) -> None:
        self._starting = asyncio.create_task(self.brokers.start(), name="dispytch start")
        # A turn or two of the loop: the settings are read in the start's first step.
        while not self.brokers.brokers and not self._starting.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        if self._starting.done():
            await self._starting

    async def _finish(self) -> None:
        if self._starting is not None:
            await self._starting


class LoopThread:
    """An event loop in a daemon thread.

    `opened`: what is open on it.

    In a forked child this object is a lifeless copy of the parent's, and all it refers to has to stay: a
    connection that was collected there would take the parent's socket out of the parent's epoll. It does stay, since
    the frames of threads that did not survive the fork keep their references.
    """

    def __init__(self) -> None:
        refuse_patched_threads()
        for name in _LATE:
            import_module(name)
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_Lookups())
        self.calls = Calls(self.loop)
        self.opened: set[Opened] = set()
        running = threading.Event()
        self.loop.call_soon(running.set)
        self._thread = threading.Thread(target=self._run, name="dispytch loop", daemon=True)
        self._thread.start()
        running.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(_end_tasks())
        finally:
            self.loop.close()

    @property
    def gone(self) -> bool:
        """Has the loop ended?"""
        return self.loop.is_closed()

    def close(self, opened: Iterable[Opened]) -> None:
        """Flush and close several, in parallel, each within its `shutdown_timeout`. Logs what was abandoned."""
        ending = list(opened)
        self.opened.difference_update(ending)

        async def stop() -> None:
            await asyncio.gather(*(each.brokers.stop() for each in ending))

        timeouts = [broker.options.shutdown_timeout for each in ending for broker in each.brokers.brokers.values()]
        self.calls.run(stop, limit=max(timeouts, default=0.0) + _CLOSING)

    def end(self) -> None:
        """Close all that is open, then the loop itself."""
        if self.gone:
            return
        try:
            self.close(self.opened)
        except DispytchError as exc:
            logger.error("connections were not closed at exit: %s", exc)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSING)


class _Fork:
    """Was Python told of the fork that made this process? uWSGI does not."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        if hasattr(os, "register_at_fork"):  # Not on Windows, where nothing forks.
            os.register_at_fork(after_in_child=self._after)

    def _after(self) -> None:
        self._pid = os.getpid()

    @property
    def told(self) -> bool:
        return self._pid == os.getpid()


_fork = _Fork()

# By process: after a fork neither the parent's thread nor its lock is of use, and fork hooks do not run under uWSGI.
_threads: dict[int, LoopThread] = {}
_locks: dict[int, threading.Lock] = {}
_exiting = threading.Event()


def loop_thread() -> LoopThread:
    """The loop thread of this process, started if need be.

    Raises ConfigurationError where gevent or eventlet has patched threads, NotStartedError when the interpreter exits.
    """
    pid = os.getpid()
    with _locks.setdefault(pid, threading.Lock()):
        thread = _threads.get(pid)
        if thread is not None and not thread.gone:
            return thread
        if _exiting.is_set():
            raise NotStartedError("the interpreter is exiting: no connection can be opened any more")
        if not _threads:
            atexit.register(_at_exit)
        elif not _fork.told:
            logger.warning(
                "this process was forked from one that had started the emitter, and nobody told Python: it may hang at "
                "its end; under uWSGI start the brokers in each worker, postfork(brokers.start), and not at import"
            )
        thread = _threads[pid] = LoopThread()
        return thread


def _at_exit() -> None:
    _exiting.set()
    thread = _threads.get(os.getpid())
    if thread is not None:
        thread.end()


class _Lookups(ThreadPoolExecutor):
    """Where the loop looks up hosts. A pool takes no work once the interpreter ends, and an exit function that emits,
    or a thread that outlives the main one, could connect to no name."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run `fn` in a thread: of the pool, or, when that is closed, of its own."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            future: Future[_T] = Future()

            def run() -> None:
                try:
                    future.set_result(fn(*args, **kwargs))
                except Exception as exc:
                    future.set_exception(exc)

            threading.Thread(target=run, name="dispytch look-up", daemon=True).start()
            return future


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1.0)
