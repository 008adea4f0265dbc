"""The stored form of a message: plain columns, read again by this version and by later ones. No pickled code.

A record's format is a number. This version writes FORMAT and reads what is not newer; rows of a newer format wait for
a relay that knows it. A format only grows: what an old relay would misread gets a new number.
"""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol, cast

from pydantic_core import from_json

from dispytch_integrations.errors import ConfigurationError, DispytchError, HeaderError, RouteError, SerializationError
from dispytch_integrations.message import Message

__all__ = [
    "ENCODED",
    "FORMAT",
    "MAX_NAME",
    "MAX_TEXT",
    "SHARDS",
    "Codec",
    "Record",
    "message_of",
    "record_of",
    "shard_of",
]

FORMAT = 1
"""The format that this version writes; it reads this one and older ones."""
ENCODED = 2
"""The same with a payload that a codec has changed: rows that wait for a relay which has the codec."""
SHARDS = 64
"""Into how many shards ordering keys are hashed; fixed, since a key must stay in its shard."""
MAX_NAME = 255
"""Characters that a type, a broker's alias, a content type or an event id may have in the table."""
MAX_TEXT = 60_000
"""Bytes that headers, properties, a destination or a key may have in the table (MySQL's TEXT holds 65,535)."""


class Codec(Protocol):
    """Changes payloads on their way into the outbox and back: to encrypt them at rest, or to compress them.

    Called in the thread that emits, and in the relay: keep it quick, and free of side effects.
    """

    def encode(self, payload: bytes) -> bytes:
        """What is stored instead of the payload. What it raises, the emit raises."""
        ...

    def decode(self, stored: bytes) -> bytes:
        """The payload again. Raise ValueError when it cannot be read (a lost key): the message is then dead at once."""
        ...


class Record:
    """One row: a message in columns. `id`, `attempts`, `next_try_ms` are the database's; 0 in a record not yet stored.

    `lane`: messages of one lane (broker, destination, ordering key) are delivered in order; a positive 63-bit number.
    `shard`: lane modulo SHARDS. `headers`, `properties`: JSON objects as text. `payload`: None is a tombstone.
    `created_ms`, `next_try_ms`: milliseconds since 1970.
    """

    __slots__ = (
        "attempts",
        "broker",
        "content_type",
        "created_ms",
        "destination",
        "event_id",
        "format",
        "headers",
        "id",
        "lane",
        "next_try_ms",
        "ordering_key",
        "payload",
        "properties",
        "shard",
        "type",
    )

    def __init__(
        self,
        event_id: str,
        type: str,
        broker: str,
        destination: str,
        ordering_key: str | None,
        headers: str,
        properties: str,
        payload: bytes | None,
        content_type: str,
        format: int,
        lane: int,
        shard: int,
        created_ms: int,
        id: int = 0,
        attempts: int = 0,
        next_try_ms: int = 0,
    ) -> None:
        self.event_id = event_id
        self.type = type
        self.broker = broker
        self.destination = destination
        self.ordering_key = ordering_key
        self.headers = headers
        self.properties = properties
        self.payload = payload
        self.content_type = content_type
        self.format = format
        self.lane = lane
        self.shard = shard
        self.created_ms = created_ms
        self.id = id
        self.attempts = attempts
        self.next_try_ms = next_try_ms

    def __repr__(self) -> str:
        size = "tombstone" if self.payload is None else f"{len(self.payload)} bytes"
        return f"<Record {self.id} {self.type} id={self.event_id} to {self.broker}:{self.destination}, {size}>"


def record_of(message: Message, codec: Codec | None = None) -> Record:
    """A message as it is stored. Raises for what cannot be: HeaderError, RouteError, SerializationError.

    Called at the emit, inside the caller's transaction: nothing that is stored is refused later for its form.
    """
    if message.route is not None:
        raise ConfigurationError(
            f"{message.type} goes to a producer that implements send() alone, and the outbox stores messages without "
            f"their route; implement deliver() in the producer of broker {message.broker!r}"
        )
    headers = _stored(message, "header", message.headers)
    properties = _stored(message, "property", message.properties)
    format_ = FORMAT
    event_id, destination, key, payload = message.id, message.destination, message.ordering_key, message.payload
    for what, name in (("event id", event_id), ("__event_type__", message.type), ("broker's alias", message.broker)):
        if len(name) > MAX_NAME:
            raise RouteError(f"{message.type}: its {what} has {len(name)} characters; the outbox takes {MAX_NAME}")
    for what, text in (("headers", headers), ("properties", properties), ("destination", destination), ("key", key)):
        if text is not None and len(text) * 4 > MAX_TEXT and len(text.encode()) > MAX_TEXT:
            raise RouteError(f"{message.type}: its {what} take more than the {MAX_TEXT} bytes of the outbox's column")
    if "\0" in destination or (key is not None and "\0" in key):
        raise RouteError(f"{message.type}: its destination or key holds a null character, which no database stores")
    if codec is not None and payload is not None:
        payload, format_ = codec.encode(payload), ENCODED
        if not isinstance(payload, bytes):
            raise SerializationError(f"{type(codec).__name__}.encode gave a {type(payload).__name__}; it must be bytes")
    lane = _lane(message.broker, destination, key, event_id)
    return Record(
        event_id,
        message.type,
        message.broker,
        destination,
        key,
        headers,
        properties,
        payload,
        message.content_type,
        format_,
        lane,
        lane % SHARDS,
        time.time_ns() // 1_000_000,
    )


def message_of(record: Record, codec: Codec | None = None) -> Message:
    """The message of a row. Raises SerializationError for one that cannot be read, without repeating what it holds."""
    try:
        headers = _loaded(record.headers)
        properties = _loaded(record.properties)
        payload = record.payload
        if record.format == ENCODED and payload is not None:
            if codec is None:
                raise ValueError("no codec")
            payload = codec.decode(payload)
            if not isinstance(payload, bytes):  # None would be a tombstone, which deletes.
                raise TypeError("the codec gave no bytes")
    except DispytchError:
        raise
    except Exception as exc:
        # Without the cause's text: it may repeat the payload.
        raise SerializationError(
            f"row {record.id} ({record.type}, id {record.event_id}) cannot be read: {type(exc).__name__}"
        ) from exc
    return Message(
        record.event_id,
        record.type,
        record.broker,
        record.destination,
        record.ordering_key,
        headers,
        properties,
        payload,
        record.content_type,
    )


def shard_of(lane: int) -> int:
    """The shard of a lane."""
    return lane % SHARDS


def _lane(broker: str, destination: str, key: str | None, event_id: str) -> int:
    """A hash that stays the same for ever. A message without a key is a lane of its own."""
    text = f"{broker}\0{destination}\0{event_id}" if key is None else f"{broker}\0{destination}\0\0{key}"
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# -- headers and properties as JSON --------------------------------------------------------------------------------
# JSON alone where it can be; what it does not know is an object of one key that begins with "$".


def _stored(message: Message, what: str, values: Mapping[str, Any]) -> str:
    if not values:
        return "{}"
    try:
        text = _dump({name: _tagged(value) for name, value in values.items()})
        # Half a surrogate pair, deep nesting, a number of thousands of digits: not all that is written can be read.
        if "\\ud" in text or text.count("[") + text.count("{") > _NESTING or len(text) > _DIGITS:
            _loaded(text)
        return text
    except (RecursionError, TypeError, ValueError) as exc:
        raise HeaderError(f"{message.type}: a {what} cannot be stored in the outbox: {exc}") from exc


_NESTING, _DIGITS = 64, 4000
"""From here on what is stored is read once, to see that it can be."""

_dump = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def _tagged(value: Any) -> Any:
    if value.__class__ is str or value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        return {"$bytes": b64encode(value).decode()}
    if isinstance(value, datetime):
        return {"$datetime": (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()}
    if isinstance(value, Decimal):
        return {"$decimal": str(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, Any]", value)
        made = {_text(key): _tagged(item) for key, item in items.items()}
        return {"$object": made} if any(key.startswith("$") for key in made) else made
    if isinstance(value, (list, tuple)):
        return [_tagged(item) for item in cast("Sequence[Any]", value)]
    raise TypeError(f"a {type(value).__name__} has no form in JSON; give text, a number, bytes, a date or a Decimal")


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a key within it is a {type(key).__name__}, not a str")
    return key


_TAGS: Mapping[str, Callable[[Any], Any]] = {
    "$bytes": partial(b64decode, validate=True),
    "$datetime": datetime.fromisoformat,
    "$decimal": Decimal,
    "$object": lambda items: {key: _untagged(item) for key, item in items.items()},
}


def _loaded(text: str) -> dict[str, Any]:
    if text == "{}":
        return {}
    values = from_json(text)
    if "[" in text or text.find("{", 1) > 0:
        return {name: _untagged(value) for name, value in values.items()}
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return cast("dict[str, Any]", values)


def _untagged(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        if len(items) == 1:
            [(tag, inner)] = items.items()
            if tag in _TAGS:
                return _TAGS[tag](inner)
            if tag.startswith("$"):
                raise ValueError(f"unknown tag {tag}")
        return {key: _untagged(item) for key, item in items.items()}
    if isinstance(value, list):
        return [_untagged(item) for item in cast("Sequence[Any]", value)]
    return value
