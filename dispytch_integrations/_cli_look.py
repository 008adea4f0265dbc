"""What the commands need of a terminal; each command line has one of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TextIO, cast

__all__ = ["Look", "Role", "cleaned", "json_line"]

Role = Literal["time", "type", "faint", "name", "string", "number", "word", "bad", "good", "title"]
"""What a piece of text is: when, which event, of less interest, a field's name, values; good and bad news."""


class Look(Protocol):
    """Where commands write. `columns`: of the terminal; None: it is none, and nothing is coloured unless wanted."""

    out: TextIO
    columns: int | None

    def say(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line."""
        ...

    def aside(self, text: str, style: Literal["", "good", "bad", "title"] = "") -> None:
        """Write a line about the command itself, to standard error."""
        ...

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table; a title that begins with ">" is that of numbers."""
        ...

    def paint(self, text: str, role: Role) -> str:
        """A piece of text in its colour, if there are colours."""
        ...


def cleaned(text: object, keep: str = "") -> str:
    """Nothing in it that a terminal would obey, or that turns the direction of reading. `keep`: characters to leave."""
    return "".join(char if char.isprintable() or char in keep else _code(ord(char)) for char in str(text))


def _code(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_line(value: object, *, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes and no terminal obeys: NaN and infinite numbers as text, keys as text."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False, indent=indent, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(_strict(value), default=str, ensure_ascii=False, indent=indent)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _strict(value: object) -> Any:
    """The same of what JSON has: MessagePack's keys may be bytes, numbers be infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key): _strict(each) for key, each in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in cast("Sequence[object]", value)]
    return value


def _key(key: object) -> str:
    if isinstance(key, bytes):
        return key.decode(errors="backslashreplace")
    return key if isinstance(key, str) else json.dumps(key, default=str)
