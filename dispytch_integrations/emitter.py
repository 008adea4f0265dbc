"""The emitter: what an app holds. `await emitter.emit(event)` prepares the message, delivers it, reports."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Protocol, TypeVar

from dispytch_integrations._outlet import Outlet
from dispytch_integrations._prepare import Prepare, require_route
from dispytch_integrations.errors import ProducerTimeout
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import Serializer

__all__ = ["DEFAULT_TIMEOUT", "EventEmitter", "OnTimeout"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 5.0
"""Seconds an emit waits for the broker's confirmation unless told otherwise."""

OnTimeout = Callable[[Any], "Awaitable[object] | object"]
"""Called with the event that was not confirmed in time; may be async."""
_Callback = TypeVar("_Callback", bound=OnTimeout)


class Outlets(Protocol):
    """Where an emitter finds the broker for a class of events."""

    def outlet_for(self, cls: type[EventBase]) -> Outlet:
        """The broker that takes events of `cls`. Raises RouteError, NotStartedError."""
        ...

    @property
    def producers(self) -> Mapping[str, Producer]:
        """The producer of each broker, by alias."""
        ...


class EventEmitter:
    """Emits events through a producer. `connect` and the framework integrations give you a ready one.

    `producer`: a KafkaProducer, RabbitMQProducer, RedisProducer, MemoryProducer, or one of your own.
    `serializer`: how events become bytes; None: JSON.
    `timeout`: seconds an emit waits for the confirmation; None: the producer's own timeout, else 5.
    `hooks`: see `dispytch_integrations.hooks`.

    An emitter made this way behaves as dispytch's: no identity headers, and an emit that times out is logged as a
    warning and not raised, unless `on_timeout` says else.
    """

    def __init__(
        self,
        producer: Producer,
        serializer: Serializer | None = None,
        *,
        timeout: float | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if timeout is None:
            # A producer written for dispytch knows no such attribute.
            timeout = getattr(producer, "timeout", None) or DEFAULT_TIMEOUT
        outlet = Outlet(producer, serializer=serializer, timeout=timeout, hooks=hooks)
        self._setup(_OneOutlet(outlet), _log_timeout)

    @classmethod
    def over(cls, outlets: Outlets, on_timeout: OnTimeout | None) -> EventEmitter:
        """An emitter over brokers that are managed; `on_timeout` None: ProducerTimeout is raised."""
        emitter = cls.__new__(cls)
        emitter._setup(outlets, on_timeout)
        return emitter

    def _setup(self, outlets: Outlets, on_timeout: OnTimeout | None) -> None:
        self._outlets = outlets
        self._on_timeout = on_timeout
        self._plans: dict[type[Any], tuple[Outlet, Prepare]] = {}

    @property
    def producers(self) -> Mapping[str, Producer]:
        """The producer of each broker, by alias; `{"default": producer}` where there is one."""
        return self._outlets.producers

    @property
    def producer(self) -> Producer:
        """The only producer. Raises LookupError where there are several: see `producers`."""
        producers = self.producers
        if len(producers) != 1:
            raise LookupError(f"this emitter has {len(producers)} producers; write emitter.producers[alias]")
        return next(iter(producers.values()))

    async def emit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        """Send one event; return when the broker has confirmed it.

        `headers`: metadata beside the payload, str to str (numbers, UUIDs, dates, dicts become text).

        Raises ProducerTimeout when the confirmation does not come in time (the event may have been delivered),
        UnroutableError when nobody takes it, BrokerUnavailableError during an outage, RouteError or HeaderError
        for a value that cannot be sent, NotStartedError without a connection.
        """
        plan = self._plans.get(type(event))
        outlet, prepare = plan if plan is not None else self._plan(type(event))
        message = prepare(event, headers)
        outcomes = await outlet.deliver((message,))
        error = outcomes[0]
        if error is not None:
            await self._report(event, error)

    async def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """Send many events at once; return when the broker has confirmed them all.

        Events of one ordering key keep their order; the others may overtake each other. `headers` go with each.
        All are prepared before the first is sent: when one cannot be prepared, none is sent.

        Raises one ExceptionGroup with the error of each event that failed; each has a note that names its event.
        """
        messages = self.prepare_many(events, headers)
        by_outlet: dict[Outlet, list[Message]] = {}
        for outlet, message in messages:
            by_outlet.setdefault(outlet, []).append(message)
        failures: list[Exception] = []
        for outlet, batch in by_outlet.items():
            outcomes = await outlet.deliver(batch)
            for message, error in zip(batch, outcomes, strict=True):
                if error is not None:
                    await self._collect(message, error, failures)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(messages)} events were not confirmed", failures)

    def prepare(self, event: EventBase, headers: Mapping[str, Any] | None = None) -> tuple[Outlet, Message]:
        """The event's message and the broker it goes to, without any I/O. Raises as `emit` does before sending."""
        plan = self._plans.get(type(event))
        outlet, prepare = plan if plan is not None else self._plan(type(event))
        return outlet, prepare(event, headers)

    def prepare_many(
        self, events: Iterable[EventBase], headers: Mapping[str, Any] | None = None
    ) -> list[tuple[Outlet, Message]]:
        """`prepare` for many; raises one ExceptionGroup with all that cannot be prepared."""
        prepared: list[tuple[Outlet, Message]] = []
        failures: list[Exception] = []
        for index, event in enumerate(events):
            try:
                prepared.append(self.prepare(event, headers))
            except Exception as exc:
                exc.add_note(f"event {index} of emit_many: {type(event).__qualname__}")
                failures.append(exc)
        if failures:
            raise ExceptionGroup(
                f"{len(failures)} of {len(failures) + len(prepared)} events cannot be sent; none was", failures
            )
        return prepared

    def on_timeout(self, callback: _Callback) -> _Callback:
        """Call `callback(event)` for each event that is not confirmed in time, instead of raising or logging.

        A decorator; the callback may be async. What it raises, the emit raises.
        """
        self._on_timeout = callback
        return callback

    def forget_plans(self) -> None:
        """Look each event class's broker up again at its next emit; called when brokers start or stop."""
        self._plans.clear()

    def _plan(self, cls: type[Any]) -> tuple[Outlet, Prepare]:
        require_route(cls)
        outlet = self._outlets.outlet_for(cls)
        plan = self._plans[cls] = (outlet, outlet.compile(cls))
        return plan

    async def _report(self, event: EventBase, error: Exception) -> None:
        callback = self._on_timeout
        if callback is None or not isinstance(error, ProducerTimeout):
            raise error
        result = callback(event)
        if isawaitable(result):
            await result

    async def _collect(self, message: Message, error: Exception, failures: list[Exception]) -> None:
        try:
            if message.event is None:
                raise error
            await self._report(message.event, error)
        except Exception as exc:
            exc.add_note(repr(message))
            failures.append(exc)


class _OneOutlet:
    """The outlets of an emitter over one producer."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def outlet_for(self, cls: type[EventBase]) -> Outlet:
        return self._outlet

    @property
    def producers(self) -> Mapping[str, Producer]:
        return {self._outlet.alias: self._outlet.producer}


def _log_timeout(event: EventBase) -> None:
    logger.warning("%s was not confirmed in time; it may have been delivered", type(event).__qualname__)


log_timeout: OnTimeout = _log_timeout
"""The callback behind `on_timeout="log"`."""
