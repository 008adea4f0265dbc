"""From an event to its message: compiled once per event class and broker, run per event."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from dispytch_integrations._identity import event_id, now_rfc3339
from dispytch_integrations._parts import of_dispytch
from dispytch_integrations._templates import Filler, Template, compile_route_part, compile_text
from dispytch_integrations.errors import (
    DispytchError,
    HeaderError,
    MessageTooLargeError,
    RouteError,
    SerializationError,
)
from dispytch_integrations.events import BackendConfig, EventBase, EventRoute, event_type, string_fields
from dispytch_integrations.message import Message
from dispytch_integrations.serialization import JSONSerializer, Serializer

__all__ = ["MessageSettings", "Prepare", "compile_prepare", "require_route"]

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
    foreign_hooks: bool = False
    """Are hooks of the user's among them? What they put into the headers is checked."""
    wants_route: bool = False
    """Does the producer want the filled route and configuration (it implements `send`, not `deliver`)?"""
    max_size: int | None = None
    """Bytes that a payload may have; None: as many as there are."""

    @property
    def serializer_content_type(self) -> str:
        """The media type of payloads; a serializer written for dispytch does not say."""
        return getattr(self.serializer, "content_type", Serializer.content_type)


def compile_prepare(cls: type[EventBase], settings: MessageSettings) -> Prepare:
    """A function that makes messages from events of `cls`. Raises RouteError when the class cannot be sent.

    The function is one flat piece on purpose: it runs for every event, and each call within it costs a tenth of it.
    """
    route = cls.__route__
    address = _Address(cls, route, settings.prefix)
    fixed_destination, fixed_properties = address.fixed
    config = _Config(cls, route)
    fill_key = _compile_ordering_key(cls)
    headers = _Headers(cls, route, settings)
    constant_headers, id_name, time_name = headers.constants, headers.id_name, headers.time_name
    serialize = _compile_payload(cls, settings.serializer)
    type_, alias, content_type = event_type(cls), settings.alias, settings.serializer_content_type
    encode_properties, before_send, wants_route = route.encode_properties, settings.before_send, settings.wants_route
    identity, foreign_hooks = headers.identity, settings.foreign_hooks
    fixed_route = None if address.dynamic else address.filled_route(None)
    tombstone, max_size = cls.__tombstone__, settings.max_size
    if tombstone and wants_route:
        raise RouteError(f"{cls.__qualname__}.__tombstone__: a producer that implements send() gets no null payload")

    def prepare(event: EventBase, given: Mapping[str, Any] | None) -> Message:
        if fixed_destination is not None:
            destination, properties = fixed_destination, fixed_properties.copy()
        else:
            destination, properties = address.fill(event)
        key = None if fill_key is None else fill_key(event)
        if config.present:
            config.fill_properties(event, properties)
            default_key = encode_properties(properties)
            if key is None:
                key = default_key
        id_ = None
        made = constant_headers.copy()
        if identity:
            made[id_name] = id_ = event_id(event)
            made[time_name] = now_rfc3339()
        if config.fill_headers is not None:
            headers.add(made, config.fill_headers(event))
        if given:
            headers.add(made, given)
        if tombstone and not key:
            raise RouteError(
                f"{cls.__qualname__}.__tombstone__ deletes a key, and this event has none: its value is "
                f"{'None' if key is None else 'empty'}"
            )
        message = Message(id_, type_, alias, destination, key, made, properties, None, content_type, event)
        if wants_route:
            message.route = fixed_route or address.filled_route(event)
            if config.present or made or key is not None:
                message.config = config.handed_over(event, made, key)
        message.payload = payload = serialize(event, message)
        if max_size is not None and payload is not None and len(payload) > max_size:
            raise MessageTooLargeError(
                f"{message!r} is larger than the {max_size} bytes that broker {alias!r} takes (max_size; of Kafka "
                f"max_request_size): send less, or where it is stored; or raise the limit, here and at the broker"
            )
        if before_send:
            before = made.copy() if foreign_hooks else None
            for hook in before_send:
                hook(message)
            if before is not None and before != message.headers:
                headers.check_hooked(message, before)
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
        if route.kind is not None:
            self._constants["kind"] = route.kind
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
        values = {field: fill(event) for field, fill in self._fillers.items()}
        if self._destination_field is not None and values.get(self._destination_field):
            values[self._destination_field] = self._prefix + values[self._destination_field]
        # Not model_copy, which costs five times as much: the values are strings in place of strings.
        return self._route.model_construct(**{**self._route.__dict__, **values})


def _compile_value(owner: str, value: Any) -> Filler | None:
    """A function that fills a configuration value, strings within dicts and lists too; None: it is constant."""
    if isinstance(value, str):
        template = Template(value, owner)
        if template.literal == value:
            return None
        return compile_text(template, owner)
    if isinstance(value, dict):
        mapping = cast("dict[object, Any]", value)
        items = [(key, item, _compile_value(f"{owner}: {key}", item)) for key, item in mapping.items()]
        if all(fill is None for _, _, fill in items):
            return None
        return lambda event: {key: item if fill is None else fill(event) for key, item, fill in items}
    if isinstance(value, (list, tuple)):
        elements = [(item, _compile_value(owner, item)) for item in cast("list[Any]", value)]
        if all(fill is None for _, fill in elements):
            return None
        return lambda event: [item if fill is None else fill(event) for item, fill in elements]
    return None


class _Config:
    """An event class's backend configuration, ready to be filled."""

    def __init__(self, cls: type[EventBase], route: EventRoute) -> None:
        self._config = cls.__backend_config__
        self.present = self._config is not None
        self._type: type[BackendConfig] = route.config_type if self._config is None else type(self._config)
        self._owner = cls.__qualname__
        self.fill_headers: Filler | None = None
        self._constants: dict[str, Any] = {}
        self._fillers: dict[str, Filler] = {}
        owner = f"{cls.__qualname__}.__backend_config__"
        for field, value in self._config.__dict__.items() if self._config is not None else ():
            if value is None:
                continue
            fill = _compile_value(f"{owner}: {field}", value)
            if field == "headers" and route.supports_headers:
                self.fill_headers = fill or _constant(value)
            elif fill is None:
                self._constants[field] = value
            else:
                self._fillers[field] = fill

    def fill_properties(self, event: EventBase, properties: dict[str, Any]) -> None:
        """Add what is configured to a message's properties; a value that is None is not there."""
        properties.update(self._constants)
        for field, fill in self._fillers.items():
            value = fill(event)
            if value is not None:
                properties[field] = value

    def handed_over(self, event: EventBase, headers: dict[str, Any], key: str | None) -> BackendConfig | None:
        """The configuration as a user's producer gets it, with what else there is only room for there.

        Raises HeaderError for headers that the configuration has no field for.
        """
        update = {field: fill(event) for field, fill in self._fillers.items()}
        known = self._type.model_fields
        if headers:
            if "headers" not in known:
                raise HeaderError(
                    f"{self._owner}: headers cannot be handed over, since {self._type.__name__} has no field for them; "
                    f"let the producer implement deliver(), or give its route a config_type with `headers`"
                )
            update["headers"] = headers
        if key is not None and "partition_key" in known and getattr(self._config, "partition_key", None) is None:
            update["partition_key"] = key
        if self._config is None:
            return self._type.model_construct(**update) if update else None
        return self._config.model_copy(update=update) if update else self._config


def _constant(value: Any) -> Filler:
    return lambda event: value


def _compile_ordering_key(cls: type[EventBase]) -> Filler | None:
    text = cls.__ordering_key__
    if text is None:
        return None
    owner = f"{cls.__qualname__}.__ordering_key__"
    return compile_text(Template(text, owner), owner)


_UNSAFE_IN_HEADERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


_NONE = object()


class _Headers:
    """The headers of one event class: CloudEvents attributes, the configuration's, the caller's."""

    def __init__(self, cls: type[EventBase], route: EventRoute, settings: MessageSettings) -> None:
        self._name = cls.__qualname__
        self._route = route
        self.identity = route.supports_headers and settings.cloudevents is not False
        prefix = settings.cloudevents if isinstance(settings.cloudevents, str) else route.cloudevents_prefix
        self.id_name, self.time_name = f"{prefix}id", f"{prefix}time"
        self.constants: dict[str, Any] = {}
        self._reserved: set[str] = set()
        if self.identity:
            self.constants = {
                f"{prefix}specversion": "1.0",
                f"{prefix}type": event_type(cls),
                f"{prefix}source": settings.source or f"/{cls.__module__.partition('.')[0].strip('_')}",
            }
            if route.content_type_header is not None:
                self.constants[route.content_type_header] = settings.serializer_content_type
            # Where the content type is a property of the message, a header of its name would contradict it.
            names = (*self.constants, self.id_name, self.time_name, "content-type")
            self._reserved = {name.lower() for name in names}

    def add(self, headers: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Add the user's own. Raises HeaderError for a name or value that cannot be sent."""
        if not self._route.supports_headers:
            raise HeaderError(
                f"{self._name}: a {type(self._route).__name__} carries no headers; put the values into the event"
            )
        if not isinstance(given, Mapping):
            raise HeaderError(f"{self._name}: headers are a dict of names and values, not a {type(given).__name__}")
        for name, value in given.items():
            self._check_name(name)
            if value is None:
                continue
            try:
                encoded = self._route.encode_header(value)
            except (RecursionError, TypeError, ValueError) as exc:
                raise HeaderError(f"{self._name}: the header {name!r} cannot be sent: {exc}") from exc
            if isinstance(encoded, str) and _UNSAFE_IN_HEADERS.search(encoded):
                raise HeaderError(f"{self._name}: the header {name!r} holds a control character; clean the value")
            headers[name] = encoded

    def check_hooked(self, message: Message, before: Mapping[str, Any]) -> None:
        """Make what hooks have put into the headers ready, as `add` does. Raises HeaderError."""
        changed = {name: value for name, value in message.headers.items() if before.get(name, _NONE) != value}
        for name, value in changed.items():
            if value is None:
                del message.headers[name]
        if changed:
            try:
                self.add(message.headers, changed)
            except HeaderError as exc:
                raise HeaderError(f"{exc} (a hook has set it, in before_send)") from exc.__cause__

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or _UNSAFE_IN_HEADERS.search(name):
            raise HeaderError(f"{self._name}: {name!r} is no name for a header; give a str without control characters")
        if name.lower() in self._reserved:
            raise HeaderError(
                f"{self._name}: the header {name!r} is made by the emitter (CloudEvents); "
                f"choose another name, or connect(..., cloudevents=False)"
            )
        if name in self._route.reserved_headers:
            raise HeaderError(
                f"{self._name}: the header {name!r} is needed by the {self._route.transport} transport itself; "
                f"choose another name"
            )


def _compile_payload(cls: type[EventBase], serializer: Serializer) -> Callable[[EventBase, Message], bytes | None]:
    if cls.__tombstone__:
        return lambda event, message: None
    # A serializer written for dispytch has `serialize` alone.
    serialize_event = getattr(serializer, "serialize_event", None)
    name = type(serializer).__name__
    if type(serializer) is JSONSerializer and cls.model_dump is BaseModel.model_dump:
        return _compile_json(cls)

    def serialize(event: EventBase, message: Message) -> bytes:
        try:
            if serialize_event is None:
                payload = serializer.serialize(event.model_dump(mode="json", by_alias=True))
            else:
                payload = serialize_event(event, message)
        except DispytchError:
            raise
        except Exception as exc:
            raise _unserializable(cls, name, exc) from exc
        if not isinstance(payload, bytes):
            raise SerializationError(
                f"{name} gave a {type(payload).__name__} for {cls.__qualname__}; it must give bytes"
            )
        return payload

    return serialize


def _compile_json(cls: type[EventBase]) -> Callable[[EventBase, Message], bytes]:
    """What JSONSerializer.serialize_event does, with all look-ups done beforehand."""
    to_json = cls.__pydantic_serializer__.to_json

    def serialize(event: EventBase, message: Message) -> bytes:
        try:
            return to_json(event, by_alias=True)
        except Exception as exc:
            raise _unserializable(cls, JSONSerializer.__name__, exc) from exc

    return serialize


def _unserializable(cls: type[EventBase], serializer: str, exc: Exception) -> SerializationError:
    # Without the cause's text: it may repeat the value.
    return SerializationError(
        f"{cls.__qualname__} cannot be serialized by {serializer}: {type(exc).__name__}; the cause is chained"
    )


def require_route(cls: type[Any], given: object = None) -> None:
    """Raise RouteError when `cls` is no event class, or has no route. `given`: what was emitted, if anything was."""
    if not issubclass(cls, EventBase):
        if isinstance(given, type):
            name = given.__qualname__
            raise RouteError(f"the class {name} is not an event; write emit({name}(...)), with its fields")
        if isinstance(given, (list, tuple, set, frozenset, Iterator)):
            raise RouteError(f"a {cls.__qualname__} is not an event; for several of them write emit_many([...])")
        hint = of_dispytch(cls) or (
            "derive its class from EventBase" if issubclass(cls, BaseModel) else "emit an instance of an EventBase"
        )
        raise RouteError(f"a {cls.__qualname__} is not an event; {hint}")
    if getattr(cls, "__route__", None) is None:
        raise RouteError(
            f"{cls.__qualname__} has no __route__, so there is nowhere to send it; write for example "
            f'__route__ = KafkaEventRoute(topic="orders")'
        )
