"""`manage.py dispytch check | emit | events | relay | outbox`."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string
from pydantic import ValidationError

from dispytch_integrations._templates import nearest
from dispytch_integrations.blocking import BlockingBrokers
from dispytch_integrations.brokers import connect
from dispytch_integrations.django import conf, emit
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._events import event_classes
from dispytch_integrations.django.checks import TAG
from dispytch_integrations.django.management._outbox import add_base, add_outbox, add_relay, operated
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.events import EventBase, event_type, string_fields

__all__ = ["Command"]


class Command(BaseCommand):
    """What people ask first: does it connect, where do my events go, and does one arrive?"""

    help = "Look at the project's brokers and events: check, emit, events. Run its outbox: relay, outbox."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The subcommands and their arguments."""
        commands = parser.add_subparsers(dest="subcommand", required=True, metavar="{check,emit,events,relay,outbox}")
        check = commands.add_parser(
            "check", help="Connect to each broker and say what is wrong; exit code 1 if any is."
        )
        check.add_argument("--timeout", type=_seconds, default=5.0, help="Seconds for each broker (default: 5).")
        check.add_argument("--json", action="store_true", help="Print JSON.")
        emit = commands.add_parser("emit", help="Emit one event: its class and its fields as JSON.")
        emit.add_argument("event", help="The class, as app.events.OrderPlaced, or its event type.")
        emit.add_argument("fields", nargs="?", default="{}", help="The event as JSON: '{\"order_id\": 1}'.")
        emit.add_argument(
            "--header", action="append", default=[], metavar="NAME=VALUE", help="A header; may be repeated."
        )
        emit.add_argument("--dry-run", action="store_true", help="Show the message, and send nothing.")
        events = commands.add_parser("events", help="List the project's event classes and where they go.")
        events.add_argument("--json", action="store_true", help="Print JSON.")
        for parser in (check, emit, events):
            add_base(parser)
        add_relay(commands)
        add_outbox(commands)

    def handle(self, *arguments: Any, subcommand: str, **options: Any) -> None:
        """Run the subcommand."""
        run: dict[str, Callable[[dict[str, Any]], None]] = {
            "check": self._check,
            "emit": self._emit,
            "events": self._events,
            "relay": self._relay,
            "outbox": lambda options: operated(self, options),
        }
        run[subcommand](options)

    # -- check -------------------------------------------------------------------------------------------------------

    def _check(self, options: dict[str, Any]) -> None:
        read = self._settings()
        rows = [self._ping(alias, read, options["timeout"]) for alias in read.config]
        if options["json"]:
            self.stdout.write(json.dumps(rows, indent=2))
        else:
            self._table(
                ("alias", "broker", "state", "answered in", "what is wrong"),
                [
                    (row["alias"], row["address"], row["state"], _milliseconds(row["milliseconds"]), row["error"] or "")
                    for row in rows
                ],
                styles={"up": self.style.SUCCESS, "down": self.style.ERROR},
            )
        down = [row["alias"] for row in rows if row["state"] != "up"]
        if down:
            raise CommandError(f"{len(down)} of {len(rows)} brokers cannot be used: {', '.join(down)}.", returncode=1)

    def _ping(self, alias: str, read: conf.Read, timeout: float) -> dict[str, Any]:
        """Connect to one broker on its own, so that each one's trouble is told."""
        settings = {**read.config[alias], "startup_timeout": timeout, "required": True}
        brokers = BlockingBrokers(lambda: connect({alias: settings}))
        row: dict[str, Any] = {"alias": alias, "address": "", "state": "down", "milliseconds": None, "error": None}
        if alias in read.specs:
            row["address"] = read.specs[alias].backend.address
        try:
            with brokers as emitter:
                row["address"] = brokers.brokers[alias].backend.address
                started = time.perf_counter()
                error = emitter.ping(timeout=timeout)[alias]
                row["milliseconds"] = round((time.perf_counter() - started) * 1000, 1)
                if error is None:
                    row["state"] = "up"
                else:
                    row["error"] = str(error)
        except DispytchError as exc:
            row["error"] = str(exc).partition(f"broker {alias!r}: ")[2] or str(exc)
        if row["error"] is not None:
            row["error"] = row["error"].removeprefix(f"{row['address']} ")
        return row

    # -- emit --------------------------------------------------------------------------------------------------------

    def _emit(self, options: dict[str, Any]) -> None:
        cls = self._event_class(options["event"])
        try:
            event = cls.model_validate_json(options["fields"])
        except ValidationError as exc:
            raise CommandError(_told(cls, exc)) from None
        _refuse_unknown_fields(cls, json.loads(options["fields"]))
        headers = dict(self._header(text) for text in options["header"])
        brokers = connect(self._settings().config)
        try:
            brokers.load()
            outlet, message = brokers.emitter.prepare(event, headers)
            if not options["dry_run"]:
                connections.always_direct = True  # A person asks for it, whatever relays the project's outbox.
                emit(event, headers=headers)
        except DispytchError as exc:
            raise CommandError(str(exc)) from None
        finally:
            connections.always_direct = False
        done = "would go" if options["dry_run"] else "was sent"
        self.stdout.write(self.style.SUCCESS(f"{message.type} {message.id} {done} to {message.destination!r}"))
        self._facts(
            {
                "broker": f"{outlet.alias} ({brokers.brokers[outlet.alias].backend.address})",
                "key": message.ordering_key,
                **{name: value for name, value in message.properties.items() if name not in ("key", "kind")},
                **({"headers": json.dumps(message.headers, default=str)} if options["dry_run"] else {}),
                "body": None if message.payload is None else message.payload.decode(errors="replace"),
            }
        )

    def _event_class(self, name: str) -> type[EventBase]:
        classes = event_classes()
        by_name = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}
        found = [cls for cls in classes if name in (event_type(cls), cls.__qualname__)]
        if name in by_name:
            return by_name[name]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            listed = " or ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in found)
            raise CommandError(f"{name!r} is the name of several events; write {listed}.")
        try:
            imported = import_string(name)
        except ImportError:
            hint = nearest(
                name, [*by_name, *(event_type(cls) for cls in classes), *(cls.__qualname__ for cls in classes)]
            )
            raise CommandError(f"There is no event {name!r}{hint}; `manage.py dispytch events` lists them.") from None
        if not (isinstance(imported, type) and issubclass(imported, EventBase)):
            raise CommandError(f"{name} is no event class; derive it from EventBase.")
        return imported

    def _header(self, text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"--header takes NAME=VALUE, not {text!r}.")
        return name, value

    # -- events ------------------------------------------------------------------------------------------------------

    def _events(self, options: dict[str, Any]) -> None:
        rows = [_described(cls) for cls in event_classes()]
        if options["json"]:
            self.stdout.write(json.dumps(rows, indent=2))
        elif not rows:
            self.stdout.write("There are no event classes: write them in events.py of an app.")
        else:
            self._table(
                ("event", "type", "goes to", "key", "broker"),
                [tuple(row[name] or "" for name in ("event", "type", "route", "key", "broker")) for row in rows],
            )

    # -- relay -------------------------------------------------------------------------------------------------------

    def _relay(self, options: dict[str, Any]) -> None:
        from dispytch_integrations.django.management._relay import relayed

        relayed(self, options)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _settings(self) -> conf.Read:
        read = connections.settings()
        if read.problems:
            told = "".join(f"\n  {problem.id}: {problem}" for problem in read.problems)
            raise CommandError(f"DISPYTCH is wrong:{told}\n(`manage.py check --tag {TAG}` says the same.)")
        return read

    def _table(
        self,
        names: Sequence[str],
        rows: Sequence[Sequence[str]],
        styles: dict[str, Callable[[str], str]] | None = None,
    ) -> None:
        widths = [max(len(row[index]) for row in (names, *rows)) for index in range(len(names))]
        self.stdout.write(self.style.MIGRATE_HEADING(_line(names, widths)))
        for row in rows:
            padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            for index, cell in enumerate(row):
                style = (styles or {}).get(cell)
                if style is not None:
                    padded[index] = style(padded[index])
            self.stdout.write("  ".join(padded).rstrip())

    def _facts(self, facts: dict[str, object]) -> None:
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            if value is not None:
                self.stdout.write(f"  {name.ljust(width)}  {value}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"


def _described(cls: type[EventBase]) -> dict[str, str | None]:
    route = cls.__route__
    texts = dict(string_fields(route))
    destination = texts.pop(route.destination_field or next(iter(texts), ""), "")
    more = "".join(f" {name}={value}" for name, value in texts.items() if value)
    key = cls.__ordering_key__
    return {
        "event": f"{cls.__module__}.{cls.__qualname__}",
        "type": event_type(cls),
        "transport": route.transport,
        "route": f"{route.kind or route.transport} {destination}{more}",
        "key": key if key is not None else getattr(cls.__backend_config__, "partition_key", None),
        "broker": cls.__broker__,
    }


def _refuse_unknown_fields(cls: type[EventBase], given: dict[str, Any]) -> None:
    """A misspelt field that has a default would be left out without a word."""
    if cls.model_config.get("extra") == "allow":
        return
    known: set[str] = set()
    for name, field in cls.model_fields.items():
        known |= {name, *(alias for alias in (field.alias, field.validation_alias) if isinstance(alias, str))}
    unknown = [name for name in given if name not in known]
    if unknown:
        told = ", ".join(f"{name!r}{nearest(name, sorted(known))}" for name in unknown)
        raise CommandError(f"{cls.__qualname__} has no field {told}.")


def _told(cls: type[EventBase], error: ValidationError) -> str:
    lines = [
        f"  {'.'.join(str(part) for part in each['loc']) or 'JSON'}: {each['msg']}"
        for each in error.errors(include_url=False, include_input=False)
    ]
    fields = ", ".join(
        f"{name}: {getattr(field.annotation, '__name__', field.annotation)}" for name, field in cls.model_fields.items()
    )
    return "\n".join([f"That is no {cls.__qualname__} ({fields}):", *lines])
