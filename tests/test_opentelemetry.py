"""Traces and metrics: what the SDK's exporters get, from the request through the relay to the consumer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, detach
from opentelemetry.propagate import extract
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Span, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from redis.asyncio import Redis
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import BrokerUnavailableError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.opentelemetry import OpenTelemetryHook, instrument, uninstrument
from dispytch_integrations.outbox.runner import Runner
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit
from tests.support.brokers import free_port
from tests.support.outboxes import Database, eventually, temporary_database
from tests.support.servers import ROOT


class OrderPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders")
    __backend_config__ = KafkaEventConfig(partition_key="{customer}")

    customer: str = "anna"
    number: int = 0


class OrderForgotten(EventBase):
    __route__ = KafkaEventRoute(topic="orders")
    __backend_config__ = KafkaEventConfig(partition_key="{customer}")
    __tombstone__ = True

    customer: str = "anna"


class TenantOrder(EventBase):
    __route__ = KafkaEventRoute(topic="orders.{tenant}")

    tenant: str = "acme"


class RoutedOrder(EventBase):
    __route__ = RabbitMQEventRoute(exchange="shop", routing_key="order.{kind}")

    kind: str = "placed"


class Told(EventBase):
    __route__ = RedisEventRoute(channel="told")


class Streamed(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __event_type__ = "opentelemetry.Streamed"

    place: str
    number: int = 0


class KeptOrder(EventBase):
    __route__ = RedisStreamEventRoute(stream="kept")
    __event_type__ = "opentelemetry.KeptOrder"

    number: int = 0


class MovedOrder(EventBase):
    __route__ = RedisStreamEventRoute(stream="moved")
    __event_type__ = "opentelemetry.MovedOrder"


class OtherOrder(EventBase):
    """Another app's, which has given its events the same type."""

    __route__ = RedisStreamEventRoute(stream="others")
    __event_type__ = "opentelemetry.KeptOrder"


class Seen:
    """What the exporters have got."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def unit(self, name: str) -> str | None:
        data = self.reader.get_metrics_data()
        assert data is not None
        return next(
            metric.unit
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        )


@pytest.fixture
def seen() -> Iterator[Seen]:
    seen = Seen()
    instrument(tracer_provider=seen.tracers, meter_provider=seen.meters)
    yield seen
    uninstrument()


def _context(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


def _attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# -- an emit -------------------------------------------------------------------------------------------------------


async def test_a_span_for_an_emit_whose_context_travels(seen: Seen) -> None:
    """Names and attributes as the conventions have them; the consumer's span is a child of it."""
    async with connect("memory://kafka") as emitter:
        with seen.tracers.get_tracer("app").start_as_current_span("POST /orders") as request:
            await emitter.emit(OrderPlaced(customer="anna"))
        [message] = emitter.producer.sent  # type: ignore[attr-defined]
    span, _ = seen.spans
    assert (span.name, span.kind, span.status.status_code) == ("send orders", SpanKind.PRODUCER, StatusCode.UNSET)
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    assert _attributes(span) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "orders",
        "messaging.message.id": message.id,
        "messaging.kafka.message.key": "anna",
    }
    consumer = trace.get_current_span(extract(message.headers)).get_span_context()
    assert (consumer.trace_id, consumer.span_id) == (_context(span).trace_id, _context(span).span_id)
    assert "1.43" in str(span.instrumentation_scope.schema_url)  # type: ignore[union-attr]


class _Named(TextMapPropagator):
    """One of a user's own, which has the name of the standard's header and another value, and cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]
    _propagators = 1

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Context:
        return context or Context()

    def inject(self, carrier: Any, context: Any = None, setter: Any = None) -> None:
        carrier["traceparent"] = "mine"

    @property
    def fields(self) -> set[str]:
        return {"traceparent"}


W3C = [TraceContextTextMapPropagator(), W3CBaggagePropagator()]
REMOTE = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState([("vendor", "x")]))


@pytest.mark.parametrize(
    ("propagator", "around"),
    [
        (CompositePropagator(W3C), Context()),
        (W3C[0], Context()),
        (W3C[1], Context()),
        (_Named(), Context()),
        (CompositePropagator([_Named(), W3C[0]]), Context()),
        (CompositePropagator([]), Context()),
        (CompositePropagator(W3C), baggage.set_baggage("tenant", "acme", Context())),
        (CompositePropagator(W3C), trace.set_span_in_context(trace.NonRecordingSpan(REMOTE), Context())),
    ],
)
@pytest.mark.parametrize("provider", ["sampled", "not sampled", "none"])
async def test_what_travels_is_what_the_propagators_say(
    propagator: TextMapPropagator, around: Context, provider: str, request: pytest.FixtureRequest
) -> None:
    """`traceparent` has a short way here, which may differ from OpenTelemetry's own in nothing but its time."""
    providers: dict[str, Any] = {
        "sampled": TracerProvider(ALWAYS_ON),
        "not sampled": TracerProvider(ALWAYS_OFF),
        "none": trace.NoOpTracerProvider(),
    }
    created: list[Span] = []

    class Watch(Hook):
        def before_send(self, message: Message) -> None:
            created.append(message.trace.span)

    before = propagate.get_global_textmap()
    request.addfinalizer(lambda: propagate.set_global_textmap(before))
    propagate.set_global_textmap(propagator)
    token = attach(around)
    hooks = [OpenTelemetryHook(tracer_provider=providers[provider]), Watch()]
    async with connect("memory://kafka", hooks=hooks) as emitter:
        await emitter.emit(OrderPlaced())
        producer: Any = emitter.producer
        headers = dict(producer.sent[0].headers)
        expected: dict[str, str] = {}
        propagate.inject(expected, trace.set_span_in_context(created[0]))
    detach(token)
    assert {name: headers[name] for name in ("traceparent", "tracestate", "baggage") if name in headers} == expected


async def test_the_size_of_the_body_where_it_is_asked_for(seen: Seen) -> None:
    """The conventions leave it to the user. A tombstone has none, and says that it is one."""
    uninstrument()
    instrument(tracer_provider=seen.tracers, body_size=True)
    async with connect("memory://kafka") as emitter:
        await emitter.emit(OrderPlaced(customer="anna"))
        await emitter.emit(OrderForgotten(customer="anna"))
        [message, _] = emitter.producer.sent  # type: ignore[attr-defined]
    told, tombstone = (_attributes(span) for span in seen.spans)
    assert told["messaging.message.body.size"] == len(message.payload)
    assert "messaging.message.body.size" not in tombstone
    assert tombstone["messaging.kafka.message.tombstone"] is True


async def test_destinations_of_each_transport(seen: Seen) -> None:
    """RabbitMQ's are exchange and key; what fields make has a template; Redis pub/sub has no headers to travel in."""
    async with connect({"k": "memory://kafka", "a": "memory://rabbitmq", "r": "memory://redis"}) as emitter:
        await emitter.emit_many([TenantOrder(tenant="acme"), RoutedOrder(kind="placed"), Told()])
        [told] = emitter.producers["r"].sent  # type: ignore[attr-defined]
    spans = {span.name: _attributes(span) for span in seen.spans}
    assert set(spans) == {"send orders.acme", "send shop:order.placed", "send told"}
    assert spans["send orders.acme"]["messaging.destination.template"] == "orders.{tenant}"
    assert spans["send shop:order.placed"]["messaging.rabbitmq.destination.routing_key"] == "order.placed"
    assert spans["send shop:order.placed"]["messaging.system"] == "rabbitmq"
    assert told.headers == {}
    names = [
        dict(point.attributes).get("messaging.destination.name")
        for point in seen.points("messaging.client.sent.messages")
    ]
    assert "orders.acme" not in names, "a metric for each tenant"


async def test_a_failure_is_told_without_its_text(seen: Seen, redis_url: str, unique: str) -> None:
    """`error.type` on span and metrics; of what a client said, nothing: it may hold a secret."""
    async with connect(redis_url, prefix=unique, timeout=0.3) as emitter:
        client = Redis.from_url(redis_url)
        await client.set(f"{unique}text", "no stream")
        with pytest.raises(Exception, match="WRONGTYPE"):
            await emitter.emit(Streamed(place="text"))
        await client.delete(f"{unique}text")
        await client.aclose()
    [span] = seen.spans
    error = _attributes(span)["error.type"]
    assert span.status.status_code == StatusCode.ERROR
    assert "WRONGTYPE" not in str(span.to_json())
    assert _attributes(span)["server.address"] in ("127.0.0.1", "localhost")
    assert isinstance(_attributes(span)["server.port"], int)
    [point] = seen.points("messaging.client.sent.messages")
    assert (point.value, point.attributes["error.type"]) == (1, error)


async def test_metrics_of_emits(seen: Seen) -> None:
    """Names and units of the conventions; what is in flight comes back to nothing."""
    async with connect("memory://kafka") as emitter:
        await emitter.emit_many([OrderPlaced(number=number) for number in range(5)])
        await emitter.emit(OrderPlaced())
    [sent] = seen.points("messaging.client.sent.messages")
    assert (sent.value, dict(sent.attributes)) == (
        6,
        {"messaging.system": "kafka", "messaging.operation.name": "send", "messaging.destination.name": "orders"},
    )
    [duration] = seen.points("messaging.client.operation.duration")
    assert (duration.count, duration.explicit_bounds[0], seen.unit("messaging.client.operation.duration")) == (
        6,
        0.005,
        "s",
    )
    assert [point.value for point in seen.points("dispytch.messages.in_flight")] == [0]
    assert seen.unit("messaging.client.sent.messages") == "{message}"


async def test_refused_during_an_outage(seen: Seen) -> None:
    """An emit that fails at once is seen as well."""
    url = f"redis://127.0.0.1:{free_port()}"
    async with connect(url, required=False, timeout=0.2) as emitter:
        with pytest.raises(BrokerUnavailableError):
            await emitter.emit(Streamed(place="x"))
    assert [_attributes(span)["error.type"] for span in seen.spans] == ["BrokerUnavailableError"]


def test_threads_and_bare_emitters(seen: Seen) -> None:
    """The caller's context counts, on whatever loop it is sent; an EventEmitter of one's own is seen, too."""
    with connect_blocking("memory://kafka") as emitter:
        with seen.tracers.get_tracer("app").start_as_current_span("task") as task:
            emitter.emit(OrderPlaced())
    span = next(span for span in seen.spans if span.name == "send orders")
    assert span.parent is not None
    assert span.parent.span_id == task.get_span_context().span_id
    asyncio.run(EventEmitter(MemoryProducer()).emit(TenantOrder()))
    assert seen.spans[-1].name == "send orders.acme"


async def test_a_hook_for_one_broker_alone() -> None:
    """Who does not want all of them gives it to those that he wants."""
    seen = Seen()
    hook = OpenTelemetryHook(tracer_provider=seen.tracers, meter_provider=seen.meters)
    async with connect({"a": {"url": "memory://kafka", "hooks": [hook]}, "b": "memory://redis"}) as emitter:
        await emitter.emit_many([OrderPlaced(), Streamed(place="x")])
    assert [span.name for span in seen.spans] == ["send orders"]


async def test_too_late_or_with_other_providers_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Spans that are missing have a line that says why."""
    tracers = TracerProvider()
    try:
        async with connect({"default": "memory://kafka", "audit": "memory://redis"}):
            instrument()
        [late] = caplog.messages
        assert "after the brokers 'audit', 'default' had been opened" in late
        instrument()
        assert caplog.messages == [late]
        instrument(tracer_provider=tracers)
        assert "called before" in caplog.messages[1]
    finally:
        uninstrument()
    caplog.clear()
    instrument(tracer_provider=tracers)
    uninstrument()
    assert caplog.messages == []


async def test_without_instrumentation_nothing_is_added() -> None:
    """Importing the module switches nothing on."""
    async with connect("memory://kafka") as emitter:
        await emitter.emit(OrderPlaced())
        [message] = emitter.producer.sent  # type: ignore[attr-defined]
    assert "traceparent" not in message.headers


# -- after a commit, and through the outbox --------------------------------------------------------------------------


async def test_after_a_commit_the_trace_goes_on(seen: Seen, tmp_path: Path) -> None:
    """Created in the request, sent after it: two spans of one trace; rolled back, only the creation is told."""
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    async with connect("memory://kafka") as emitter:
        with seen.tracers.get_tracer("app").start_as_current_span("request"), Session(engine) as session:
            emit_on_commit(session, OrderPlaced(number=1), emitter=emitter)
            session.commit()
            emit_on_commit(session, OrderPlaced(number=2), emitter=emitter)
            session.rollback()
        await eventually(lambda: len(seen.spans) == 4)
        [message] = emitter.producer.sent  # type: ignore[attr-defined]
    engine.dispose()
    created, _, request, sent = _by_name(seen)
    assert (created.kind, sent.kind) == (SpanKind.PRODUCER, SpanKind.CLIENT)
    assert _attributes(created)["messaging.operation.type"] == "create"
    assert _context(created).trace_id == _context(sent).trace_id == _context(request).trace_id
    assert sent.parent is not None
    assert sent.parent.span_id == _context(created).span_id
    assert [link.context.span_id for link in sent.links] == [_context(created).span_id]
    travelling = trace.get_current_span(extract(message.headers)).get_span_context()
    assert travelling.span_id == _context(created).span_id


def _by_name(seen: Seen) -> tuple[ReadableSpan, ReadableSpan, ReadableSpan, ReadableSpan]:
    """Those of the committed one, the rolled back one, the request, and the sending."""
    created = [span for span in seen.spans if span.name == "create orders"]
    request = next(span for span in seen.spans if span.name == "request")
    sent = next(span for span in seen.spans if span.name == "send orders")
    return created[0], created[1], request, sent


@pytest.fixture
def database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@asynccontextmanager
async def _storing(database: Database) -> AsyncGenerator[Any]:
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    factory, outbox = async_sessionmaker(engine), SQLAlchemyOutbox(engine, "external")
    bind(factory, outbox)
    async with connect("redis://127.0.0.1:1", outbox=outbox):
        yield factory
    await engine.dispose()


RELAY = """
import asyncio, json, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import create_engine
from dispytch_integrations import connect
from dispytch_integrations.opentelemetry import instrument
from dispytch_integrations.outbox.runner import Runner
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox

exporter, tracers = InMemorySpanExporter(), TracerProvider()
tracers.add_span_processor(SimpleSpanProcessor(exporter))
instrument(tracer_provider=tracers)
outbox = SQLAlchemyOutbox(create_engine(sys.argv[1]), "external")
code = Runner(connect(sys.argv[2]), {"default": outbox.store}).main(once=True)
outbox.engine.dispose()
print(json.dumps([
    [span.name, span.kind.name, format(span.context.trace_id, "032x"),
     span.parent and format(span.parent.span_id, "016x"),
     [format(link.context.span_id, "016x") for link in span.links], dict(span.attributes)]
    for span in exporter.get_finished_spans()
]))
"""


@pytest.mark.parametrize("count", [1, 5])
async def test_through_the_outbox_to_the_consumer_across_processes(
    count: int, seen: Seen, database: Database, redis_url: str, unique: str, tmp_path: Path
) -> None:
    """The request creates, another process relays, a consumer reads: all of it is found by the request's trace."""
    async with _storing(database) as factory:
        with seen.tracers.get_tracer("app").start_as_current_span("request") as request:
            async with factory.begin() as session:
                emit_on_commit(session, [Streamed(place=unique, number=number) for number in range(count)])
    created = [span for span in seen.spans if span.name == f"create {unique}"]
    assert len(created) == count

    (tmp_path / "relay.py").write_text(textwrap.dedent(RELAY))
    url = database.url("postgresql+psycopg").render_as_string(hide_password=False)
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "relay.py", url, redis_url],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert process.returncode == 0, process.stderr
    [(name, kind, trace_id, parent, links, attributes)] = json.loads(process.stdout.splitlines()[-1])
    assert (name, kind) == (f"send {unique}", "CLIENT")
    assert attributes["messaging.system"] == "redis"
    assert sorted(links) == sorted(format(_context(span).span_id, "016x") for span in created)
    if count == 1:
        assert trace_id == format(request.get_span_context().trace_id, "032x")
        assert parent == links[0]
    else:
        assert attributes["messaging.batch.message_count"] == count
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        entries: Any = await client.xrange(unique)
        await client.delete(unique)
    consumed = [trace.get_current_span(extract(fields)).get_span_context() for _, fields in entries]
    assert {each.trace_id for each in consumed} == {request.get_span_context().trace_id}
    assert [each.span_id for each in consumed] == [_context(span).span_id for span in created]


async def test_metrics_of_a_relay_tell_the_destinations_of_known_classes(seen: Seen, database: Database) -> None:
    """A name or a template as in the web process; nothing where the class is unknown or writes to another place now."""
    events: list[EventBase] = [
        Streamed(place="acme", number=1),
        Streamed(place="umbrella", number=2),
        KeptOrder(),
        MovedOrder(),
    ]
    async with _storing(database) as factory, factory.begin() as session:
        emit_on_commit(session, events)
    database.run("update dispytch_outbox_event set destination = 'where-it-was' where destination = 'moved'")
    database.run("update dispytch_outbox_event set type = 'not.imported' where destination = 'umbrella'")
    engine = create_engine(database.url("postgresql+psycopg"))
    runner = Runner(connect("memory://redis"), {"default": SQLAlchemyOutbox(engine, "external").store})
    running = asyncio.create_task(runner.run())
    await eventually(lambda: sum(point.value for point in seen.points("messaging.client.sent.messages")) == 4)
    runner.stop()
    await running
    engine.dispose()
    told = {
        (
            point.attributes.get("messaging.destination.name"),
            point.attributes.get("messaging.destination.template"),
        ): point.value
        for point in seen.points("messaging.client.sent.messages")
    }
    assert told == {(None, "{place}"): 1, ("kept", None): 1, (None, None): 2}
    names = {_attributes(span).get("messaging.destination.name") for span in seen.spans if span.kind is SpanKind.CLIENT}
    assert names <= {None, "acme", "umbrella", "kept", "where-it-was"}


async def test_gauges_of_the_outbox(seen: Seen, database: Database) -> None:
    """What waits, what is dead and how old it is, from the relay that counts it anyway."""
    async with _storing(database) as factory:
        async with factory.begin() as session:
            emit_on_commit(session, [Streamed(place="nowhere", number=number) for number in range(3)])
    database.run("update dispytch_outbox_event set created_ms = created_ms - 60000")
    engine = create_engine(database.url("postgresql+psycopg"))
    outbox = SQLAlchemyOutbox(engine, "external")
    away = connect(f"redis://127.0.0.1:{free_port()}")
    runner = Runner(away, {"shop": outbox.store}, on_progress=lambda progress: None, every=0.1)
    running = asyncio.create_task(runner.run())
    await eventually(lambda: seen.points("dispytch.outbox.messages"))
    rows = {
        point.attributes["dispytch.state"]: point.value
        for point in seen.points("dispytch.outbox.messages")
        if point.attributes["dispytch.database"] == "shop"
    }
    assert rows == {"waiting": 3, "dead": 0, "sent": 0}
    ages = seen.points("dispytch.outbox.oldest_age")
    [age] = [point for point in ages if point.attributes["dispytch.database"] == "shop"]
    assert (60 <= age.value < 90, dict(age.attributes), seen.unit("dispytch.outbox.oldest_age")) == (
        *(True, {"dispytch.database": "shop"}, "s"),
    )
    runner.stop()
    await running
    engine.dispose()
