"""The emitter over one producer: dispytch's API, and what it promises beyond it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Generic, TypeVar
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from dispytch_integrations import EventBase, EventEmitter, event_id
from dispytch_integrations.errors import (
    ConfigurationError,
    HeaderError,
    ProducerTimeout,
    RouteError,
    SerializationError,
    UnroutableError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.producer import BackendConfig, EventRoute, Producer
from dispytch_integrations.serialization import JSONSerializer, MessagePackSerializer, Serializer


class FileConfig(BackendConfig):
    mode: str | None = None
    headers: dict[str, str] | None = None


class FileRoute(EventRoute):
    config_type = FileConfig
    path: str
    suffix: str = ".json"


class Saved(EventBase):
    __route__ = FileRoute(path="users/{user_id}")
    __backend_config__ = FileConfig(mode="{mode}", headers={"who": "{user_id}"})

    user_id: str
    mode: str = "w"


class Recorder(Producer):
    """A producer as dispytch's users write it: `send` alone, and no __init__ of ours."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, EventRoute, BackendConfig | None]] = []

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        await asyncio.sleep(0)
        self.calls.append((payload, route, config))


class Stuck(Producer):
    """A broker that never confirms."""

    def __init__(self, first_ones_pass: int = 0) -> None:
        self.passing = first_ones_pass

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        if self.passing > 0:
            self.passing -= 1
            return
        await asyncio.Event().wait()


class Failing(Producer):
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        raise self.error


async def test_a_users_own_producer_gets_what_dispytch_would_give_it() -> None:
    """Producers written for dispytch work unchanged: filled route and configuration, JSON payload."""
    producer = Recorder()
    await EventEmitter(producer).emit(Saved(user_id="ada"))
    payload, route, config = producer.calls[0]
    assert json.loads(payload) == {"user_id": "ada", "mode": "w"}
    assert route == FileRoute(path="users/ada")
    assert config == FileConfig(mode="w", headers={"who": "ada"})


async def test_emit_many_over_a_users_own_producer_keeps_the_order() -> None:
    """A producer that can only send one after the other must still deliver in order."""
    producer = Recorder()
    await EventEmitter(producer).emit_many([Saved(user_id=f"u{number}") for number in range(20)])
    assert [json.loads(payload)["user_id"] for payload, _, _ in producer.calls] == [f"u{n}" for n in range(20)]


async def test_a_bare_emitter_logs_a_timeout_as_dispytch_does(caplog: pytest.LogCaptureFixture) -> None:
    """Code written for dispytch must not suddenly see exceptions."""
    with caplog.at_level(logging.WARNING):
        await EventEmitter(Failing(ProducerTimeout())).emit(Saved(user_id="ada"))
    assert "Saved was not confirmed in time" in caplog.text


async def test_on_timeout_takes_sync_and_async_callbacks_and_returns_them() -> None:
    """A decorator that swallows its function breaks everybody who calls or tests the callback."""
    seen: list[EventBase] = []
    emitter = EventEmitter(Failing(ProducerTimeout()))

    @emitter.on_timeout
    def note(event: EventBase) -> None:
        seen.append(event)

    first = Saved(user_id="ada")
    await emitter.emit(first)
    assert callable(note)

    @emitter.on_timeout
    async def note_later(event: EventBase) -> None:
        await asyncio.sleep(0)
        seen.append(event)

    second = Saved(user_id="bob")
    await emitter.emit(second)
    assert callable(note_later)
    assert seen[0] is first
    assert seen[1] is second


async def test_every_emit_has_a_deadline() -> None:
    """A producer that never answers must not hang the request that emits."""
    emitter = EventEmitter(Stuck(), timeout=0.05)
    timed_out: list[EventBase] = []
    emitter.on_timeout(timed_out.append)
    async with asyncio.timeout(2):
        await asyncio.gather(*(emitter.emit(Saved(user_id=f"u{n}")) for n in range(50)))
    assert len(timed_out) == 50


async def test_cancelling_an_emit_is_no_timeout() -> None:
    """A client that disconnects cancels its request; that must go through, not turn into a log line."""
    emitter = EventEmitter(Stuck(), timeout=5)
    emitting = asyncio.create_task(emitter.emit(Saved(user_id="ada")))
    await asyncio.sleep(0)
    emitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await emitting


async def test_emit_many_tells_what_was_confirmed_before_the_deadline() -> None:
    """Only the unconfirmed may be reported: resending the others would make duplicates."""
    emitter = EventEmitter(Stuck(first_ones_pass=3), timeout=0.05)
    timed_out: list[EventBase] = []
    emitter.on_timeout(timed_out.append)
    events = [Saved(user_id=f"u{n}") for n in range(5)]
    await emitter.emit_many(events)
    assert timed_out == events[3:]


async def test_a_producers_own_error_reaches_the_caller() -> None:
    """Whatever is not a timeout is not to be swallowed."""
    with pytest.raises(UnroutableError, match="nobody"):
        await EventEmitter(Failing(UnroutableError("nobody takes it"))).emit(Saved(user_id="ada"))
    with pytest.raises(ExceptionGroup) as caught:
        await EventEmitter(Failing(ZeroDivisionError("oh"))).emit_many([Saved(user_id="a"), Saved(user_id="b")])
    assert "2 of 2 events" in str(caught.value)


class Topic(EventRoute):
    supports_headers = True
    topic: str


T = TypeVar("T")


class User(BaseModel):
    id: int
    born: datetime


class Rich(EventBase):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)
    __route__ = Topic(topic="users.{user.id}.{at:%Y-%m}")

    user: User
    at: datetime
    net_price: Decimal
    token: UUID
    raw: bytes
    hidden: str = Field(default="h", exclude=True)


async def test_the_body_is_the_json_that_dispytch_sends() -> None:
    """Consumers written for dispytch read aliases, nested models, dates, decimals and bytes as before."""
    producer = MemoryProducer()
    event = Rich(
        user=User(id=7, born=datetime(1990, 1, 2, tzinfo=UTC)),
        at=datetime(2026, 3, 4, tzinfo=UTC),
        net_price=Decimal("9.90"),
        token=UUID(int=5),
        raw=b"abc",
    )
    await EventEmitter(producer).emit(event)
    message = producer.sent[0]
    assert message.destination == "users.7.2026-03"
    assert message.payload is not None
    assert json.loads(message.payload) == event.model_dump(mode="json", by_alias=True)
    assert "netPrice" in json.loads(message.payload)
    assert "hidden" not in json.loads(message.payload)


class Changed(EventBase, Generic[T]):
    __route__ = Topic(topic="changed")
    item: T


class CustomDump(EventBase):
    __route__ = Topic(topic="dumps")
    value: int

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        return {"mine": self.value}


async def test_generic_events_and_own_model_dump_are_respected() -> None:
    """What a model says about its own serialization is the body."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    await emitter.emit(Changed[int](item=3))
    await emitter.emit(CustomDump(value=4))
    bodies = [json.loads(message.payload or b"") for message in producer.sent]
    assert bodies == [{"item": 3}, {"mine": 4}]


class Upper(Serializer):
    content_type = "text/plain"

    def serialize(self, payload: dict[str, Any]) -> bytes:
        return str(payload["value"]).upper().encode()


class DispytchSerializer:
    """As dispytch's users have them: no base class of ours, `serialize` alone."""

    def serialize(self, payload: dict[str, Any]) -> bytes:
        return b"plain"


class Registry(Serializer):
    """Needs the event's class and its destination, as Avro with a schema registry does."""

    content_type = "avro/binary"

    def serialize(self, payload: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def serialize_event(self, event: EventBase, message: Message) -> bytes:
        message.headers["schema"] = f"{message.destination}-{type(event).__name__}"
        return b"\x00" + event.model_dump_json().encode()


class Word(EventBase):
    __route__ = Topic(topic="words")
    value: str


async def test_serializers_of_ones_own() -> None:
    """Payload formats are the user's choice, from two lines to a schema registry."""
    producer = MemoryProducer()
    await EventEmitter(producer, Upper()).emit(Word(value="loud"))
    await EventEmitter(producer, DispytchSerializer()).emit(Word(value="x"))  # type: ignore[arg-type]
    await EventEmitter(producer, Registry()).emit(Word(value="x"))
    await EventEmitter(producer, MessagePackSerializer()).emit(Word(value="x"))
    upper, plain, avro, packed = producer.sent
    assert (upper.payload, upper.content_type) == (b"LOUD", "text/plain")
    assert plain.payload == b"plain"
    assert (avro.payload, avro.headers["schema"]) == (b'\x00{"value":"x"}', "words-Word")
    assert (packed.payload, packed.content_type) == (b"\x81\xa5value\xa1x", "application/msgpack")


class Bad(Serializer):
    def serialize(self, payload: dict[str, Any]) -> bytes:
        raise ValueError(f"cannot: {payload}")


class Wrong(Serializer):
    def serialize(self, payload: dict[str, Any]) -> bytes:
        return "text"  # type: ignore[return-value]


@pytest.mark.parametrize("serializer", [Bad(), Wrong()])
async def test_a_serializer_that_fails_says_so_without_the_payload(serializer: Serializer) -> None:
    """The error goes to logs; the event's values must not."""
    with pytest.raises(SerializationError) as caught:
        await EventEmitter(MemoryProducer(), serializer).emit(Word(value="confidential"))
    assert "confidential" not in str(caught.value)
    assert type(serializer).__name__ in str(caught.value)


async def test_json_of_strange_characters_is_utf8() -> None:
    """The two ways JSON is written (pydantic's and json.dumps) give the same value."""
    assert json.loads(JSONSerializer().serialize({"ä": "\u2028☃"})) == {"ä": "\u2028☃"}


class Unroutable(EventBase):
    value: int


class PlainModel(BaseModel):
    value: int


async def test_what_is_no_event_is_refused_with_what_to_write() -> None:
    """The commonest mistakes of the first day."""
    emitter = EventEmitter(MemoryProducer())
    with pytest.raises(RouteError, match=r"Unroutable has no __route__.*write for example"):
        await emitter.emit(Unroutable(value=1))
    with pytest.raises(RouteError, match="derive its class from EventBase"):
        await emitter.emit(PlainModel(value=1))  # type: ignore[arg-type]
    with pytest.raises(RouteError, match="dict is not an event"):
        await emitter.emit({"value": 1})  # type: ignore[arg-type]


async def test_a_route_of_another_transport_is_refused() -> None:
    """An event for Kafka given to a producer for files would otherwise fail deep in a client."""

    class FileProducer(Recorder):
        routes = (FileRoute,)

    with pytest.raises(RouteError, match="Word has a Topic, but FileProducer takes a FileRoute"):
        await EventEmitter(FileProducer()).emit(Word(value="x"))


async def test_headers_are_text_and_checked() -> None:
    """UUIDs, numbers, dates and dicts are what people put into headers; line breaks are how they are attacked."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    given = {"id": UUID(int=1), "n": 3, "ok": True, "d": {"a": 1}, "t": datetime(2026, 1, 2, tzinfo=UTC), "none": None}
    await emitter.emit(Word(value="x"), headers=given)
    assert producer.sent[0].headers == {
        "id": "00000000-0000-0000-0000-000000000001",
        "n": "3",
        "ok": "true",
        "d": '{"a":1}',
        "t": "2026-01-02T00:00:00+00:00",
    }
    for bad in ({"a\n": "x"}, {"a": "x\r\ny"}, {"": "x"}, {"a": object()}):
        with pytest.raises(HeaderError):
            await emitter.emit(Word(value="x"), headers=bad)
    with pytest.raises(HeaderError, match="FileRoute carries no headers"):
        await emitter.emit(Saved(user_id="ada"), headers={"a": "b"})
    assert len(producer.sent) == 1


async def test_emit_many_sends_nothing_when_one_event_cannot_be_sent() -> None:
    """Half a batch, because the 7th of 10 has a bad value, is the worst of both."""
    producer = MemoryProducer()
    events = [Saved(user_id="ok"), Saved(user_id="a/../b"), Saved(user_id="")]
    with pytest.raises(ExceptionGroup) as caught:
        await EventEmitter(producer).emit_many(events)
    assert "2 of 3 events cannot be sent; none was" in str(caught.value)
    assert caught.value.exceptions[0].__notes__ == ["event 1 of emit_many: Saved"]
    assert producer.sent == []


class Trace(Hook):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_send(self, message: Message) -> None:
        message.headers["trace"] = "t-1"
        self.seen.append("before")

    def sent(self, message: Message) -> None:
        self.seen.append(f"sent {message.headers['trace']}")

    def failed(self, message: Message, error: Exception) -> None:
        self.seen.append(f"failed {type(error).__name__}")


class Broken(Hook):
    def sent(self, message: Message) -> None:
        raise RuntimeError("the hook is broken")


async def test_hooks_see_each_message_and_cannot_harm(caplog: pytest.LogCaptureFixture) -> None:
    """Tracing and metrics must neither miss an event nor lose one."""
    trace = Trace()
    producer = MemoryProducer()
    await EventEmitter(producer, hooks=[Broken(), trace]).emit(Word(value="x"))
    with pytest.raises(UnroutableError):
        await EventEmitter(Failing(UnroutableError()), hooks=[trace]).emit(Word(value="x"))
    assert trace.seen == ["before", "sent t-1", "before", "failed UnroutableError"]
    assert producer.sent[0].headers["trace"] == "t-1"
    assert "the hook" in caplog.text


async def test_an_event_emitted_twice_keeps_its_identity() -> None:
    """Consumers drop the duplicate of a retry by its id."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    event = Word(value="x")
    await emitter.emit(event)
    await emitter.emit(event)
    await emitter.emit(event.model_copy())
    first, again, copy = [message.id for message in producer.sent]
    assert first == again == event_id(event)
    assert copy != first


class Slots(Producer):
    """Overrides `deliver`: gets messages, many at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        raise AssertionError("deliver is there")

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        self.batches.append(len(messages))
        return [None] * len(messages)


async def test_a_producer_that_delivers_gets_many_at_once() -> None:
    """emit_many is pipelined where the producer can."""
    producer = Slots()
    await EventEmitter(producer).emit_many([Word(value="x")] * 100)
    assert producer.batches == [100]


async def test_a_bare_emitter_outlives_its_event_loop() -> None:
    """pytest gives each test a loop of its own; a module-level emitter over memory works in all of them."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    await asyncio.to_thread(lambda: [asyncio.run(emitter.emit(Word(value=str(n)))) for n in range(3)])
    assert len(producer.sent) == 3


# -- mistakes that are told at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [Recorder, "kafka://localhost", None, object()])
def test_what_is_no_producer_is_refused(given: Any) -> None:
    """A URL, a class and a raw client are the likely mistakes; the error says what to write."""
    with pytest.raises(ConfigurationError, match=r"sends through a Producer.*connect\("):
        EventEmitter(given)


class _Async(Hook):
    async def sent(self, message: Message) -> None:  # type: ignore[override]
        raise AssertionError("nobody awaits it")


@pytest.mark.parametrize(
    ("hook", "told"), [(lambda message: None, "has none of them"), (Hook, r"write Hook\(\)"), (_Async(), "coroutine")]
)
def test_what_is_no_hook_is_refused(hook: Any, told: str) -> None:
    """A hook that is never called is missed in production."""
    with pytest.raises(ConfigurationError, match=told):
        EventEmitter(MemoryProducer(), hooks=[hook])


async def test_a_hook_need_not_derive_from_ours() -> None:
    """One method is enough."""

    class Sent:
        def __init__(self) -> None:
            self.messages: list[Message] = []

        def sent(self, message: Message) -> None:
            self.messages.append(message)

    hook: Any = Sent()
    await EventEmitter(MemoryProducer(), hooks=[hook]).emit(Saved(user_id="1"))
    assert len(hook.messages) == 1


@pytest.mark.parametrize("serializer", ["json", JSONSerializer])
def test_what_is_no_serializer_is_refused(serializer: Any) -> None:
    """Not at the first event, but where it is given."""
    with pytest.raises(ConfigurationError, match="MessagePackSerializer"):
        EventEmitter(MemoryProducer(), serializer)


async def test_emit_many_of_one_event_is_refused() -> None:
    """An event is iterable, over its fields; one without fields would be sent by nobody, without a word."""

    class Ping(EventBase):
        __route__ = FileRoute(path="ping")

    with pytest.raises(TypeError, match=r"emit\(event\)"):
        await EventEmitter(MemoryProducer()).emit_many(Ping())  # type: ignore[arg-type]


class QueuedConfig(BackendConfig):
    partition_key: str | None = None
    headers: dict[str, Any] | None = None


class QueueRoute(EventRoute):
    config_type = QueuedConfig
    supports_headers = True
    supports_tombstones = True
    queue: str


async def test_a_producer_of_ones_own_gets_headers_and_key() -> None:
    """`send(payload, route, config)` has room for them in the configuration; dropped, nobody would notice."""

    class Queued(EventBase):
        __route__ = QueueRoute(queue="orders")
        __ordering_key__ = "{number}"
        number: int

    recorder = Recorder()
    await EventEmitter(recorder).emit(Queued(number=7), headers={"tenant": "acme"})
    [(_, _, config)] = recorder.calls
    assert config == QueuedConfig(partition_key="7", headers={"tenant": "acme"})


async def test_headers_that_a_producer_has_no_room_for_are_refused() -> None:
    """Better an error than a header that is not there."""

    class Bare(EventRoute):
        supports_headers = True
        name: str

    class Named(EventBase):
        __route__ = Bare(name="orders")

    with pytest.raises(HeaderError, match="no field for them"):
        await EventEmitter(Recorder()).emit(Named(), headers={"tenant": "acme"})


async def test_a_tombstone_without_its_key_is_refused() -> None:
    """A null payload without a key deletes nothing, and says so to nobody."""

    class Gone(EventBase):
        __route__ = QueueRoute(queue="customers")
        __ordering_key__ = "{id}"
        __tombstone__ = True
        id: str | None = None

    producer = MemoryProducer()
    for missing in (None, ""):
        with pytest.raises(RouteError, match="deletes a key"):
            await EventEmitter(producer).emit(Gone(id=missing))
    await EventEmitter(producer).emit(Gone(id="1"))
    assert [message.ordering_key for message in producer.sent] == ["1"]
    with pytest.raises(RouteError, match="null payload"):
        await EventEmitter(Recorder()).emit(Gone(id="1"))


async def test_headers_must_be_a_dict_of_what_can_be_sent() -> None:
    """Told as a header's trouble, not as an error of a library below."""

    class Queued(EventBase):
        __route__ = QueueRoute(queue="orders")

    emitter = EventEmitter(MemoryProducer())
    for headers in ([("a", "b")], {"a": {"b": object()}}):
        with pytest.raises(HeaderError):
            await emitter.emit(Queued(), headers=headers)  # type: ignore[arg-type]


def test_only_an_event_has_an_id() -> None:
    """`event_id(event.order_id)` is a slip that an AttributeError of ours does not explain."""
    with pytest.raises(TypeError, match="not an event"):
        event_id("x")  # type: ignore[arg-type]


async def test_a_key_or_header_of_one_field_is_encoded_as_a_constant_is() -> None:
    """Equal dicts are equal keys, whatever their order; dates and booleans read as in JSON."""

    class Keyed(EventBase):
        __route__ = QueueRoute(queue="orders")
        __backend_config__ = QueuedConfig(
            partition_key="{key}", headers={"flag": "{flag}", "at": "{at}", "user": "{user}"}
        )
        key: dict[str, int]
        flag: bool = True
        at: datetime = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
        user: BaseModel | None = None

    class User(BaseModel):
        id: int

    producer = MemoryProducer()
    for key in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        await EventEmitter(producer).emit(Keyed(key=key, user=User(id=1)))
    first, second = producer.sent
    assert first.properties["partition_key"] == second.properties["partition_key"] == '{"a":1,"b":2}'
    assert first.headers == {"flag": "true", "at": "2026-01-02T03:04:00+00:00", "user": '{"id":1}'}
