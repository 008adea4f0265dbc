"""From an event to its message: compiled once per event class and broker, run per event."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel

from dispytch_integrations._identity import event_id
from dispytch_integrations._templates import Filler, Template, compile_route_part, compile_text
from dispytch_integrations.errors import DispytchError, HeaderError, RouteError, SerializationError
from dispytch_integrations.events import BackendConfig, EventBase, EventRoute, event_type, string_fields
from dispytch_integrations.message import Message
from dispytch_integrations.serialization import Serializer

__all__ = ["MessageSettings", "Prepare", "compile_prepare"]

Prepare = Callable[[EventBase, "Mapping[str, Any] | None"], Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSettings:
    """What a broker adds to the messages made for it."""

    alias: str
    serializer: Serializer
    prefix: str = ""
    """Goes in front of every destination."""
    cloudevents: bool | str = False
    """CloudEvents attributes as headers; a string is their prefix instead of the transport's own."""
    source: str | None = None
    """CloudEvents `source`; None: "/" and the top-level package of the event's class."""
    before_send: tuple[Callable[[Message], None], ...] = ()
    wants_route: bool = False
    """Does the producer want the filled route and configuration (it implements `send`, not `deliver`)?"""


def compile_prepare(cls: type[EventBase], settings: MessageSettings) -> Prepare:
    """A function that makes messages from events of `cls`. Raises RouteError when the class cannot be sent."""
    route = cls.__route__
    address = _Address(cls, route, settings.prefix)
    fill_properties, fill_config_headers, fill_config = _compile_config(cls, route)
    fill_key = _compile_ordering_key(cls)
    make_headers = _compile_headers(cls, route, settings, fill_config_headers)
    serialize = _compile_payload(cls, settings.serializer)
    type_, alias, content_type = event_type(cls), settings.alias, settings.serializer.content_type
    encode_properties, before_send, wants_route = route.encode_properties, settings.before_send, settings.wants_route
    fixed_destination, fixed_properties = address.fixed

    def prepare(event: EventBase, headers: Mapping[str, Any] | None) -> Message:
        if fixed_destination is not None:
            destination, properties = fixed_destination, fixed_properties.copy()
        else:
            destination, properties = address.fill(event)
        key = None if fill_key is None else fill_key(event)
        if fill_properties is not None:
            properties.update(fill_properties(event))
            default_key = encode_properties(properties)
            if key is None:
                key = default_key
        message = Message(
            None, type_, alias, destination, key, make_headers(event, headers), properties, None, content_type, event
        )
        if wants_route:
            message.route = address.filled_route(event)
            message.config = fill_config(event)
        message.payload = serialize(event, message)
        for hook in before_send:
            hook(message)
        return message

    return prepare


class _Address:
    """A route's strings, ready to be filled."""

    def __init__(self, cls: type[EventBase], route: EventRoute, prefix: str) -> None:
        self._route = route
        self._prefix = prefix
        self._fillers: dict[str, Filler] = {}
        dynamic = False
        for field, text in string_fields(route):
            template = Template(text, f"{cls.__qualname__}.__route__: {field}")
            dynamic = dynamic or template.literal is None
            self._fillers[field] = compile_route_part(template, route.safe, field)
        self._destination_field = route.destination_field or next(iter(self._fillers), None)
        self._constants = {
            field: value
            for field, value in route.__dict__.items()
            if field not in self._fillers and field != "safe" and value is not None
        }
        self.dynamic = dynamic
        self.fixed: tuple[str | None, dict[str, Any]] = (None, {})
        if not dynamic:
            self.fixed = self.fill(None)

    def fill(self, event: Any) -> tuple[str, dict[str, Any]]:
        """The destination and the route's other fields. Raises RouteError."""
        properties = self._constants.copy()
        destination = ""
        for field, fill in self._fillers.items():
            if field == self._destination_field:
                destination = fill(event)
            else:
                properties[field] = fill(event)
        if destination:
            destination = self._prefix + destination
        self._route.check_address(destination, properties)
        return destination, properties

    def filled_route(self, event: Any) -> EventRoute:
        """The route as a user's producer gets it."""
        if not self.dynamic and not self._prefix:
            return self._route
        values = {field: fill(event) for field, fill in self._fillers.items()}
        if self._destination_field is not None and values.get(self._destination_field):
            values[self._destination_field] = self._prefix + values[self._destination_field]
        return self._route.model_copy(update=values)


def _compile_value(cls: type[EventBase], owner: str, value: Any) -> Filler | None:
    """A function that fills a configuration value, strings within dicts and lists too; None: it is constant."""
    if isinstance(value, str):
        template = Template(value, owner)
        if template.literal == value:
            return None
        return compile_text(template, owner)
    if isinstance(value, dict):
        items = [(key, item, _compile_value(cls, f"{owner}: {key}", item)) for key, item in value.items()]
        if all(fill is None for _, _, fill in items):
            return None
        return lambda event: {key: item if fill is None else fill(event) for key, item, fill in items}
    if isinstance(value, (list, tuple)):
        elements = [(item, _compile_value(cls, owner, item)) for item in value]
        if all(fill is None for _, fill in elements):
            return None
        return lambda event: [item if fill is None else fill(event) for item, fill in elements]
    return None


def _compile_config(
    cls: type[EventBase], route: EventRoute
) -> tuple[Filler | None, Filler | None, Callable[[EventBase], BackendConfig | None]]:
    """Functions for the properties, for the headers, and for the whole filled configuration."""
    config = cls.__backend_config__
    if config is None:
        return None, None, lambda event: None
    owner = f"{cls.__qualname__}.__backend_config__"
    constants: dict[str, Any] = {}
    fillers: dict[str, Filler] = {}
    headers: Filler | None = None
    for field, value in config.__dict__.items():
        if value is None:
            continue
        fill = _compile_value(cls, f"{owner}: {field}", value)
        if field == "headers" and route.supports_headers:
            constant = value
            headers = fill or (lambda event, constant=constant: constant)
        elif fill is None:
            constants[field] = value
        else:
            fillers[field] = fill

    def fill_properties(event: Any) -> dict[str, Any]:
        properties = constants.copy()
        for field, fill in fillers.items():
            value = fill(event)
            if value is not None:
                properties[field] = value
        return properties

    def fill_config(event: EventBase) -> BackendConfig:
        update = {field: fill(event) for field, fill in fillers.items()}
        if headers is not None:
            update["headers"] = headers(event)
        return config.model_copy(update=update) if update else config

    return fill_properties, headers, fill_config


def _compile_ordering_key(cls: type[EventBase]) -> Filler | None:
    text = cls.__ordering_key__
    if text is None:
        return None
    owner = f"{cls.__qualname__}.__ordering_key__"
    return compile_text(Template(text, owner), owner)


_UNSAFE_IN_HEADERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _compile_headers(
    cls: type[EventBase], route: EventRoute, settings: MessageSettings, fill_config_headers: Filler | None
) -> Callable[[EventBase, Mapping[str, Any] | None], dict[str, Any]]:
    """A function that makes the headers: CloudEvents attributes, the configuration's, the caller's."""
    supported, encode = route.supports_headers, route.encode_header
    identity = supported and settings.cloudevents is not False
    prefix = settings.cloudevents if isinstance(settings.cloudevents, str) else route.cloudevents_prefix
    constants: dict[str, Any] = {}
    if identity:
        constants = {
            f"{prefix}specversion": "1.0",
            f"{prefix}type": event_type(cls),
            f"{prefix}source": settings.source or f"/{cls.__module__.partition('.')[0].strip('_')}",
        }
        if route.content_type_header is not None:
            constants[route.content_type_header] = settings.serializer.content_type
    id_name, time_name = f"{prefix}id", f"{prefix}time"
    reserved = {name.lower() for name in (*constants, id_name, time_name)} if identity else set[str]()
    name_of = cls.__qualname__

    def add(headers: dict[str, Any], given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if not isinstance(name, str) or not name or _UNSAFE_IN_HEADERS.search(name):
                raise HeaderError(f"{name_of}: {name!r} is no name for a header; give a str without control characters")
            if name.lower() in reserved:
                raise HeaderError(
                    f"{name_of}: the header {name!r} is made by the emitter (CloudEvents); "
                    f"choose another name, or connect(..., cloudevents=False)"
                )
            if value is None:
                continue
            try:
                encoded = encode(value)
            except TypeError as exc:
                raise HeaderError(f"{name_of}: the header {name!r} cannot be sent: {exc}") from exc
            if isinstance(encoded, str) and _UNSAFE_IN_HEADERS.search(encoded):
                raise HeaderError(f"{name_of}: the header {name!r} holds a control character; clean the value")
            headers[name] = encoded

    def make_headers(event: EventBase, given: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = constants.copy()
        if identity:
            headers[id_name] = event_id(event)
            headers[time_name] = _now()
        if fill_config_headers is not None:
            add(headers, fill_config_headers(event))
        if given:
            if not supported:
                raise HeaderError(
                    f"{name_of}: a {type(route).__name__} carries no headers; put the values into the event"
                )
            add(headers, given)
        return headers

    return make_headers


def _now() -> str:
    # RFC 3339, as CloudEvents asks for.
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _compile_payload(
    cls: type[EventBase], serializer: Serializer
) -> Callable[[EventBase, Message], bytes | None]:
    if cls.__tombstone__:
        return lambda event, message: None
    # A serializer written for dispytch has `serialize` alone.
    serialize_event = getattr(serializer, "serialize_event", None)
    name = type(serializer).__name__

    def serialize(event: EventBase, message: Message) -> bytes:
        try:
            if serialize_event is None:
                payload = serializer.serialize(event.model_dump(mode="json", by_alias=True))
            else:
                payload = serialize_event(event, message)
        except DispytchError:
            raise
        except Exception as exc:
            raise SerializationError(
                f"{cls.__qualname__} cannot be serialized by {name}: {type(exc).__name__}; "
                f"the cause is chained to this error"
            ) from exc
        if not isinstance(payload, bytes):
            raise SerializationError(f"{name} gave a {type(payload).__name__} for {cls.__qualname__}; it must give bytes")
        return payload

    return serialize


def require_route(cls: type[Any]) -> None:
    """Raise RouteError when `cls` is no event class, or has no route."""
    if not issubclass(cls, EventBase):
        hint = "derive its class from EventBase" if issubclass(cls, BaseModel) else "emit an instance of an EventBase"
        raise RouteError(f"a {cls.__qualname__} is not an event; {hint}")
    if getattr(cls, "__route__", None) is None:
        raise RouteError(
            f"{cls.__qualname__} has no __route__, so there is nowhere to send it; write for example "
            f'__route__ = KafkaEventRoute(topic="orders")'
        )
