"""How `dispytch-integrations` looks on a terminal (rich) and elsewhere (aligned text)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

import click

from dispytch_integrations._cli_look import Role
from dispytch_integrations.outbox.operations import aligned

__all__ = ["TerminalScreen", "is_terminal"]

_NARROW = 20
"""Below so many columns a text is folded, not cut."""
_STYLES = {"good": "green", "bad": "red", "title": "bold", "": ""}
_CELLS = {"dead": "red", "waiting": "yellow", "sent": "green", "up": "green", "down": "red", "wrong": "red",
          "breaking": "red"}  # fmt: skip

_ROLES: Mapping[str, str] = {
    "time": "36",
    "type": "1",
    "faint": "2",
    "name": "34",
    "string": "32",
    "number": "36",
    "word": "35",
    "bad": "31",
    "good": "32",
    "title": "1",
}


def is_terminal(stream: TextIO) -> bool:
    """Is it one, or taken for one? FORCE_COLOR says yes, as to rich."""
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _colored(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    return is_terminal(stream)


class TerminalScreen:
    """The Screen and Look of `dispytch-integrations`."""

    def __init__(self, *, as_json: bool) -> None:
        self.out: TextIO = sys.stdout
        self._rich = is_terminal(sys.stdout) and not as_json
        self._color = _colored(sys.stdout) and not as_json
        self.interactive = sys.stdout.isatty() and not as_json and sys.stdin.isatty()
        self.columns: int | None = shutil.get_terminal_size().columns if self._rich else None

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        if self._rich and style:
            from rich.console import Console

            Console(soft_wrap=True).print(text, style=_STYLES[style], markup=False, highlight=False)
        else:
            click.echo(text)

    def aside(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line about the command itself, to standard error."""
        code = _ROLES[style or "faint"]
        print(f"\x1b[{code}m{text}\x1b[0m" if _colored(sys.stderr) else text, file=sys.stderr, flush=True)  # noqa: T201

    def paint(self, text: str, role: Role) -> str:
        """A piece of text in its colour, if there are colours."""
        return f"\x1b[{_ROLES[role]}m{text}\x1b[0m" if self._color and text else text

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table."""
        if not self._rich:
            click.echo(aligned(titles, rows))
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # A column that is empty throughout takes room from the others.
        columns = [index for index in range(len(titles)) if any(row[index] for row in rows)]
        console = Console()
        *others, last = columns
        heads = [title.lstrip(">") for title in titles]
        room = console.width - sum(2 + max(len(row[index]) for row in (heads, *rows)) for index in others)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for index in columns:
            number = titles[index].startswith(">")
            table.add_column(heads[index], justify="right" if number else "left", no_wrap=number, overflow="fold")
        for row in rows:
            cells = list(row)
            # An error takes one line of many; who asks for one row sees all of it.
            if len(rows) > 1 and _NARROW <= room < len(cells[last]):
                cells[last] = f"{cells[last][: room - 1]}…"
            table.add_row(*(Text(cells[index], style=_CELLS.get(cells[index], "")) for index in columns))
        console.print(table)

    def confirm(self, question: str) -> bool:
        """Ask; Ctrl-C and Ctrl-D are a no that ends the command."""
        return click.confirm(question)
