"""The event catalogue over HTTP, for any framework: is it on, and what is answered. Knows no framework.

What makes the document and the page is imported at the first request: most processes never show it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from typing import Any
from weakref import ref

from dispytch_integrations._asyncapi_classes import Events
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import ConfigurationError

__all__ = ["PARTS", "Answer", "Catalog"]

PARTS = ("", "asyncapi.json", "asyncapi.yaml")
"""What there is below the catalogue's path; the page is at the path itself."""

_TYPES = {"": "text/html; charset=utf-8", "asyncapi.json": "application/json", "asyncapi.yaml": "application/yaml"}

_HEADERS = {
    # A browser may keep it, and asks each time whether it may still be seen, and is the same.
    "Cache-Control": "private, no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer to a GET. `headers`: with the content type."""

    status: int
    body: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class _Made:
    """What was made for some brokers: the document, and its forms once they were asked for."""

    brokers: ref[Brokers] | None
    document: Mapping[str, Any]
    bodies: dict[str, tuple[bytes, str]] = field(default_factory=dict[str, tuple[bytes, str]])


class Catalog:
    """The catalogue of one declaration in an app: made at the first request that may see it, and kept.

    `how`: what its user has written, for messages: "catalog_router". `logger`: of the framework's public module. The
    others: see `dispytch_integrations.starlette.catalog_routes`. May be used by many threads.

    Raises ConfigurationError for a module that does not exist, and for an `enabled` that is neither yes nor no.
    """

    def __init__(
        self,
        how: str,
        logger: logging.Logger,
        *,
        events: Events = None,
        title: str | None = None,
        version: str | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> None:
        given: Any = enabled
        if given not in (None, True, False):
            raise ConfigurationError(f"{how}(enabled={given!r}): write True, False, or None for debug mode alone")
        if isinstance(events, str):
            _require_module(how, events)
        self._how = how
        self._logger = logger
        self._events = events
        self._info = {"title": title, "version": version, "description": description}
        self._enabled = enabled
        self._told = False
        self._lock = threading.Lock()
        self._made: _Made | None = None

    def is_on(self, *, debug: bool) -> bool:
        """May it be seen? `debug`: is the app in its debug mode? The first no is logged, with what to write."""
        given = os.environ.get("DISPYTCH_CATALOG", "").strip().lower()
        on = self._enabled if self._enabled is not None else (debug if not given else given in _YES)
        if not on and not self._told:
            self._told = True
            why = "it was switched off" if self._enabled is False or given else "the app is not in debug mode"
            self._logger.warning(
                "the event catalogue was asked for and answers 404, since %s: write %s(..., enabled=True), or set "
                "DISPYTCH_CATALOG=1 in the environment, and say who may see it",
                why,
                self._how,
            )
        return on

    def answer(self, part: str, brokers: Brokers | None, if_none_match: str | None = None) -> Answer:
        """The page, or the document as JSON or YAML. `brokers`: the app's, which are described, not connected to.

        Takes up to a second the first time: not for an event loop. Raises what `describe` raises.
        """
        with self._lock:
            body, tag = self._body(part, brokers)
        headers = {**_HEADERS, "ETag": tag}
        if part == "":
            from dispytch_integrations._catalog_page import policy

            headers["Content-Security-Policy"] = f"{policy()}; frame-ancestors 'self'"
        if _knows(tag, if_none_match):
            return Answer(304, b"", headers)
        return Answer(200, body, {**headers, "Content-Type": _TYPES[part]})

    def _body(self, part: str, brokers: Brokers | None) -> tuple[bytes, str]:
        from dispytch_integrations.asyncapi import describe

        made = self._made
        known = None if made is None or made.brokers is None else made.brokers()
        if made is None or known is not brokers or (made.brokers is not None and known is None):
            document = describe(self._events, brokers=brokers, **self._info)
            made = self._made = _Made(None if brokers is None else ref(brokers), document)
        if part not in made.bodies:
            body = self._rendered(part, made.document).encode("utf-8", "replace")
            made.bodies[part] = body, f'"{sha256(body).hexdigest()[:32]}"'
        return made.bodies[part]

    @staticmethod
    def _rendered(part: str, document: Mapping[str, Any]) -> str:
        if part == "":
            from dispytch_integrations._catalog_page import render

            return render(document, served=True)
        from dispytch_integrations.asyncapi import to_json, to_yaml

        return to_json(document) if part == "asyncapi.json" else to_yaml(document)


_YES = ("1", "true", "yes", "on")


def _knows(tag: str, if_none_match: str | None) -> bool:
    """Does the client have this version?"""
    given = [each.strip().removeprefix("W/") for each in (if_none_match or "").split(",")]
    return tag in given or given == ["*"]


def _require_module(how: str, name: str) -> None:
    """Raise ConfigurationError where there is no such module; it is imported at the first request alone."""
    try:
        found = find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    except (ImportError, ValueError):
        return  # It is there, or will say itself what is wrong.
    if not found:
        raise ConfigurationError(
            f"{how}(events={name!r}): there is no such module; write its dotted name, as in events='shop.events'"
        )
