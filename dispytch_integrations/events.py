"""Event classes: what happened, and by their route where it goes."""

from __future__ import annotations

from abc import ABC
from datetime import date, datetime
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, ClassVar, cast
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from dispytch_integrations._declared import Declared
from dispytch_integrations._identity import event_id
from dispytch_integrations._parts import of_dispytch
from dispytch_integrations._templates import Template, check_constant
from dispytch_integrations.errors import RouteError

__all__ = ["BackendConfig", "EventBase", "EventRoute", "event_id"]


def header_text(value: Any) -> str | bytes:
    """A header value as text: str and bytes as they are, mappings and lists as JSON, dates in ISO 8601, enums by value.

    Raises TypeError for a type that has no obvious text.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal, UUID)):
        return str(value)
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, (BaseModel, dict, list, tuple)):
        return to_json(value).decode()
    raise TypeError(
        f"a {type(value).__name__} is not text; give str, bytes, a number, a UUID, a date, a dict or a list"
    )


class BackendConfig(Declared, ABC):
    """What only one transport knows about an event: partition, priority, expiration...

    Its fields become the message's properties; `headers` becomes its headers. Strings may hold `{field}` parts.
    Derive from it for a producer of your own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class EventRoute(Declared, ABC):
    """Where an event goes. Strings may hold `{field}` parts, filled from the event.

    The class variables declare what the transport behind such a route can do. Derive from it for a producer of
    your own:

        class FileRoute(EventRoute):
            path: str

        __route__ = FileRoute(path="orders/{order_id}.json")
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    transport: ClassVar[str] = "custom"
    """Name of the transport, as in `memory://kafka`."""
    destination_field: ClassVar[str | None] = None
    """The field that becomes the message's destination; None: the first field that is a string."""
    config_type: ClassVar[type[BackendConfig]] = BackendConfig
    """What `__backend_config__` must be an instance of."""
    supports_headers: ClassVar[bool] = False
    """Does the transport carry metadata beside the payload?"""
    supports_tombstones: ClassVar[bool] = False
    """Is there a null payload, as in a compacted Kafka topic?"""
    cloudevents_prefix: ClassVar[str] = "ce_"
    """What stands before the CloudEvents attributes' names in headers."""
    content_type_header: ClassVar[str | None] = "content-type"
    """The header that carries the payload's media type; None: the transport has a property for it."""
    reserved_headers: ClassVar[frozenset[str]] = frozenset()
    """Names that no header may have, since the transport needs them itself."""
    kind: ClassVar[str | None] = None
    """Tells messages of this route from those of the transport's other routes: their property "kind"; None: none."""

    safe: str = ""
    """Delimiters that the values of `{field}` parts may hold, as in `urllib.parse.quote`; default: none of them."""

    @classmethod
    def check_address(cls, destination: str, properties: dict[str, Any]) -> None:
        """Raise RouteError when the transport does not allow this name; called before anything is sent."""

    @classmethod
    def encode_properties(cls, properties: dict[str, Any]) -> str | None:
        """Bring `properties` into the form they are sent and stored in; return the default ordering key."""
        return None

    @classmethod
    def encode_header(cls, value: Any) -> Any:
        """A header's value as it is sent; by default text, or bytes as they are. Raises TypeError."""
        return header_text(value)


class EventBase(BaseModel):
    """An event: a pydantic model with a `__route__`.

        class OrderPlaced(EventBase):
            __route__ = KafkaEventRoute(topic="orders.{tenant}")
            __ordering_key__ = "{order_id}"

            tenant: str = Field(exclude=True)
            order_id: int

    Routes, keys and headers may use every field, those with `exclude=True` too. All of them are checked when the
    class is declared. Raises RouteError there when a `{field}` part names no field.
    """

    __slots__ = ("_dispytch_event_id",)  # Outside pydantic's state: ids do not make equal events differ.

    __route__: ClassVar[EventRoute]
    """Where the event goes. A class without one can be derived from, not emitted."""
    __backend_config__: ClassVar[BackendConfig | None] = None
    """What only this transport knows; None: its defaults."""
    __ordering_key__: ClassVar[str | None] = None
    """Events of equal key arrive in order; None: the Kafka partition key if there is one, else no order."""
    __event_type__: ClassVar[str]
    """Name of the event for its consumers; default: the class's qualified name (`__qualname__`)."""
    __broker__: ClassVar[str | None] = None
    """Alias of the broker, where several would take the route; None: the only one that does, else "default"."""
    __tombstone__: ClassVar[bool] = False
    """Send a null payload: in a compacted Kafka topic it deletes the key. Needs a key."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        _check_names(cls)
        if getattr(cls, "__route__", None) is not None:
            _check_declaration(cls)


_OURS = ("__route__", "__backend_config__", "__ordering_key__", "__event_type__", "__broker__", "__tombstone__")
_BARE = {name.strip("_").replace("_", ""): name for name in _OURS}
_PARTS = {
    "__topic__": "__route__ = KafkaEventRoute(topic=...)",
    "__stream__": "__route__ = RedisStreamEventRoute(stream=...)",
    "__channel__": "__route__ = RedisEventRoute(channel=...)",
    "__exchange__": "__route__ = RabbitMQEventRoute(exchange=..., routing_key=...)",
    "__routing_key__": "__route__ = RabbitMQEventRoute(exchange=..., routing_key=...)",
    "__partition_key__": "__ordering_key__, or __backend_config__ = KafkaEventConfig(partition_key=...)",
}
"""Parts of a route that somebody may take for class variables, with what to write."""


def _check_names(cls: type[EventBase]) -> None:
    """Raise RouteError for a class variable that looks like one of ours and is none: nobody would ever read it.

    No special name of Python or pydantic is that near to one of ours, on any version; a test compares them.
    """
    for name in vars(cls):
        if name.startswith("__") and name.endswith("__") and name not in _OURS:
            meant = _PARTS.get(name.lower()) or _near(name.lower().strip("_").replace("_", ""), 0.75)
            if meant is not None:
                raise RouteError(f"{cls.__qualname__}.{name} means nothing to an event; write {meant}")
    for name in cls.__private_attributes__:
        # Without its last underscores `__ordering_key` is a private attribute, renamed by Python.
        mangled = f"_{cls.__name__.lstrip('_')}__"
        if name.startswith(mangled):
            bare = name.removeprefix(mangled).rstrip("_")
            meant = _near(bare.replace("_", ""), 1.0)
            if meant is not None:
                raise RouteError(f"{cls.__qualname__}.__{bare} is private to the class; write {meant}")


@cache
def _near(bare: str, cutoff: float) -> str | None:
    matches = get_close_matches(bare, _BARE, n=1, cutoff=cutoff)
    return _BARE[matches[0]] if matches else None


def _check_declaration(cls: type[EventBase]) -> None:
    name = cls.__qualname__
    route = cls.__route__
    if not isinstance(route, EventRoute):
        given: object = route
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        write = of_dispytch(given) or 'write for example __route__ = KafkaEventRoute(topic="orders")'
        raise RouteError(f"{name}.__route__ is {what}, not a route; {write}")
    literals: dict[str, str] = {}
    for field, value in string_fields(route):
        owner = f"{name}.__route__: {field}"
        template = Template(value, owner)
        template.check(cls, owner)
        check_constant(value, owner)
        if template.literal is not None:
            literals[field] = template.literal
    _check_literal_address(cls, route, literals)
    given_type: object = getattr(cls, "__event_type__", None)
    if given_type is not None:
        owner = f"{name}.__event_type__"
        if not isinstance(given_type, str):
            raise RouteError(f'{owner} is a {type(given_type).__name__}; write a str such as "shop.order.placed"')
        if not given_type:
            raise RouteError(f'{owner} is empty; write a name such as "shop.order.placed", or leave it out')
        check_constant(given_type, owner)
    broker: object = cls.__broker__
    if broker is not None and (not isinstance(broker, str) or not broker):
        raise RouteError(f'{name}.__broker__ is {broker!r}; write the alias of a broker, such as "default"')
    config = cls.__backend_config__
    if config is not None:
        if not isinstance(config, route.config_type):
            raise RouteError(
                f"{name}.__backend_config__ is a {type(config).__name__}, but a {type(route).__name__} "
                f"goes with a {route.config_type.__name__}"
            )
        for owner, text in _config_texts(f"{name}.__backend_config__", config):
            Template(text, owner).check(cls, owner)
        _check_key(cls, getattr(config, "partition_key", None), f"{name}.__backend_config__: partition_key")
    if cls.__ordering_key__ is not None:
        owner = f"{name}.__ordering_key__"
        if not isinstance(cls.__ordering_key__, str):
            raise RouteError(f'{owner} is a {type(cls.__ordering_key__).__name__}; write a str such as "{{order_id}}"')
        Template(cls.__ordering_key__, owner).check(cls, owner)
        check_constant(cls.__ordering_key__, owner)
        _check_key(cls, cls.__ordering_key__, owner)
    if cls.__tombstone__:
        _check_tombstone(cls)


def _check_key(cls: type[EventBase], key: object, owner: str) -> None:
    """Raise RouteError for a field's name without braces: all events of the class would have one and the same key."""
    if isinstance(key, str) and key in cls.__pydantic_fields__:
        raise RouteError(f'{owner} {key!r} is a text, and the same for all events; of the field write "{{{key}}}"')


def _check_literal_address(cls: type[EventBase], route: EventRoute, literals: dict[str, str]) -> None:
    """Raise RouteError for a name that no event could change, and that the transport does not allow."""
    names = [field for field, _ in string_fields(route)]
    if len(literals) < len(names) or not names:
        return
    destination = literals.pop(route.destination_field or names[0], "")
    try:
        route.check_address(destination, dict(literals))
    except RouteError as exc:
        raise RouteError(f"{cls.__qualname__}.__route__: {exc}") from None


def _check_tombstone(cls: type[EventBase]) -> None:
    if not cls.__route__.supports_tombstones:
        raise RouteError(f"{cls.__qualname__}.__tombstone__: {type(cls.__route__).__name__} knows no null payload")
    if cls.__ordering_key__ is None and getattr(cls.__backend_config__, "partition_key", None) is None:
        raise RouteError(
            f"{cls.__qualname__}.__tombstone__ deletes a key, but the event has none; "
            f'write __ordering_key__ = "{{your_id_field}}"'
        )


def string_fields(route: EventRoute) -> list[tuple[str, str]]:
    """The route's fields that may hold `{field}` parts, with their values, in order of declaration."""
    values = route.__dict__
    return [(field, value) for field, value in values.items() if field != "safe" and isinstance(value, str)]


def _config_texts(owner: str, value: Any) -> list[tuple[str, str]]:
    """Every string in a configuration, nested ones too, with the place where it stands."""
    if isinstance(value, str):
        return [(owner, value)]
    if isinstance(value, BaseModel):
        value = value.__dict__
    if isinstance(value, dict):
        mapping = cast("dict[object, Any]", value)
        return [found for key, item in mapping.items() for found in _config_texts(f"{owner}: {key}", item)]
    if isinstance(value, (list, tuple)):
        return [found for item in cast("list[Any]", value) for found in _config_texts(owner, item)]
    return []


def event_type(cls: type[EventBase]) -> str:
    """The event's type as consumers see it: `__event_type__`, else the class's qualified name."""
    declared: str | None = getattr(cls, "__event_type__", None)
    return cls.__qualname__ if declared is None else declared
