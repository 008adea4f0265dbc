"""The outbox in `manage.py dispytch`: options and databases."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from dispytch_integrations._cli_options import EXIT_CODES, OUTBOX, RELAY, RELAY_JSON, Option
from dispytch_integrations.django import conf
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.management._options import Formatter, add_options, given_of
from dispytch_integrations.django.management._screen import CommandScreen
from dispytch_integrations.django.outbox import conf as outbox_conf
from dispytch_integrations.django.outbox.store import DjangoStore
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.outbox.operations import operate
from dispytch_integrations.outbox.runner import AWAY, DONE, WRONG, DatabaseAwayError
from dispytch_integrations.outbox.store import OutboxStore

__all__ = ["DATABASE", "add_outbox", "add_relay", "exits", "operated", "outbox_settings", "stores_of"]

DATABASE = Option("--database", "Alias of a database; default: each that has an outbox.", str, "ALIAS", many=True)
_RELAY_HELP = """Send the outbox's events to their brokers until SIGTERM or Ctrl-C, which let what is under way be
settled. What is given here beats DISPYTCH_OUTBOX. Durations are seconds, or 30m, 12h, 7d."""


# -- options ---------------------------------------------------------------------------------------------------------


def add_relay(commands: Any) -> None:
    """The command `relay`."""
    parser = commands.add_parser(
        "relay",
        help="Send the outbox's events to their brokers until SIGTERM or Ctrl-C.",
        description=_RELAY_HELP,
        epilog=f"{EXIT_CODES}\n{RELAY_JSON}",
        formatter_class=Formatter,
    )
    add_options(parser, (DATABASE, *RELAY))


def add_outbox(commands: Any) -> None:
    """The commands `outbox stats` and so on."""
    outbox = commands.add_parser("outbox", help=f"Look at the outbox, and operate it: {', '.join(OUTBOX)}.")
    operations = outbox.add_subparsers(dest="operation", required=True, metavar=f"{{{','.join(OUTBOX)}}}")
    for name, (options, told, more) in OUTBOX.items():
        parser = operations.add_parser(
            name, help=told, description=told, epilog="\n".join(more), formatter_class=Formatter
        )
        add_options(parser, (DATABASE, *options))


# -- what it works on ------------------------------------------------------------------------------------------------


def outbox_settings() -> outbox_conf.OutboxSettings:
    """DISPYTCH_OUTBOX. Raises SettingsError with all that is wrong with it, and where the app is not installed."""
    if not outbox_conf.installed():
        told = f"this project has no outbox: write INSTALLED_APPS += [{outbox_conf.APP!r}] in its settings"
        raise SettingsError([f"{told}, and run manage.py migrate"])
    read = outbox_conf.read()
    conf.require(read.problems)
    return read


def stores_of(given: Mapping[str, Any], settings: outbox_conf.OutboxSettings) -> dict[str, Callable[[], OutboxStore]]:
    """By alias of the databases that are named, or have an outbox, what makes the store."""
    aliases = dict.fromkeys(given["database"] or settings.databases)
    for alias in aliases:
        DjangoStore(alias)  # Opens nothing: one that does not exist is told before anything is done.
    return {alias: partial(DjangoStore, alias) for alias in aliases}


def exits(run: Callable[[], int]) -> int:
    """What `run` returns; its errors become Django's, with the exit codes of the help."""
    try:
        return run()
    except BrokenPipeError:
        # What read us has seen enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except DatabaseAwayError as exc:
        raise CommandError(str(exc), returncode=AWAY) from exc
    except DispytchError as exc:
        raise CommandError(str(exc), returncode=WRONG) from exc


def operated(command: BaseCommand, options: Mapping[str, Any]) -> None:
    """Run `outbox stats` and so on. Raises CommandError; SystemExit where the answer was no."""
    operation: str = options["operation"]
    given = given_of(options, (DATABASE, *OUTBOX[operation][0]))
    screen = CommandScreen(command, as_json=bool(given["json"]))
    code = exits(lambda: operate(operation, stores_of(given, outbox_settings()), given, screen))
    if code != DONE:
        raise SystemExit(code)
