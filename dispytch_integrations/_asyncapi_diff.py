"""What has changed between two AsyncAPI documents: events, where they go, headers, keys; `_asyncapi_diff_schemas` has
the bodies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dispytch_integrations._asyncapi_diff_schemas import Difference, compare_schemas, shown
from dispytch_integrations._asyncapi_schemas import mapping, sequence
from dispytch_integrations.errors import ConfigurationError

__all__ = ["Change", "diff"]


class Change(NamedTuple):
    """One difference between two documents; `str()` is a line for people.

    `breaking`: may it break who consumes the event? `event`: its type, of a changed one the old; "" for what belongs to
    no event. `where`: "payload.lines[].price", "channel", "headers.tenant"... `what`: what has changed, and why that
    breaks.
    """

    breaking: bool
    event: str
    where: str
    what: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.event, self.where, self.what) if part)
        return f"{'BREAKING' if self.breaking else 'compatible'}  {place}"


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What has changed from `old` to `new`, breaking changes first.

    Both are AsyncAPI 3 documents: of `describe`, or read from JSON or YAML. What counts is whether an event's consumers
    can go on as they are. Two of them are thought of:

    - one that was written for the old document and reads new messages: it breaks when an event or a field goes away,
      when a field may be absent or null that never was, when a type, an enum or a limit is widened, and when the event
      takes another way (type, broker, address, exchange, ordering key, content type, headers).
    - one that is written for the new document and reads old messages: those that still are in the topic, the stream or
      the outbox, or are sent by instances that are not replaced yet. It breaks when a type, an enum or a limit is
      narrowed, and when a field is required that could be absent or null.

    So all of these are breaking. Compatible are a new event, a new field (who reads must ignore what it does not know,
    and do without it in old messages), a new header, descriptions, defaults, examples and deprecations, and where the
    servers are.

    An event is found again by its type, or, if that has changed, by its class (`x-dispytch-class`).

    Raises ConfigurationError for what is no AsyncAPI 3 document.
    """
    before, after = _Document(old, "old"), _Document(new, "new")
    changes = _server_changes(before, after)
    for one, other in _pairs(before.events, after.events):
        if one is None and other is not None:
            changes.append(Change(False, other.name, "event", "new"))
        elif one is not None and other is None:
            changes.append(Change(True, one.name, "event", "removed: its consumers get nothing any more"))
        elif one is not None and other is not None:
            found = [*_event_changes(one, other), *_body_changes(one, other, before, after)]
            changes += [Change(each.breaking, one.name, each.where, each.what) for each in found]
    # Sorted by event within the two halves; within an event they stay as they were found.
    return sorted(changes, key=lambda change: (not change.breaking, change.event))


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Event:
    """A message with the channel it is sent to, and how."""

    name: str
    message: dict[str, Any]
    channel: dict[str, Any]
    operation: dict[str, Any]

    @property
    def cls(self) -> str | None:
        """The class that it was made from."""
        found = self.message.get("x-dispytch-class")
        return found if isinstance(found, str) else None


class _Document:
    """A document that can follow its references."""

    def __init__(self, document: object, which: str) -> None:
        self._root = mapping(document)
        self._which = which
        version = self._root.get("asyncapi")
        if not isinstance(version, str) or not version.startswith("3."):
            said = "has no `asyncapi: 3.0.0`" if version is None else f"says asyncapi: {version!r:.40}"
            raise ConfigurationError(
                f"the {which} document is no AsyncAPI 3 document: it {said}; give one that `describe` or "
                f"`dispytch-integrations catalog` has made"
            )
        for part in ("channels", "operations", "components"):
            if not isinstance(self._root.get(part, {}), Mapping):
                raise ConfigurationError(
                    f"the {which} document is no AsyncAPI 3 document: its {part!r} is no mapping; was the file damaged?"
                )
        self.events = self._events()
        self.servers = {name: self.resolve(each) for name, each in mapping(self._root.get("servers")).items()}

    def resolve(self, value: object) -> dict[str, Any]:
        """An object, its references followed; what cannot be found is empty."""
        found = mapping(value)
        for _ in range(20):
            reference = found.get("$ref")
            if not isinstance(reference, str):
                return found
            if not reference.startswith("#"):
                raise ConfigurationError(
                    f"the {self._which} document refers to {reference!r:.80}, which it does not hold; bundle both into "
                    f"one file before they are compared"
                )
            rest = {name: each for name, each in found.items() if name != "$ref"}
            found = {**mapping(self._at(reference)), **rest}
        return {}

    def _at(self, reference: str) -> object:
        value: object = self._root
        for step in reference.removeprefix("#/").split("/"):
            value = mapping(value).get(step.replace("~1", "/").replace("~0", "~"))
        return value

    def _events(self) -> list[_Event]:
        operations: dict[str, dict[str, Any]] = {}
        for value in mapping(self._root.get("operations")).values():
            operation = self.resolve(value)
            for each in sequence(operation.get("messages")):
                operations[str(mapping(each).get("$ref"))] = operation
        events: list[_Event] = []
        for channel_name, value in mapping(self._root.get("channels")).items():
            channel = self.resolve(value)
            for key, each in mapping(channel.get("messages")).items():
                message = self.resolve(each)
                operation = operations.get(f"#/channels/{channel_name}/messages/{key}", {})
                events.append(_Event(str(message.get("name") or key), message, channel, operation))
        return sorted(events, key=lambda event: (event.name, event.cls or ""))


def _pairs(old: list[_Event], new: list[_Event]) -> list[tuple[_Event | None, _Event | None]]:
    """The same events of both documents; None: it is in the other one alone."""
    left, alone = list(new), list[_Event](old)
    pairs: list[tuple[_Event | None, _Event | None]] = []
    for same in _SAME:
        events, alone = alone, list[_Event]()
        for event in events:
            found = next((other for other in left if same(event, other)), None)
            if found is None:
                alone.append(event)
            else:
                left.remove(found)
                pairs.append((event, found))
    return [*pairs, *((event, None) for event in alone), *((None, event) for event in left)]


_SAME: tuple[Callable[[_Event, _Event], bool], ...] = (
    lambda one, other: one.name == other.name and one.cls == other.cls,
    lambda one, other: one.name == other.name,
    lambda one, other: one.cls is not None and one.cls == other.cls,
)
"""Are they the same event? The surest way first."""


# -- comparing ---------------------------------------------------------------------------------------------------------


def _server_changes(old: _Document, new: _Document) -> list[Change]:
    changes: list[Change] = []
    for name, server in old.servers.items():
        other = new.servers.get(name)
        if other is None:
            changes.append(Change(False, "", f"servers.{name}", "no longer described"))
            continue
        if server.get("protocol") != other.get("protocol"):
            told = f"protocol was {shown(server.get('protocol'))}, is {shown(other.get('protocol'))}"
            changes.append(Change(True, "", f"servers.{name}", f"{told}: clients of the old one cannot connect"))
        if _hosts(server) != _hosts(other):
            changes.append(Change(False, "", f"servers.{name}", f"is at {_hosts(other)}, was at {_hosts(server)}"))
    changes += [Change(False, "", f"servers.{name}", "new") for name in new.servers if name not in old.servers]
    return changes


def _hosts(server: dict[str, Any]) -> str:
    return ", ".join(map(str, sequence(server.get("x-hosts")) or [server.get("host")])) + str(
        server.get("pathname") or ""
    )


def _event_changes(old: _Event, new: _Event) -> list[Difference]:
    """All but headers and body."""
    found: list[Difference] = []

    def changed(where: str, before: object, after: object, why: str, *, breaking: bool = True) -> None:
        if before != after:
            told = f"was {shown(before)}, is {shown(after)}"
            found.append(Difference(breaking, where, f"{told}: {why}" if why else told))

    changed("type", old.name, new.name, "consumers that look for the old type do not find it")
    changed(
        "broker",
        *_both(old.message, new.message, "x-dispytch-broker"),
        "consumers are connected to the old one",
    )
    moved = "consumers still listen at the old place"
    changed("transport", *_both(old.channel, new.channel, "x-dispytch-transport"), moved)
    changed("kind", *_both(old.channel, new.channel, "x-dispytch-kind"), moved)
    changed("channel", _address(old.channel), _address(new.channel), moved)
    exchanges = [mapping(_binding(event.channel, "amqp").get("exchange")) for event in (old, new)]
    changed("exchange", exchanges[0].get("name"), exchanges[1].get("name"), moved)
    if exchanges[0].get("name") == exchanges[1].get("name"):
        for name in ("type", "x-type", "durable", "autoDelete", "vhost"):
            why = "an exchange cannot be declared twice in different ways, and queues are bound by its type"
            if name in exchanges[0] and name in exchanges[1]:
                changed(f"exchange.{name}", exchanges[0][name], exchanges[1][name], why)
    why = "what arrived in order may arrive in another, or in another partition"
    changed("ordering key", *_both(old.message, new.message, "x-dispytch-ordering-key"), why)
    keys = [_key(event.message) for event in (old, new)]
    if keys[0] != keys[1] and old.message.get("x-dispytch-ordering-key") == new.message.get("x-dispytch-ordering-key"):
        changed("key", keys[0], keys[1], why)
    changed("contentType", *_both(old.message, new.message, "contentType"), "consumers cannot decode it")
    encodings = [_binding(event.message, "amqp").get("contentEncoding") for event in (old, new)]
    changed("contentEncoding", encodings[0], encodings[1], "consumers cannot decode it")
    published = [
        {name: value for name, value in _binding(event.operation, "amqp").items() if name != "bindingVersion"}
        for event in (old, new)
    ]
    for name in sorted({*published[0], *published[1]}, key=str) if published[0] and published[1] else ():
        changed(f"publishing.{name}", published[0].get(name), published[1].get(name), "", breaking=False)
    before, after = (bool(event.message.get("deprecated")) for event in (old, new))
    if before != after:
        found.append(Difference(False, "event", "is deprecated now" if after else "is no longer deprecated"))
    said = [name for name in ("summary", "description", "examples") if old.message.get(name) != new.message.get(name)]
    return [*found, *(Difference(False, name, "changed") for name in said)]


def _both(old: dict[str, Any], new: dict[str, Any], name: str) -> tuple[object, object]:
    """A value of both documents; what one of them does not say is no difference."""
    if name.startswith("x-dispytch-") and name != "x-dispytch-ordering-key" and (name not in old or name not in new):
        return None, None
    return old.get(name), new.get(name)


def _binding(holder: dict[str, Any], protocol: str) -> dict[str, Any]:
    return mapping(mapping(holder.get("bindings")).get(protocol))


def _address(channel: dict[str, Any]) -> str:
    """The address as the route has it: the fields that fill it, and how."""
    parameters = mapping(channel.get("parameters"))

    def part(match: re.Match[str]) -> str:
        said = mapping(parameters.get(match[1])).get("x-dispytch-part")
        return said if isinstance(said, str) else match[0]

    return re.sub(r"\{([^{}]*)\}", part, str(channel.get("address")))


def _key(message: dict[str, Any]) -> object:
    key = mapping(_binding(message, "kafka").get("key"))
    return key.get("x-dispytch-template", key.get("const"))


def _body_changes(old: _Event, new: _Event, before: _Document, after: _Document) -> list[Difference]:
    """Headers and body."""
    headers: list[dict[str, Any]] = [
        {"type": "object", **before.resolve(old.message.get("headers"))},
        {"type": "object", **after.resolve(new.message.get("headers"))},
    ]
    # These follow from what was told already.
    follows = [
        name
        for name, schema in mapping(headers[0].get("properties")).items()
        if str(name).endswith("type") and mapping(schema).get("const") in (old.name, old.message.get("contentType"))
    ]
    for each in headers:
        properties = {
            name: {"type": "string"} if name in follows else schema
            for name, schema in mapping(each.get("properties")).items()
        }
        each["properties"] = properties
    found = compare_schemas(headers[0], headers[1], "headers", before.resolve, after.resolve)
    payloads = [_without_format(event.message.get("payload", {})) for event in (old, new)]
    return [*found, *compare_schemas(payloads[0], payloads[1], "payload", before.resolve, after.resolve)]


def _without_format(payload: object) -> object:
    """The schema itself, of one that says which language it is written in (AsyncAPI's multi format schema)."""
    found = mapping(payload)
    return found["schema"] if "schemaFormat" in found and "schema" in found else payload
