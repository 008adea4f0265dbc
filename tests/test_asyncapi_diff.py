"""What `diff` calls breaking: what consumers of an event would notice, and nothing else."""

from __future__ import annotations

import copy
import json
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, create_model

from dispytch_integrations import EventBase
from dispytch_integrations.asyncapi import Change, describe, diff, to_json, to_yaml
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventConfig, RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.serialization import Serializer

TOPIC = KafkaEventRoute(topic="orders")


def _event(
    fields: dict[str, Any] | None = None,
    *,
    name: str = "DiffPlaced",
    route: EventRoute = TOPIC,
    config: BackendConfig | None = None,
    doc: str | None = None,
    **declared: Any,
) -> type[EventBase]:
    """An event class; each is a version of the same one unless `name` says else."""
    body = {
        "__module__": "diff_shop",
        "__qualname__": name,
        "__route__": route,
        "__backend_config__": config,
        "__doc__": doc,
        "__annotations__": {field: kind for field, (kind, *_) in (fields or {}).items()},
        **{field: rest[0] for field, (_, *rest) in (fields or {}).items() if rest},
        **declared,
    }
    return type(name, (EventBase,), body)


def _changes(
    old: type[EventBase] | None, new: type[EventBase] | None, was: Any = None, now: Any = None
) -> list[Change]:
    """The changes but for the examples'; `was` and `now`: the brokers before and after."""
    documents = [describe([] if cls is None else [cls], brokers=brokers) for cls, brokers in ((old, was), (new, now))]
    # As they are kept: one in JSON, the other in YAML.
    changes = diff(json.loads(to_json(documents[0])), yaml.safe_load(to_yaml(documents[1])))
    return [change for change in changes if change.where != "examples"]


def _breaking(
    old: type[EventBase] | None, new: type[EventBase] | None, was: Any = None, now: Any = None
) -> list[tuple[str, str]]:
    changes = _changes(old, new, was, now)
    assert changes == sorted(changes, key=lambda change: not change.breaking)
    return [(change.where, change.what) for change in changes if change.breaking]


def _field(old: Any, new: Any) -> list[tuple[str, str]]:
    """The breaking changes of one field's type."""
    return _breaking(_event({"field": (old,)}), _event({"field": (new,)}))


class DiffColor(Enum):
    RED = "red"
    BLUE = "blue"


class DiffLine(BaseModel):
    sku: str
    price: Decimal


class DiffNode(BaseModel):
    name: str
    left: DiffNode | None = None
    right: DiffNode | None = None
    children: list[DiffNode] = []


class DiffCat(BaseModel):
    kind: Literal["cat"]
    lives: int


class DiffDog(BaseModel):
    kind: Literal["dog"]


EVERYTHING: dict[str, Any] = {
    "number": (int,),
    "text": (Annotated[str, Field(max_length=10)], "x"),
    "color": (DiffColor,),
    "lines": (list[DiffLine],),
    "tree": (DiffNode,),
    "pet": (Annotated[DiffCat | DiffDog, Field(discriminator="kind")],),
    "maybe": (datetime | None, None),
    "table": (dict[str, tuple[int, str]],),
    "anything": (Any,),
}


# -- nothing has changed -----------------------------------------------------------------------------------------------


def test_the_same_events_do_not_differ() -> None:
    """A job in CI that cries without a reason is switched off."""
    cls = _event(EVERYTHING, __ordering_key__="{number}", config=KafkaEventConfig(headers={"n": "{number}"}))
    assert _changes(cls, cls) == []


def test_documents_are_left_as_they_are() -> None:
    """Who compares them goes on to show them."""
    document = describe([_event(EVERYTHING)])
    before = copy.deepcopy(document)
    diff(document, document)
    assert document == before


# -- breaking ----------------------------------------------------------------------------------------------------------


def test_an_event_that_is_gone_is_breaking() -> None:
    """Its consumers wait for ever, and nothing tells them."""
    changes = _changes(_event(), None)
    assert [(change.event, change.where) for change in changes] == [("DiffPlaced", "event")]
    assert changes[0].breaking
    assert str(changes[0]) == "BREAKING  DiffPlaced: event: removed: its consumers get nothing any more"


def test_a_type_that_changed_is_breaking() -> None:
    """Consumers look for it; the class shows that it is the same event, and not one gone and another one new."""
    (change,) = _breaking(_event(__event_type__="a"), _event(__event_type__="b"))
    assert change[0] == "type"
    assert _breaking(_event(__event_type__="a"), _event(__event_type__="a", name="DiffRenamed")) == []


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ({"a": (int,)}, {}, "payload.a", "removed"),
        ({"a": (int,)}, {"a": (int | None,)}, "payload.a", "may be null now"),
        ({"a": (int | None,)}, {"a": (int,)}, "payload.a", "no longer null"),
        ({"a": (int,)}, {"a": (str,)}, "payload.a", "was integer, is string"),
        ({"a": (int,)}, {"a": (float,)}, "payload.a", "wider"),
        ({"a": (float,)}, {"a": (int,)}, "payload.a", "narrower"),
        ({"a": (int,)}, {"a": (int | str,)}, "payload.a", "may be string now"),
        ({"a": (int | str,)}, {"a": (int,)}, "payload.a", "no longer string"),
        ({"a": (Any,)}, {"a": (int,)}, "payload.a", "narrower"),
        ({"a": (int,)}, {"a": (Any,)}, "payload.a", "wider"),
        ({"a": (Literal["x"],)}, {"a": (Literal["y"],)}, "payload.a", 'was "x", is "y"'),
        ({"a": (Literal["x", "y"],)}, {"a": (Literal["x"],)}, "payload.a", '"y" removed'),
        ({"a": (Literal["x"],)}, {"a": (Literal["x", "y"],)}, "payload.a", '"y" added'),
        ({"a": (DiffColor,)}, {"a": (Literal["red", "blue", "green"],)}, "payload.a", '"green" added'),
        ({"a": (str,)}, {"a": (Literal["x"],)}, "payload.a", "could be anything"),
        ({"a": (Literal["x", "y"],)}, {"a": (str,)}, "payload.a", "can be anything now"),
        ({"a": (datetime,)}, {"a": (date,)}, "payload.a", 'format was "date-time", is "date"'),
        ({"a": (datetime,)}, {"a": (str,)}, "payload.a", 'format was "date-time", is nothing'),
        ({"a": (Annotated[int, Field(ge=1)],)}, {"a": (Annotated[int, Field(ge=0)],)}, "payload.a", "do not know"),
        ({"a": (Annotated[int, Field(ge=0)],)}, {"a": (Annotated[int, Field(ge=1)],)}, "payload.a", "refused now"),
        ({"a": (Annotated[int, Field(le=1)],)}, {"a": (Annotated[int, Field(le=2)],)}, "payload.a", "do not know"),
        ({"a": (int,)}, {"a": (Annotated[int, Field(le=2)],)}, "payload.a", "maximum was nothing, is 2"),
        ({"a": (Annotated[str, Field(max_length=9)],)}, {"a": (str,)}, "payload.a", "maxLength was 9, is nothing"),
        ({"a": (list[int],)}, {"a": (list[str],)}, "payload.a[]", "was integer, is string"),
        ({"a": (list[DiffLine],)}, {"a": (list[DiffCat],)}, "payload.a[].sku", "removed"),
        ({"a": (dict[str, int],)}, {"a": (dict[str, str],)}, "payload.a[*]", "was integer, is string"),
        ({"a": (tuple[int, str],)}, {"a": (tuple[int, int],)}, "payload.a[1]", "was string, is integer"),
        ({"a": (tuple[int, str],)}, {"a": (list[int],)}, "payload.a", "a list of any length"),
        ({"a": (set[int],)}, {"a": (list[int],)}, "payload.a", "uniqueItems"),
        ({"a": (DiffCat | DiffDog,)}, {"a": (DiffCat,)}, "payload.a", "no longer DiffDog"),
        ({"a": (DiffCat | None,)}, {"a": (DiffDog | None,)}, "payload.a.lives", "removed"),
    ],
)  # fmt: skip
def test_a_field_that_changed_is_breaking(old: Any, new: Any, where: str, what: str) -> None:
    """Each of these makes some consumer fail, today or when it reads older messages."""
    found = _breaking(_event(old), _event(new))
    assert (where, True) in [(place, what in told) for place, told in found], found


def test_a_field_that_may_be_absent_is_breaking() -> None:
    """In both directions: who relies on it, and who reads what was sent without it."""
    documents = [describe([_event({"a": (int,)})]) for _ in range(2)]
    del documents[1]["components"]["messages"]["DiffPlaced"]["payload"]["required"]
    (absent,) = diff(documents[0], documents[1])
    (required,) = diff(documents[1], documents[0])
    assert (absent.breaking, absent.where, "may be absent now" in absent.what) == (True, "payload.a", True)
    assert (required.breaking, "is required now" in required.what) == (True, True)


def test_models_within_models_are_compared() -> None:
    """A field deep in a shared model breaks every event that holds it, and is told once for each of them."""
    old = create_model("DiffDeep", __module__="diff_shop", name=(str, ...), line=(DiffLine, ...))
    line = create_model("DiffLine", __module__="diff_shop", sku=(int, ...), price=(Decimal, ...))
    new = create_model("DiffDeep", __module__="diff_shop", name=(str, ...), line=(line, ...))
    found = _breaking(_event({"deep": (list[old],), "again": (old,)}), _event({"deep": (list[new],), "again": (new,)}))  # type: ignore[valid-type]
    assert [where for where, _ in found] == ["payload.deep[].line.sku"]


def test_models_that_hold_themselves_end() -> None:
    """A tree is as deep as its data."""

    class DiffNode2(BaseModel):
        model_config = ConfigDict(title="DiffNode")
        name: int
        left: DiffNode2 | None = None
        right: DiffNode2 | None = None
        children: list[DiffNode2] = []

    found = _field(DiffNode, DiffNode2)
    assert [where for where, _ in found] == ["payload.field.name"]


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ({"route": TOPIC}, {"route": KafkaEventRoute(topic="sales")}, "channel"),
        ({"route": KafkaEventRoute(topic="o.{a}")}, {"route": KafkaEventRoute(topic="o.{b}")}, "channel"),
        ({"route": KafkaEventRoute(topic="o.{a}")}, {"route": KafkaEventRoute(topic="o.{a:03d}")}, "channel"),
        ({"route": TOPIC}, {"route": RedisEventRoute(channel="orders")}, "transport"),
        ({"route": RedisEventRoute(channel="orders")}, {"route": RedisStreamEventRoute(stream="orders")}, "kind"),
        (
            {"route": RabbitMQEventRoute(exchange="one", routing_key="k")},
            {"route": RabbitMQEventRoute(exchange="two", routing_key="k")},
            "exchange",
        ),
        (
            {"route": RabbitMQEventRoute(exchange="one", routing_key="k")},
            {"route": RabbitMQEventRoute(exchange="one", routing_key="l")},
            "channel",
        ),
        ({"__ordering_key__": "{a}"}, {"__ordering_key__": "{b}"}, "ordering key"),
        ({"__ordering_key__": "{a}"}, {}, "ordering key"),
        ({"__broker__": "one"}, {"__broker__": "two"}, "broker"),
        (
            {"__ordering_key__": "{a}", "config": KafkaEventConfig(partition_key="{a}")},
            {"__ordering_key__": "{a}", "config": KafkaEventConfig(partition_key="{b}")},
            "key",
        ),
        ({"config": KafkaEventConfig(headers={"x": "1"})}, {"config": KafkaEventConfig()}, "headers.x"),
        (
            {"config": KafkaEventConfig(headers={"x": "1"})},
            {"config": KafkaEventConfig(headers={"x": "2"})},
            "headers.x",
        ),
        (
            {"route": RabbitMQEventRoute(exchange="e", routing_key="")},
            {
                "route": RabbitMQEventRoute(exchange="e", routing_key=""),
                "config": RabbitMQEventConfig(content_encoding="gzip"),
            },
            "contentEncoding",
        ),
        ({"__ordering_key__": "{a}"}, {"__ordering_key__": "{a}", "__tombstone__": True}, "payload"),
    ],
)
def test_another_way_is_breaking(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Consumers listen where the events no longer are, or get them in another order."""
    fields = {"a": (int,), "b": (int,)}
    found = _breaking(_event(fields, **old), _event(fields, **new))
    assert where in [place for place, _ in found], found


def test_what_the_brokers_settings_change_is_seen() -> None:
    """A prefix, a serializer, headers that are switched off: not a line of the events has changed."""

    class Packed(Serializer):
        content_type = "application/x-packed"

        def serialize(self, payload: dict[str, Any]) -> bytes:
            return b""

    cls = _event()
    prefixed = _breaking(cls, cls, "kafka://h", {"default": {"url": "kafka://h", "prefix": "p."}})
    assert [where for where, _ in prefixed] == ["channel"]
    packed = _breaking(cls, cls, "kafka://h", {"default": {"url": "kafka://h", "serializer": Packed()}})
    assert [where for where, _ in packed] == ["contentType"]
    silent = _breaking(cls, cls, "kafka://h", {"default": {"url": "kafka://h", "cloudevents": False}})
    assert "headers.ce_id" in [where for where, _ in silent]
    rabbit = _event(route=RabbitMQEventRoute(exchange="e", routing_key="k"))
    kinds = [{"r": {"url": "amqp://h", "exchanges": {"e": kind}}} for kind in ("topic", "fanout")]
    assert [where for where, _ in _breaking(rabbit, rabbit, kinds[0], kinds[1])] == ["exchange.type"]
    secure = _breaking(cls, cls, "kafka://h", "kafka+ssl://h")
    assert [where for where, _ in secure] == ["servers.default"]


# -- compatible --------------------------------------------------------------------------------------------------------


def test_what_only_adds_is_compatible() -> None:
    """Adding must be free, or nobody adds."""
    old = _event({"a": (int,)}, doc="Before.")
    new = _event(
        {"a": (Annotated[int, Field(description="Now told", deprecated=True)], 3), "b": (list[DiffLine],)},
        doc="After.",
        config=KafkaEventConfig(headers={"x": "1"}),
    )
    changes = _changes(old, new)
    assert [change for change in changes if change.breaking] == []
    told = {change.where: change.what for change in changes}
    assert told["payload.b"] == "new (array)"
    assert told["headers.x"] == 'new (one of ["1"])'
    assert told["summary"] == "changed"
    assert "payload.a" in told
    (change,) = _changes(None, _event())
    assert (change.breaking, change.what) == (False, "new")


def test_a_server_that_moved_is_compatible() -> None:
    """Each environment has its own."""
    changes = _changes(_event(), _event(), "kafka://one", "kafka://two")
    assert [str(change) for change in changes] == ["compatible  servers.default: is at two:9092, was at one:9092"]


def test_how_it_is_published_is_compatible() -> None:
    """Priority and expiration concern no reader."""
    route = RabbitMQEventRoute(exchange="e", routing_key="k")
    changes = _changes(_event(route=route), _event(route=route, config=RabbitMQEventConfig(priority=5)))
    assert [(change.breaking, change.where) for change in changes] == [(False, "publishing.priority")]


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        None, [], "text", {}, {"openapi": "3.1.0"}, {"asyncapi": "2.6.0"}, {"asyncapi": 3},
        {"asyncapi": "3.0.0", "channels": []},
    ],
    ids=str,
)  # fmt: skip
def test_other_files_are_refused(document: Any) -> None:
    """A file that is empty, or of another tool, would otherwise differ in nothing."""
    good = describe([_event()])
    with pytest.raises(ConfigurationError, match="the old document is no AsyncAPI 3 document"):
        diff(document, good)
    with pytest.raises(ConfigurationError, match="the new document is no AsyncAPI 3 document"):
        diff(good, document)


def test_a_document_that_somebody_else_wrote_is_read() -> None:
    """A contract that was agreed on by hand is compared with what the code says."""
    written: dict[str, Any] = {
        "asyncapi": "3.0.0",
        "info": {"title": "By hand", "version": "1"},
        "channels": {
            "c": {
                "address": "orders",
                "messages": {"DiffPlaced": {"payload": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
            }
        },
    }
    found = diff(written, describe([_event({"a": (str,)})]))
    assert ("payload.a", True) in [(change.where, change.breaking) for change in found]
    assert "channel" not in [change.where for change in found]


_PATHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)
_JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, -1, "", "x", [], ["x"], {}, {"$ref": "#/nowhere"}, {"$ref": 3}, True, {"type": []}]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_PATHS, _JUNK)
def test_damaged_documents_raise_nothing_of_their_own(path: list[int], junk: Any) -> None:
    """Files are edited by hand, and merged by git."""
    document = describe([_event(EVERYTHING)], brokers="kafka://h")
    damaged = copy.deepcopy(document)
    place: Any = damaged
    for index in path:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key: Any = keys[index % len(keys)]
        if index == path[-1] or not place[key] or not isinstance(place[key], (dict, list)):
            place[key] = junk
            break
        place = place[key]
    for one, other in ((document, damaged), (damaged, document)):
        try:
            assert all("\n" not in str(change) for change in diff(one, other))
        except ConfigurationError:
            pass


# -- written by hand, or by who means no good -----------------------------------------------------------------------


def _by_hand(payload: object, **schemas: object) -> dict[str, Any]:
    channel = {"address": "a", "messages": {"m": {"payload": payload}}}
    return {"asyncapi": "3.0.0", "channels": {"c": channel}, "components": {"schemas": schemas}}


_ITSELF = {"$ref": "#/components/schemas/A"}


@pytest.mark.parametrize("keyword", ["anyOf", "allOf", "oneOf"])
@pytest.mark.timeout(20)
def test_references_that_lead_back_end(keyword: str) -> None:
    """Each of 64 steps would double the work of the one before: a job of CI that never ends."""
    both = [_ITSELF, _ITSELF]
    old = _by_hand(_ITSELF, A={keyword: [*both, {"type": "object", "properties": {"n": {"type": "integer"}}}]})
    new = _by_hand(_ITSELF, A={keyword: [*both, {"type": "object", "properties": {"n": {"type": "string"}}}]})
    assert diff(old, old) == []
    assert [change.where for change in diff(old, new)] == ["payload.n"]


def test_a_schema_that_names_its_language_is_compared() -> None:
    """AsyncAPI's multi format schema is written by other tools: "No difference" would be a lie."""
    documents = [
        _by_hand({"schemaFormat": "application/schema+json;version=draft-07", "schema": {"type": kind}})
        for kind in ("integer", "string")
    ]
    assert [change.breaking for change in diff(*documents)] == [True]


@pytest.mark.parametrize("odd", [5, "abc", None, True, [None], {1: 2}], ids=repr)
def test_odd_parts_raise_nothing(odd: Any) -> None:
    """YAML has keys that are no text, and hands write anything: a traceback would say nothing about the document."""
    good = _by_hand({"type": "object", "properties": {"a": {"enum": [1]}}})
    for place in ("enum", "type", "properties", "items", "anyOf", "required"):
        bad = _by_hand({"type": "object", "properties": {"a": {place: odd}, 1: {}}, place: odd})
        bad["channels"]["c"]["messages"]["m"]["headers"] = {"properties": {1: {"const": "m"}}}
        diff(good, bad)
        diff(bad, good)
