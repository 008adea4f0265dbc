"""The events of an app as an AsyncAPI 3.0 document, and what has changed between two of them.

    document = describe("shop.events", brokers="kafka://localhost:9092")
    Path("events.yaml").write_text(to_yaml(document), encoding="utf-8")

It needs no framework, client or connection, and nothing but pydantic.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from dispytch_integrations._asyncapi_brokers import Catalogued, places
from dispytch_integrations._asyncapi_classes import Events, event_classes
from dispytch_integrations._asyncapi_diff import Change, diff
from dispytch_integrations._asyncapi_document import document_of
from dispytch_integrations._asyncapi_yaml import yaml_of

__all__ = ["Change", "describe", "diff", "event_classes", "to_json", "to_yaml"]


def describe(
    events: Events = None,
    *,
    brokers: Catalogued = None,
    title: str | None = None,
    version: str | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """The AsyncAPI 3.0.0 document of event classes, as dicts and lists that JSON and YAML know.

    `events`: classes; a module, or its dotted name, which is imported: the classes in it and below it, and those that
    it has imported; None: every imported class with a route. See `event_classes`.
    `brokers`: what `connect` has returned, started or not, or what it takes: they become the servers, without users,
    passwords and options, and their prefix, serializer and CloudEvents settings count. None: no servers; events are
    told apart by their alias, and shown as `connect` sends them unless told otherwise.
    `title`: None: the name of the classes' top-level package, or "Events". `version`: None: that of the package, or
    "0.0.0". `description`: for `info`, as Markdown; None: none.

    Each event is a message with the schema of what is on the wire, its headers, and an example that was made with the
    class; the reason, where there is none (`x-dispytch-no-example`, `x-dispytch-no-schema`, `x-dispytch-problem`). Two
    runs of the same code give the same document.

    Raises ConfigurationError for a module without events and for brokers that are written wrong, RouteError for a class
    that is no event or has no route.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecated classes and fields are described, not used.
        return document_of(
            event_classes(events), places(brokers), title=title, version=version, description=description
        )


def to_json(document: Mapping[str, Any]) -> str:
    """The document as JSON, indented by two, keys in their order, with a newline at the end."""
    return _encodable(json.dumps(document, indent=2, ensure_ascii=False), document) + "\n"


def _encodable(text: str, document: Mapping[str, Any]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # Half a surrogate pair, in a docstring or an example.
        return json.dumps(document, indent=2)
    return text


def to_yaml(document: Mapping[str, Any]) -> str:
    """The document as YAML in block style, keys in their order, for people and `git diff`. It needs no PyYAML."""
    return yaml_of(dict(document))
