"""A short text that a regular expression matches, for examples: of the expressions that people write for fields."""

from __future__ import annotations

import re

__all__ = ["matching"]

_CLASSES = {"d": "1", "w": "a", "s": " ", "D": "a", "W": "-", "S": "a"}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_LIKED = "a1A0b2-_. "
"""Tried first as a character of a class that is negated."""
_LONGEST = 200
_SLOW = re.compile(r"[*+}|][^)]*\)+[*+{]")
"""A repetition, or a choice, that is repeated: Python may try its ways for hours, where pydantic's Rust does not."""


class _UnknownError(Exception):
    """Something that is not read here."""


def matching(pattern: str, shortest: int = 0) -> str | None:
    """A text of at least `shortest` characters that `pattern` finds itself in; None: it is one that is not read here.

    Quantifiers are taken as few times as they allow, and more often only where the text would be too short.
    """
    for more in (0, 1, shortest):
        try:
            text = _Reader(pattern, more).read()
        except (_UnknownError, IndexError, OverflowError, ValueError):
            return None
        if len(text) >= shortest and _finds(pattern, text):
            return text
    return None


def _finds(pattern: str, text: str) -> bool:
    if _SLOW.search(pattern) is not None:
        return True  # The class decides.
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return True  # Rust's expressions, which pydantic uses, are not quite Python's: the class decides.


class _Reader:
    """Reads an expression once, and writes down what matches it."""

    def __init__(self, pattern: str, more: int) -> None:
        self._pattern = pattern
        self._at = 0
        self._more = more

    def read(self) -> str:
        text = self._alternatives()
        if self._at < len(self._pattern):
            raise _UnknownError
        return text

    def _next(self) -> str:
        character = self._pattern[self._at]
        self._at += 1
        return character

    def _sees(self, text: str) -> bool:
        return self._pattern.startswith(text, self._at)

    def _alternatives(self) -> str:
        """`a|b|c`: the first."""
        first = self._sequence()
        while self._sees("|"):
            self._at += 1
            self._sequence()
        return first

    def _sequence(self) -> str:
        parts: list[str] = []
        while self._at < len(self._pattern) and not self._sees("|") and not self._sees(")"):
            part = self._atom()
            parts.append(part * self._times(bool(part)))
        return "".join(parts)[:_LONGEST]

    def _times(self, consumes: bool) -> int:
        """How often, by the quantifier that follows."""
        if self._at >= len(self._pattern):
            return 1
        fewest, most = 1, 1
        character = self._pattern[self._at]
        if character in "*+?":
            self._at += 1
            fewest, most = {"*": (0, _LONGEST), "+": (1, _LONGEST), "?": (0, 1)}[character]
        elif (found := re.compile(r"\{(\d*)(,?)(\d*)\}").match(self._pattern, self._at)) is not None:
            self._at = found.end()
            fewest = int(found[1] or 0)
            most = fewest if not found[2] else int(found[3] or _LONGEST)
        else:
            return 1
        if self._sees("?") or self._sees("+"):  # Lazy or possessive: matches the same here.
            self._at += 1
        return min(max(fewest, min(most, self._more)), _LONGEST) if consumes else 1

    def _atom(self) -> str:
        character = self._next()
        if character in "^$":
            return ""
        if character == ".":
            return "a"
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return self._escape()
        return character

    def _group(self) -> str:
        if self._sees("?"):
            named = re.compile(r"\?(?:P?<[A-Za-z_]\w*>|:|[a-z]+:)").match(self._pattern, self._at)
            if named is None:
                raise _UnknownError  # Looks ahead or behind, or refers to another one.
            self._at = named.end()
        text = self._alternatives()
        if self._next() != ")":
            raise _UnknownError
        return text

    def _escape(self) -> str:
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            return _CONTROLS[character]
        if character in "AzZbB":
            return ""
        if character.isalnum():
            raise _UnknownError
        return character

    def _class(self) -> str:
        """`[a-z0-9]`: its first character; of `[^...]` one that is not in it."""
        start = self._at
        negated = self._sees("^")
        self._at += negated
        first = self._at
        while not self._sees("]") or self._at == first:
            if self._next() == "\\":
                self._next()
        inside = self._pattern[first : self._at]
        self._at += 1
        whole = f"[{self._pattern[start : self._at]}"
        if not negated:
            one = _CLASSES.get(inside[1:2], inside[1:2]) if inside.startswith("\\") else inside[0]
            candidates = one + _LIKED
        else:
            candidates = _LIKED
        for candidate in candidates:
            if _finds(whole, candidate):
                return candidate
        raise _UnknownError
