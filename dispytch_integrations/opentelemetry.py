"""Traces and metrics by OpenTelemetry: a span for each emit, one for each batch of a relay, and its context in headers.

    from dispytch_integrations.opentelemetry import instrument

    instrument()            # once, before the app starts; brokers that are opened from now on are seen

Only the API is needed (the extra `otel`); what becomes of spans and metrics says the SDK that you configure. Names and
units follow the semantic conventions for messaging, version 1.43 (https://opentelemetry.io/docs/specs/semconv/messaging/,
status "Development").

    span "send orders"      PRODUCER, of an emit, from the call to the confirmation; its context travels in the headers
    span "create orders"    PRODUCER, of an event that waits for a commit or is put into an outbox; its context travels
    span "send orders"      CLIENT, when such events are sent, after the commit or by a relay; linked to where they were
                            created, and a child of it when it is one alone

    messaging.client.operation.duration     histogram, seconds: of each send
    messaging.client.sent.messages          counter: attempts, failed ones with `error.type`
    dispytch.messages.in_flight             up-down counter: handed to a broker (`dispytch.broker`), not confirmed yet
    dispytch.outbox.messages                gauge: rows by `state`; of a relay that counts them
    dispytch.outbox.oldest_age              gauge, seconds: of the oldest that waits
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple
from weakref import WeakSet

from dispytch_integrations._asyncapi_classes import event_classes
from dispytch_integrations._broker import Broker
from dispytch_integrations._outlet import Outlet
from dispytch_integrations._overriding import overriding
from dispytch_integrations.errors import MissingExtraError
from dispytch_integrations.events import EventBase, EventRoute, event_type
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.outbox._counted import counted

try:
    from opentelemetry import baggage, context, metrics, propagate, trace
    from opentelemetry.baggage.propagation import W3CBaggagePropagator
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.propagators.composite import CompositePropagator
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "opentelemetry":
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.opentelemetry", extra="otel", package="opentelemetry-api") from exc

__all__ = ["OpenTelemetryHook", "instrument", "uninstrument"]

logger = logging.getLogger(__name__)

_NAME = "dispytch_integrations"
_SCHEMA = "https://opentelemetry.io/schemas/1.43.0"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Of durations, in seconds, as the conventions advise."""
_LINKS = 128
"""How many links a span has at most, as the SDK's default is."""
_ADDRESS = re.compile(r"[a-z0-9+]+://(?P<host>\[[^]]+\]|[^:/,@]+)(?::(?P<port>\d+))?(?:/.*)?", re.IGNORECASE)

_Attributes = dict[str, Any]


class _Open:
    """The span of an emit that is under way, when it began, and what metrics tell of it."""

    __slots__ = ("few", "span", "started")

    def __init__(self, span: Span, started: float, few: _Attributes) -> None:
        self.span = span
        self.started = started
        self.few = few


class OpenTelemetryHook(Hook):
    """The instrumentation as a hook, for some brokers alone: `connect(..., hooks=[OpenTelemetryHook()])`.

    `tracer_provider`, `meter_provider`: None: the global ones. `body_size`: spans tell the size of the
    payload, too, in bytes, which the conventions leave to the user. `instrument()` puts one on all brokers.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        body_size: bool = False,
    ) -> None:
        known = _version()
        self.body_size = body_size
        self.tracer = trace.get_tracer(_NAME, known, tracer_provider, schema_url=_SCHEMA)
        meter = metrics.get_meter(_NAME, known, meter_provider, schema_url=_SCHEMA)
        self.duration = meter.create_histogram(
            "messaging.client.operation.duration",
            unit="s",
            description="Duration of messaging operation initiated by a producer or consumer client.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self.sent_messages = meter.create_counter(
            "messaging.client.sent.messages",
            unit="{message}",
            description="Number of messages producer attempted to send to the broker.",
        )
        self._outlets: WeakSet[Outlet] = WeakSet()
        meter.create_observable_up_down_counter(
            "dispytch.messages.in_flight",
            [self._count_in_flight],
            unit="{message}",
            description="Messages that were handed to a broker and are not confirmed yet.",
        )
        meter.create_observable_gauge(
            "dispytch.outbox.messages",
            [_count_rows],
            unit="{message}",
            description="Rows of an outbox by their state, as a relay has counted them.",
        )
        meter.create_observable_gauge(
            "dispytch.outbox.oldest_age",
            [_oldest_age],
            unit="s",
            description="Age of the oldest event that waits in an outbox.",
        )

    def bound(self, outlet: Outlet) -> Hook:
        """The hook of one broker, which knows what to tell of it. Called for each that is made."""
        self._outlets.add(outlet)
        return _Bound(self, outlet)

    def _count_in_flight(self, options: CallbackOptions) -> Iterable[Observation]:
        found = Counter[str]()
        for outlet in list(self._outlets):
            if isinstance(outlet, Broker):
                found[outlet.alias] += outlet.in_flight
        return [Observation(number, {"dispytch.broker": alias}) for alias, number in found.items()]

    def delivering(self, messages: Sequence[Message]) -> None:
        """See `bound`, whose hooks do the work."""


class _Bound(Hook):
    def __init__(self, telemetry: OpenTelemetryHook, outlet: Outlet) -> None:
        self._telemetry = telemetry
        self._start_span = telemetry.tracer.start_span
        self._outlet = outlet
        self._broker: _Attributes | None = None
        self._plans: dict[type[EventBase] | None, _Plan] = {}
        self._by_type: dict[str, list[_Plan]] = {}

    # -- the moments of a message ----------------------------------------------------------------------------------

    def before_send(self, message: Message) -> None:
        """Start the span, and let its context travel."""
        plan = self._plan(message)
        started = time.perf_counter()
        span = self._start_span(
            plan.span_name or f"send {_name(message)}",
            kind=SpanKind.PRODUCER,
            attributes=self._attributes(plan, message),
        )
        if plan.travels and "traceparent" not in message.headers:
            _inject(span, message.headers)
        message.trace = _Open(span, started, plan.few)

    def held(self, message: Message) -> None:
        """It waits for a commit: its creation is over."""
        if not isinstance(message.trace, _Open):
            return
        span = message.trace.span
        span.update_name(f"create {_name(message)}")
        span.set_attribute("messaging.operation.name", "create")
        span.set_attribute("messaging.operation.type", "create")
        span.end()
        message.trace = span.get_span_context()

    def delivering(self, messages: Sequence[Message]) -> Callable[[Sequence[Exception | None]], None] | None:
        """Messages are handed to their producer: those that have no span under way get one together."""
        created = [message for message in messages if message.trace.__class__ is not _Open]
        if not created:
            return None
        span, started, few = self._batch_span(created), time.perf_counter(), self._few_of_all(created)

        def ended(outcomes: Sequence[Exception | None]) -> None:
            error = next((error for error in outcomes if error is not None), None)
            _end(span, error)
            self._telemetry.duration.record(time.perf_counter() - started, _with_error(few, error))

        return ended

    def sent(self, message: Message) -> None:
        """It is confirmed."""
        self._ended(message, None)

    def failed(self, message: Message, error: Exception) -> None:
        """It is not."""
        self._ended(message, error)

    def _ended(self, message: Message, error: Exception | None) -> None:
        telemetry, opened = self._telemetry, message.trace
        if opened.__class__ is not _Open:
            telemetry.sent_messages.add(1, _with_error(self._plan(message).few, error))
            return
        message.trace = None
        attributes = opened.few
        if error is None:
            opened.span.end()
        else:
            attributes = _with_error(attributes, error)
            _end(opened.span, error)
        telemetry.sent_messages.add(1, attributes)
        telemetry.duration.record(time.perf_counter() - opened.started, attributes)

    def _batch_span(self, messages: Sequence[Message]) -> Span:
        """The span of sending what was created before, or elsewhere, linked to its creation."""
        first, name = messages[0], _name(messages[0])
        same = all(message.destination == first.destination for message in messages)
        if len(messages) == 1:
            attributes = self._attributes(self._plan(first), first)
        else:
            attributes = {
                **self._few_of_all(messages),
                "messaging.operation.type": "send",
                "messaging.batch.message_count": len(messages),
                **({"messaging.destination.name": name} if same else {}),
            }
        created = [found for message in messages[:_LINKS] if (found := _created(message)).is_valid]
        # A trace goes on where it is one alone; of many it is told by the links.
        parent = context.Context()
        if len(messages) == 1 and created:
            parent = trace.set_span_in_context(trace.NonRecordingSpan(created[0]), parent)
        return self._start_span(
            f"send {name}" if same else "send",
            parent,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            links=[Link(each) for each in created],
        )

    # -- what is told of it ----------------------------------------------------------------------------------------

    @property
    def _of_broker(self) -> _Attributes:
        """Attributes that all messages of the broker have."""
        told = self._broker
        if told is None:
            told = dict[str, Any]({"messaging.operation.name": "send"})
            told["messaging.system"] = self._outlet.producer.routes[0].transport
            backend: Any = getattr(self._outlet, "backend", None)
            address = "" if backend is None or backend.transport == "memory" else backend.address
            match = _ADDRESS.fullmatch(address)
            if match is not None:
                told["server.address"] = match["host"].strip("[]")
                if match["port"] is not None:
                    told["server.port"] = int(match["port"])
            self._broker = told
        return told

    def _attributes(self, plan: _Plan, message: Message) -> _Attributes:
        """Attributes for a span of one message."""
        told = plan.more.copy()
        if plan.span_name is None:
            told["messaging.destination.name"] = _name(message)
        told["messaging.message.id"] = message.id
        payload, system = message.payload, plan.system
        if self._telemetry.body_size and payload is not None:
            told["messaging.message.body.size"] = len(payload)
        if system == "kafka":
            if message.ordering_key is not None:
                told["messaging.kafka.message.key"] = message.ordering_key
            if payload is None:
                told["messaging.kafka.message.tombstone"] = True
        elif system == "rabbitmq" and (key := message.properties.get("routing_key")):
            told["messaging.rabbitmq.destination.routing_key"] = key
        return told

    def _plan(self, message: Message) -> _Plan:
        """What is told of all events of its class."""
        event = message.event
        return self._plan_of_stored(message) if event is None else self._plan_of(event.__class__)

    def _plan_of(self, cls: type[EventBase] | None) -> _Plan:
        plan = self._plans.get(cls)
        if plan is None:
            plan = self._plans[cls] = self._made(cls)
        return plan

    def _plan_of_stored(self, message: Message) -> _Plan:
        """Of what was read back from an outbox: by its type, if its class is imported and its route still the same."""
        plans = self._by_type.get(message.type)
        if plans is None:
            fitting = tuple(self._outlet.producer.routes)
            classes = [cls for cls in event_classes() if event_type(cls) == message.type]
            plans = [self._plan_of(cls) for cls in classes if isinstance(cls.__route__, fitting)]
            self._by_type[message.type] = plans
        name = _name(message)
        templates: list[_Plan] = []
        for plan in plans:
            if plan.name == name:
                return plan
            if plan.name is None:
                templates.append(plan)
        return templates[0] if len(templates) == 1 else self._plan_of(None)

    def _few_of_all(self, messages: Sequence[Message]) -> _Attributes:
        """Of a batch: with the destination that metrics tell if all have the same."""
        few = self._plan(messages[0]).few
        alike = all(self._plan(message).few == few for message in messages)
        return few if alike else self._plan_of(None).few

    def _made(self, cls: type[EventBase] | None) -> _Plan:
        few = dict(self._of_broker)
        if cls is None:
            return _Plan(few, _more(few, None), few["messaging.system"], None, None, travels=False)
        route = cls.__route__
        few["messaging.system"] = route.transport
        template, name = _template(cls), None
        if template is None:
            name = _fixed_name(route, self._outlet.settings.prefix)
            few["messaging.destination.name"] = name
        else:
            few["messaging.destination.template"] = template
        span_name = name and f"send {name}"
        return _Plan(few, _more(few, name), route.transport, name, span_name, travels=route.supports_headers)


class _Plan(NamedTuple):
    """What is told of all events of a class. `few`: attributes of few values, for metrics: a destination whose name
    the event's fields make is not among them. `more`: for spans. `name`, `span_name`: None where fields make them.
    """

    few: _Attributes
    more: _Attributes
    system: str
    name: str | None
    span_name: str | None
    travels: bool


def _more(few: _Attributes, name: str | None) -> _Attributes:
    told = {**few, "messaging.operation.type": "send"}
    if name is not None:
        told["messaging.destination.name"] = name
    return told


_instrumented: list[tuple[OpenTelemetryHook, tuple[object, ...]]] = []
"""The hook that is on all brokers, and what `instrument` was given for it; or none."""


def instrument(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    body_size: bool = False,
) -> None:
    """Trace and measure all brokers that are opened from now on, and every EventEmitter that is made; once is enough.

    Call it where your app configures OpenTelemetry, before its lifespan starts; in Django in its settings or an
    AppConfig; for `dispytch-integrations relay --app` in the app's module.
    `tracer_provider`, `meter_provider`: None: the global ones. `body_size`: spans tell the size of the
    payload, too, in bytes (`messaging.message.body.size`), which the conventions leave to the user.

    Logs a warning where it comes too late, for brokers that are open, or a second time with other arguments.
    """
    given = (tracer_provider, meter_provider, body_size)
    if _instrumented:
        if given != _instrumented[0][1]:
            logger.warning(
                "instrument() was called before, and the providers and body_size of the first call stay in force: call "
                "it once, or uninstrument() in between"
            )
        return
    hook = OpenTelemetryHook(tracer_provider=tracer_provider, meter_provider=meter_provider, body_size=body_size)
    _instrumented.append((hook, given))
    overriding.hooks.append(hook)
    late = sorted(
        broker.alias
        for brokers in list(overriding.opened)
        for broker in brokers.brokers.values()
        if broker.state not in ("new", "stopped")
    )
    if late:
        logger.warning(
            "instrument() came after the broker%s %s had been opened, whose events are neither traced nor measured: "
            "call it before the app's lifespan, in Django in the settings or an AppConfig",
            "" if len(late) == 1 else "s",
            ", ".join(map(repr, late)),
        )


def uninstrument() -> None:
    """Undo `instrument` for brokers that are opened from now on."""
    for hook, _ in _instrumented:
        overriding.hooks.remove(hook)
    _instrumented.clear()


def _inject(span: Span, headers: dict[str, Any]) -> None:
    """As `propagate.inject`, which takes three times as long, where `traceparent` is all that is to be written.

    That is the usual case: W3C's propagators (the default), no `tracestate`, no baggage.
    """
    created = span.get_span_context()
    if created.trace_state or baggage.get_all() or not _is_w3c(propagate.get_global_textmap()):
        propagate.inject(headers, trace.set_span_in_context(span))
    elif created.is_valid:
        # Source: W3C Trace Context, section 3.2, version 00.
        headers["traceparent"] = f"00-{created.trace_id:032x}-{created.span_id:016x}-{created.trace_flags:02x}"


_looked_at: tuple[TextMapPropagator | None, bool] = (None, False)
"""The propagators of the last call, and what they are. One of a user's own may not be hashable."""


def _is_w3c(textmap: TextMapPropagator) -> bool:
    global _looked_at  # noqa: PLW0603
    seen, answer = _looked_at
    if seen is textmap:
        return answer
    # A composite does not tell its parts; should it keep them elsewhere, the long way is taken.
    parts: Sequence[TextMapPropagator] = (textmap,)
    if type(textmap) is CompositePropagator:
        parts = getattr(textmap, "_propagators", ())
    kinds = {type(part) for part in parts}
    answer = TraceContextTextMapPropagator in kinds and kinds <= {TraceContextTextMapPropagator, W3CBaggagePropagator}
    _looked_at = textmap, answer
    return answer


def _name(message: Message) -> str:
    """The destination as the conventions have it: of RabbitMQ the exchange and the routing key."""
    key = message.properties.get("routing_key")
    return f"{message.destination}:{key}" if key and message.destination else key or message.destination


def _address(route: EventRoute) -> tuple[str, str]:
    """Its destination and its routing key, as they are written."""
    texts: Mapping[str, Any] = route.__dict__
    name = route.destination_field or next((name for name, text in texts.items() if isinstance(text, str)), "")
    return str(texts.get(name) or ""), str(texts.get("routing_key") or "")


def _template(cls: type[EventBase]) -> str | None:
    """The route as it is written, where it has `{field}` parts."""
    parts = [part for part in _address(cls.__route__) if part]
    return ":".join(parts) if any("{" in part for part in parts) else None


def _fixed_name(route: EventRoute, prefix: str) -> str:
    destination, key = _address(route)
    return ":".join(part for part in (destination and prefix + destination, key) if part)


def _created(message: Message) -> SpanContext:
    """The context of the span in which a message was created, here or where it was put into an outbox."""
    if isinstance(message.trace, SpanContext):
        return message.trace
    carrier = {name: value for name, value in message.headers.items() if isinstance(value, str)}
    return trace.get_current_span(propagate.extract(carrier, context.Context())).get_span_context()


def _with_error(attributes: _Attributes, error: Exception | None) -> _Attributes:
    return attributes if error is None else {**attributes, "error.type": type(error).__name__}


def _end(span: Span, error: Exception | None) -> None:
    if error is not None:
        # Without its text, which may hold what a client was given.
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
    span.end()


def _count_rows(options: CallbackOptions) -> Iterable[Observation]:
    for database, stats in list(counted.items()):
        for state in ("waiting", "dead", "sent"):
            yield Observation(getattr(stats, state), {"dispytch.database": database, "dispytch.state": state})


def _oldest_age(options: CallbackOptions) -> Iterable[Observation]:
    for database, stats in list(counted.items()):
        yield Observation(stats.oldest or 0.0, {"dispytch.database": database})


def _version() -> str:
    try:
        return version("dispytch-integrations")
    except PackageNotFoundError:
        return "unknown"
