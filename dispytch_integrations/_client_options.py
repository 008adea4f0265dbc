"""Values of a client's options, checked before the client fails because of them in the middle of a connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["wrong_types"]

_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "True or False"),
    ((int, float), "a number"),
    (str, "a str"),
)
"""(what a default is, what a value has to be); bool before int, of which it is a kind."""


def wrong_types(
    given: Mapping[str, Any], defaults: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]
) -> Iterator[str]:
    """What is wrong with options: each is to be of the type of its default, else of the one in `kinds`.

    Where the default is None, so may the value be. The values themselves are not told: they may be secrets.
    """
    for name, value in given.items():
        default = defaults.get(name)
        if default is None:
            if value is not None and name in kinds and not isinstance(value, kinds[name]):
                yield f"{name} is of type {type(value).__name__}; write one of type {_names(kinds[name])}"
            continue
        for kind, words in _KINDS:
            if isinstance(default, kind):
                if not _fits(value, kind):
                    yield f"{name} is of type {type(value).__name__}; write {words}, such as {name}={default!r}"
                break


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if kind is bool:
        return isinstance(value, int) and value in (0, 1)
    return isinstance(value, kind) and not isinstance(value, bool)


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)
