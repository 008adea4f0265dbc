"""The catalogue's document, put together."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, cast

from dispytch_integrations._asyncapi_brokers import Destination, Places
from dispytch_integrations._asyncapi_channels import Channel, channel_of, identifier, unlike
from dispytch_integrations._asyncapi_examples import Examples
from dispytch_integrations._asyncapi_messages import documented, message_of, operation_bindings
from dispytch_integrations._asyncapi_schemas import Schemas
from dispytch_integrations.events import EventBase, event_type

__all__ = ["document_of"]

_VERSION = "3.0.0"
"""Of AsyncAPI."""


def document_of(
    classes: Sequence[type[EventBase]],
    places: Places,
    *,
    title: str | None,
    version: str | None,
    description: str | None,
) -> dict[str, Any]:
    """The document of these classes. Same classes, same text: no time and nothing random is in it."""
    package = _package(classes)
    info: dict[str, Any] = {"title": title or package or "Events", "version": version or _version(package)}
    if description:
        info["description"] = description
    parts = _Parts()
    schemas = Schemas(classes, "serialization")
    schemas.inline()
    examples = Examples(classes, schemas)
    names = _names(classes)
    for cls in classes:
        destination = places.destination(cls)
        message = message_of(cls, destination, schemas.of.get(cls, {}), schemas.problems.get(cls))
        examples.add(message, cls, destination)
        parts.add(cls, names[cls], destination, message)
    made: dict[str, Any] = {"asyncapi": _VERSION, "info": info, "defaultContentType": "application/json"}
    if places.servers:
        made["servers"] = places.servers
    made["channels"] = dict(sorted(parts.channels.items()))
    made["operations"] = dict(sorted(parts.operations.items()))
    made["components"] = {
        "messages": dict(sorted(parts.messages.items())),
        "schemas": dict(sorted(schemas.components.items())),
    }
    plain: dict[str, Any] = _plain(made)
    return plain


class _Parts:
    """Channels, operations and messages by the names they have got."""

    def __init__(self) -> None:
        self.channels: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, dict[str, Any]] = {}
        self.messages: dict[str, dict[str, Any]] = {}
        self._channel_names: dict[tuple[str, ...], str] = {}

    def add(self, cls: type[EventBase], name: str, destination: Destination, message: dict[str, Any]) -> None:
        """Add an event."""
        channel = self._channel(channel_of(cls, destination))
        self.messages[name] = message
        self.channels[channel]["messages"][name] = {"$ref": f"#/components/messages/{name}"}
        operation: dict[str, Any] = {"action": "send", "channel": {"$ref": f"#/channels/{channel}"}}
        summary, _ = documented(cls)
        if summary:
            operation["summary"] = summary
        bindings = operation_bindings(cls)
        if bindings:
            operation["bindings"] = bindings
        operation["messages"] = [{"$ref": f"#/channels/{channel}/messages/{name}"}]
        self.operations[f"send-{name}"] = operation

    def _channel(self, channel: Channel) -> str:
        name = self._channel_names.get(channel.key)
        if name is None:
            name = channel.name if channel.name not in self.channels else unlike(channel.name, channel.key)
            self._channel_names[channel.key] = name
            self.channels[name] = channel.body
        elif "parameters" in channel.body:
            self.channels[name]["parameters"] = {**channel.body["parameters"], **self.channels[name]["parameters"]}
        return name


def _names(classes: Sequence[type[EventBase]]) -> dict[type[EventBase], str]:
    """A key for each class: its type; of classes that have one type in common, their module and name."""
    types = Counter(identifier(event_type(cls)) for cls in classes)
    names: dict[type[EventBase], str] = {}
    taken: set[str] = set()
    for cls in classes:
        name = identifier(event_type(cls))
        if types[name] > 1:
            name = identifier(f"{cls.__module__}.{cls.__qualname__}")
        free, count = name, 1
        while free in taken:
            count += 1
            free = f"{name}-{count}"
        taken.add(free)
        names[cls] = free
    return names


def _package(classes: Sequence[type[EventBase]]) -> str | None:
    """The top-level package that all classes have in common."""
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    name = packages.pop() if len(packages) == 1 else "__main__"
    return None if name == "__main__" else name


def _version(package: str | None) -> str:
    if package is None:
        return "0.0.0"
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        said = getattr(sys.modules.get(package), "__version__", None)
        return said if isinstance(said, str) else "0.0.0"


def _plain(value: object) -> Any:
    """`value` as JSON has it, in objects of its own: tuples as lists, no infinite numbers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in cast("Sequence[object]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
