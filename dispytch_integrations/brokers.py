"""Several backends as one: routing, start, stop. `connect()` is what most apps need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Protocol

from dispytch_integrations._broker import Broker
from dispytch_integrations._misuse import AsyncBlock
from dispytch_integrations._outlet import OnTimeout
from dispytch_integrations._overriding import overriding
from dispytch_integrations._templates import nearest
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DispytchError,
    NotStartedError,
    RouteError,
    StartupError,
    WrongLoopError,
)
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import Serializer
from dispytch_integrations.settings import Config, load_brokers, schemes

__all__ = ["Brokers", "Outbox", "brokers_of", "connect"]

logger = logging.getLogger(__name__)

_OTHERS = 0.5
"""Seconds that a start whose settings are wrong waits for the other brokers' mistakes."""

_parents_brokers: list[Mapping[str, Broker]] = []
"""What a fork has copied into this process. Kept: a connection that is collected here would take the parent's socket
out of the epoll instance that both share, and the parent would wait for answers for ever."""


class Outbox(Protocol):
    """What `connect(..., outbox=...)` takes: SQLAlchemyOutbox, or one of your own."""

    external: bool
    """Is it relayed by another process? Then this one opens no broker connection."""

    async def start(self, brokers: Brokers) -> None:
        """The brokers are up, or, with `external`, their settings are read. What it raises, the start raises."""
        ...

    async def stop(self, brokers: Brokers) -> None:
        """The brokers are about to be closed."""
        ...


class Brokers(AsyncBlock, AbstractAsyncContextManager[EventEmitter]):
    """The brokers of an app and their one emitter; made by `connect`.

    Use it as `async with`, or call `start` and `stop`. Both are counted: entered twice, it is opened once and
    closed at the second exit. After the last exit it can be entered again, on another event loop too.
    """

    def __init__(self, config: Config, options: Mapping[str, Any], outbox: Outbox | None = None) -> None:
        given: Any = outbox
        if given is not None and (isinstance(given, type) or not hasattr(given, "external")):
            told = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise ConfigurationError(
                f"outbox= takes an outbox, not {told}; write outbox=SQLAlchemyOutbox(engine), from "
                f"dispytch_integrations.sqlalchemy"
            )
        self._config = config
        self._options = options
        self.outbox = outbox
        """The outbox that is relayed to these brokers; None: there is none."""
        self._brokers: dict[str, Broker] = {}
        self._users = 0
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._emitters: dict[str, EventEmitter] = {}
        self.on_change: Callable[[Broker], None] | None = None
        """Called on the event loop with each broker whose `state` has changed; set it before the start."""
        self.emitter = EventEmitter.over(self)
        """The emitter of all brokers; raises NotStartedError until they are started."""

    # -- start and stop ------------------------------------------------------------------------------------------

    async def start(self, *, wait: bool = True) -> None:
        """Connect to all brokers, in parallel; those that do not answer are tried again until `startup_timeout`.

        A broker with `required=False` is connected in the background, and so is one that does not answer while an
        outbox keeps its events. `wait`: False: all of them are, and tried again without end; the start returns once the
        settings are read, and emits wait for the connection within their timeout.

        Raises ConfigurationError with everything that is wrong in the settings, StartupError when a required broker
        was not reached: those that were are closed again.
        """
        self._leave_dead_loop()
        while self._closing is not None:
            await self._closed_here(self._closing)
        self._users += 1
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(wait), name="dispytch start")
        starting = self._starting
        if starting.get_loop() is not asyncio.get_running_loop():
            self._users -= 1
            raise _elsewhere()
        try:
            # Shielded: one user who gives up does not end the start for the others.
            await asyncio.shield(starting)
        except BaseException:
            self._users -= 1
            if self._users == 0:
                await self._close()
            raise

    async def stop(self) -> None:
        """Undo one `start`; the last one refuses new emits, waits for those in flight, and closes the connections.

        Harmless when not started.
        """
        if self._users == 0:
            return
        self._users -= 1
        if self._users == 0:
            await self._close()

    async def _close(self) -> None:
        """End a start that still runs, and stop what it has started; a start that comes meanwhile waits for the end."""
        starting, self._starting = self._starting, None
        closing = self._closing = asyncio.get_running_loop().create_future()
        try:
            if starting is not None:
                await _finished(starting)
            await self._stop()
        finally:
            self._closing = None
            if not closing.done():
                closing.set_result(None)

    async def _closed_here(self, closing: asyncio.Future[None]) -> None:
        if closing.get_loop() is not asyncio.get_running_loop():
            raise _elsewhere()
        await asyncio.wait({closing})

    def for_relay(self) -> Brokers:
        """The same brokers without their outbox, not started: what a relay opens to send the outbox's messages."""
        return Brokers(self._config, self._options)

    async def __aenter__(self) -> EventEmitter:
        await self.start()
        return self.emitter

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def load(self) -> None:
        """Read the settings and connect to nothing: `emitter.prepare` works, and shows what would be sent where.

        Raises ConfigurationError with everything that is wrong.
        """
        specs = load_brokers(self._config, self._options)
        overriding.opened.add(self)
        self._brokers = {spec.alias: Broker(spec.alias, spec.backend, spec.options, self.on_change) for spec in specs}
        self.emitter.forget_plans()
        self._emitters.clear()

    async def _start(self, wait: bool) -> None:
        self.load()
        for broker in self._brokers.values():
            for name in broker.backend.modules:
                import_module(name)
        if self.outbox is not None and self.outbox.external and not overriding.active:
            for broker in self._brokers.values():
                broker.elsewhere = True
            await self.outbox.start(self)
            return
        tasks: dict[Broker, asyncio.Task[None]] = {}
        required: list[Broker] = []
        relayed: list[Broker] = []
        for broker in self._brokers.values():
            options = broker.options
            if wait and (options.required or (options.required is None and self.outbox is None)):
                tasks[broker] = broker.begin(options.startup_timeout)
                required.append(broker)
                continue
            patience = 0.0 if wait else options.timeout or options.startup_timeout
            told_elsewhere = wait and options.required is None
            tasks[broker] = broker.begin(None, patience=patience, told_elsewhere=told_elsewhere)
            if told_elsewhere:
                relayed.append(broker)
            else:
                tasks[broker].add_done_callback(_log_failure)
        try:
            failures = await _failures({broker: tasks[broker] for broker in required})
            failures += await _mistakes({broker: tasks[broker] for broker in relayed})
        except asyncio.CancelledError:
            await self._stop()
            raise
        if failures:
            await self._stop()
            raise _startup_error(failures)
        if self.outbox is not None:
            try:
                await self.outbox.start(self)
            except BaseException:
                await self._stop()
                raise

    async def _stop(self) -> None:
        if self.outbox is not None:
            await self.outbox.stop(self)
        await asyncio.gather(*(broker.stop() for broker in self._brokers.values()))

    def _leave_dead_loop(self) -> None:
        """Start over when the loop of the last start is gone: closed without a stop, or left behind by a fork."""
        if any(broker.loop_is_gone for broker in self._brokers.values()):
            if any(broker.foreign for broker in self._brokers.values()):
                _parents_brokers.append(self._brokers)
            for broker in self._brokers.values():
                broker.abandon()
            self._users = 0
            self._starting = self._closing = None

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Has `start` been called more often than `stop`?"""
        return self._users > 0

    @property
    def brokers(self) -> Mapping[str, Broker]:
        """The brokers by alias; empty before the first start."""
        return MappingProxyType(self._brokers)

    @property
    def producers(self) -> Mapping[str, Producer]:
        """The producers by alias; empty before the first start."""
        return {alias: broker.producer for alias, broker in self._brokers.items()}

    async def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """Ask every broker for an answer, in parallel; by alias None, or what is wrong.

        `timeout`: seconds; None: each broker's own.
        """
        if not self._brokers:
            raise self._not_started()
        outcomes = await asyncio.gather(
            *(broker.ping(timeout) for broker in self._brokers.values()), return_exceptions=True
        )
        answers: dict[str, DispytchError | None] = {}
        for alias, outcome in zip(self._brokers, outcomes, strict=True):
            if outcome is not None and not isinstance(outcome, DispytchError):
                raise outcome
            answers[alias] = outcome
        return answers

    # -- routing -------------------------------------------------------------------------------------------------

    def outlet_for(self, cls: type[EventBase]) -> Broker:
        """The broker that takes events of `cls`: `__broker__`, else the only one that takes the route, else "default".

        Raises RouteError that names the candidates, NotStartedError before the first start.
        """
        brokers = self._brokers
        if not brokers:
            raise self._not_started()
        alias = cls.__broker__
        if alias is not None:
            if alias not in brokers:
                raise RouteError(f"{cls.__qualname__}.__broker__ is {alias!r}; configured are {_names(brokers)}")
            return brokers[alias]
        candidates = {name: broker for name, broker in brokers.items() if broker.takes(cls)}
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        if "default" in candidates:
            return candidates["default"]
        route = type(cls.__route__).__name__
        if not candidates:
            configured = ", ".join(f"{name!r} ({broker.backend.address})" for name, broker in brokers.items())
            raise RouteError(
                f"{cls.__qualname__} has a {route}, which no broker takes; configured are {configured}: "
                f"{_advice(cls, brokers.values())}"
            )
        raise RouteError(
            f"{cls.__qualname__} has a {route}, which {_names(candidates)} would take; "
            f"write __broker__ = {next(iter(candidates))!r} on the class, or call one of them 'default'"
        )

    def emitter_to(self, alias: str) -> EventEmitter:
        """An emitter whose events all go to one broker, whatever their `__broker__`.

        Raises RouteError for an alias that is not configured, NotStartedError before the first start.
        """
        if not self._brokers:
            raise self._not_started()
        if alias not in self._brokers:
            raise RouteError(
                f"there is no broker {alias!r}{nearest(alias, list(self._brokers))}; "
                f"configured are {_names(self._brokers)}"
            )
        return self._emitters.setdefault(alias, EventEmitter.over(_Only(self, alias)))

    def _not_started(self) -> NotStartedError:
        return NotStartedError(
            "the emitter's connection was never opened. Likely causes: TestClient without `with` (write "
            "`with TestClient(app) as client:`), a lifespan on a mounted sub-app (put it on the outermost app), "
            "or a missing `async with connect(...) as emitter:`"
        )


class _Only:
    """The outlets of an emitter that sends to one of several brokers."""

    def __init__(self, brokers: Brokers, alias: str) -> None:
        self.brokers = brokers
        self._alias = alias

    def outlet_for(self, cls: type[EventBase]) -> Broker:
        return self.brokers.brokers[self._alias]

    @property
    def producers(self) -> Mapping[str, Producer]:
        return {self._alias: self.brokers.producers[self._alias]}

    async def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        return {self._alias: (await self.brokers.ping(timeout=timeout))[self._alias]}


def brokers_of(emitter: EventEmitter) -> Brokers | None:
    """The brokers behind an emitter; None: it is one over a producer, whose connection is not ours."""
    outlets = emitter._outlets
    if isinstance(outlets, _Only):
        return outlets.brokers
    return outlets if isinstance(outlets, Brokers) else None


def connect(
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
) -> Brokers:
    """The emitter of one or several brokers, connected inside an `async with` block.

        async with connect("kafka://localhost:9092", acks="all") as emitter:
            await emitter.emit(OrderPlaced(order_id=1))

    `config`: a URL; a mapping of aliases to URLs or to mappings with `url` and options; a function that returns one
    of them, called at start; None: the environment variable DISPYTCH_URL.
    `timeout`: seconds an emit waits for the broker's confirmation; None waits without end.
    `startup_timeout`: seconds during which a broker that does not answer is tried again before the start fails.
    `shutdown_timeout`: seconds that events in flight get at the end.
    `required`: False: the start does not wait for the broker; it is connected in the background. True: the start fails
    without it. None: True without an outbox; with one the app starts without a broker that does not answer, since its
    events wait in the outbox.
    `on_timeout`: what an emit that is not confirmed in time does: raise ProducerTimeout, log, or call with the event.
    `source`: CloudEvents `source`; None: "/" and the top-level package of the event's class.
    `cloudevents`: identity headers; False: none; a str: their prefix instead of the transport's own.
    `prefix`: goes in front of every topic, exchange, channel and stream.
    `max_size`: bytes that an event's body may have; None: what the client takes.
    `hooks`: see `dispytch_integrations.hooks`.
    `serializer`: how events become bytes; None: JSON.
    `client`: options of the underlying client whose names are ours.
    `outbox`: an outbox that is relayed to these brokers, a SQLAlchemyOutbox; None: there is none.
    `options`: the transport's own (see its `...Options` class) or the underlying client's.

    All of them are defaults for every broker: a broker's own mapping comes before them, its URL's query before that.

    Nothing is read or checked before the start. Raises there ConfigurationError, MissingExtraError, StartupError.
    """
    ours: dict[str, Any] = {
        "timeout": timeout,
        "startup_timeout": startup_timeout,
        "shutdown_timeout": shutdown_timeout,
        "required": required,
        "on_timeout": on_timeout,
        "source": source,
        "cloudevents": cloudevents,
        "prefix": prefix,
        "max_size": max_size,
        "hooks": hooks,
        "serializer": serializer,
        "client": {} if client is None else client,
    }
    return Brokers(config, {**ours, **options}, outbox)


def _elsewhere() -> WrongLoopError:
    return WrongLoopError(
        "these brokers are open on another event loop; stop them there first, or connect() anew on this one"
    )


def _advice(cls: type[EventBase], brokers: Iterable[Broker]) -> str:
    """What to write where no broker takes the events of a class."""
    routes = {route.__name__: None for broker in brokers for route in broker.producer.routes}
    other = f"give {cls.__qualname__} a {' or '.join(routes)}"
    transport = cls.__route__.transport
    return f"add a broker with a {transport}:// URL, or {other}" if transport in schemes() else other


def _names(brokers: Mapping[str, Broker]) -> str:
    return " and ".join(repr(name) for name in brokers)


async def _failures(starting: Mapping[Broker, asyncio.Task[None]]) -> list[tuple[Broker, BaseException]]:
    """Wait for all brokers, or until one has a mistake in its settings; what failed, and what was still tried then."""
    pending, wrong = set(starting.values()), False
    while pending:
        # The others get a moment, so that their mistakes are told as well.
        done, pending = await asyncio.wait(
            pending, timeout=_OTHERS if wrong else None, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            break
        wrong = wrong or any(isinstance(_error_of(task), ConfigurationError) for task in done)
    failures: list[tuple[Broker, BaseException]] = []
    for broker, task in starting.items():
        error = _error_of(task)
        if error is None and task in pending:
            error = BrokerUnavailableError(
                f"{broker.backend.address} was not reached yet: {broker.last_error or '...'}"
            )
        if error is not None:
            failures.append((broker, error))
    return failures


async def _mistakes(starting: Mapping[Broker, asyncio.Task[None]]) -> list[tuple[Broker, BaseException]]:
    """Wait for the first attempt of brokers whose events can wait: what is wrong with their settings has failed."""
    limits = {broker: broker.options.timeout or broker.options.startup_timeout for broker in starting}
    await asyncio.gather(*(broker.wait_for_start(limit) for broker, limit in limits.items()))
    mistakes: list[tuple[Broker, BaseException]] = []
    for broker, task in starting.items():
        error = _error_of(task)
        if error is not None:
            mistakes.append((broker, error))
            continue
        if not task.done():
            logger.warning(
                "the app starts without broker %r (%s), and its events wait in the outbox: %s",
                *(broker.alias, broker.backend.address, broker.last_error or "it did not answer yet"),
                extra={"broker": broker.alias},
            )
        task.add_done_callback(_log_failure)
    return mistakes


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    if not task.done():
        return None
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _startup_error(failures: Sequence[tuple[Broker, BaseException]]) -> BaseException:
    wrong = [(broker, error) for broker, error in failures if isinstance(error, ConfigurationError)]
    if wrong:
        others = [(broker, error) for broker, error in failures if not isinstance(error, ConfigurationError)]
        return ConfigurationError(
            [f"broker {broker.alias!r}: {problem}" for broker, error in wrong for problem in error.problems]
            + [f"broker {broker.alias!r}: {error}" for broker, error in others]
        )
    told = "; ".join(f"broker {broker.alias!r}: {error}" for broker, error in failures)
    limit = max(broker.options.startup_timeout for broker, _ in failures)
    failed = StartupError(
        f"not connected within startup_timeout={limit:g} s: {told.rstrip('.')}; is it running, and are host and port "
        f"right? With required=False the start goes on without it, and connects when it can"
    )
    failed.__cause__ = failures[0][1]
    return failed


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a broker that is connected in the background is not usable: %s", error)


async def _finished(task: asyncio.Task[None]) -> None:
    """Cancel a task if it still runs, and wait for its end."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # Seen: whoever started it was told.
