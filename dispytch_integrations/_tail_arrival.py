"""An event as it was read from a broker, for a person: who it is, what is in it, and whether it is looked for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

__all__ = ["Arrival", "Filter", "moment"]

_NAMES = ("id", "type", "source", "time")
_PREFIXES = ("ce_", "cloudEvents_", "cloudEvents:", "ce-")
"""Of the transports' bindings, for headers without the version, which says what the prefix is."""
_DEEPEST = 100
"""Levels of a body that is shown as JSON: Python's writer ends at some hundreds, and nobody reads them."""
_MSGPACK_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
"""First bytes of a map in MessagePack; none of them begins a text in UTF-8."""


@dataclass(frozen=True)
class Arrival:
    """One event, as it was read. `payload` None: a tombstone. `position`: where it stands: partition, entry..."""

    transport: str
    destination: str
    payload: bytes | None
    headers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    key: str | None = None
    position: Mapping[str, Any] = field(default_factory=dict[str, Any])
    content_type: str | None = None
    stored_at: datetime | None = None
    """When the broker, or whoever sent it, says it was; None: it does not."""
    arrived_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @cached_property
    def decoded(self) -> tuple[str | None, Any]:
        """(encoding, value) of the body: "json" and "msgpack" with the value, "text" with a str, "base64" with that
        of the bytes; None and None: a tombstone."""
        payload = self.payload
        if payload is None:
            return None, None
        if payload[:1] and (payload[0] in _MSGPACK_MAPS or "msgpack" in self.media_type):
            value = _from_msgpack(payload)
            if value is not None and (len(payload) <= _DEEPEST or _is_shallow(value)):
                return "msgpack", value
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            return "base64", base64.b64encode(payload).decode()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "text", text
        shallow = text.count("[") + text.count("{") <= _DEEPEST or _is_shallow(value)
        return ("json", value) if shallow else ("text", text)

    @property
    def media_type(self) -> str:
        """That of the body; empty: nobody says."""
        return (self.content_type or str(self.headers.get("content-type") or "")).lower()

    @cached_property
    def prefix(self) -> str | None:
        """What stands before the CloudEvents attributes' names in the headers; None: there are none."""
        for name in self.headers:
            if name.endswith("specversion"):
                return name.removesuffix("specversion")
        for prefix in _PREFIXES:
            if f"{prefix}id" in self.headers or f"{prefix}type" in self.headers:
                return prefix
        return None

    def attribute(self, name: str) -> str | None:
        """A CloudEvents attribute: from the headers, or from the body in structured mode."""
        if self.prefix is not None:
            value = self.headers.get(f"{self.prefix}{name}")
            return None if value is None else str(value)
        body = self.decoded[1]
        if isinstance(body, dict) and "specversion" in body:
            value = cast("dict[str, Any]", body).get(name)
            return None if value is None else str(value)
        return None

    @property
    def time(self) -> str:
        """When it was emitted, as RFC 3339; else when it was stored; else when it arrived."""
        return self.attribute("time") or (self.stored_at or self.arrived_at).isoformat(timespec="milliseconds")

    @property
    def own_headers(self) -> dict[str, Any]:
        """The headers without those that are told elsewhere: CloudEvents attributes and the content type."""
        prefix = self.prefix
        hidden = {"content-type"}
        if prefix is not None:
            hidden |= {f"{prefix}{name}" for name in (*_NAMES, "specversion", "datacontenttype")}
        return {name: value for name, value in self.headers.items() if name not in hidden}

    def as_json(self) -> dict[str, Any]:
        """The fields of `tail --json`."""
        encoding, body = self.decoded
        return {
            "time": self.time,
            "id": self.attribute("id"),
            "type": self.attribute("type"),
            "source": self.attribute("source"),
            "transport": self.transport,
            "destination": self.destination,
            "position": dict(self.position),
            "key": self.key,
            "headers": dict(self.headers),
            "content_type": self.content_type or self.headers.get("content-type"),
            "body": body,
            "encoding": encoding,
            "size": None if self.payload is None else len(self.payload),
        }


def moment(milliseconds: int) -> datetime | None:
    """That time; None: the calendar has none, since anybody may write any number."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, OSError, ValueError):
        return None


def _from_msgpack(payload: bytes) -> Any:
    if find_spec("msgpack") is None:
        return None
    import msgpack  # type: ignore[import-untyped]

    unpack = cast("Callable[..., Any]", msgpack.unpackb)  # pyright: ignore[reportUnknownMemberType]
    try:
        return unpack(payload, strict_map_key=False, timestamp=3)
    except Exception:  # Whatever it is, it is no MessagePack.
        return None


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += cast("Any", each).values()
            elif isinstance(each, (list, tuple)):
                inner += cast("Sequence[Any]", each)
        if not inner:
            return True
        level = inner
    return False


# -- which ones are shown ----------------------------------------------------------------------------------------------


class Filter:
    """One FIELD=VALUE; `*` in the value stands for anything.

    FIELD: `type`, `id`, `source`, `key`, `headers.NAME`, or a field of the body, nested ones with dots, `body.` in
    front where the name is one of those. In a list any element will do.
    """

    def __init__(self, name: str, value: str) -> None:
        self._name = name
        self._parts = value.split("*")

    def __call__(self, arrival: Arrival) -> bool:
        """Is it one of these?"""
        return any(self._matches(_text(value)) for value in self._values(arrival))

    def _matches(self, text: str) -> bool:
        """Part by part, each as early as it can be: a regular expression of many stars would try all ways."""
        first, *others = self._parts
        if not others:
            return text == first
        *middle, last = others
        at, end = len(first), len(text) - len(last)
        if at > end or not text.startswith(first) or not text.endswith(last):
            return False
        for part in middle:
            at = text.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True

    def _values(self, arrival: Arrival) -> list[Any]:
        name = self._name
        if name in ("type", "id", "source"):
            value = arrival.attribute(name)
            return [] if value is None else [value]
        if name == "key":
            return [] if arrival.key is None else [arrival.key]
        if name.startswith("headers."):
            header = name.removeprefix("headers.")
            return [arrival.headers[header]] if header in arrival.headers else []
        return _at(arrival.decoded[1], name.removeprefix("body.").split("."))


def _at(value: Any, path: Sequence[str]) -> list[Any]:
    if not path:
        return [value]
    if isinstance(value, list):
        return [found for element in cast("Sequence[Any]", value) for found in _at(element, path)]
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        if ".".join(path) in fields:
            return _at(fields[".".join(path)], ())
        if path[0] in fields:
            return _at(fields[path[0]], path[1:])
    return []


def _text(value: Any) -> str:
    """As it would be written on a command line: true, null, 7, 1.5, Bonn."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
