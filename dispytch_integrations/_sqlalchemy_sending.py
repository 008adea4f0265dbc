"""What is sent once a transaction of SQLAlchemy is committed: left to the brokers' event loop, waited for if asked."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextvars import Context
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from dispytch_integrations._blocking_handoff import Handoff, LeftMessage
from dispytch_integrations._broker import Broker
from dispytch_integrations._outlet import Outlet
from dispytch_integrations.errors import BrokerUnavailableError, NotStartedError, WrongLoopError, WrongProcessError
from dispytch_integrations.message import Message, log_fields

__all__ = ["MAX_PENDING", "Parcel", "running_loop", "send", "tell_failure"]

logger = logging.getLogger("dispytch_integrations.sqlalchemy")

MAX_PENDING = 10_000
"""Messages of one broker that may wait for its confirmation; of more, a commit waits for its own."""
_LOOK = 0.5
"""Seconds between two looks at whether the loop is still there."""
_GRACE = 1.0
"""Seconds beyond the broker's timeout after which the wait for a confirmation is given up."""


class Parcel(NamedTuple):
    """A message that goes out after a commit.

    `loop`: the event loop that its connection belongs to; None: the one that runs at the commit. `context`: of whoever
    emitted it. `wait`: does the commit return only when it is confirmed, or has failed?
    """

    outlet: Outlet
    message: Message
    loop: asyncio.AbstractEventLoop | None
    context: Context
    wait: bool


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread; None: there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def send(parcels: Sequence[Parcel]) -> None:
    """Leave messages to their event loops, in their order. Raises nothing but what ends the task that waits."""
    here = running_loop()
    batches: dict[_LeftToLoop, list[Parcel]] = {}
    for parcel in parcels:
        loop = parcel.loop or here
        if loop is None:
            tell_failure(parcel, NotStartedError(f"{parcel.message!r} was not sent: no event loop runs here"))
        else:
            batches.setdefault(_left_to(parcel.outlet, loop), []).append(parcel)
    waits = [wait for left, batch in batches.items() if (wait := left.leave(batch, here)) is not None]
    for wait in waits:
        wait.until_done(here)


def tell_failure(parcel: Parcel, error: Exception) -> None:
    """Report a message whose transaction is committed and that was not handed to its broker at all."""
    if parcel.outlet.has_hooks:
        parcel.outlet.call_hooks((parcel.message,), (error,))
    parcel.context.copy().run(_log, parcel.message, error)


def _log(message: Message, error: Exception) -> None:
    logger.error(
        "%s (id %s, to %s:%s) was not delivered after its transaction was committed: %s",
        message.type,
        message.id,
        message.broker,
        message.destination,
        error,
        extra=log_fields(message.type, message.id, message.broker, message.destination),
    )


# -- per broker ------------------------------------------------------------------------------------------------------

_handoffs: WeakKeyDictionary[Outlet, _LeftToLoop] = WeakKeyDictionary()
_making = threading.Lock()


def _left_to(outlet: Outlet, loop: asyncio.AbstractEventLoop) -> _LeftToLoop:
    found = _handoffs.get(outlet)
    if found is not None and found.loop is loop:
        return found
    with _making:
        found = _handoffs.get(outlet)
        if found is None or found.loop is not loop:
            found = _handoffs[outlet] = _LeftToLoop(loop)
            if isinstance(outlet, Broker):
                outlet.before_stop = found.drain
        return found


class _LeftToLoop(Handoff):
    """A hand-off that the loop's own thread uses as well, without another thread in between.

    In order per lane, across commits: see Handoff.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop, self._settled, lambda alias: MAX_PENDING)
        self.loop = loop
        self._waits: dict[Message, _Wait] = {}
        self._draining: asyncio.Event | None = None

    def leave(self, parcels: Sequence[Parcel], here: asyncio.AbstractEventLoop | None) -> _Wait | None:
        """Leave messages of one broker; what comes back can be waited for. None: nobody wants to."""
        left = [LeftMessage(parcel.outlet, parcel.message, parcel.context) for parcel in parcels]
        wait = None
        # From a thread, too many wait for room.
        full = here is not None and self.pending >= MAX_PENDING
        if full or any(parcel.wait for parcel in parcels):
            wait = _Wait(self.loop, left)
            self._waits.update((each.message, wait) for each in left)
        if here is self.loop:
            self._begin_here(left)
        else:
            for each in left[self.put(left) :]:
                self._tell(each, NotStartedError(f"{each.message!r} was not sent: its connection is closed"))
        return wait

    async def drain(self, seconds: float) -> None:
        """Let what was left go out, at most that long, and take no more from threads; called before a broker stops."""
        self._draining = asyncio.Event()
        try:
            async with asyncio.timeout(seconds):
                while self.pending:
                    self._draining.clear()
                    await self._draining.wait()
        except TimeoutError:
            pass
        finally:
            self._draining = None
            self.close()

    def _begin_here(self, left: list[LeftMessage]) -> None:
        with self._changed:
            for each in left:
                self._pending[each.outlet.alias] += 1
        self._begin(left)

    def _queue_when_there_is_room(self, left: LeftMessage) -> bool:
        try:
            return super()._queue_when_there_is_room(left)
        except BrokerUnavailableError as exc:
            if left.outlet.has_hooks:
                left.outlet.call_hooks((left.message,), (exc,))
            raise

    def _end(self, alias: str, batch: Sequence[LeftMessage], outcomes: Sequence[Exception | None]) -> None:
        super()._end(alias, batch, outcomes)
        if self._draining is not None and not self.pending:
            self.loop.call_soon_threadsafe(self._draining.set)

    def _settled(self, left: LeftMessage, error: Exception | None) -> None:
        wait = self._waits.pop(left.message, None)
        try:
            if error is not None:
                # A delivery that was refused as a whole has called no hooks.
                refused = isinstance(error, (NotStartedError, WrongLoopError, WrongProcessError))
                if refused and left.outlet.has_hooks:
                    left.outlet.call_hooks((left.message,), (error,))
                left.context.copy().run(_log, left.message, error)
        finally:
            if wait is not None:
                wait.one_done()


class _Wait:
    """The wait of one commit for the end of its deliveries."""

    def __init__(self, loop: asyncio.AbstractEventLoop, left: Sequence[LeftMessage]) -> None:
        self._loop = loop
        self._open = len(left)
        self._lock = threading.Lock()
        self._done: Future[None] = Future()
        timeouts = [each.outlet.timeout for each in left]
        self._limit = None if None in timeouts else max(each or 0.0 for each in timeouts) + _GRACE

    def one_done(self) -> None:
        """One of the messages was confirmed, or has failed."""
        with self._lock:
            self._open -= 1
            done = not self._open
        if done:
            self._done.set_result(None)

    def until_done(self, here: asyncio.AbstractEventLoop | None) -> None:
        """Wait; not where that would block the event loop. What is late is reported when it ends."""
        if here is None:
            self._in_thread()
        elif in_greenlet():
            await_only(self._on_loop())

    async def _on_loop(self) -> None:
        await asyncio.wait({asyncio.wrap_future(self._done)}, timeout=self._limit)

    def _in_thread(self) -> None:
        waited = 0.0
        while self._loop.is_running() and (self._limit is None or waited < self._limit):
            try:
                self._done.result(_LOOK)
            except TimeoutError:
                waited += _LOOK
            else:
                return
