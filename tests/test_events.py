"""Event classes: checked when declared, inherited as Python classes are, each event with an identity of its own."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import re
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, ClassVar, Generic, TypeVar, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, computed_field
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

from dispytch_integrations import EventBase, EventEmitter, event_id
from dispytch_integrations._identity import now_rfc3339, uuid7
from dispytch_integrations.errors import HeaderError, RouteError, SerializationError
from dispytch_integrations.events import BackendConfig, EventRoute, _check_names, header_text
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message


class QueueConfig(BackendConfig):
    partition_key: str | None = None
    priority: int | None = None
    headers: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None


class QueueRoute(EventRoute):
    """A transport with everything: headers, tombstones, a configuration."""

    transport: ClassVar[str] = "queue"
    config_type: ClassVar[type[BackendConfig]] = QueueConfig
    supports_headers: ClassVar[bool] = True
    supports_tombstones: ClassVar[bool] = True

    queue: str
    label: str | None = None
    ttl: int | None = None

    @classmethod
    def encode_properties(cls, properties: dict[str, Any]) -> str | None:
        key: str | None = properties.pop("partition_key", None)
        return key


class BareRoute(EventRoute):
    """A transport with nothing beside the payload."""

    channel: str


class User(BaseModel):
    id: int = 1
    email: str = "anna@example.com"


class Color(Enum):
    RED = "red"


class Placed(EventBase):
    __route__ = QueueRoute(queue="orders.{tenant}", label="v{version}", ttl=3)
    __backend_config__ = QueueConfig(
        partition_key="{user.id}",
        priority=5,
        headers={"x-user": "{user.email}", "x-fixed": "yes", "x-none": "{note}"},
        extra={"list": ["{tenant}", 1], "plain": "text"},
    )

    tenant: str = Field(default="acme", exclude=True)
    version: int = 2
    user: User = User()
    note: str | None = None


def prepare(event: EventBase, **headers: Any) -> Message:
    """The event's message, as a bare emitter makes it."""
    return EventEmitter(MemoryProducer()).prepare(event, headers or None)[1]


# -- from fields to the message ----------------------------------------------------------------------------------------


def test_route_key_headers_and_properties_are_filled_from_the_event() -> None:
    """One declaration says all of it, and `exclude=True` keeps a field out of the body but usable for the route."""
    message = prepare(Placed(), trace="t1")
    assert message.destination == "orders.acme"
    assert message.ordering_key == "1"
    assert message.headers == {"x-user": "anna@example.com", "x-fixed": "yes", "trace": "t1"}
    assert message.properties == {
        "label": "v2",
        "ttl": 3,
        "priority": 5,
        "extra": {"list": ["acme", 1], "plain": "text"},
    }
    assert json.loads(message.payload or b"") == {
        "version": 2,
        "user": {"id": 1, "email": "anna@example.com"},
        "note": None,
    }


def test_messages_of_one_class_share_nothing() -> None:
    """A hook that changes one message's headers or properties must not change the next one's."""
    first = prepare(Placed())
    first.headers["x-fixed"] = "changed"
    first.properties["priority"] = 9
    second = prepare(Placed())
    assert second.headers["x-fixed"] == "yes"
    assert second.properties["priority"] == 5


def test_ordering_key_comes_before_the_partition_key() -> None:
    """Whoever says both means the order of the one and gets it on every transport."""

    class Keyed(Placed):
        __ordering_key__ = "{tenant}/{version}"

    assert prepare(Keyed()).ordering_key == "acme/2"


def test_aliases_are_used_in_the_body_and_field_names_in_the_route() -> None:
    """The body speaks the consumers' language, the class its author's."""

    class Renamed(EventBase):
        model_config = ConfigDict(alias_generator=AliasGenerator(serialization_alias=to_camel))
        __route__ = QueueRoute(queue="orders-{order_id}")
        order_id: int
        placed_by: str = Field(default="anna", serialization_alias="by")

    message = prepare(Renamed(order_id=7))
    assert message.destination == "orders-7"
    assert json.loads(message.payload or b"") == {"orderId": 7, "by": "anna"}


def test_body_is_the_json_of_the_declared_types() -> None:
    """Dates, decimals, UUIDs, bytes, enums and nested models: the same JSON value that dispytch sends."""

    class Rich(EventBase):
        __route__ = BareRoute(channel="rich")
        at: datetime = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
        day: date = date(2026, 1, 2)
        price: Decimal = Decimal("10.50")
        id: UUID = UUID(int=1)
        raw: bytes = b"raw"
        color: Color = Color.RED
        users: list[User] = [User()]
        ratio: float = 0.1
        many: dict[str, tuple[int, ...]] = {"a": (1, 2)}

        @computed_field  # type: ignore[prop-decorator]
        @property
        def total(self) -> int:
            return 3

    event = Rich()
    message = prepare(event)
    assert json.loads(message.payload or b"") == event.model_dump(mode="json", by_alias=True)
    assert message.content_type == "application/json"


def test_overridden_model_dump_decides_the_body() -> None:
    """Who has customised the dump gets it sent, as in dispytch; the fast path must not go around it."""

    class Custom(EventBase):
        __route__ = BareRoute(channel="custom")
        number: int = 1

        def model_dump(self, **options: Any) -> dict[str, Any]:
            return {**super().model_dump(**options), "added": True}

    assert json.loads(prepare(Custom()).payload or b"") == {"number": 1, "added": True}


def test_event_that_cannot_be_serialized_says_so() -> None:
    """An object that JSON does not know is the program's mistake, told with the class and without its data."""

    class Opaque(EventBase):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        __route__ = BareRoute(channel="opaque")
        thing: object = Field(default_factory=object)
        password: str = "hunter2"

    with pytest.raises(SerializationError, match="Opaque") as caught:
        prepare(Opaque())
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is not None


# -- generics and inheritance ------------------------------------------------------------------------------------------

_T = TypeVar("_T")


class Envelope(EventBase, Generic[_T]):
    __route__ = QueueRoute(queue="envelopes-{kind}")

    kind: str = "k"
    content: _T


def test_generic_events_work() -> None:
    """An envelope with a typed content is the usual way to share metadata fields."""
    message = prepare(Envelope[User](content=User()))
    assert message.destination == "envelopes-k"
    assert message.type == "Envelope[User]"
    assert json.loads(message.payload or b"") == {"kind": "k", "content": {"id": 1, "email": "anna@example.com"}}


def test_generic_part_is_checked_once_the_type_is_known() -> None:
    """`{content.id}` is fine for an Envelope[User]; for another content it is found when the class is made."""

    class Deep(EventBase, Generic[_T]):
        __route__ = QueueRoute(queue="deep-{content.id}")
        content: _T

    assert prepare(Deep[User](content=User(id=5))).destination == "deep-5"

    class Other(BaseModel):
        name: str = ""

    with pytest.raises(RouteError, match=r"\{content\.id\} is no field of .*Other"):
        _ = Deep[Other]


class Page(list[int]):
    """A list with an attribute that no class shows."""

    def __init__(self, items: Iterable[int]) -> None:
        super().__init__(items)
        self.number = 7

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.is_instance_schema(cls)


class Nested(BaseModel):
    """Whatever a path can lead through."""

    one: User | None = None
    many: Annotated[list[User], Field(min_length=1)] = [User()]
    by_name: dict[str, User] = {"a": User()}
    pair: tuple[int, User] = (1, User())
    rest: tuple[User, ...] = (User(),)
    at: datetime = datetime(2026, 11, 29)
    number: int = 3
    word: str = "word"
    anything: Any = User()
    counted: Counter[str] = Counter("aab")
    nothing: tuple[()] = ()
    page: Page = Page([1])


@pytest.mark.parametrize(
    ("path", "filled"),
    [
        ("one.email", None),
        ("many[0].id", "1"),
        ("by_name.a.id", "1"),
        ("by_name[a].id", "1"),
        ("pair[1].id", "1"),
        ("rest[0].id", "1"),
        ("at.year", "2026"),
        ("number.real", "3"),
        ("word[0]", "w"),
        ("anything.id", "1"),
        ("counted.a", "2"),
        ("page.number", "7"),
        ("nothing[0]", None),
    ],
)
def test_paths_that_lead_somewhere(path: str, filled: str | None) -> None:
    """They are checked as far as the annotations tell, and not further."""
    cls: Any = type("Leads", (EventBase,), {"__annotations__": {"deep": Nested}, "__module__": __name__,
                                       "__route__": QueueRoute(queue=f"q-{{deep.{path}}}")})  # fmt: skip
    if filled is not None:
        assert prepare(cls(deep=Nested())).destination == f"q-{filled}"


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"__broker__": 3}, "__broker__ is 3; write the alias of a broker"),
        ({"__broker__": ""}, "__broker__ is ''"),
        ({"__event_type__": ""}, "__event_type__ is empty"),
        ({"__ordering_key__": "number"}, 'the same for all events; of the field write "{number}"'),
        ({"__backend_config__": KafkaEventConfig(partition_key="number")}, "partition_key 'number' is a text"),
        ({"__route__": KafkaEventRoute}, "is the class KafkaEventRoute, not a route; write for example"),
        ({"__route__": 3}, "is a int, not a route"),
    ],
)
def test_slips_of_a_declaration_are_told_at_import(declared: dict[str, Any], told: str) -> None:
    """They would change where events go, or their order, and nobody would notice."""
    names = {"__annotations__": {"number": int}, "__module__": __name__, "__route__": KafkaEventRoute(topic="t")}
    with pytest.raises(RouteError) as caught:
        type("Slip", (EventBase,), {**names, **declared})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("one.emial", "is no field of User .did you mean 'email'"),
        ("many[0].emial", "is no field of User .did you mean 'email'"),
        ("by_name.a.emial", "is no field of User .did you mean 'email'"),
        ("rest[0].emial", "is no field of User"),
        ("many.id", "names 'id' of a list; one of its items is written with its number in brackets"),
        ("number.id", "reaches for 'id', which a int does not have"),
        ("number[0]", "reaches for 0, which a int does not have"),
        ("at.yaer", "reaches for 'yaer', which a datetime does not have"),
    ],
)
def test_paths_that_lead_nowhere_are_refused_at_import(path: str, told: str) -> None:
    """The first emit would find it, in production."""
    with pytest.raises(RouteError, match=told):
        type("Lost", (EventBase,), {"__annotations__": {"deep": Nested}, "__module__": __name__,
                                    "__route__": QueueRoute(queue=f"q-{{deep.{path}}}")})  # fmt: skip


def test_subclass_inherits_or_overrides() -> None:
    """A family of events shares its route; one member may go elsewhere."""

    class Cancelled(Placed):
        reason: str = ""

    class Refunded(Placed):
        __route__ = QueueRoute(queue="refunds")
        __backend_config__ = None  # type: ignore[assignment]
        __event_type__ = "shop.refunded"

    assert prepare(Cancelled()).destination == "orders.acme"
    assert prepare(Cancelled()).type.endswith("Cancelled")
    refund = prepare(Refunded())
    assert (refund.destination, refund.type, refund.headers, refund.properties) == ("refunds", "shop.refunded", {}, {})


def test_base_class_without_a_route_can_be_derived_from_but_not_emitted() -> None:
    """Common fields live in a base class; emitting that itself must say what is missing."""

    class Base(EventBase):
        __ordering_key__ = "{id}"
        id: int = 1

    class Routed(Base):
        __route__ = BareRoute(channel="ids")

    assert prepare(Routed()).ordering_key == "1"
    with pytest.raises(RouteError, match=r"no __route__.*write for example"):
        prepare(Base())


def test_route_that_names_a_subclass_field_is_checked_where_it_is_declared() -> None:
    """A base class with a route is complete in itself: its parts must be fields it has."""

    def declare() -> None:
        class Base(EventBase):
            __route__ = BareRoute(channel="{order_id}")

        class Derived(Base):
            order_id: int

    with pytest.raises(RouteError, match="order_id"):
        declare()


def test_event_type_is_the_qualified_name_unless_declared() -> None:
    """Consumers tell events apart by it; declared, it survives renaming the class."""

    class Named(Placed):
        __event_type__ = "com.shop.order.placed"

    assert prepare(Placed()).type == "Placed"
    assert prepare(Named()).type == "com.shop.order.placed"


# -- what is refused when the class is declared ------------------------------------------------------------------------


def _declare(**namespace: Any) -> type[EventBase]:
    annotations = {"order_id": int, "user": User}
    made = types.new_class(
        "Order",
        (EventBase,),
        exec_body=lambda ns: ns.update(namespace, __annotations__=annotations, __module__=__name__),
    )
    return cast("type[EventBase]", made)


@pytest.mark.parametrize(
    ("namespace", "said"),
    [
        ({"__route__": BareRoute(channel="o-{order_ID}")}, r"Order\.__route__: channel.*did you mean 'order_id'"),
        ({"__route__": "orders"}, r"Order\.__route__ is a str, not a route; write for example"),
        ({"__route__": QueueRoute}, r"Order\.__route__ is a ModelMetaclass|not a route"),
        ({"__route__": BareRoute(channel="c"), "__ordering_key__": "{id}"}, r"Order\.__ordering_key__"),
        ({"__route__": BareRoute(channel="c"), "__backend_config__": 1}, "is a int, but a BareRoute"),
        (
            {"__route__": QueueRoute(queue="q"), "__backend_config__": BackendConfig()},
            "a QueueRoute goes with a QueueConfig",
        ),
        (
            {"__route__": QueueRoute(queue="q"), "__backend_config__": QueueConfig(partition_key="{user.name}")},
            r"__backend_config__: partition_key.*\{user\.name\} is no field of User",
        ),
        (
            {"__route__": QueueRoute(queue="q"), "__backend_config__": QueueConfig(headers={"x": "{nope}"})},
            r"__backend_config__: headers: x",
        ),
        ({"__route__": BareRoute(channel="c"), "__tombstone__": True}, "BareRoute knows no null payload"),
        ({"__route__": QueueRoute(queue="q"), "__tombstone__": True}, r"write __ordering_key__ = "),
    ],
)
def test_wrong_declaration_fails_at_import_and_says_what_to_write(namespace: dict[str, Any], said: str) -> None:
    """What is wrong with a class shows when it is imported, in the first test run, not in production."""
    with pytest.raises(RouteError) as caught:
        _declare(**namespace)
    assert re.search(said, str(caught.value)), str(caught.value)


def test_unknown_route_field_is_refused() -> None:
    """A misspelt `topik=` must not be dropped silently."""
    with pytest.raises(ValueError, match="topik"):
        QueueRoute(queue="q", topik="t")  # type: ignore[call-arg]


@pytest.mark.parametrize("thing", [{"a": 1}, "text", None, User()])
def test_what_is_no_event_is_refused(thing: Any) -> None:
    """A dict or another pydantic model handed to emit must be told apart from an event at once."""
    with pytest.raises(RouteError, match="not an event"):
        prepare(thing)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("__orderingkey__", "write __ordering_key__"),
        ("__order_key__", "write __ordering_key__"),
        ("__ORDERING_KEY__", "write __ordering_key__"),
        ("__rout__", "write __route__"),
        ("__routes__", "write __route__"),
        ("__topic__", r"write __route__ = KafkaEventRoute\(topic=...\)"),
        ("__partition_key__", "write __ordering_key__, or"),
        ("__backendconfig__", "write __backend_config__"),
        ("__eventtype__", "write __event_type__"),
        ("__brokers__", "write __broker__"),
        ("__tomb_stone__", "write __tombstone__"),
    ],
)
@pytest.mark.parametrize("routed", [True, False])
def test_a_misspelt_class_variable_is_refused(name: str, told: str, *, routed: bool) -> None:
    """Nobody would read it, and the order of events, or the event itself, would be lost without a word."""
    namespace: dict[str, Any] = {"__module__": __name__, "__qualname__": "Misspelt", name: "{order_id}"}
    if routed:
        namespace["__route__"] = QueueRoute(queue="orders")
    with pytest.raises(RouteError, match=rf"Misspelt\.{name} means nothing to an event; {told}"):
        type("Misspelt", (EventBase,), namespace)


def test_a_class_variable_without_its_last_underscores_is_refused() -> None:
    """Python renames it and pydantic makes it private: as silent as a misspelt one."""
    with pytest.raises(RouteError, match=r"Private\.__ordering_key is private to the class; write __ordering_key__"):

        class Private(EventBase):
            __route__ = QueueRoute(queue="orders")
            __ordering_key = "{order_id}"
            __own = 1
            order_id: int


def test_special_names_of_python_and_pydantic_are_left_alone() -> None:
    """What a class body may hold, on any Python, must not be taken for a misspelt class variable of ours."""
    # Not by isinstance: Django's lazy objects would be made for it.
    types_seen = {value for module in list(sys.modules.values()) for value in list(vars(module).values())
                  if issubclass(type(value), type)}  # fmt: skip
    names = {name for cls in types_seen for name in vars(cls) if name.startswith("__") and name.endswith("__")}
    names |= {
        "__annotate__", "__annotate_func__", "__annotations_cache__", "__classcell__", "__classdict__",
        "__classdictcell__", "__conditional_annotations__", "__firstlineno__", "__get_pydantic_core_schema__",
        "__get_pydantic_json_schema__", "__orig_bases__", "__root__", "__static_attributes__", "__table_args__",
        "__tablename__", "__type_params__", "__typing_subst__",
    }  # fmt: skip
    own = {"__name__": "Seen", "__qualname__": "Seen", "__private_attributes__": {}}
    assert len(names) > 200
    _check_names(cast("Any", types.SimpleNamespace(**{**dict.fromkeys(names), **own})))


# -- tombstones --------------------------------------------------------------------------------------------------------


def test_tombstone_has_a_key_and_no_payload() -> None:
    """In a compacted topic a null payload deletes the key: b"" or b"null" would not."""

    class Deleted(EventBase):
        __route__ = QueueRoute(queue="users")
        __ordering_key__ = "{user_id}"
        __tombstone__ = True
        user_id: int

    message = prepare(Deleted(user_id=4))
    assert (message.payload, message.ordering_key) == (None, "4")
    assert "tombstone" in repr(message)


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        (b"raw", b"raw"),
        (3, "3"),
        (True, "true"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        ({"a": [1]}, '{"a":[1]}'),
        (["a", 1], '["a",1]'),
        (User(), '{"id":1,"email":"anna@example.com"}'),
        (Color.RED, "red"),
    ],
)
def test_header_values_become_obvious_text(value: Any, text: str | bytes) -> None:
    """Raw clients raise for a UUID or drop a number; an author writes what is at hand."""
    assert header_text(value) == text


@pytest.mark.parametrize(
    "headers",
    [{"x": object()}, {"x": "a\r\nb"}, {"x": "a\x00"}, {"": "x"}, {"a\nb": "x"}, {1: "x"}, {"x": "\ud800"}],
)
def test_header_that_cannot_be_sent_is_refused(headers: dict[Any, Any]) -> None:
    """A line break in a header is an injection, an object an accident; neither may reach the client."""
    with pytest.raises(HeaderError, match="Placed"):
        EventEmitter(MemoryProducer()).prepare(Placed(), headers)


def test_refused_header_does_not_show_its_value() -> None:
    """Headers hold tokens; error messages end in logs."""
    with pytest.raises(HeaderError) as caught:
        prepare(Placed(), authorization="Bearer secret\n")
    assert "secret" not in str(caught.value)


# -- identity ----------------------------------------------------------------------------------------------------------

_copies: list[Callable[[Placed], Placed]] = [
    copy.copy,
    copy.deepcopy,
    Placed.model_copy,
    lambda event: pickle.loads(pickle.dumps(event)),
    lambda event: Placed.model_validate(event.model_dump() | {"tenant": event.tenant}),
]


@pytest.mark.parametrize("copied", _copies, ids=["copy", "deepcopy", "model_copy", "pickle", "validate"])
def test_copy_is_another_event(copied: Callable[[Placed], Placed]) -> None:
    """A changed copy under the old id would be dropped by consumers as a duplicate."""
    event = Placed()
    first = event_id(event)
    twin = copied(event)
    assert twin == event
    assert event_id(twin) != first
    assert event_id(event) == first


def test_id_is_no_part_of_the_event() -> None:
    """Asking for the id must not change what an event equals, prints or sends."""
    asked, other = Placed(), Placed()
    event_id(asked)
    assert asked == other
    assert repr(asked) == repr(other)
    assert asked.model_dump() == other.model_dump()
    assert event_id(asked) not in (prepare(asked).payload or b"").decode()


def test_frozen_events_have_an_id() -> None:
    """Many teams freeze their events."""

    class Frozen(EventBase):
        model_config = ConfigDict(frozen=True)
        __route__ = BareRoute(channel="c")

    event = Frozen()
    assert event_id(event) == event_id(event)
    assert prepare(event).id == event_id(event)


def test_ids_are_uuids_of_version_7_ordered_by_time() -> None:
    """Outbox tables are indexed by it: random ids scatter over the whole index."""
    first = uuid7()
    time.sleep(0.002)
    second = uuid7()
    for text in (first, second):
        parsed = UUID(text)
        assert (parsed.version, parsed.variant, str(parsed)) == (7, "specified in RFC 4122", text)
    assert first < second
    assert abs(int(first.replace("-", "")[:12], 16) / 1000 - time.time()) < 60


def test_ids_never_repeat_across_threads() -> None:
    """Two events with one id are one event to a consumer: the second is lost."""
    made: list[list[str]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def make(mine: list[str]) -> None:
        start.wait()
        mine.extend(uuid7() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({text[14:] for mine in made for text in mine}) == 16_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_make_different_ids() -> None:
    """Workers forked from one master share its memory, randomness drawn ahead included."""
    uuid7()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, "".join(uuid7()[14:] for _ in range(50)).encode())
        os._exit(0)
    os.close(writing)
    mine = {uuid7()[14:] for _ in range(50)}
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    theirs = {text[start : start + 22] for start in range(0, len(text), 22)}
    assert len(theirs) == 50
    assert not mine & theirs


def test_time_is_rfc_3339_in_utc() -> None:
    """CloudEvents asks for it; consumers in other languages parse nothing else."""
    text = now_rfc3339()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    assert abs((datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()) < 5


class Note(EventBase):
    __route__ = BareRoute(channel="notes")
    text: str = ""


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_body_survives_the_way(text: str) -> None:
    """Whatever text a field holds, the consumer reads the same one."""
    assert json.loads(prepare(Note(text=text)).payload or b"") == {"text": text}


def test_message_repr_shows_no_payload_and_no_header() -> None:
    """Messages are logged; what they carry is nobody's business."""
    text = repr(prepare(Placed(note="secret"), authorization="Bearer token"))
    assert "secret" not in text
    assert "token" not in text
    assert "orders.acme" in text


def test_prepare_needs_no_event_loop() -> None:
    """Commit hooks and sync code prepare events: nothing of it may wait for a loop."""
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert prepare(Placed()).destination == "orders.acme"


# -- literal names and paths ---------------------------------------------------------------------------------------


def test_a_literal_name_that_the_transport_refuses_is_told_at_import() -> None:
    """Not by the first event in production."""
    from dispytch_integrations.kafka import KafkaEventRoute
    from dispytch_integrations.rabbitmq import RabbitMQEventRoute

    for route in (
        KafkaEventRoute(topic="my topic!"),
        KafkaEventRoute(topic=""),
        RabbitMQEventRoute(exchange="x" * 300, routing_key="placed"),
    ):
        with pytest.raises(RouteError, match=r"Wrong\.__route__"):
            type("Wrong", (EventBase,), {"__route__": route, "__module__": __name__, "__qualname__": "Wrong"})


def test_an_ordering_key_is_a_text() -> None:
    """5 is no template."""
    with pytest.raises(RouteError, match=r"write a str such as"):

        class Wrong(EventBase):
            __route__ = QueueRoute(queue="orders")
            __ordering_key__ = 5  # type: ignore[assignment]


async def test_a_field_of_a_list_is_reached_by_its_index() -> None:
    """`{users[0].id}` is the first user's id; `{users.id}` is nobody's."""

    class Member(BaseModel):
        id: int

    class Joined(EventBase):
        __route__ = QueueRoute(queue="group.{users[0].id}")
        users: list[Member]

    producer = MemoryProducer()
    await EventEmitter(producer).emit(Joined(users=[Member(id=7)]))
    assert producer.sent[0].destination == "group.7"
