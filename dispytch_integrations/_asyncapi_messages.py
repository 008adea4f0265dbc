"""Event classes as AsyncAPI messages: headers, keys, bindings, and what else a reader wants to know."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from inspect import cleandoc
from typing import Any

from pydantic_core import to_jsonable_python

from dispytch_integrations._asyncapi_brokers import Destination
from dispytch_integrations._asyncapi_channels import AMQP, KAFKA, field_of, part_of
from dispytch_integrations._asyncapi_schemas import Schema, mapping
from dispytch_integrations._prepare import _Headers
from dispytch_integrations._templates import Template
from dispytch_integrations.events import EventBase, event_type

__all__ = ["deprecation", "documented", "message_of", "operation_bindings"]


def message_of(cls: type[EventBase], destination: Destination, payload: Schema, problem: str | None) -> dict[str, Any]:
    """The message object, but for its examples. `problem`: why there is no schema of the payload."""
    route, config = cls.__route__, cls.__backend_config__
    values: Mapping[str, Any] = {} if config is None else config.__dict__
    summary, description = documented(cls)
    made: dict[str, Any] = {"name": event_type(cls), "title": cls.__qualname__.rpartition(">.")[2]}
    if summary:
        made["summary"] = summary
    if description:
        made["description"] = description
    content_type = values.get("content_type") if route.transport == "rabbitmq" else None
    made["contentType"] = content_type or destination.settings.serializer_content_type
    headers = _headers(cls, destination)
    if headers["properties"]:
        made["headers"] = headers
    # The class's docstring is the message's, and its examples are: see `_asyncapi_examples`.
    own = {name: value for name, value in payload.items() if name not in ("description", "examples")}
    made["payload"] = {"type": "null"} if cls.__tombstone__ else own
    correlation = _correlation(cls, values.get("correlation_id"))
    if correlation:
        made["correlationId"] = correlation
    bindings = _message_bindings(cls, values)
    if bindings:
        made["bindings"] = bindings
    deprecated = deprecation(cls)
    if deprecated is not None:
        made["deprecated"] = True
        made["x-dispytch-deprecated"] = deprecated
    made["x-dispytch-class"] = f"{cls.__module__}.{cls.__qualname__}"
    made["x-dispytch-module"] = cls.__module__
    made["x-dispytch-broker"] = destination.alias
    made["x-dispytch-transport"] = route.transport
    made["x-dispytch-route"] = {
        name: _plain(value)
        for name, value in route.__dict__.items()
        if value is not None and (name, value) != ("safe", "")
    }
    properties = {name: _plain(value) for name, value in values.items() if value is not None and name != "headers"}
    if properties:
        made["x-dispytch-config"] = properties
    key = cls.__ordering_key__ if cls.__ordering_key__ is not None else _key_text(values)
    if key is not None:
        made["x-dispytch-ordering-key"] = key
    if cls.__tombstone__:
        made["x-dispytch-tombstone"] = True
    if problem is not None and not cls.__tombstone__:
        made["x-dispytch-no-schema"] = problem
    if destination.problem is not None:
        made["x-dispytch-problem"] = destination.problem
    return made


def documented(cls: type[EventBase]) -> tuple[str, str]:
    """The first paragraph of a class's docstring, in one line, and the rest; of a class without, its base's."""
    for each in cls.__mro__:
        if each is EventBase:
            break
        doc = each.__dict__.get("__doc__")
        if isinstance(doc, str) and doc.strip():
            summary, _, rest = cleandoc(doc).partition("\n\n")
            return " ".join(summary.split()), rest.strip()
    return "", ""


def deprecation(cls: type[EventBase]) -> str | bool | None:
    """What `@deprecated` says on the class; True: that it is; None: it is not."""
    said: object = cls.__dict__.get("__deprecated__")
    if isinstance(said, str):
        return said or True
    marked: object = mapping(cls.model_config.get("json_schema_extra")).get("deprecated")
    return marked if isinstance(marked, str) else True if marked else None


# -- headers -----------------------------------------------------------------------------------------------------------


def _headers(cls: type[EventBase], destination: Destination) -> Schema:
    """The schema of the headers: the CloudEvents attributes as this broker writes them, and the class's own."""
    route = cls.__route__
    properties: dict[str, Schema] = {}
    required: list[str] = []
    if route.supports_headers:
        made = _Headers(cls, route, destination.settings)
        for name, value in made.constants.items():
            properties[name] = {"type": "string", "const": value}
        if made.identity:
            properties[made.id_name] = {
                "type": "string",
                "format": "uuid",
                "description": "The event's identity: the same each time it is sent again.",
            }
            properties[made.time_name] = {
                "type": "string",
                "format": "date-time",
                "description": "When it was emitted.",
            }
        required += properties
    given = mapping(getattr(cls.__backend_config__, "headers", None)) if route.supports_headers else {}
    for name, value in given.items():
        if value is None:
            continue
        properties[name], always = _header(cls, value)
        if always:
            required.append(name)
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema


def _header(cls: type[EventBase], value: Any) -> tuple[Schema, bool]:
    """The schema of one header of the class's configuration, and: is it always there?"""
    if isinstance(value, str):
        literal = Template(value, "").literal
        if literal is not None:
            return {"type": "string", "const": literal}, True
        part = part_of(value)
        found = None if part is None else field_of(cls, part)
        schema: Schema = {"type": "string", "x-dispytch-template": value}
        if found is not None and found.info is not None and found.info.description:
            schema["description"] = found.info.description
        return schema, found is None or not found.nullable
    try:
        sent = cls.__route__.encode_header(value)
    except (RecursionError, TypeError, ValueError):
        return {}, True
    if isinstance(sent, bool):
        return {"type": "boolean", "const": sent}, True
    if isinstance(sent, (int, float)):
        return {"type": "integer" if isinstance(sent, int) else "number", "const": sent}, True
    if isinstance(sent, str):
        return {"type": "string", "const": sent}, True
    if isinstance(sent, Mapping):
        return {"type": "object"}, True
    return ({"type": "array"} if isinstance(sent, list) else {"type": "string"}), True


# -- keys and bindings -------------------------------------------------------------------------------------------------


def _key_text(values: Mapping[str, Any]) -> str | None:
    """The partition key as its template; None: there is none."""
    key = values.get("partition_key")
    if key is None:
        return None
    return key if isinstance(key, str) else str(_plain(key))


def _correlation(cls: type[EventBase], template: Any) -> dict[str, Any] | None:
    """Where the correlation id is, if it is a field of the body."""
    part = part_of(template) if isinstance(template, str) else None
    if part is None or not part.plain:
        return None
    pointer = field_of(cls, part).pointer
    return None if pointer is None else {"location": f"$message.payload#{pointer}"}


def _message_bindings(cls: type[EventBase], values: Mapping[str, Any]) -> dict[str, Any]:
    transport = cls.__route__.transport
    if transport == "kafka":
        template = _key_text(values) or cls.__ordering_key__
        if template is None:
            return {}
        return {"kafka": {"key": _key(cls, template), "bindingVersion": KAFKA}}
    if transport != "rabbitmq":
        return {}
    given = {"contentEncoding": values.get("content_encoding"), "messageType": values.get("type")}
    said = {name: value for name, value in given.items() if value is not None}
    return {"amqp": {**said, "bindingVersion": AMQP}} if said else {}


def _key(cls: type[EventBase], template: str) -> Schema:
    key: Schema = {"type": "string"}
    if "{" not in template:
        return {**key, "const": template}
    part = part_of(template)
    found = None if part is None else field_of(cls, part)
    if found is not None and found.info is not None and found.info.description:
        key["description"] = found.info.description
    return {**key, "x-dispytch-template": template}


def operation_bindings(cls: type[EventBase]) -> dict[str, Any]:
    """How an event is published, as AsyncAPI's operation binding; only AMQP has one that says something."""
    route, config = cls.__route__, cls.__backend_config__
    if route.transport != "rabbitmq":
        return {}
    values: Mapping[str, Any] = {} if config is None else config.__dict__
    made: dict[str, Any] = {
        "deliveryMode": int(values.get("delivery_mode") or 2),
        "mandatory": bool(getattr(route, "mandatory", True)),
    }
    expiration = values.get("expiration")
    if isinstance(expiration, timedelta):
        expiration = expiration.total_seconds()
    if expiration is not None and not isinstance(expiration, datetime):
        made["expiration"] = int(expiration * 1000)
    if values.get("priority") is not None:
        made["priority"] = values["priority"]
    if values.get("user_id") is not None:
        made["userId"] = values["user_id"]
    if values.get("timestamp") is not None:
        made["timestamp"] = True
    return {"amqp": {**made, "bindingVersion": AMQP}}


def _plain(value: Any) -> Any:
    return to_jsonable_python(value, fallback=lambda other: f"<{type(other).__name__}>", bytes_mode="base64")
