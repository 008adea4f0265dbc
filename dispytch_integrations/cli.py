"""`dispytch-integrations`: run the relay of an outbox, and operate it, without Django.

Needs the extra `cli`. A Django project has `manage.py dispytch relay` and `manage.py dispytch outbox` instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dispytch_integrations._cli_options import EXIT_CODES, OUTBOX, RELAY, RELAY_JSON, Option

try:
    import click
except ModuleNotFoundError as exc:
    if exc.name != "click":
        raise
    sys.exit("dispytch-integrations needs click and rich: pip install 'dispytch-integrations[cli]'")

__all__ = ["main"]

_WRONG, _AWAY = 2, 3

_SOURCE = (
    Option("--app", "Your own objects: what connect(url, outbox=...) returned.", str, "MODULE:NAME"),
    Option("--database-url", "The outbox's database (default: DATABASE_URL).", str, "URL"),
    Option("--schema", "The schema of the outbox's tables.", str, "NAME"),
)
_BROKERS = (
    Option("--broker-url", "Where it goes (default: DISPYTCH_URL); several: alias=URL.", str, "[ALIAS=]URL", many=True),
)


def main() -> NoReturn:
    """The command line. Exits with 0, or as each command's help says."""
    from dispytch_integrations.errors import DispytchError

    try:
        code = _cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("", 130)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        # What read us has seen enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except DispytchError as exc:
        _fail(str(exc), _WRONG)
    except ConnectionError as exc:
        _fail(str(exc), _AWAY)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> NoReturn:
    if text:
        click.echo(click.style("Error: ", fg="red") + text, err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dispytch-integrations", prog_name="dispytch-integrations")
def _cli() -> None:
    """Relay the events of a transactional outbox to their broker, and operate it."""


@_cli.group("outbox")
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


def _click_option(option: Option) -> click.Option:
    if option.read is None:
        return click.Option([option.flag, option.name], is_flag=True, help=option.help)
    return click.Option(
        [option.flag, option.name],
        type=_Read(option),
        metavar=option.metavar,
        multiple=option.many,
        help=option.help,
    )


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
    (*_SOURCE, *_BROKERS, *RELAY),
    _relay,
    "Send the outbox's events to their brokers until SIGTERM or Ctrl-C, which let what is under way be settled. "
    "Durations are seconds, or 30m, 12h, 7d.",
    (_EXAMPLES, EXIT_CODES, RELAY_JSON),
)
for _name, (_options, _help, _more) in OUTBOX.items():
    _command(_outbox, _name, (*_SOURCE, *_options), _operate(_name), _help, _more)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
