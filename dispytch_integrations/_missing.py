"""Whether a package of an extra is not installed, or one of its own imports is missing."""

from __future__ import annotations

import sys

__all__ = ["is_missing"]


def is_missing(error: ModuleNotFoundError, *packages: str) -> bool:
    """Whether one of the packages itself is not there; False: it is, and something else is missing.

    Who hides a package by `sys.modules[name] = None`, as tests do, gets told of a submodule of it.
    """
    name = error.name or ""
    hidden = [package for package in packages if package in sys.modules and not sys.modules[package]]
    return name in packages or name.partition(".")[0] in hidden
