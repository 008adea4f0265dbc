"""One thread for a synchronous database: neither the event loop nor the app's threads wait for it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._forks import not_in_a_fork
from dispytch_integrations.outbox._sql import CHANNEL

__all__ = ["OneThread", "listen_blocking", "no_listener", "shut_down"]

_T = TypeVar("_T")

_LOOK = 0.5
"""Seconds after which a thread that listens looks whether it should end."""


class OneThread:
    """Runs functions one after the other on a thread that starts with the first and ends with `end`.

    A database connection that is opened in one of them may be used in all: keep it in a `threading.local`, since a
    thread that hangs is replaced. `at_end`: called in each thread at its end, to close what it keeps. `left`: called on
    the event loop when a thread is left to what it does, to break it off (see `shut_down`).

    A fork of this process waits, for a second at most, until no function runs.
    """

    def __init__(
        self, name: str, at_end: Callable[[], None] = lambda: None, left: Callable[[], None] = lambda: None
    ) -> None:
        self._name = name
        self._at_end = at_end
        self._left = left
        self._queue: SimpleQueue[Callable[[], None] | None] | None = None

    async def run(self, function: Callable[[], _T]) -> _T:
        """What the function returns, or raises.

        Cancelled, the thread is left to what it does, which may hang in a dead connection: what follows runs on a new
        one. The process does not wait for it at its end.
        """
        return await self._run(function, not_in_a_fork())

    async def wait(self, function: Callable[[], _T]) -> _T:
        """As `run`, for a function that waits for most of its time: a fork does not wait for it."""
        return await self._run(function, nullcontext())

    async def _run(self, function: Callable[[], _T], guard: AbstractContextManager[None]) -> _T:
        queue = self._queue
        if queue is None:
            queue = self._queue = SimpleQueue()
            threading.Thread(target=_work, args=(queue, self._at_end), name=self._name, daemon=True).start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        queue.put(partial(_call, function, guard, loop, future))
        try:
            return await future
        except asyncio.CancelledError:
            if self._queue is queue:
                self.end()
                self._left()
            raise

    def end(self) -> None:
        """Let the thread end once it has run what it was given."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.put(None)


def _work(queue: SimpleQueue[Callable[[], None] | None], at_end: Callable[[], None]) -> None:
    while (call := queue.get()) is not None:
        call()
        del call  # It would keep what it holds until the next one comes.
    with suppress(Exception), not_in_a_fork():  # Nobody waits for it any more.
        at_end()


def _call(
    function: Callable[[], _T],
    guard: AbstractContextManager[None],
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[_T],
) -> None:
    def tell() -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(cast("_T", result))
        else:
            future.set_exception(error)

    result: _T | None = None
    error: BaseException | None = None
    try:
        with guard:
            result = function()
    except BaseException as exc:
        error = exc
    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:
        pass  # The loop is closed: nobody waits.


def shut_down(driver: Any) -> None:
    """End what a thread waits for on a driver's connection: psycopg, psycopg2, PyMySQL; others end by timeouts."""
    with suppress(Exception):
        number = driver.fileno() if hasattr(driver, "fileno") else driver._sock.fileno()
        with socket.socket(fileno=os.dup(number)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def listen_blocking(driver: Any, wake: Callable[[], None], stopped: threading.Event) -> None:
    """Wait for NOTIFY on a psycopg connection that commits each statement, until stopped; raises when it is lost."""
    driver.execute(f"listen {CHANNEL}")
    wake()
    while not stopped.is_set():
        for _ in driver.notifies(timeout=_LOOK, stop_after=1):
            wake()


def no_listener(driver: str) -> ConfigurationError:
    """The error for a driver that cannot wait for NOTIFY."""
    return ConfigurationError(f"notify=True needs psycopg or asyncpg, and the driver is {driver}; leave it out")
