"""check, emit, events, tail and catalog in `manage.py dispytch`: the project's settings say where the brokers are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string

from dispytch_integrations._cli_options import Argument, Option
from dispytch_integrations._cli_tables import CATALOG, CHECK, EMIT, EVENTS, TAIL
from dispytch_integrations._cli_tail import AWAY, quiet_clients, tail
from dispytch_integrations._templates import nearest
from dispytch_integrations.django import conf, emit_many
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._events import event_classes
from dispytch_integrations.django.checks import TAG
from dispytch_integrations.django.management._options import add_table
from dispytch_integrations.django.management._screen import CommandScreen
from dispytch_integrations.errors import BrokerUnavailableError, DispytchError
from dispytch_integrations.events import EventBase, event_type
from dispytch_integrations.message import Message
from dispytch_integrations.settings import load_brokers

__all__ = ["COMMANDS", "add_brokers"]

_SECONDS = 5.0
_FAILED, _WRONG = 1, 2
_ALIAS = Option("--alias", "Which broker of DISPYTCH (default: default, or the only one).", str, "ALIAS")
_EMIT = (
    Argument("event", "The class, as app.events.OrderPlaced, or its event type.", "EVENT"),
    Argument("fields", "Its fields as JSON: '{\"order_id\": 1}'; -: from standard input.", "[JSON]", True),
)
_CATALOG = Argument("diff", "Two documents to compare, instead.", "diff OLD NEW", True, many=True)


def add_brokers(commands: Any) -> None:
    """The commands of this module."""
    add_table(commands, "check", CHECK, ["check", "check --json"])
    add_table(commands, "emit", EMIT, ["emit shop.events.OrderPlaced '{\"order_id\": 1}' --dry-run"], _EMIT)
    add_table(commands, "events", EVENTS, ["events", "events --json"])
    name = TAIL.arguments[1]
    add_table(commands, "tail", TAIL, ["tail orders", "tail orders --filter order_id=7"], (name,), (_ALIAS,))
    examples = ["catalog -o events.yaml --html events.html", "catalog diff main.yaml branch.yaml"]
    add_table(commands, "catalog", CATALOG, examples, (_CATALOG,))


def _check(command: BaseCommand, options: Mapping[str, Any]) -> None:
    from dispytch_integrations._cli_check import check, shown

    screen = CommandScreen(command, as_json=options["json"])
    read = _settings()
    with quiet_clients():
        answers = asyncio.run(check(read.config, options["timeout"] or _SECONDS))
    code = shown(answers, screen, as_json=options["json"], named=True)
    if code:
        unusable = [answer.alias for answer in answers if answer.state != "up"]
        told = f"{len(unusable)} of {len(answers)} brokers cannot be used: {', '.join(unusable)}."
        raise CommandError(told, returncode=code)


# -- emit ------------------------------------------------------------------------------------------------------------


def _emit(command: BaseCommand, options: Mapping[str, Any]) -> None:
    from dispytch_integrations._cli_emit import NotDeliveredError, emit

    cls = _event_class(options["event"])
    way = _Way(_settings())
    connections.always_direct = True  # A person asks for it, whatever relays the project's outbox.
    try:
        with quiet_clients():
            emit(cls, options, way, CommandScreen(command, as_json=options["json"]))
    except NotDeliveredError as exc:
        raise CommandError(str(exc), returncode=_FAILED) from None
    except DispytchError as exc:
        _refused(exc)
    finally:
        connections.always_direct = False


class _Way:
    """Sends as the project does: its settings, its hooks, its signals."""

    def __init__(self, read: conf.Read) -> None:
        from dispytch_integrations.brokers import connect

        self._brokers = connect(read.config)

    def prepare(self, event: EventBase, headers: Mapping[str, str]) -> tuple[str, str, Message]:
        """The message, without connecting."""
        if not self._brokers.brokers:
            self._brokers.load()
        outlet, message = self._brokers.emitter.prepare(event, headers)
        return outlet.alias, self._brokers.brokers[outlet.alias].backend.address, message

    def send(self, events: Sequence[EventBase], headers: Mapping[str, str]) -> None:
        """Send them, and wait for their confirmation."""
        from dispytch_integrations.django import emit

        if len(events) == 1:
            emit(events[0], headers=headers)
        else:
            emit_many(events, headers=headers)


def _event_class(name: str) -> type[EventBase]:
    classes = event_classes()
    by_name = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}
    found = [cls for cls in classes if name in (event_type(cls), cls.__qualname__)]
    if name.replace(":", ".") in by_name:
        return by_name[name.replace(":", ".")]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        listed = " or ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in found)
        raise CommandError(f"{name!r} is the name of several events; write {listed}.", returncode=_WRONG)
    try:
        imported = import_string(name)
    except ImportError:
        hint = nearest(name, [*by_name, *(event_type(cls) for cls in classes), *(cls.__qualname__ for cls in classes)])
        told = f"There is no event {name!r}{hint}; `manage.py dispytch events` lists them."
        raise CommandError(told, returncode=_WRONG) from None
    if not (isinstance(imported, type) and issubclass(imported, EventBase)):
        raise CommandError(f"{name} is no event class; derive it from EventBase.", returncode=_WRONG)
    return imported


# -- what there is, and what travels -----------------------------------------------------------------------------------


def _events(command: BaseCommand, options: Mapping[str, Any]) -> None:
    import json

    from dispytch_integrations._cli_catalog import described, listed

    screen = CommandScreen(command, as_json=options["json"])
    classes = event_classes()
    if options["json"]:
        screen.say(json.dumps([described(cls) for cls in classes], indent=2))
    elif not classes:
        screen.say("There are no event classes: write them in events.py of an app.")
    else:
        listed(classes, screen)


def _tail(command: BaseCommand, options: Mapping[str, Any]) -> None:
    read = _settings()
    alias = options["alias"] or (
        "default" if "default" in read.config or len(read.config) > 1 else next(iter(read.config))
    )
    if alias not in read.config:
        known = " and ".join(map(repr, read.config))
        told = f"DISPYTCH has no broker {alias!r}{nearest(alias, list(read.config))}; it has {known}: write --alias."
        raise CommandError(told, returncode=_WRONG)
    try:
        [spec] = load_brokers({alias: dict(read.config[alias])}, {})
        tail(spec, options, CommandScreen(command, as_json=options["json"]))
    except BrokerUnavailableError as exc:
        raise CommandError(str(exc), returncode=AWAY) from None
    except DispytchError as exc:
        _refused(exc)


def _catalog(command: BaseCommand, options: Mapping[str, Any]) -> None:
    from dispytch_integrations._cli_catalog import catalog, compared

    words = options["diff"]
    screen = CommandScreen(command, as_json=options["json"])
    if words and (words[0] != "diff" or len(words) != 3):
        raise CommandError("write `catalog`, or `catalog diff OLD NEW`", returncode=_WRONG)
    try:
        if words:
            code = compared({"old": words[1], "new": words[2], "json": options["json"]}, screen)
            if code:
                raise SystemExit(code)
            return
        read = connections.settings()
        brokers = _settings().config if read.config else None
        catalog(event_classes(), brokers, options, screen)
    except DispytchError as exc:
        _refused(exc)


# -- what they share -------------------------------------------------------------------------------------------------


def _settings() -> conf.Read:
    read = connections.settings()
    if read.problems:
        told = "".join(f"\n  {problem.id}: {problem}" for problem in read.problems)
        raise CommandError(
            f"DISPYTCH is wrong:{told}\n(`manage.py check --tag {TAG}` says the same.)", returncode=_WRONG
        )
    return read


def _refused(error: DispytchError) -> NoReturn:
    # As Django writes: a sentence; but for what begins with a name.
    told = re.sub("^(?:that|there|the|a) ", lambda found: found[0].capitalize(), str(error))
    raise CommandError(told, returncode=_WRONG) from None


COMMANDS: Mapping[str, Callable[[BaseCommand, Mapping[str, Any]], None]] = {
    "check": _check,
    "emit": _emit,
    "events": _events,
    "tail": _tail,
    "catalog": _catalog,
}
"""What runs each of them."""
