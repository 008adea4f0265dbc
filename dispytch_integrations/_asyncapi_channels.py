"""Routes as AsyncAPI channels: address, parameters, bindings.

Versions of the bindings: kafka 0.5.0, amqp 0.3.0. For Redis AsyncAPI's binding is empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin
from urllib.parse import quote

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dispytch_integrations._asyncapi_brokers import Destination
from dispytch_integrations._templates import Template, _Part, model_of
from dispytch_integrations.errors import RouteError
from dispytch_integrations.events import EventBase, EventRoute, string_fields

__all__ = ["AMQP", "KAFKA", "Channel", "channel_of", "field_of", "identifier", "part_of", "unlike"]

AMQP, KAFKA = "0.3.0", "0.5.0"
"""Versions of AsyncAPI's bindings."""

_KINDS = {"kafka": "topic", "rabbitmq": "exchange", "redis": "pubsub"}


@dataclass(frozen=True, slots=True)
class Channel:
    """`key`: equal for events that go to the same place. `name`: how it would like to be called. `body`: the object."""

    key: tuple[str, ...]
    name: str
    body: dict[str, Any]


def identifier(text: str) -> str:
    """`text` as AsyncAPI allows it for a key: letters, digits, `.`, `-` and `_`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("{", "").replace("}", "")).strip("_") or "_"


def channel_of(cls: type[EventBase], destination: Destination) -> Channel:
    """The channel that events of `cls` go to."""
    route = cls.__route__
    texts = dict(string_fields(route))
    target = route.destination_field or next(iter(texts), None)
    where = texts.pop(target, "") if target is not None else ""
    if where:
        where = destination.settings.prefix + where
    kind = route.kind or _KINDS.get(route.transport, route.transport)
    address, shown = where, where
    exchange: str | None = None
    if route.transport == "rabbitmq":
        exchange, address = where, texts.get("routing_key", "")
        shown = f"{exchange} → {address}" if exchange and address else exchange or address
        kind = "exchange" if exchange else "queue"
    parameters = _Parameters(cls)
    body: dict[str, Any] = {"address": parameters.address(address), "title": shown}
    if destination.server:
        body["servers"] = [{"$ref": f"#/servers/{quote(_escaped(destination.alias), safe='~')}"}]
    if parameters.made:
        body["parameters"] = parameters.made
    body["messages"] = {}
    bindings = _bindings(address, exchange, route, destination)
    if bindings:
        body["bindings"] = bindings
    body["x-dispytch-broker"] = destination.alias
    body["x-dispytch-transport"] = route.transport
    body["x-dispytch-kind"] = kind
    body["x-dispytch-destination"] = where
    if exchange and (of_exchange := _Parameters(cls)).address(exchange) and of_exchange.made:
        body["x-dispytch-exchange-parameters"] = of_exchange.made
    name = identifier(f"{destination.alias}.{where}.{address}" if exchange else f"{destination.alias}.{address}")
    return Channel((destination.alias, route.transport, kind, where, address, str(destination.server)), name, body)


def unlike(name: str, key: tuple[str, ...]) -> str:
    """A name for a channel whose own is that of another one."""
    return f"{name}-{sha256(repr(key).encode()).hexdigest()[:6]}"


# -- parameters --------------------------------------------------------------------------------------------------------


class _Parameters:
    """The `{field}` parts of an address as AsyncAPI parameters."""

    def __init__(self, cls: type[EventBase]) -> None:
        self._cls = cls
        self.made: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}

    def address(self, text: str) -> str:
        """`text` with legal names in its `{field}` parts; braces that are meant are written %7B and %7D."""
        parts = Template(text, self._cls.__qualname__).parts
        return "".join(
            part.replace("{", "%7B").replace("}", "%7D") if isinstance(part, str) else f"{{{self._name(part)}}}"
            for part in parts
        )

    def _name(self, part: _Part) -> str:
        if part.text in self._names:
            return self._names[part.text]
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", part.path).strip("_") or "part"
        name, count = plain, 1
        while name in self.made:
            count += 1
            name = f"{plain}_{count}"
        self._names[part.text] = name
        self.made[name] = _parameter(self._cls, part, name)
        return name


def _parameter(cls: type[EventBase], part: _Part, name: str) -> dict[str, Any]:
    found = field_of(cls, part)
    made: dict[str, Any] = {}
    info = found.info
    if info is not None and info.description:
        made["description"] = info.description
    values = _closed(found.annotation)
    rendered = [] if values is None else _rendered(part, values)
    if rendered:
        made["enum"] = rendered
    if info is not None:
        default = _rendered(part, [info.default]) if info.default is not PydanticUndefined else []
        if default and default[0]:
            made["default"] = default[0]
        examples = _rendered(part, info.examples or [])
        if examples:
            made["examples"] = examples
    if found.pointer is not None and part.plain:
        made["location"] = f"$message.payload#{found.pointer}"
    if part.text != f"{{{name}}}":
        made["x-dispytch-part"] = part.text
    return made


def _rendered(part: _Part, values: list[Any]) -> list[str]:
    """The values as they stand in the address, without those that cannot."""
    texts: list[str] = []
    for value in values:
        try:
            text = part.render(value.value if isinstance(value, Enum) else value)
        except RouteError:
            continue
        if text and text not in texts:
            texts.append(text)
    return texts


def _closed(annotation: Any) -> list[Any] | None:
    """All values that an annotation allows, in the case of an Enum or a Literal; None: there are others."""
    if get_origin(annotation) in (Union, UnionType):
        choices = [each for each in get_args(annotation) if each is not type(None)]
        return _closed(choices[0]) if len(choices) == 1 else None
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if value is not None]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return list(annotation)
    return None


@dataclass(frozen=True, slots=True)
class FieldOf:
    """The field that a `{field}` part names. `pointer`: where it is in the body; None: it is not, or not known."""

    info: FieldInfo | None
    annotation: Any
    pointer: str | None
    nullable: bool


def field_of(cls: type[BaseModel], part: _Part) -> FieldOf:
    """Follow a part's path through the models."""
    model: type[BaseModel] | None = cls
    info: FieldInfo | None = None
    annotation: Any = Any
    pointer: str | None = ""
    nullable = False
    for _, step in part.steps:
        fields: Mapping[str, FieldInfo] = {} if model is None else model.__pydantic_fields__
        info = fields.get(step) if isinstance(step, str) else None
        if info is None:
            computed = None if model is None else model.__pydantic_decorators__.computed_fields.get(str(step))
            annotation = Any if computed is None else computed.info.return_type
            known = computed is not None and pointer is not None
            return FieldOf(None, annotation, f"{pointer}/{_escaped(str(step))}" if known else None, True)
        annotation = info.annotation
        nullable = nullable or _allows_none(annotation)
        name = info.serialization_alias or info.alias or str(step)
        pointer = None if pointer is None or info.exclude else f"{pointer}/{_escaped(name)}"
        model = model_of(annotation)
    return FieldOf(info, annotation, pointer, nullable)


def _allows_none(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_allows_none(each) for each in get_args(annotation))
    return annotation in (None, Any, type(None))


def _escaped(name: str) -> str:
    """A name within a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def part_of(text: str) -> _Part | None:
    """The `{field}` part that a template consists of; None: there is more to it, or less."""
    parts = Template(text, "").parts
    return parts[0] if len(parts) == 1 and isinstance(parts[0], _Part) else None


# -- bindings ----------------------------------------------------------------------------------------------------------


def _bindings(address: str, exchange: str | None, route: EventRoute, destination: Destination) -> dict[str, Any]:
    if route.transport == "kafka":
        literal = Template(address, "").literal
        return {"kafka": {**({} if literal is None else {"topic": literal}), "bindingVersion": KAFKA}}
    if exchange is None:
        return {}
    if not exchange:
        queue = {"name": address, "vhost": destination.vhost}
        return {"amqp": {"is": "queue", "queue": queue, "bindingVersion": AMQP}}
    declared = _declared(destination.exchanges.get(exchange.removeprefix(destination.settings.prefix)))
    return {
        "amqp": {
            "is": "routingKey",
            "exchange": {"name": exchange, **declared, "vhost": destination.vhost},
            "bindingVersion": AMQP,
        }
    }


def _declared(given: Any) -> dict[str, Any]:
    """What is known of how an exchange is declared, in AsyncAPI's names."""
    if isinstance(given, BaseModel):
        given = given.model_dump()
    values: dict[str, Any] = {"type": given} if isinstance(given, str) else {}
    if isinstance(given, Mapping):
        values = dict(cast("Mapping[str, Any]", given))
    made: dict[str, Any] = {}
    if "type" in values:
        known = values["type"] in ("topic", "direct", "fanout", "headers")
        made["type" if known else "x-type"] = values["type"]
        made["durable"] = values.get("durable", True)
        made["autoDelete"] = values.get("auto_delete", False)
    return made
