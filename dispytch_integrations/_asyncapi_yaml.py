"""YAML in block style, written by ourselves: of plain data it is simple, and PyYAML takes seconds for 500 events.

What is written means the same to readers of YAML 1.1 (PyYAML) and of 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from dispytch_integrations._asyncapi_schemas import mapping, sequence

__all__ = ["yaml_of"]

_PLAIN = re.compile(r"(?:[^\W\d]|[$/])[\w./$()+@,;'\"!?%=-]*(?: [\w./$()+@;,!?%='\"-]+)*")
"""Text that needs no quotes: words, and what cannot be taken for anything else between them."""
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that are no text without them."""
_LONGEST_KEY = 120
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\0": "\\0"}


def yaml_of(value: object) -> str:
    """A value of dicts with keys of text, lists, text, numbers, booleans and None, as YAML."""
    return "\n".join(_lines(value, "")) + "\n"


def _lines(value: object, indent: str) -> Iterator[str]:
    """The lines of a value that stands alone, each with `indent`."""
    if not _is_nested(value):
        yield f"{indent}{_inline(value)}"
    elif isinstance(value, dict):
        for key, each in mapping(cast("object", value)).items():
            yield from _entry(_inline(key), each, indent)
    else:
        for each in sequence(value):
            if _is_nested(each):
                first, *others = _lines(each, f"{indent}  ")
                yield f"{indent}- {first.removeprefix(f'{indent}  ')}"
                yield from others
            else:
                yield from _held(f"{indent}-", each, indent)


def _entry(key: str, value: object, indent: str) -> Iterator[str]:
    """A key and its value."""
    start = f"{indent}{key}:"
    if len(key) > _LONGEST_KEY:
        yield f"{indent}? {key}"
        start = f"{indent}:"
    if _is_nested(value):
        yield start
        yield from _lines(value, f"{indent}  ")
    else:
        yield from _held(start, value, indent)


def _is_nested(value: object) -> bool:
    return isinstance(value, (dict, list)) and bool(cast("object", value))


def _held(start: str, value: object, indent: str) -> Iterator[str]:
    """A value on the line of its key or dash; text of several lines below it."""
    lines = value.removesuffix("\n").split("\n") if isinstance(value, str) else []
    if len(lines) < 2 or not _fits_block(lines):
        yield f"{start} {_inline(value)}"
        return
    yield f"{start} {'|' if str(value).endswith(chr(10)) else '|-'}"
    for line in lines:
        yield f"{indent}  {line}" if line else ""


def _fits_block(lines: list[str]) -> bool:
    """Can they stand as they are? The first one tells the indentation; the last one, where the text ends."""
    whole = bool(lines[0]) and bool(lines[-1]) and not lines[0].startswith(" ")
    return whole and all(line.isprintable() and (not line or bool(line.strip())) for line in lines)


def _inline(value: object) -> str:
    """A value in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (dict, list)):
        return "{}" if isinstance(value, dict) else "[]"
    return _text(str(value))


def _text(text: str) -> str:
    if not text.isprintable():
        return '"' + "".join(_ESCAPES.get(each) or _escaped(each) for each in text) + '"'
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return "'" + text.replace("'", "''") + "'"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
