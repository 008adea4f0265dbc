"""The outbox in `manage.py dispytch`: options, databases, and how it looks."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from django.core.management.base import BaseCommand, CommandError, DjangoHelpFormatter

from dispytch_integrations._cli_options import EXIT_CODES, OUTBOX, RELAY, RELAY_JSON, Option
from dispytch_integrations.django import conf
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.outbox import conf as outbox_conf
from dispytch_integrations.django.outbox.store import DjangoStore
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.outbox.operations import aligned, operate
from dispytch_integrations.outbox.runner import AWAY, DONE, WRONG, DatabaseAwayError
from dispytch_integrations.outbox.store import OutboxStore

__all__ = ["add_base", "add_outbox", "add_relay", "exits", "given_of", "operated", "outbox_settings", "stores_of"]

_DATABASE = Option("--database", "Alias of a database; default: each that has an outbox.", str, "ALIAS", many=True)
_RELAY_HELP = """Send the outbox's events to their brokers until SIGTERM or Ctrl-C, which let what is under way be
settled. What is given here beats DISPYTCH_OUTBOX. Durations are seconds, or 30m, 12h, 7d."""


# -- options ---------------------------------------------------------------------------------------------------------


class _Formatter(RawDescriptionHelpFormatter, DjangoHelpFormatter):
    """Django's order of options, and texts as they are."""


def add_relay(commands: Any) -> None:
    """The command `relay`."""
    parser = commands.add_parser(
        "relay",
        help="Send the outbox's events to their brokers until SIGTERM or Ctrl-C.",
        description=_RELAY_HELP,
        epilog=f"{EXIT_CODES}\n{RELAY_JSON}",
        formatter_class=_Formatter,
    )
    _add(parser, (_DATABASE, *RELAY))


def add_outbox(commands: Any) -> None:
    """The commands `outbox stats` and so on."""
    outbox = commands.add_parser("outbox", help=f"Look at the outbox, and operate it: {', '.join(OUTBOX)}.")
    operations = outbox.add_subparsers(dest="operation", required=True, metavar=f"{{{','.join(OUTBOX)}}}")
    for name, (options, told, more) in OUTBOX.items():
        parser = operations.add_parser(
            name, help=told, description=told, epilog="\n".join(more), formatter_class=_Formatter
        )
        _add(parser, (_DATABASE, *options))


def _add(parser: ArgumentParser, options: Sequence[Option]) -> None:
    for option in options:
        told = option.help.replace("%", "%%")
        if option.read is None:
            parser.add_argument(option.flag, action="store_true", help=told)
        else:
            action = "append" if option.many else "store"
            parser.add_argument(
                option.flag, action=action, type=partial(_read, option.read), metavar=option.metavar, help=told
            )
    add_base(parser)


def _read(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except ValueError as exc:
        raise ArgumentTypeError(str(exc)) from None


def add_base(parser: ArgumentParser) -> None:
    """Let Django's own options stand behind the subcommand, too."""
    for flag in ("--settings", "--pythonpath"):
        parser.add_argument(flag, default=SUPPRESS, help=SUPPRESS)
    for flag in ("--traceback", "--no-color", "--force-color", "--skip-checks"):
        parser.add_argument(flag, action="store_true", default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("-v", "--verbosity", type=int, choices=range(4), default=SUPPRESS, help=SUPPRESS)


def given_of(options: Mapping[str, Any], table: Sequence[Option]) -> dict[str, Any]:
    """Of all that Django hands to a command, the values of these options and the databases."""
    return {option.name: options.get(option.name) for option in (_DATABASE, *table)}


# -- what it works on ------------------------------------------------------------------------------------------------


def outbox_settings() -> outbox_conf.OutboxSettings:
    """DISPYTCHOUTBOX. Raises SettingsError with all that is wrong with it, and where the app is not installed."""
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
    given = given_of(options, OUTBOX[operation][0])
    screen = _CommandScreen(command, as_json=bool(given["json"]))
    code = exits(lambda: operate(operation, stores_of(given, outbox_settings()), given, screen))
    if code != DONE:
        raise SystemExit(code)


# -- how it looks ----------------------------------------------------------------------------------------------------


class _CommandScreen:
    """The Screen of `manage.py`."""

    def __init__(self, command: BaseCommand, *, as_json: bool) -> None:
        self._out = command.stdout
        self._style = command.style
        self._terminal = command.stdout.isatty() and not as_json
        self.interactive = self._terminal and sys.stdin.isatty()

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        paint = {"good": self._style.SUCCESS, "bad": self._style.ERROR, "title": self._style.MIGRATE_HEADING}
        self._out.write(paint[style](text) if style else text)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table, on a terminal as wide as that."""
        room = shutil.get_terminal_size().columns if self._terminal else None
        heads, *lines = aligned(titles, rows, room).splitlines()
        self._out.write(self._style.MIGRATE_LABEL(heads))
        for line in lines:
            self._out.write(line)

    def confirm(self, question: str) -> bool:
        """Ask, as `manage.py flush` does; Ctrl-C and Ctrl-D are a no."""
        try:
            return input(f"{question} [y/N]: ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            self._out.write("")
            return False
