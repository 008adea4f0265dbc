"""check, emit, tail and catalog of `dispytch-integrations`, for brokers that are named by their URLs."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dispytch_integrations._cli_emit import FAILED, NotDeliveredError, emit
from dispytch_integrations._cli_import import config_of, imported, imported_module, urls_of
from dispytch_integrations._cli_screen import TerminalScreen
from dispytch_integrations._cli_tail import AWAY, quiet_clients, tail
from dispytch_integrations._templates import nearest
from dispytch_integrations.blocking import BlockingBrokers
from dispytch_integrations.brokers import Brokers, connect
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, StartupError
from dispytch_integrations.events import EventBase
from dispytch_integrations.message import Message
from dispytch_integrations.settings import load_brokers

__all__ = ["run_catalog", "run_check", "run_diff", "run_emit", "run_tail"]

_CHECK_SECONDS = 5.0


def run_check(given: Mapping[str, Any]) -> int:
    """Ask the brokers; return the exit code."""
    from dispytch_integrations._cli_check import check, shown

    screen = TerminalScreen(as_json=bool(given["json"]))
    with quiet_clients():
        answers = asyncio.run(check(_asked(given["urls"]), given["timeout"] or _CHECK_SECONDS))
    return shown(answers, screen, as_json=bool(given["json"]))


def _asked(urls: Sequence[str]) -> Mapping[str, Any] | None:
    """Several without an alias are told apart by their address; their alias is a number."""
    if not urls:
        if not os.environ.get("DISPYTCH_URL", "").strip():
            raise ConfigurationError(
                "there is no broker: write its URL, as in check kafka://localhost:9092, or set DISPYTCH_URL"
            )
        return None
    plain = [url for url in urls if "default" in urls_of([url])]
    if len(plain) < 2:
        return urls_of(urls, "check")
    named = urls_of([url for url in urls if url not in plain], "check")
    return {**{str(number): url for number, url in enumerate(plain, 1)}, **named}


def run_tail(given: Mapping[str, Any]) -> int:
    """Show what arrives; return the exit code."""
    [spec] = load_brokers({"default": {"url": given["url"]}}, {})
    screen = TerminalScreen(as_json=bool(given["json"]))
    try:
        return tail(spec, given, screen)
    except BrokerUnavailableError as exc:
        return _failed(exc, AWAY)


def run_emit(given: Mapping[str, Any]) -> int:
    """Emit or show; return the exit code."""
    cls = _class(given["event"])
    dry = bool(given["dry_run"])
    nowhere = dry and not given["broker_url"] and not os.environ.get("DISPYTCH_URL", "").strip()
    config = {"default": "memory://"} if nowhere else config_of(given["broker_url"], more="")
    way = _Way(config, nowhere=nowhere)
    try:
        with quiet_clients():
            return emit(cls, given, way, TerminalScreen(as_json=bool(given["json"])))
    except (NotDeliveredError, StartupError) as exc:
        return _failed(exc, FAILED)
    finally:
        way.close()


def _failed(error: Exception, code: int) -> int:
    import click

    color = False if os.environ.get("NO_COLOR") else None
    click.echo(click.style("Error: ", fg="red") + str(error), err=True, color=color)
    return code


class _Way:
    """Sends over connections of its own, opened for the first event."""

    def __init__(self, config: Mapping[str, Any] | None, *, nowhere: bool = False) -> None:
        self._nowhere = nowhere
        self._make = partial(connect, config, startup_timeout=_CHECK_SECONDS)
        self._loaded: Brokers = self._make()
        self._open: BlockingBrokers | None = None
        self._emitter: Any = None

    def prepare(self, event: EventBase, headers: Mapping[str, str]) -> tuple[str, str, Message]:
        """The message, without connecting."""
        if not self._loaded.brokers:
            self._loaded.load()
        outlet, message = self._loaded.emitter.prepare(event, headers)
        address = self._loaded.brokers[outlet.alias].backend.address
        return outlet.alias, "none is given: --broker-url" if self._nowhere else address, message

    def send(self, events: Sequence[EventBase], headers: Mapping[str, str]) -> None:
        """Send them, and wait for their confirmation."""
        if self._open is None:
            opening = BlockingBrokers(self._make)
            self._emitter = opening.__enter__()
            self._open = opening
        if len(events) == 1:
            self._emitter.emit(events[0], headers=headers)
        else:
            self._emitter.emit_many(events, headers=headers)

    def close(self) -> None:
        """Close what was opened."""
        if self._open is not None:
            self._open.__exit__(None, None, None)


def _class(path: str) -> type[EventBase]:
    found = imported("EVENT", path, "shop.events:OrderPlaced", _candidates)
    if not (isinstance(found, type) and issubclass(found, EventBase)):
        raise ConfigurationError(f"{path} is no event class; derive it from EventBase{_candidates(path)}")
    return found


def _candidates(path: str) -> str:
    """What the module has that would do."""
    module, _, name = path.partition(":")
    names = [
        each
        for each, value in vars(sys.modules[module]).items()
        if isinstance(value, type) and issubclass(value, EventBase) and getattr(value, "__route__", None) is not None
    ]
    hint = nearest(name, names)
    if hint or not names:
        return hint
    return f"; it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


# -- catalog ---------------------------------------------------------------------------------------------------------

_FASTAPIS_TITLE = "FastAPI"


def run_catalog(given: Mapping[str, Any]) -> int:
    """Write the catalogue; return the exit code."""
    from dispytch_integrations._cli_catalog import catalog
    from dispytch_integrations.asyncapi import event_classes

    path = given["app"]
    facts: dict[str, str | None] = {}
    if ":" in path:
        facts = _facts_of(imported("MODULE:APP", path, "shop.main:app"))
        classes = event_classes()  # Of the app are all that came with it.
    else:
        classes = event_classes(imported_module("MODULE", path))
    urls = given["broker_url"]
    brokers = urls_of(urls) if urls else os.environ.get("DISPYTCH_URL", "").strip() or None
    return catalog(classes, brokers, given, TerminalScreen(as_json=False), **facts)


def _facts_of(app: object) -> dict[str, str | None]:
    """What a FastAPI app says of itself, unless nobody has said it."""
    title = getattr(app, "title", None)
    if not isinstance(title, str) or title == _FASTAPIS_TITLE:
        return {}
    found = {"title": title, "version": getattr(app, "version", None), "description": getattr(app, "description", None)}
    return {name: value if isinstance(value, str) and value else None for name, value in found.items()}


def run_diff(given: Mapping[str, Any]) -> int:
    """Compare two documents; return the exit code."""
    from dispytch_integrations._cli_catalog import compared

    return compared(given, TerminalScreen(as_json=bool(given["json"])))
