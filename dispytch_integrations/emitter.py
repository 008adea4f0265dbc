"""The emitter: what an app holds. `await emitter.emit(event)` prepares the message, delivers it, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from dispytch_integrations._outlet import OnTimeout, Outlet
from dispytch_integrations._prepare import Prepare, require_route
from dispytch_integrations.errors import ConfigurationError, DispytchError, NotStartedError, ProducerTimeout
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import Serializer

__all__ = ["DEFAULT_TIMEOUT", "EventEmitter", "OnTimeout", "Outlets"]

DEFAULT_TIMEOUT = 5.0
"""Seconds an emit waits for the broker's confirmation unless told otherwise."""

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

    async def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """By alias None, or what is wrong."""
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
        outlet = Outlet(producer, serializer=serializer, timeout=timeout, hooks=hooks, on_timeout="log")
        self._setup(_OneOutlet(outlet))

    @classmethod
    def over(cls, outlets: Outlets) -> EventEmitter:
        """An emitter over brokers that are managed."""
        emitter = cls.__new__(cls)
        emitter._setup(outlets)
        return emitter

    def _setup(self, outlets: Outlets) -> None:
        self._outlets = outlets
        self._on_timeout: OnTimeout | None = None
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
        outlet, prepare = plan if plan is not None else self._plan(event)
        outcomes = await outlet.deliver((prepare(event, headers),))
        error = outcomes[0]
        if error is not None:
            await self._report(outlet, event, error)

    async def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """Send many events at once; return when the broker has confirmed them all.

        Events of one ordering key keep their order; the others may overtake each other. `headers` go with each.
        All are prepared before the first is sent: when one cannot be prepared, none is sent.

        Raises one ExceptionGroup with the error of each event that failed; each has a note that names its event.
        """
        await self.deliver_many(self.prepare_many(events, headers))

    async def deliver(self, outlet: Outlet, message: Message) -> None:
        """The second half of `emit`: send what `prepare` made. Raises as `emit` does when sending."""
        error = (await outlet.deliver((message,)))[0]
        if error is not None:
            await self._report(outlet, message.event, error)

    async def deliver_many(self, prepared: Sequence[tuple[Outlet, Message]]) -> None:
        """The second half of `emit_many`: send what `prepare_many` made. Raises as `emit_many` does when sending."""
        failures: list[Exception] = []
        for outlet, message, error in await self.attempt_many(prepared):
            await self._collect(outlet, message, error, failures)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(prepared)} events were not confirmed", failures)

    async def attempt_many(self, prepared: Sequence[tuple[Outlet, Message]]) -> list[tuple[Outlet, Message, Exception]]:
        """Send what `prepare_many` made; return what failed, and raise nothing for it."""
        batches: dict[Outlet, list[Message]] = {outlet: [] for outlet, _ in prepared}
        for outlet, message in prepared:
            batches[outlet].append(message)
        if len(batches) == 1:
            delivered = [await outlet.deliver(batch) for outlet, batch in batches.items()]
        else:
            delivered = await asyncio.gather(*(_all_fail(outlet, batch) for outlet, batch in batches.items()))
        return [
            (outlet, message, error)
            for (outlet, batch), outcomes in zip(batches.items(), delivered, strict=True)
            for message, error in zip(batch, outcomes, strict=True)
            if error is not None
        ]

    async def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """Ask every broker for an answer, in parallel; by alias None, or what is wrong.

        `timeout`: seconds; None: each broker's own. Raises NotStartedError without a connection,
        ConfigurationError for an emitter over a producer of yours, whose connection we do not manage.
        """
        return await self._outlets.ping(timeout=timeout)

    def prepare(self, event: EventBase, headers: Mapping[str, Any] | None = None) -> tuple[Outlet, Message]:
        """The event's message and the broker it goes to, without any I/O. Raises as `emit` does before sending."""
        plan = self._plans.get(type(event))
        outlet, prepare = plan if plan is not None else self._plan(event)
        return outlet, prepare(event, headers)

    def prepare_many(
        self, events: Iterable[EventBase], headers: Mapping[str, Any] | None = None
    ) -> list[tuple[Outlet, Message]]:
        """`prepare` for many; raises one ExceptionGroup with all that cannot be prepared."""
        if isinstance(events, BaseModel):  # Iterable as well: over its fields.
            raise TypeError(
                f"emit_many takes several events; write emit(event), or emit_many([{type(events).__name__}])"
            )
        prepared: list[tuple[Outlet, Message]] = []
        failures: list[Exception] = []
        plans = self._plans
        for index, event in enumerate(events):
            try:
                plan = plans.get(type(event))
                outlet, prepare = plan if plan is not None else self._plan(event)
                prepared.append((outlet, prepare(event, headers)))
            except NotStartedError:
                raise
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

    def timeout_callback(self, outlet: Outlet) -> OnTimeout | None:
        """What is called for an event that `outlet` did not confirm in time; None: ProducerTimeout is raised."""
        return self._on_timeout or outlet.on_timeout

    def forget_plans(self) -> None:
        """Look each event class's broker up again at its next emit; called when brokers start or stop."""
        self._plans.clear()

    def _plan(self, event: object) -> tuple[Outlet, Prepare]:
        cls: type[Any] = type(event)
        require_route(cls, event)
        outlet = self._outlets.outlet_for(cls)
        plan = self._plans[cls] = (outlet, outlet.compile(cls))
        return plan

    async def _report(self, outlet: Outlet, event: EventBase | None, error: Exception) -> None:
        callback = self.timeout_callback(outlet)
        if callback is None or event is None or not isinstance(error, ProducerTimeout):
            raise error
        result = callback(event)
        if isawaitable(result):
            await result

    async def _collect(self, outlet: Outlet, message: Message, error: Exception, failures: list[Exception]) -> None:
        try:
            await self._report(outlet, message.event, error)
        except Exception as exc:
            exc.add_note(repr(message))
            failures.append(exc)


async def _all_fail(outlet: Outlet, batch: Sequence[Message]) -> list[Exception | None]:
    """Deliver one broker's part; what hinders all of it becomes the outcome of each: other brokers have sent theirs."""
    try:
        return await outlet.deliver(batch)
    except DispytchError as exc:
        return [exc] * len(batch)


class _OneOutlet:
    """The outlets of an emitter over one producer."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def outlet_for(self, cls: type[EventBase]) -> Outlet:
        return self._outlet

    @property
    def producers(self) -> Mapping[str, Producer]:
        return {self._outlet.alias: self._outlet.producer}

    async def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        raise ConfigurationError(
            "an EventEmitter over a producer does not manage its connection and cannot ping it; "
            "ask the client itself, or use connect()"
        )
