"""From the tables of both command lines to argparse, with Django's own options behind the subcommand, too."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from django.core.management.base import DjangoHelpFormatter

from dispytch_integrations._cli_options import Argument, Option
from dispytch_integrations._cli_tables import Table, with_examples

__all__ = ["Formatter", "add_base", "add_options", "add_table", "given_of"]


class Formatter(RawDescriptionHelpFormatter, DjangoHelpFormatter):
    """Django's order of options, and texts as they are."""


def add_table(
    commands: Any,
    name: str,
    table: Table,
    examples: Sequence[str],
    arguments: Sequence[Argument] = (),
    more: Sequence[Option] = (),
) -> None:
    """A command of a table. `examples`: its own, since its arguments are; `more`: options that stand in front."""
    parser = commands.add_parser(
        name,
        help=table.short,
        description=table.help,
        epilog="\n".join(with_examples(table, "manage.py dispytch", examples)),
        formatter_class=Formatter,
    )
    for argument in arguments:
        parser.add_argument(
            argument.name,
            nargs="*" if argument.many else "?" if argument.optional else None,
            metavar=argument.metavar,
            help=argument.help.replace("%", "%%"),
        )
    add_options(parser, (*more, *table.options))


def add_options(parser: ArgumentParser, options: Sequence[Option]) -> None:
    """These options, and Django's own."""
    for option in options:
        told = option.help.replace("%", "%%")
        if option.read is None:
            parser.add_argument(*option.flags, action="store_true", help=told)
        else:
            action = "append" if option.many else "store"
            parser.add_argument(
                *option.flags, action=action, type=partial(_read, option.read), metavar=option.metavar, help=told
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
    """Of all that Django hands to a command, the values of these options."""
    return {option.name: options.get(option.name) for option in table}
