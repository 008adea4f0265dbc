"""`dispytch-integrations`: ask brokers, emit an event, see events as they travel, relay an outbox, without Django.

Needs the extra `cli`. A Django project has the same under `manage.py dispytch`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from dispytch_integrations._cli_options import EXIT_CODES, OUTBOX, RELAY, RELAY_JSON, Argument, Option
from dispytch_integrations._cli_tables import BROKERS, CATALOG, CHECK, DIFF, EMIT, TAIL, Table, with_examples

try:
    import click

    if find_spec("rich") is None:  # imported for tables at a terminal alone
        raise ModuleNotFoundError("No module named 'rich'", name="rich")
except ModuleNotFoundError as exc:
    if exc.name not in ("click", "rich"):
        raise
    sys.exit("dispytch-integrations needs click and rich: pip install 'dispytch-integrations[cli]'")

__all__ = ["main"]

_WRONG, _AWAY = 2, 3

_SOURCE = (
    Option("--app", "Your own objects: what connect(url, outbox=...) returned.", str, "MODULE:NAME"),
    Option("--database-url", "The outbox's database (default: DATABASE_URL).", str, "URL"),
    Option("--schema", "The schema of the outbox's tables.", str, "NAME"),
)


def main() -> NoReturn:
    """The command line. Exits with 0, or as each command's help says."""
    try:
        _ended()
    except KeyboardInterrupt:  # While something was imported.
        sys.exit(130)


def _ended() -> NoReturn:
    from dispytch_integrations.errors import DispytchError

    _open_streams()
    try:
        code = _cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("", 130)
    except click.ClickException as exc:
        told = io.StringIO()
        exc.show(told)
        click.echo(re.sub(r"://[^\s/]*@", "://***@", told.getvalue()), err=True, nl=False)  # A URL in the wrong place.
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        _close_output()  # What read us has seen enough, as `head` does.
        sys.exit(1)
    except DispytchError as exc:
        _fail(str(exc), _WRONG)
    except ConnectionError as exc:
        _fail(str(exc), _AWAY)
    except OSError as exc:
        if exc.errno not in _FULL:
            raise
        _close_output()
        _fail(f"the output cannot be written: {exc.strerror}", 1)
    sys.exit(code if isinstance(code, int) else 0)


_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


def _open_streams() -> None:
    """Where the shell has closed them (`>&-`), nothing is read and written; no socket gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for good


def _close_output() -> None:
    """What is left in the buffer goes nowhere, without a word at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str, code: int) -> NoReturn:
    if text:
        color = False if os.environ.get("NO_COLOR") else None
        click.echo(click.style("Error: ", fg="red") + text, err=True, color=color)
    sys.exit(code)


class _InOrder(click.Group):
    """Lists its commands in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dispytch-integrations", prog_name="dispytch-integrations")
def _cli() -> None:
    """Ask brokers, emit an event, see events as they arrive, list those of an app, relay an outbox.

    \b
    examples:
      dispytch-integrations check kafka://localhost:9092
      dispytch-integrations tail kafka://localhost:9092 orders --from-beginning
      dispytch-integrations emit shop.events:OrderPlaced '{"order_id": 7}' --dry-run

    \b
    completion, in bash (zsh_source and fish_source for the others):
      eval "$(_DISPYTCH_INTEGRATIONS_COMPLETE=bash_source dispytch-integrations)"
    """


@click.group("outbox", cls=_InOrder)
def _outbox() -> None:
    """Look at an outbox: counts and rows; requeue or discard what is dead."""


def _command(
    group: click.Group,
    name: str,
    options: Sequence[Option],
    run: Callable[..., int],
    help: str,
    more: Sequence[str] = (),
) -> None:
    """A command whose options come from the tables that Django's command line has, too."""
    group.add_command(
        click.Command(
            name,
            callback=run,
            params=[_click_option(option) for option in options],
            help=help + "".join(f"\n\n\b\n{paragraph}" for paragraph in more),
        )
    )


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # Not generic in every version.


class _Read(_ParamType):
    """Reads a value with an option's own function."""

    def __init__(self, option: Option) -> None:
        self.name = option.metavar.lower()
        self._option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or self._option.read is None:
            return value
        try:
            return self._option.read(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def _click_argument(argument: Argument) -> click.Argument:
    return click.Argument(
        [argument.name],
        required=not argument.optional,
        nargs=-1 if argument.many else 1,
        metavar=argument.metavar,
    )


def _click_option(option: Option) -> click.Option:
    if option.read is None:
        return click.Option([*option.flags, option.name], is_flag=True, help=option.help)
    return click.Option(
        [*option.flags, option.name],
        type=_Read(option),
        metavar=option.metavar,
        multiple=option.many,
        help=option.help,
    )


# -- brokers and events ------------------------------------------------------------------------------------------------


def _check(**given: Any) -> int:
    from dispytch_integrations._cli_run import run_check

    return run_check(given)


def _emit(**given: Any) -> int:
    from dispytch_integrations._cli_run import run_emit

    return run_emit(given)


def _tail(**given: Any) -> int:
    from dispytch_integrations._cli_run import run_tail

    return run_tail(given)


def _catalog(**given: Any) -> int:
    from dispytch_integrations._cli_run import run_catalog

    return run_catalog(given)


def _diff(**given: Any) -> int:
    from dispytch_integrations._cli_run import run_diff

    return run_diff(given)


class _Catalog(click.Command):
    """`catalog MODULE`, and `catalog diff OLD NEW`: a group would take every module for a command."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["diff"]:
            diff = _of_table("diff", DIFF, _diff)
            return diff.make_context(f"{info_name} diff", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def _of_table(
    name: str, table: Table, run: Callable[..., int], cls: type[click.Command] = click.Command
) -> click.Command:
    words = "".join(f"\n\n\b\n{paragraph}" for paragraph in with_examples(table, "dispytch-integrations"))
    width = max((len(each.metavar) for each in table.arguments), default=0)
    arguments = "".join(f"\n  {each.metavar.ljust(width)}  {each.help}" for each in table.arguments)
    return cls(
        name,
        callback=run,
        params=[
            *(_click_argument(argument) for argument in table.arguments),
            *(_click_option(option) for option in (*table.options, *table.more_options)),
        ],
        help=f"{table.help}\n\n\b{arguments}{words}" if arguments else table.help + words,
        short_help=table.short,
    )


for _command_name, _table, _run in (("check", CHECK, _check), ("emit", EMIT, _emit), ("tail", TAIL, _tail)):
    _cli.add_command(_of_table(_command_name, _table, _run))
_cli.add_command(_of_table("catalog", CATALOG, _catalog, _Catalog))


# -- relay -----------------------------------------------------------------------------------------------------------


def _relay(**given: Any) -> int:
    from dispytch_integrations._cli_relay import relay

    return relay(given)


def _operate(command: str) -> Callable[..., int]:
    def run(**given: Any) -> int:
        from dispytch_integrations._cli_relay import stores_of
        from dispytch_integrations._cli_screen import TerminalScreen
        from dispytch_integrations.outbox.operations import operate

        stores, close = stores_of(given)
        return operate(command, stores, given, TerminalScreen(as_json=given["json"]), on_end=close)

    return run


_EXAMPLES = """examples:
  dispytch-integrations relay --database-url postgresql://app@db/shop --broker-url kafka://kafka:9092
  dispytch-integrations relay --app shop.main:brokers --workers 2 --liveness-file /tmp/relay
  dispytch-integrations relay --broker-url default=kafka://kafka:9092 --broker-url alerts=redis://redis
"""

_command(
    _cli,
    "relay",
    (*_SOURCE, *BROKERS, *RELAY),
    _relay,
    "Send the outbox's events to their brokers until SIGTERM or Ctrl-C, which let what is under way be settled. "
    "Durations are seconds, or 30m, 12h, 7d.",
    (_EXAMPLES, EXIT_CODES, RELAY_JSON),
)
_cli.add_command(_outbox)
for _name, (_options, _help, _more) in OUTBOX.items():
    _command(_outbox, _name, (*_SOURCE, *_options), _operate(_name), _help, _more)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
