"""The event catalogue as an AsyncAPI document: valid, true to the wire, without secrets, the same in every run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import unquote
from uuid import UUID, uuid4

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from pydantic import (
    AnyUrl,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FutureDate,
    Json,
    NaiveDatetime,
    PastDatetime,
    RootModel,
    SecretStr,
    ValidationError,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
)
from typing_extensions import TypedDict, deprecated

from dispytch_integrations import EventBase, connect
from dispytch_integrations._asyncapi_patterns import matching
from dispytch_integrations.asyncapi import describe, diff, event_classes, to_json, to_yaml
from dispytch_integrations.errors import ConfigurationError, DispytchError, RouteError
from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.rabbitmq import RabbitMQEventConfig, RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.serialization import Serializer
from dispytch_integrations.testing import capture_events

SCHEMA = Path(__file__).parent / "support" / "asyncapi" / "schema-3.0.0.json"
SECRET = "Zq7hush"
T = TypeVar("T")


@cache
def _asyncapi() -> Draft7Validator:
    return Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _problems(document: dict[str, Any]) -> list[str]:
    """What AsyncAPI's schema says, and references that lead nowhere."""
    told = [f"{'/'.join(map(str, error.path))}: {error.message[:300]}" for error in _asyncapi().iter_errors(document)]
    missing = [each for each in _references(document) if not _leads_somewhere(document, each)]
    return told + [f"{reference} leads nowhere" for reference in missing]


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for each in value.values() for found in _references(each)]
    return [found for each in value for found in _references(each)] if isinstance(value, list) else []


def _leads_somewhere(document: dict[str, Any], reference: str) -> bool:
    value: Any = document
    for step in reference.removeprefix("#/").split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if name not in value:
            return False
        value = value[name]
    return True


def _described(*classes: type[EventBase], brokers: Any = None) -> dict[str, Any]:
    document = describe(classes, brokers=brokers)
    assert _problems(document) == []
    return document


def _message(cls: type[EventBase], brokers: Any = None) -> dict[str, Any]:
    (message,) = _described(cls, brokers=brokers)["components"]["messages"].values()
    assert isinstance(message, dict)
    return message


def _fits(document: dict[str, Any], message: dict[str, Any]) -> list[str]:
    """What is wrong with the message's examples, by its own schemas."""
    wrong = []
    for example in message.get("examples", []):
        for part in ("payload", "headers"):
            if part in example:
                schema = {**message[part], "components": document["components"]}
                wrong += [error.message for error in Draft7Validator(schema).iter_errors(example[part])]
    return wrong


# -- events of all kinds -----------------------------------------------------------------------------------------------


class Currency(Enum):
    EUR = "EUR"
    USD = "USD"


class CatalogLine(BaseModel):
    sku: str = Field(pattern=r"^SKU-\d{4}$", description="As on the shelf")
    count: int = Field(ge=1)
    price: Decimal


class CatalogPlaced(EventBase):
    """An order was placed.

    It is paid already.
    """

    __route__ = KafkaEventRoute(topic="orders.{tenant}.{line.sku}.{number:05d}")
    __backend_config__ = KafkaEventConfig(headers={"tenant": "{tenant}", "app": "shop", "note": "{note}"})
    __ordering_key__ = "{order_id}"
    __event_type__ = "com.shop.order.placed"

    tenant: str = Field(exclude=True, examples=["acme"], description="Whose order it is")
    order_id: UUID
    number: int = 7
    line: CatalogLine
    lines: list[CatalogLine] = Field(min_length=2)
    currency: Currency = Currency.EUR
    placed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    total: Decimal = Field(serialization_alias="grandTotal")
    note: str | None = None


class CatalogMailed(EventBase):
    __route__ = RabbitMQEventRoute(exchange="mails", routing_key="user.{user}.{how}")
    __backend_config__ = RabbitMQEventConfig(
        priority=3, expiration=1.5, correlation_id="{user}", content_encoding="gzip"
    )

    user: str
    how: Literal["sent", "read"]


class CatalogStreamed(EventBase):
    __route__ = RedisStreamEventRoute(stream="readings", maxlen=1000)

    value: float


class CatalogPublished(EventBase):
    __route__ = RedisEventRoute(channel="alerts")

    text: str


BROKERS = {
    "main": {
        "url": f"kafka://user:{SECRET}@one:1,two?sasl_mechanism=SCRAM-SHA-512&client_id={SECRET}",
        "prefix": "st.",
    },
    "mails": {
        "url": f"amqps://user:{SECRET}@[::1]/shop",
        "exchanges": {"mails": "topic"},
        "client": {"auth": SECRET},
        "prefix": "st.",
    },
    "fast": {"url": "redis://fast/2", "password": SECRET, "cloudevents": "x-"},
}


def test_the_document_is_valid_asyncapi() -> None:
    """Other tools read it: generators, registries, AsyncAPI Studio."""
    document = _described(CatalogPlaced, CatalogMailed, CatalogStreamed, CatalogPublished, brokers=BROKERS)
    assert document["asyncapi"] == "3.0.0"
    assert sorted(document["components"]["messages"]) == [
        "CatalogMailed", "CatalogPublished", "CatalogStreamed", "com.shop.order.placed",
    ]  # fmt: skip


def test_no_secret_is_in_the_document() -> None:
    """It is put into repositories and on pages that everybody reads."""
    document = _described(CatalogPlaced, CatalogMailed, CatalogPublished, brokers=BROKERS)
    assert SECRET not in to_json(document)
    assert SECRET not in to_yaml(document)
    assert "user@" not in to_json(document["servers"])
    assert document["servers"]["main"]["security"] == [{"type": "scramSha512"}]
    assert document["servers"]["fast"]["security"] == [{"type": "userPassword"}]


def test_servers_say_where_and_how() -> None:
    """Who is to consume the events has to know the host, the port and the protocol."""
    servers = _described(CatalogPlaced, brokers=BROKERS)["servers"]
    assert (servers["main"]["host"], servers["main"]["protocol"]) == ("one:1", "kafka")
    assert servers["main"]["x-hosts"] == ["one:1", "two:9092"]
    assert (servers["mails"]["host"], servers["mails"]["pathname"]) == ("[::1]:5671", "/shop")
    assert (servers["fast"]["host"], servers["mails"]["protocol"]) == ("fast:6379", "amqps")
    memory = _described(CatalogPlaced, brokers="memory://kafka")["servers"]["default"]
    assert (memory["protocol"], memory["x-dispytch-transport"]) == ("memory", "kafka")


def test_an_alias_may_be_any_text() -> None:
    """Names of brokers are the app's own."""
    document = _described(CatalogStreamed, brokers={"my/old ~broker": "redis://h"})
    assert list(document["servers"]) == ["my/old ~broker"]


def test_brokers_may_be_what_connect_returned() -> None:
    """An app describes the brokers that it has, not a copy of their settings; it need not be started."""
    brokers = connect(BROKERS, source="/shop")
    document = _described(CatalogStreamed, brokers=brokers)
    (message,) = document["components"]["messages"].values()
    assert message["headers"]["properties"]["x-source"] == {"type": "string", "const": "/shop"}
    assert not brokers.started
    assert brokers.brokers == {}


def test_without_brokers_there_are_no_servers() -> None:
    """A package of event classes is described where nobody knows the brokers."""
    document = _described(CatalogPlaced, CatalogMailed)
    assert "servers" not in document
    assert {each["x-dispytch-broker"] for each in document["channels"].values()} == {"default"}


def test_settings_that_are_wrong_are_told() -> None:
    """A catalogue of the wrong brokers would be worse than none."""
    with pytest.raises(ConfigurationError, match="nobody serves kafak"):
        describe([CatalogPlaced], brokers={"a": "kafak://h"})
    with pytest.raises(ConfigurationError, match="serializer"):
        describe([CatalogPlaced], brokers={"a": {"url": "kafka://h", "serializer": "json"}})


def test_addresses_have_legal_parameters() -> None:
    """Readers must know what stands in a topic's name, and where in the body it is found again."""
    document = _described(CatalogPlaced, brokers=BROKERS)
    (channel,) = document["channels"].values()
    assert channel["address"] == "st.orders.{tenant}.{line_sku}.{number}"
    assert channel["parameters"]["tenant"] == {"description": "Whose order it is", "examples": ["acme"]}
    assert channel["parameters"]["line_sku"] == {
        "description": "As on the shelf",
        "location": "$message.payload#/line/sku",
        "x-dispytch-part": "{line.sku}",
    }
    assert channel["parameters"]["number"] == {"default": "00007", "x-dispytch-part": "{number:05d}"}
    assert channel["servers"] == [{"$ref": "#/servers/main"}]


def test_closed_parameters_list_their_values() -> None:
    """Who binds a queue wants to know which routing keys there are."""
    (channel,) = _described(CatalogMailed)["channels"].values()
    assert channel["parameters"]["how"]["enum"] == ["sent", "read"]


def test_braces_that_are_meant_are_no_parameters() -> None:
    """Redis' hash tags are written in braces."""

    class CatalogTagged(EventBase):
        __route__ = RedisStreamEventRoute(stream="{{orders}}.{number}")
        number: int

    (channel,) = _described(CatalogTagged)["channels"].values()
    assert channel["address"] == "%7Borders%7D.{number}"
    assert list(channel["parameters"]) == ["number"]


def test_bindings_say_what_the_broker_needs() -> None:
    """An exchange and its routing key, not an address alone, is what a RabbitMQ consumer binds to."""
    document = _described(CatalogMailed, CatalogStreamed, CatalogPublished, CatalogPlaced, brokers=BROKERS)
    kinds = {each["x-dispytch-kind"]: each for each in document["channels"].values()}
    assert sorted(kinds) == ["exchange", "pubsub", "stream", "topic"]
    assert kinds["exchange"]["bindings"]["amqp"]["exchange"] == {
        "name": "st.mails", "type": "topic", "durable": True, "autoDelete": False, "vhost": "shop",
    }  # fmt: skip
    operation = document["operations"]["send-CatalogMailed"]
    assert operation["bindings"]["amqp"] == {
        "deliveryMode": 2, "mandatory": True, "expiration": 1500, "priority": 3, "bindingVersion": "0.3.0",
    }  # fmt: skip
    mailed = document["components"]["messages"]["CatalogMailed"]
    assert mailed["correlationId"] == {"location": "$message.payload#/user"}
    assert mailed["bindings"]["amqp"]["contentEncoding"] == "gzip"
    placed = document["components"]["messages"]["com.shop.order.placed"]
    assert placed["bindings"]["kafka"]["key"] == {"type": "string", "x-dispytch-template": "{order_id}"}
    assert placed["x-dispytch-ordering-key"] == "{order_id}"


def test_the_default_exchange_leads_to_a_queue() -> None:
    """With exchange="" the routing key is the queue's name."""

    class CatalogQueued(EventBase):
        __route__ = RabbitMQEventRoute(exchange="", routing_key="jobs")

    (channel,) = _described(CatalogQueued, brokers="amqp://h")["channels"].values()
    assert channel["bindings"]["amqp"]["queue"]["name"] == "jobs"
    assert (channel["x-dispytch-kind"], channel["address"]) == ("queue", "jobs")


def test_events_share_their_channel() -> None:
    """Several events on one topic are one channel with several messages, as consumers see it."""

    class CatalogOne(EventBase):
        __route__ = KafkaEventRoute(topic="shared")

    class CatalogTwo(EventBase):
        __route__ = KafkaEventRoute(topic="shared")

    document = _described(CatalogOne, CatalogTwo)
    (channel,) = document["channels"].values()
    assert len(channel["messages"]) == 2


async def test_the_payload_is_what_is_on_the_wire() -> None:
    """A schema of what the class takes, not of what it sends, makes consumers look for fields that are not there."""
    message = _message(CatalogPlaced)
    payload = message["payload"]
    assert list(payload["properties"]) == [
        "order_id", "number", "line", "lines", "currency", "placed_at", "grandTotal", "note",
    ]  # fmt: skip
    # What has a default is always there.
    assert payload["required"] == list(payload["properties"])
    assert payload["properties"]["grandTotal"]["type"] == "string"
    with capture_events() as events:
        async with connect("kafka://nowhere") as emitter:
            line = CatalogLine(sku="SKU-0001", count=1, price=Decimal(1))
            event = CatalogPlaced(tenant="acme", order_id=uuid4(), line=line, lines=[line, line], total=Decimal(2))
            await emitter.emit(event)
    (sent,) = events.messages
    assert list(json.loads(sent.payload or b"")) == list(payload["properties"])
    assert sorted(sent.headers) == sorted(message["headers"]["required"])


def test_headers_are_those_that_are_sent() -> None:
    """Consumers drop duplicates by the id in them, whatever the transport calls it."""
    headers = _message(CatalogPlaced)["headers"]
    assert headers["properties"]["ce_type"]["const"] == "com.shop.order.placed"
    assert headers["properties"]["app"] == {"type": "string", "const": "shop"}
    assert headers["properties"]["tenant"]["x-dispytch-template"] == "{tenant}"
    assert "note" in headers["properties"]
    assert "note" not in headers["required"]
    assert "cloudEvents_id" in _message(CatalogMailed)["headers"]["required"]
    assert "headers" not in _message(CatalogPublished)
    silent = _message(CatalogStreamed, brokers={"a": {"url": "redis://h", "cloudevents": False}})
    assert "headers" not in silent


def test_equal_names_of_different_models_do_not_clash() -> None:
    """Two apps of a project have an Address each."""
    made = []
    for number, kind in enumerate((int, str)):
        address = create_model("CatalogAddress", __module__=f"shop.app{number}", street=(kind, ...))
        made.append(
            type(
                f"CatalogMoved{number}",
                (EventBase,),
                {
                    "__module__": f"shop.app{number}",
                    "__route__": KafkaEventRoute(topic="moved"),
                    "__annotations__": {"address": address},
                },
            )
        )
    document = _described(*made)
    schemas = document["components"]["schemas"]
    streets = []
    for number in range(2):
        reference = document["components"]["messages"][f"CatalogMoved{number}"]["payload"]["properties"]["address"][
            "$ref"
        ]
        streets.append(schemas[reference.rpartition("/")[2]]["properties"]["street"]["type"])
    assert streets == ["integer", "string"]


def test_equal_types_get_names_of_their_own() -> None:
    """A subclass inherits its base's type; both are there."""

    class CatalogBase(EventBase):
        __route__ = KafkaEventRoute(topic="same")
        __event_type__ = "same.type"

    class CatalogDerived(CatalogBase):
        more: int

    messages = _described(CatalogBase, CatalogDerived)["components"]["messages"]
    assert len(messages) == 2
    assert {each["name"] for each in messages.values()} == {"same.type"}


def test_docstrings_and_deprecations_are_told() -> None:
    """The docstring is what the author has written for readers."""

    @deprecated("use CatalogPlaced")
    class CatalogOld(EventBase):
        """Gone soon."""

        __route__ = KafkaEventRoute(topic="old")
        number: int = Field(default=1, deprecated=True)

    message = _message(CatalogOld)  # pyright: ignore[reportDeprecated]
    assert (message["deprecated"], message["x-dispytch-deprecated"]) == (True, "use CatalogPlaced")
    assert message["payload"]["properties"]["number"]["deprecated"] is True
    assert len(message["examples"]) == 1
    placed = _message(CatalogPlaced)
    assert (placed["summary"], placed["description"]) == ("An order was placed.", "It is paid already.")
    assert "summary" not in _message(CatalogMailed)


def test_a_tombstone_has_no_body() -> None:
    """A consumer of a compacted topic gets null, and the key says what is deleted."""

    class CatalogDeleted(EventBase):
        __route__ = KafkaEventRoute(topic="orders")
        __ordering_key__ = "{order_id}"
        __tombstone__ = True
        order_id: int

    message = _message(CatalogDeleted)
    assert message["payload"] == {"type": "null"}
    assert message["examples"][0]["payload"] is None
    assert message["x-dispytch-example"] == {"destination": "orders", "key": "1"}


def test_the_content_type_is_the_serializers() -> None:
    """Whoever reads MessagePack as JSON gets nonsense."""

    class Packed(Serializer):
        content_type = "application/x-packed"

        def serialize(self, payload: dict[str, Any]) -> bytes:
            raise AssertionError("a catalogue sends nothing")

    message = _message(CatalogStreamed, brokers={"a": {"url": "redis://h", "serializer": Packed()}})
    assert message["contentType"] == "application/x-packed"
    assert message["examples"][0]["headers"]["content-type"] == "application/x-packed"


def test_a_route_that_no_broker_takes_is_told_at_the_event() -> None:
    """The others are described all the same."""
    document = _described(CatalogPlaced, CatalogMailed, brokers="kafka://h")
    messages = document["components"]["messages"]
    assert "which no broker takes" in messages["CatalogMailed"]["x-dispytch-problem"]
    assert "kafka://h" in messages["CatalogMailed"]["x-dispytch-problem"]
    assert "x-dispytch-problem" not in messages["com.shop.order.placed"]


def test_a_users_own_route_is_described() -> None:
    """Producers of one's own are a promise of this package."""

    class CatalogFileRoute(EventRoute):
        path: str

    class CatalogFiled(EventBase):
        __route__ = CatalogFileRoute(path="orders/{number}.json")
        number: int

    document = _described(CatalogFiled, brokers={"default": "memory://"})
    (channel,) = document["channels"].values()
    assert (channel["address"], channel["x-dispytch-kind"]) == ("orders/{number}.json", "custom")


def test_one_class_never_breaks_the_page() -> None:
    """A field that JSON schema cannot tell belongs to one event among hundreds."""

    class Opaque:
        pass

    class CatalogOpaque(EventBase):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        __route__ = KafkaEventRoute(topic="opaque")
        thing: Opaque

    class CatalogUndefined(EventBase):
        __route__ = KafkaEventRoute(topic="undefined")
        thing: NowhereToBeFound  # type: ignore[name-defined] # noqa: F821 # pyright: ignore[reportUndefinedVariable]

    document = _described(CatalogOpaque, CatalogUndefined, CatalogStreamed)
    messages = {each["title"]: each for each in document["components"]["messages"].values()}
    assert messages["CatalogOpaque"]["payload"] == {}
    assert "Opaque" in messages["CatalogOpaque"]["x-dispytch-no-schema"]
    assert "x-dispytch-no-example" in messages["CatalogOpaque"]
    assert "x-dispytch-no-schema" in messages["CatalogUndefined"]
    assert len(messages["CatalogStreamed"]["examples"]) == 1


# -- examples ----------------------------------------------------------------------------------------------------------


def test_examples_fit_their_own_schemas() -> None:
    """An example is copied into a consumer's test; a wrong one costs an afternoon."""
    document = _described(CatalogPlaced, CatalogMailed, CatalogStreamed, CatalogPublished)
    for message in document["components"]["messages"].values():
        assert message["examples"]
        assert _fits(document, message) == []
    placed = document["components"]["messages"]["com.shop.order.placed"]
    assert placed["examples"][0]["payload"]["line"]["sku"] == "SKU-1111"
    assert placed["x-dispytch-example"]["destination"] == "orders.acme.SKU-1111.00007"


class CatalogTree(BaseModel):
    name: str
    left: CatalogTree | None = None
    children: list[CatalogTree] = []


class CatalogCat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(gt=8, lt=10)


class CatalogDog(BaseModel):
    kind: Literal["dog"]


class CatalogRoot(RootModel[dict[str, int]]):
    pass


class CatalogTyped(TypedDict, total=False):
    name: str


def _starts_with_x(value: str) -> str:
    if not value.startswith("X"):
        raise ValueError("it starts with X")
    return value


ODD: list[Any] = [
    bool, int, float, str, bytes, Decimal, UUID, datetime, date, time, timedelta, AnyUrl, IPv4Address, SecretStr, Path,
    AwareDatetime, NaiveDatetime, FutureDate, PastDatetime, Currency, CatalogLine, CatalogTree, CatalogRoot,
    CatalogTyped, Any, object, type(None), Json[dict[str, int]], Literal["a", 1, None], complex,
    list[int], set[int], frozenset[Currency], tuple[int, str], tuple[int, ...], dict[str, Decimal], dict[int, str],
    dict[UUID, CatalogLine], int | str, UUID | None, list[CatalogTree] | None, type[int], Callable[[], int],
    Annotated[CatalogCat | CatalogDog, Field(discriminator="kind")],
    Annotated[int, Field(gt=5, lt=7)], Annotated[int, Field(multiple_of=7, ge=8)],
    Annotated[float, Field(gt=0, lt=0.1)],
    Annotated[Decimal, Field(max_digits=3, decimal_places=1, gt=0)], Annotated[str, Field(min_length=40)],
    Annotated[str, Field(max_length=2)], Annotated[str, Field(pattern=r"^[A-Z]{2}\d+(-(x|y))?$", min_length=6)],
    Annotated[list[str], Field(min_length=3, max_length=4)],
    Annotated[set[int], Field(min_length=3)], Annotated[dict[str, int], Field(min_length=2)],
    Annotated[int, Field(ge=2, examples=[5])], Annotated[int, Field(ge=2, examples=["no number"])],
]  # fmt: skip


@pytest.mark.parametrize("kind", ODD, ids=str)
def test_each_type_is_described(kind: Any) -> None:
    """No type of a field is unusual enough to break the page, and no example is one that the class refuses."""
    _check(_event({"field": (kind, ...)}))


def _event(fields: dict[str, Any]) -> type[EventBase]:
    made: Any = create_model("CatalogMade", __base__=CatalogMadeBase, **fields)
    return made  # type: ignore[no-any-return]


class CatalogMadeBase(EventBase):
    __route__ = KafkaEventRoute(topic="made")


def _check(cls: type[EventBase]) -> dict[str, Any]:
    document = _described(cls)
    (message,) = document["components"]["messages"].values()
    assert ("examples" in message) != ("x-dispytch-no-example" in message)
    assert _fits(document, message) == []
    for example in message.get("examples", ()):
        _load(cls, example["payload"])
    assert to_json(describe([cls])) == to_json(document)
    return message  # type: ignore[no-any-return]


def _load(cls: type[EventBase], payload: Any) -> None:
    """What consumers get is what the class takes."""
    refused: set[str] = set()
    try:
        cls.model_validate_json(json.dumps(payload))
    except ValidationError as exc:
        refused = {error["type"] for error in exc.errors()}
    assert refused <= {"json_type"}  # Json[...] takes text, and sends what that means.


USUAL = [kind for kind in ODD if not any(name in str(kind) for name in ("complex", "type[int]", "Callable"))]


@pytest.mark.parametrize("kind", USUAL, ids=str)
def test_usual_types_have_an_example(kind: Any) -> None:
    """An event whose example is missing is one that its readers have to guess."""
    assert "x-dispytch-no-example" not in _check(_event({"field": (kind, ...)}))


_FIELDS = st.dictionaries(
    st.sampled_from(["a", "order_id", "name", "class_", "Größe", "x2"]),
    st.tuples(
        st.recursive(
            st.sampled_from(
                [kind for kind in ODD if "Json" not in str(kind)]
            ),  # In a union it is what is sent no more.
            lambda inner: (
                st.builds(lambda kind: list[kind], inner)  # type: ignore[valid-type]
                | st.builds(lambda kind: dict[str, kind], inner)  # type: ignore[valid-type]
                | st.builds(lambda one, other: one | other if one and other else Any, inner, inner)
            ),
            max_leaves=4,
        ),
        st.sampled_from(["required", "alias", "excluded", "factory", "described"]),
    ),
    max_size=5,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(_FIELDS)
def test_whatever_the_fields_are_the_document_is_valid(fields: dict[str, tuple[Any, str]]) -> None:
    """Nobody's event classes are known here; none may raise, be invalid, or have an example that is wrong."""
    kinds: dict[str, Any] = {
        "required": lambda: Field(),
        "alias": lambda: Field(alias="An Alias/~1"),
        "excluded": lambda: Field(default=None, exclude=True),
        "factory": lambda: Field(default_factory=lambda: uuid4()),
        "described": lambda: Field(description='Wörter: "a"\n- b', title="T"),
    }
    aliased = False
    made: dict[str, Any] = {}
    for name, (kind, how) in fields.items():
        if how == "alias" and aliased:
            how = "required"
        aliased = aliased or how == "alias"
        made[name] = (kind, kinds[how]())
    try:
        cls = _event(made)
    except (TypeError, ValueError, RuntimeError):
        return  # Pydantic refuses the class itself.
    document = describe([cls])
    assert _problems(document) == []
    (message,) = document["components"]["messages"].values()
    assert _fits(document, message) == []
    for example in message.get("examples", ()):
        _load(cls, example["payload"])
    read = yaml.safe_load(to_yaml(document))
    assert read == document
    assert diff(document, read) == []


def test_an_apps_own_examples_come_first() -> None:
    """The author knows what a good example is; all that the class accepts are shown, as they would be sent."""

    class CatalogOwn(EventBase):
        model_config = ConfigDict(
            json_schema_extra={"examples": [{"number": "41", "tenant": "acme"}, {"number": "no"}, {"number": 42}]}
        )
        __route__ = KafkaEventRoute(topic="own.{tenant}")
        number: int
        tenant: str = Field(default="none", exclude=True)

    message = _message(CatalogOwn)
    assert [each["payload"] for each in message["examples"]] == [{"number": 41}, {"number": 42}]
    assert message["x-dispytch-example"]["destination"] == "own.acme"
    assert message["x-dispytch-wrong-examples"][0].startswith("example 2 of the class: number: ")
    assert "examples" not in message["payload"]


def test_an_example_that_cannot_be_made_is_told() -> None:
    """No example is better than a wrong one, and its author learns what to write."""

    class CatalogPicky(EventBase):
        __route__ = KafkaEventRoute(topic="picky")
        code: str

        @field_validator("code")
        @classmethod
        def _checked(cls, value: str) -> str:
            if not value.startswith("X-"):
                raise ValueError("it starts with X-")
            return value

    class CatalogHelped(CatalogPicky):
        code: str = Field(examples=["X-1"])

    message = _message(CatalogPicky)
    assert "examples" not in message
    assert message["x-dispytch-no-example"].startswith("code: Value error, it starts with X-; give Field(examples=")
    assert _message(CatalogHelped)["examples"][0]["payload"] == {"code": "X-1"}


def test_an_example_that_its_route_refuses_is_told() -> None:
    """Every address has a dot, so that every event of this class would be refused: its author should know."""

    class CatalogRefused(EventBase):
        __route__ = KafkaEventRoute(topic="mails.{address}")
        address: str = Field(examples=["ada@example.com"])

    message = _message(CatalogRefused)
    assert message["examples"][0]["payload"] == {"address": "ada@example.com"}
    assert "write safe='.' on the route" in message["x-dispytch-example-problem"]
    assert "x-dispytch-example" not in message


def test_what_changes_each_time_is_no_example() -> None:
    """A document in git must not differ by a random id."""

    class CatalogRandom(EventBase):
        __route__ = KafkaEventRoute(topic="random")
        number: int

        @computed_field  # type: ignore[prop-decorator]
        @property
        def token(self) -> UUID:
            return uuid4()

    class CatalogFactory(EventBase):
        __route__ = KafkaEventRoute(topic="factory")
        made: UUID = Field(default_factory=uuid4)

    assert "random" in _message(CatalogRandom)["x-dispytch-no-example"]
    assert len(_message(CatalogFactory)["examples"]) == 1


def test_computed_fields_and_serializers_count() -> None:
    """What consumers get is what counts, not what the class is made from."""

    class CatalogCents(EventBase):
        model_config = ConfigDict(extra="forbid")
        __route__ = KafkaEventRoute(topic="cents")
        cents: int

        @field_serializer("cents")
        def _written(self, value: int) -> str:
            return f"{value / 100:.2f}"

        @computed_field  # type: ignore[prop-decorator]
        @property
        def free(self) -> bool:
            return self.cents == 0

    message = _message(CatalogCents)
    assert message["payload"]["properties"]["cents"]["type"] == "string"
    assert message["examples"][0]["payload"] == {"cents": "0.01", "free": False}


def test_generics_that_are_bound_to_a_name_are_events() -> None:
    """`OrderEnvelope = Envelope[Order]` is how a generic event is used."""

    class CatalogEnvelope(EventBase, Generic[T]):
        __route__ = KafkaEventRoute(topic="envelopes")
        body: T

    module = types.ModuleType("catalog_generic")
    module.LineEnvelope = CatalogEnvelope[CatalogLine]  # type: ignore[attr-defined]
    document = describe(module)
    assert _problems(document) == []
    (message,) = document["components"]["messages"].values()
    assert message["payload"]["properties"]["body"] == {"$ref": "#/components/schemas/CatalogLine"}
    assert CatalogEnvelope[CatalogLine] not in event_classes()


@pytest.mark.parametrize(
    ("pattern", "shortest"),
    [
        (r"^\d{3}-[a-f]+$", 0), (r"^(?:EUR|USD)$", 0), (r"[^0-9]{2,}", 5), (r"^#[0-9a-fA-F]{6}$", 0), (r"\.\w+@x", 0),
        (r"^a?b*c+$", 0), (r"^[\w.-]+/v\d$", 12), (r"^(?P<y>\d{4})-(?P<m>\d\d)$", 0), (r"^[]a]$", 0), (r"^\S+$", 3),
        ("^ORD-[A-Z0-9]{8}$", 0),
    ],
)  # fmt: skip
def test_patterns_are_matched(pattern: str, shortest: int) -> None:
    """A field with a pattern is the one whose example helps most."""
    import re

    found = matching(pattern, shortest)
    assert found is not None
    assert re.search(pattern, found)
    assert len(found) >= shortest


@pytest.mark.parametrize("pattern", [r"(?=a)", r"(a)\1", r"(?!x)", "[", "(", r"\p{L}"])
def test_patterns_that_are_not_read_give_nothing(pattern: str) -> None:
    """Rather no text than one that is refused."""
    assert matching(pattern) is None


# -- which classes -----------------------------------------------------------------------------------------------------


def test_a_module_stands_for_its_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`catalog shop.main` shows what the app emits, and not the events of every library."""
    shop = tmp_path / "catalog_shop"
    (shop / "events").mkdir(parents=True)
    route = (
        "from dispytch_integrations import EventBase\nfrom dispytch_integrations.redis import RedisEventRoute\n"
        "class {name}(EventBase):\n    __route__ = RedisEventRoute(channel='c')\n"
    )
    (shop / "__init__.py").write_text("__version__ = '4.2'\n")
    (shop / "events" / "__init__.py").write_text(route.format(name="ShopInPackage"))
    (shop / "events" / "orders.py").write_text(route.format(name="ShopBelow"))
    (shop / "other.py").write_text(route.format(name="ShopElsewhere") + route.format(name="ShopByName"))
    (shop / "main.py").write_text(
        "from catalog_shop import events\nimport catalog_shop.events.orders\n"
        "from catalog_shop.other import ShopByName\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def names(events: Any) -> list[str]:
        return [cls.__name__ for cls in event_classes(events)]

    assert names("catalog_shop.events") == ["ShopInPackage"]
    assert names("catalog_shop.main") == ["ShopInPackage", "ShopByName"]
    assert names("catalog_shop.events") == ["ShopInPackage", "ShopBelow"]  # main has imported it meanwhile.
    assert names(sys.modules["catalog_shop"]) == ["ShopInPackage", "ShopBelow", "ShopByName", "ShopElsewhere"]
    info = describe("catalog_shop")["info"]
    assert info == {"title": "catalog_shop", "version": "4.2"}
    assert describe("catalog_shop", title="Shop", version="5", description="All.")["info"]["title"] == "Shop"


def test_mistakes_in_what_is_to_be_described_are_told() -> None:
    """The command line passes on what a person has typed."""
    with pytest.raises(ConfigurationError, match=r"no module 'catalog_nowhere'.*dotted name"):
        describe("catalog_nowhere.events")
    with pytest.raises(ConfigurationError, match="has no event classes"):
        describe("json")
    with pytest.raises(RouteError, match="is not an event"):
        describe([CatalogLine])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
    with pytest.raises(RouteError, match="no __route__"):
        describe([EventBase])
    with pytest.raises(ConfigurationError, match="names no events"):
        describe(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigurationError, match="is no dotted name"):
        describe("..x")


def test_all_imported_classes_are_described_unless_told() -> None:
    """`describe()` in an app's own shell shows everything that it has."""
    classes = event_classes()
    assert CatalogPlaced in classes
    assert classes == sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))


# -- as text -----------------------------------------------------------------------------------------------------------


def test_json_and_yaml_say_the_same() -> None:
    """Whichever of the two is kept in git, `diff` reads it."""
    document = _described(CatalogPlaced, CatalogMailed, brokers=BROKERS)
    assert json.loads(to_json(document)) == document
    text = to_yaml(document)
    assert yaml.safe_load(text) == document
    assert text.startswith("asyncapi: '3.0.0'\n")


def test_yaml_keeps_letters_and_lines() -> None:
    """People read it."""

    class CatalogLetters(EventBase):
        """Größe.

        - eins
        - zwei: 2
        """

        __route__ = KafkaEventRoute(topic="letters")
        kind: Literal["on", "1e3", "0o14", "12:30", "null", "2026-01-01", "1_000", "~", "ja: nein", "é"]

    document = _described(CatalogLetters)
    text = to_yaml(document)
    assert "Größe" in text
    assert "description: |-\n" in text
    assert yaml.safe_load(text) == document
    assert "- '1e3'" in text


def test_two_runs_give_the_same_bytes() -> None:
    """A document in git changes when the events do."""
    code = (
        "import sys, tests.test_asyncapi as t\nfrom dispytch_integrations.asyncapi import *\n"
        "sys.stdout.write(to_yaml(describe([t.CatalogPlaced, t.CatalogMailed, t.CatalogStreamed], brokers=t.BROKERS)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert b"com.shop.order.placed" in runs[0]


_TEXT = st.text() | st.sampled_from(
    [
        "", " ", "y", "No", "null", "~", "1e3", ".5", "0x1f", "12:30:45", "2026-01-31", "- x", "a: b", "a #b", "a:",
        "#", "'", '"', "a\nb", "a\nb\n", "a\n\nb", "\na", " a\nb", "a\n \nb", "a \nb", "a\tb\nc", "[x]", "{x}", "&a",
        "*a", "!a", "%a", "@a", "`a", "\ufeffa", "\x85", "\u2028", "\U0001f600", "é", "=", "<<", "x" * 2000, "? a",
        "a\rb", "key: |", "...", "---", "$ref", "/a", "$1", "/1e3",
    ]
)  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.dictionaries(_TEXT, _JSON, max_size=4))
def test_yaml_is_read_as_it_was_meant(document: dict[str, Any]) -> None:
    """A docstring may hold whatever its author likes, and `no` is Norway."""
    text = to_yaml(document)
    text.encode()
    assert yaml.safe_load(text) == document


def test_no_driver_and_no_framework_is_imported() -> None:
    """The catalogue is made in CI, where nothing but the event classes is installed."""
    code = (
        "import sys\nfrom dispytch_integrations.asyncapi import describe\n"
        "from dispytch_integrations import EventBase\nfrom dispytch_integrations.kafka import KafkaEventRoute\n"
        "class E(EventBase):\n    __route__ = KafkaEventRoute(topic='t')\n"
        "describe([E], brokers={'a': 'kafka://h', 'b': 'amqp://h', 'c': 'redis://h'})\n"
        "print([m for m in ('aiokafka', 'aio_pika', 'redis', 'django', 'starlette', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_ours() -> None:
    """`except DispytchError` is enough around it."""
    with pytest.raises(DispytchError):
        describe([CatalogPlaced], brokers={"url": "kafka://h"})
    assert MemoryProducer().sent == []


def test_models_that_hold_each_other_in_many_ways_end() -> None:
    """Two fields of each model double the work of every level: the first request for the catalogue would never end."""
    model: Any = int
    for number in range(24):
        model = create_model(f"AsyncApiLevel{number}", a=(model, ...), b=(model, ...))
    cls = type(
        "AsyncApiLevels",
        (EventBase,),
        {"__module__": __name__, "__route__": KafkaEventRoute(topic="levels"), "__annotations__": {"top": model}},
    )
    message = describe([cls])["components"]["messages"]["AsyncApiLevels"]
    assert "3,000 values" in message["x-dispytch-no-example"]


def test_a_pattern_that_python_tries_for_years_is_left_to_the_class() -> None:
    """Pydantic's own engine decides about it at once; Python's would hold the process."""
    fields = {"code": Annotated[str, Field(pattern="^(a+)+b$", min_length=40)]}
    cls = type(
        "AsyncApiSlowPattern",
        (EventBase,),
        {"__module__": __name__, "__route__": KafkaEventRoute(topic="slow"), "__annotations__": fields},
    )
    assert "pattern" in describe([cls])["components"]["messages"]["AsyncApiSlowPattern"]["x-dispytch-no-example"]


def test_two_classes_that_are_alike_are_two_events() -> None:
    """A class that is made twice, by a factory or a reload, would leave the others without a catalogue."""
    declared: dict[str, Any] = {"__module__": __name__, "__route__": KafkaEventRoute(topic="twins")}
    made = [type("AsyncApiTwin", (EventBase,), {**declared, "__annotations__": {"a": int}}) for _ in range(2)]
    messages = describe(made)["components"]["messages"]
    assert [message["payload"]["properties"] for message in messages.values()] == [{"a": {"type": "integer"}}] * 2
