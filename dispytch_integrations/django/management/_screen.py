"""How the commands look in a Django project: its own colours, and its way to ask."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TextIO, cast

from django.core.management.base import BaseCommand
from django.core.management.color import no_style

from dispytch_integrations._cli_look import Role
from dispytch_integrations.outbox.operations import aligned

__all__ = ["CommandScreen"]

_ROLES: Mapping[str, str] = {
    "time": "HTTP_NOT_MODIFIED",
    "type": "MIGRATE_LABEL",
    "name": "SQL_KEYWORD",
    "string": "SQL_COLTYPE",
    "number": "HTTP_NOT_MODIFIED",
    "word": "HTTP_NOT_FOUND",
    "good": "SUCCESS",
    "bad": "ERROR",
    "title": "MIGRATE_HEADING",
}
"""Names of Django's palette; what is not here has no colour."""
_STATES: Mapping[str, Role] = {"up": "good", "down": "bad", "wrong": "bad"}
_STATE = re.compile(rf"(?<=  )(?:{'|'.join(_STATES)})(?=  |$)")
"""As a cell of a table: columns have two spaces between them."""


class CommandScreen:
    """The Screen and Look of `manage.py`."""

    def __init__(self, command: BaseCommand, *, as_json: bool) -> None:
        self._out, self._err = command.stdout, command.stderr
        self._style: Any = no_style() if os.environ.get("NO_COLOR") else command.style
        self._terminal = command.stdout.isatty() and not as_json
        self.interactive = self._terminal and sys.stdin.isatty()
        self.out = cast("TextIO", command.stdout._out)
        self.columns: int | None = shutil.get_terminal_size().columns if self._terminal else None

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        self._out.write(self.paint(text, style) if style else text)

    def aside(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line about the command itself, to standard error."""
        self._err.write(text, self._painter(style) if style else str)
        self._err.flush()

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table, on a terminal as wide as that."""
        heads, *lines = aligned(titles, rows, self.columns).splitlines()
        self._out.write(self._style.MIGRATE_LABEL(heads))
        for line in lines:
            self._out.write(_STATE.sub(lambda found: self.paint(found[0], _STATES[found[0]]), line))

    def paint(self, text: str, role: Role) -> str:
        """A piece of text in its colour, if there are colours."""
        return self._painter(role)(text)

    def _painter(self, role: str) -> Callable[[str], str]:
        return getattr(self._style, _ROLES[role]) if role in _ROLES else str

    def confirm(self, question: str) -> bool:
        """Ask, as `manage.py flush` does; Ctrl-C and Ctrl-D are a no."""
        try:
            return input(f"{question} [y/N]: ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            self._out.write("")
            return False
