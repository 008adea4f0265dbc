"""How the operations look on a terminal (rich) and elsewhere (aligned text)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import click

from dispytch_integrations.outbox.operations import aligned

__all__ = ["TerminalScreen"]

_NARROW = 20
"""Below so many columns a text is folded, not cut."""
_STYLES = {"good": "green", "bad": "red", "title": "bold", "": ""}


class TerminalScreen:
    """The Screen of `dispytch-integrations`."""

    def __init__(self, *, as_json: bool) -> None:
        self._rich = sys.stdout.isatty() and not as_json
        self.interactive = self._rich and sys.stdin.isatty()

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        if self._rich and style:
            from rich.console import Console

            Console(soft_wrap=True).print(text, style=_STYLES[style], markup=False, highlight=False)
        else:
            click.echo(text)

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


_CELLS = {"dead": "red", "waiting": "yellow", "sent": "green"}
