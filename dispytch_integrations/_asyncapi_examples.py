"""Examples of events: made with the class itself, and written as the emitter would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import to_json, to_jsonable_python

from dispytch_integrations._asyncapi_brokers import Destination
from dispytch_integrations._asyncapi_sampling import NoSampleError, Sampler
from dispytch_integrations._asyncapi_schemas import Schema, Schemas, mapping, name_in, sequence, told
from dispytch_integrations._prepare import Prepare, _Headers, compile_prepare
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.events import EventBase
from dispytch_integrations.message import Message
from dispytch_integrations.serialization import JSONSerializer

__all__ = ["Examples"]

_ID = "019c1402-5e00-7a1b-8c2d-3e4f5a6b7c8d"
_TIME = "2026-01-31T12:00:00.000000Z"
_ROUNDS = 24
"""How often the class may refuse what was made."""
_MOST = 10
"""Examples of an app's own."""
_ADVICE = "give Field(examples=[...]), or json_schema_extra={'examples': [...]} in the class's model_config"


class _Made(NamedTuple):
    event: EventBase
    body: Any


class Examples:
    """Examples of some classes.

    `wire`: the schemas of their bodies. What a class is made from is mostly the same, and costs as much again to find
    out: it is asked for where it is not.
    """

    def __init__(self, classes: Sequence[type[EventBase]], wire: Schemas) -> None:
        self._made: dict[type[EventBase], _Made] = {}
        self._reasons: dict[type[EventBase], str] = {}
        others: list[type[EventBase]] = []
        for cls in classes:
            hidden = any(info.exclude for info in cls.__pydantic_fields__.values())
            if hidden or cls not in wire.of or not self._sample(cls, wire):
                others.append(cls)
        given = Schemas(others, "validation")
        for cls in others:
            if cls not in given.of:
                self._reasons[cls] = given.problems.get(cls, "it has no schema")
            else:
                self._sample(cls, given)

    def _sample(self, cls: type[EventBase], schemas: Schemas) -> bool:
        try:
            self._made[cls] = _sampled(cls, schemas)
        except Exception as exc:  # Validators of an app raise what they like.
            self._reasons[cls] = _reason(exc)
            return False
        return True

    def add(self, message: dict[str, Any], cls: type[EventBase], destination: Destination) -> None:
        """Put examples into the message object; or, as `x-dispytch-no-example`, why there is none."""
        made: list[_Made] = []
        problems: list[str] = []
        for number, given in enumerate(_own(cls)):
            try:
                made.append(_checked(cls, to_json(given, fallback=str)))
            except Exception as exc:
                problems.append(f"example {number + 1} of the class: {_reason(exc)}")
        if not made and cls in self._made:
            made = [self._made[cls]]
        if problems:
            message["x-dispytch-wrong-examples"] = problems
        if made:
            _write(message, cls, destination, made)
        else:
            message["x-dispytch-no-example"] = f"{self._reasons[cls]}; {_ADVICE}"


def _own(cls: type[EventBase]) -> list[Any]:
    """Examples that the class gives itself."""
    extra: Any = cls.model_config.get("json_schema_extra")
    if callable(extra):
        schema: dict[str, Any] = {}
        try:
            extra(schema) if len(signature(extra).parameters) == 1 else extra(schema, cls)
        except Exception:  # It expects the schema of the class, and has said there what it says.
            return []
        extra = schema
    return sequence(mapping(extra).get("examples"))[:_MOST]


def _sampled(cls: type[EventBase], schemas: Schemas) -> _Made:
    """Make an event; where the class refuses a value it gets another. Raises what the class says at the end."""
    sampler = Sampler(_without_examples(schemas.of[cls], schemas.components), schemas.components)
    for _ in range(_ROUNDS):
        sample = to_json(sampler.sample())
        try:
            return _checked(cls, sample)
        except ValidationError as exc:
            places = [
                error["loc"] for error in exc.errors(include_url=False, include_context=False, include_input=False)
            ]
            others = [sampler.refuse(place) for place in places]  # All of them, and not the first alone.
            if not any(others):
                raise
    return _checked(cls, to_json(sampler.sample()))


def _without_examples(schema: Schema, components: Mapping[str, Schema]) -> Schema:
    """The schema of a class; its own examples have been tried."""
    name = name_in(schema)
    found = schema if name is None else {**components.get(name, {}), **schema}
    return {key: value for key, value in found.items() if key not in ("$ref", "examples")}


def _checked(cls: type[EventBase], given: bytes) -> _Made:
    """An event of these values, and its body. Raises what the class raises, and NoSampleError."""
    made = [_body(cls.model_validate_json(given)) for _ in range(2)]
    if made[0].body != made[1].body:
        raise NoSampleError("it is another one each time: a default or a computed field is random, or the time of now")
    return made[0]


def _body(event: EventBase) -> _Made:
    return _Made(event, json.loads(JSONSerializer().serialize_event(event, _NO_MESSAGE)))


_NO_MESSAGE = Message(_ID, "", "default", "", None, {}, {}, None)


def _reason(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, error["loc"]))
        return f"{place}: {error['msg']}" if place else error["msg"]
    return told(exc)


# -- as it would be sent -----------------------------------------------------------------------------------------------


def _write(message: dict[str, Any], cls: type[EventBase], destination: Destination, made: list[_Made]) -> None:
    settings = replace(
        destination.settings, serializer=JSONSerializer(), before_send=(), wants_route=False, max_size=None
    )
    prepare: Prepare | None
    try:
        prepare = compile_prepare(cls, settings)
    except DispytchError:
        prepare = None
    time_name = _Headers(cls, cls.__route__, settings).time_name
    content_type = cls.__route__.content_type_header
    examples: list[dict[str, Any]] = []
    for each in made:
        example: dict[str, Any] = {}
        prepared: Message | None = None
        object.__setattr__(each.event, "_dispytch_event_id", _ID)
        try:
            prepared = None if prepare is None else prepare(each.event, None)
        except DispytchError as exc:  # A value must not stand in the route: such an event is refused.
            message.setdefault("x-dispytch-example-problem", told(exc))
        if prepared is not None and prepared.headers:
            headers = {name: _plain(value) for name, value in prepared.headers.items()}
            if time_name in headers:
                headers[time_name] = _TIME
            if content_type in headers:
                headers[str(content_type)] = message["contentType"]
            example["headers"] = headers
        example["payload"] = None if cls.__tombstone__ else each.body
        examples.append(example)
        if prepared is not None and "x-dispytch-example" not in message:
            message["x-dispytch-example"] = _told_of(prepared)
    message["examples"] = examples


def _told_of(message: Message) -> dict[str, Any]:
    """Where the first example goes."""
    where: dict[str, Any] = {"destination": message.destination}
    if message.properties.get("routing_key"):
        where["routing_key"] = message.properties["routing_key"]
    key = message.properties.get("key", message.ordering_key)
    if key is not None:
        where["key"] = key.decode(errors="replace") if isinstance(key, bytes) else key
    return where


def _plain(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str, bytes_mode="base64")
