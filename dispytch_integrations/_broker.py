"""One managed broker: its state, its start and stop, and the detection of outages."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

from dispytch_integrations._outlet import Outlet, observed
from dispytch_integrations.backend import Backend, BrokerOptions, scrub
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DispytchError,
    NotStartedError,
    UnconfirmedError,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.message import Message

__all__ = ["Broker", "State"]

logger = logging.getLogger("dispytch_integrations.brokers")

State = Literal["new", "starting", "up", "down", "stopping", "stopped"]


class _Deliver(Protocol):
    async def __call__(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[Exception | None]: ...


_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_PROBE_DELAY = 0.5
_AFTER_MISTAKE = 60.0
"""Seconds before a broker is tried again that has refused us: more often might lock a user out."""
_CLOSE_GRACE = 1.0
"""Seconds a client gets to close after its flush was cut off."""


class Broker(Outlet):
    """A backend with its settings and its state.

    `state`: "new", "starting" (the first connection is being made), "up", "down" (known not to answer: emits fail
    at once), "stopping", "stopped". `since`: when it changed, seconds of `time.time()`. `last_error`: what happened
    last, scrubbed of secrets; None: nothing yet. `in_flight`: messages handed over and not yet confirmed. `abandoned`:
    how many of them the last stop did not wait for. `on_change`: called on the event loop at each change of the state.
    """

    def __init__(
        self, alias: str, backend: Backend, options: BrokerOptions, on_change: Callable[[Broker], None] | None = None
    ) -> None:
        super().__init__(
            backend.producer,
            alias=alias,
            serializer=options.serializer,
            timeout=options.timeout,
            prefix=options.prefix,
            cloudevents=options.cloudevents,
            source=options.source,
            hooks=options.hooks,
            on_timeout=options.on_timeout,
            max_size=options.max_size or backend.max_size,
        )
        self.backend = backend
        self.options = options
        self.state: State = "new"
        self.since = time.time()
        self.last_error: str | None = None
        self.in_flight = 0
        self.abandoned = 0
        self.was_up = False
        """Has it been connected to since its last start?"""
        self.elsewhere = False
        """Do this process's events go out through an outbox that another one relays?"""
        self.before_stop: Callable[[float], Awaitable[None]] | None = None
        """Awaited first at a stop, with the seconds there are; set by who leaves messages to the event loop, so that
        they go out while the broker is still there."""
        self._on_change = on_change
        self._up = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._decided = asyncio.Event()  # set while the state is neither "new" nor "starting"
        self._idle = asyncio.Event()
        self._connecting: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    # -- starting ------------------------------------------------------------------------------------------------

    def begin(self, limit: float | None, *, patience: float = 0.0, told_elsewhere: bool = False) -> asyncio.Task[None]:
        """Start connecting in a task; it ends when connected, or raises what hinders it.

        A broker that does not answer is tried again for `limit` seconds, None: without end. Then emits fail at once
        while it is tried again, except in the first `patience` seconds, in which they wait, each within its timeout.
        The first attempt that fails is logged, unless it is `told_elsewhere`.
        """
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        self._decided, self._idle = asyncio.Event(), asyncio.Event()
        self.was_up = False
        self._change("starting")
        connecting = self._connect(limit, patience, told_elsewhere)
        self._connecting = asyncio.create_task(connecting, name=f"dispytch start {self.alias}")
        return self._connecting

    async def _connect(self, limit: float | None, patience: float, told_elsewhere: bool) -> None:
        loop = asyncio.get_running_loop()
        end = None if limit is None else loop.time() + limit
        patient_until = loop.time() + patience
        delay = _FIRST_DELAY
        logged = told_elsewhere
        while True:
            attempt = self.options.startup_timeout if end is None else end - loop.time()
            try:
                async with asyncio.timeout(attempt):
                    await self.backend.start()
            except ConfigurationError as exc:
                told = self._tell(exc)
                if limit is not None or self.options.required is not False:
                    self._failed("stopped" if limit is not None else "down", told)
                    raise
                if told != self.last_error:
                    self._log(logging.ERROR, "cannot be used, and is tried again each minute: %s", told)
                self._failed("down", told)
                logged = True
                # Nobody starts it again: a password may be set, and a certificate renewed, at the broker.
                await asyncio.sleep(_AFTER_MISTAKE * random.uniform(0.75, 1.25))
                continue
            except Exception as exc:
                error = exc
            else:
                if logged and not told_elsewhere:
                    self._log(logging.INFO, "answers now")
                self._change("up")
                return
            told = self._tell(error, attempt)
            if isinstance(error, TimeoutError) and attempt < self.options.startup_timeout and self.last_error:
                told = self.last_error  # The last attempt was cut by the end: what the one before said is the reason.
            left = None if end is None else end - loop.time()
            if left is not None and left < _FIRST_DELAY:
                self._failed("down", told)
                raise BrokerUnavailableError(f"{self.backend.address} {told}") from error
            if end is None and loop.time() >= patient_until:
                self._failed("down", told)
            else:
                self.last_error = told
            if not logged:
                logged = True
                until = "in the background" if limit is None else f"for up to {limit:g} s"
                self._log(logging.WARNING, f"does not answer yet, and is tried again {until}: %s", told)
            pause = delay * random.uniform(0.75, 1.25)
            # Towards the end the pauses get shorter, so that the last attempt is close to it.
            await asyncio.sleep(pause if left is None else min(pause, left / 2))
            delay = min(delay * 2, _LONGEST_DELAY)

    # -- delivering ----------------------------------------------------------------------------------------------

    async def deliver(self, messages: Sequence[Message]) -> list[Exception | None]:
        """Send messages, as Outlet.deliver; while the broker is known to be down they fail at once."""
        if not self._up:
            return await self._deliver_when_up(messages, self.producer.deliver)
        if asyncio.get_running_loop() is not self._loop:
            raise self._wrong_place()
        return await self._deliver(messages, self.timeout, self.producer.deliver)

    async def deliver_in_order(self, messages: Sequence[Message]) -> list[Exception | None]:
        """`deliver` with Producer.deliver_in_order: behind a message that failed, nothing of its key is sent."""
        if not self._up:
            return await self._deliver_when_up(messages, self.producer.deliver_in_order)
        if asyncio.get_running_loop() is not self._loop:
            raise self._wrong_place()
        return await self._deliver(messages, self.timeout, self.producer.deliver_in_order)

    async def _deliver(
        self, messages: Sequence[Message], timeout: float | None, deliver: _Deliver
    ) -> list[Exception | None]:
        self.in_flight += len(messages)
        try:
            delivered = deliver(messages, timeout=timeout)
            ends = self._begin(messages) if self._delivering_hooks else ()
            outcomes = await (observed(messages, delivered, ends) if ends else delivered)
        finally:
            self.in_flight -= len(messages)
            if self.in_flight == 0 and self.state == "stopping":
                self._idle.set()
        for error in outcomes:
            if isinstance(error, (BrokerUnavailableError, UnconfirmedError)):
                self._suspect()
                break
        if self.has_hooks:
            self.call_hooks(messages, outcomes)
        return outcomes

    async def _deliver_when_up(self, messages: Sequence[Message], deliver: _Deliver) -> list[Exception | None]:
        if self.state in ("new", "stopping", "stopped"):
            raise self._not_started()
        if self._loop is None or asyncio.get_running_loop() is not self._loop:
            raise self._wrong_place()
        timeout = await self.wait_for_start(self.timeout)
        if self.state == "starting":
            why = f": {self.last_error}" if self.last_error else ""
            return self._refuse(messages, f"is still being connected to after {self.timeout} s{why}")
        if self.state == "down":
            return self._refuse(messages, f"is down: {self.last_error}")
        if not self._up:
            raise self._not_started()
        return await self._deliver(messages, timeout, deliver)

    async def wait_for_start(self, timeout: float | None) -> float | None:
        """Wait while the state is "starting", at most `timeout` seconds; return what is left of them."""
        if self.state != "starting":
            return timeout
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(timeout):
                await self._decided.wait()
        except TimeoutError:
            pass
        return None if timeout is None else max(0.001, timeout - (loop.time() - started))

    def _refuse(self, messages: Sequence[Message], why: str) -> list[Exception | None]:
        outcomes: list[Exception | None] = [
            BrokerUnavailableError(f"{message!r} was not sent: {self.backend.address} {why}") for message in messages
        ]
        if self.has_hooks:
            self.call_hooks(messages, outcomes)
        return outcomes

    # -- outages -------------------------------------------------------------------------------------------------

    async def ping(self, timeout: float | None = None) -> None:
        """Ask the broker for an answer within `timeout` seconds (None: the broker's `timeout`).

        Raises NotStartedError, WrongLoopError, BrokerUnavailableError.
        """
        if self.state in ("new", "stopping", "stopped"):
            raise self._not_started()
        if asyncio.get_running_loop() is not self._loop:
            raise self._wrong_place()
        # At the first use in a process it would tell of an outage that is none.
        limit = timeout if timeout is not None else self.timeout
        left = await self.wait_for_start(limit)
        state = self._state_now()
        if state == "starting":
            why = f": {self.last_error}" if self.last_error else ""
            raise BrokerUnavailableError(f"{self.backend.address} is still being connected to{why}")
        if state in ("stopping", "stopped"):
            raise self._not_started()
        if self._connecting is not None and not self._connecting.done() and not self._up:
            raise BrokerUnavailableError(f"{self.backend.address} is down: {self.last_error}")
        try:
            async with asyncio.timeout(left):
                await self.backend.ping()
        except Exception as exc:
            raise BrokerUnavailableError(f"{self.backend.address} {self._tell(exc, limit)}") from exc
        if self.state == "down":
            self._change("up")

    def _state_now(self) -> State:
        """`state` after an await, in which it may have changed: type checkers think it cannot."""
        return self.state

    def _suspect(self) -> None:
        """A delivery was not confirmed: find out whether the broker is down, without holding anybody up."""
        if self._up and self._probing is None:
            self._probing = asyncio.create_task(self._probe(), name=f"dispytch probe {self.alias}")

    async def _probe(self) -> None:
        delay = _PROBE_DELAY
        try:
            while True:
                try:
                    async with asyncio.timeout(self.timeout):
                        await self.backend.ping()
                except Exception as exc:
                    if self._up:
                        self._log(logging.WARNING, "is down: %s", self._tell(exc))
                    self._failed("down", self._tell(exc))
                else:
                    if not self._up:
                        self._log(logging.INFO, "is up again")
                        self._change("up")
                    return
                await asyncio.sleep(delay * random.uniform(0.75, 1.25))
                delay = min(delay * 1.5, _LONGEST_DELAY)
        finally:
            self._probing = None

    # -- stopping ------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Refuse new messages, give those in flight `shutdown_timeout` seconds, close. Logs what was abandoned."""
        if self.state in ("new", "stopped"):
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + self.options.shutdown_timeout
        if self.before_stop is not None:
            await self.before_stop(self.options.shutdown_timeout)
        self._change("stopping")
        for task in (self._connecting, self._probing):
            await _cancelled(task)
        if self.in_flight:
            try:
                async with asyncio.timeout_at(end):
                    await self._idle.wait()
            except TimeoutError:
                pass
        abandoned = self.in_flight  # Counted before closing, which ends them.
        closing = asyncio.create_task(self.backend.stop(), name=f"dispytch stop {self.alias}")
        _, pending = await asyncio.wait({closing}, timeout=max(end - loop.time(), 0.1))
        if pending:
            closing.cancel()
            await asyncio.wait({closing}, timeout=_CLOSE_GRACE)
            self._log(logging.WARNING, "did not close in time")
        elif not closing.cancelled() and (error := closing.exception()) is not None:
            self._log(logging.WARNING, "did not close: %s", self._tell(error))
        self.abandoned = abandoned
        if abandoned:
            self._log(
                logging.ERROR,
                "was closed before all was confirmed: %d events abandoned; they may have been delivered",
                abandoned,
            )
        self._change("stopped")

    def abandon(self) -> None:
        """Forget a connection whose event loop is gone: nothing on it can be awaited any more."""
        self._up = False
        self.state, self.since = "stopped", time.time()

    # -- states and texts ----------------------------------------------------------------------------------------

    @property
    def loop_is_gone(self) -> bool:
        """Was it started on an event loop that has been closed, or in another process?"""
        return self._loop is not None and (self._loop.is_closed() or self.foreign)

    @property
    def foreign(self) -> bool:
        """Was it made in another process, before a fork?"""
        return self._pid != os.getpid()

    def _change(self, state: State) -> None:
        self.state, self.since = state, time.time()
        self._up = state == "up"
        self.was_up = self.was_up or self._up
        if state not in ("new", "starting"):
            self._decided.set()
        if self._on_change is not None:
            self._on_change(self)

    def _log(self, level: int, told: str, *values: object) -> None:
        text = f"broker %r (%s) {told}"
        logger.log(level, text, self.alias, self.backend.address, *values, extra={"broker": self.alias})

    def _failed(self, state: State, told: str) -> None:
        self.last_error = told
        if self.state != state:
            self._change(state)

    def _tell(self, error: BaseException, timeout: float | None = None) -> str:
        """What an error says, without secrets."""
        if isinstance(error, TimeoutError) and not isinstance(error, DispytchError):
            limit = timeout if timeout is not None else self.timeout
            return f"did not answer within {limit:.3g} s" if limit is not None else "did not answer in time"
        text = str(error) or type(error).__name__
        return scrub(text, self.backend.secrets)

    def _not_started(self) -> NotStartedError:
        if self.elsewhere:
            return NotStartedError(
                f"this process has no connection to broker {self.alias!r} ({self.backend.address}): its outbox is "
                f"relayed by another one; write emit_on_commit(...) to send through it, or relay='embedded' (in Django "
                f"EMBEDDED) to emit directly as well"
            )
        if self.state == "new":
            return NotStartedError(
                f"the connection to broker {self.alias!r} ({self.backend.address}) was not opened: "
                f"emit inside `async with connect(...) as emitter:`, or after the app's lifespan has started"
            )
        return NotStartedError(
            f"the connection to broker {self.alias!r} ({self.backend.address}) is closed: the event was emitted "
            f"after the `async with connect(...)` block ended or the app shut down; emit before, or enter it again"
        )

    def _wrong_place(self) -> DispytchError:
        if self.foreign:
            return WrongProcessError(
                f"the connection to broker {self.alias!r} was opened in process {self._pid}, before a fork; "
                f"open one in this process: call connect() after the fork"
            )
        return WrongLoopError(
            f"the connection to broker {self.alias!r} belongs to another event loop; emit on the loop that opened it "
            f"(from a thread: BlockingEmitter or BlockingEmitterDep), or open one with connect() on this loop"
        )


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for its end, whatever it is; not for ever: a client may ignore the cancellation."""
    if task is None or task.done():
        return
    task.cancel()
    await asyncio.wait({task}, timeout=_CLOSE_GRACE)
    if task.done() and not task.cancelled():
        task.exception()  # Seen: it was reported where it happened.
