"""What a command line names: modules and objects of the user's code, and brokers by their URLs."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from dispytch_integrations.errors import ConfigurationError

__all__ = ["config_of", "imported", "imported_module", "or_traceback", "urls_of"]

_WITH_ALIAS = re.compile(r"(?P<alias>[A-Za-z_][A-Za-z0-9_.-]*)=(?P<url>[A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL)


def imported(what: str, path: str, example: str, candidates: Callable[[str], str] = lambda path: "") -> object:
    """The object of `module:name`; the working directory is where modules are looked for, too.

    `what`: what it is given for, as errors call it ("--app"). `candidates`: words about what would do instead.
    Raises ConfigurationError; what the module itself raises is shown in full before.
    """
    if "://" in path:
        raise ConfigurationError(f"{what} takes module:name, as in {example}, not a URL")
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ConfigurationError(f"{what} takes module:name, as in {example}, not {path!r}")
    found: object = imported_module(what, module)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigurationError(f"{module} has no {name!r}{candidates(path)}") from None
    return found


def imported_module(what: str, module: str) -> ModuleType:
    """The module of that name. As `imported`."""
    if sys.path[:1] != [os.getcwd()]:  # Further down an installed package of the same name would come first.
        sys.path.insert(0, os.getcwd())
    try:
        with redirect_stdout(sys.stderr):  # What it prints is none of our output, which may be JSON.
            return import_module(module)
    except SystemExit as exc:
        raise ConfigurationError(
            f"{what} {module} ended the program (exit code {exc.code!r}) as it was imported; put what it does below "
            f'`if __name__ == "__main__":`'
        ) from None
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module}.".startswith(f"{exc.name}."):
            or_traceback(f"{what} {module}", partial(_raise, exc))
        raise ConfigurationError(
            f"there is no module {exc.name!r} (looked for in {os.getcwd()} and where Python looks)"
        ) from None
    except Exception as exc:
        or_traceback(f"{what} {module}", partial(_raise, exc))
        raise


def _raise(error: Exception) -> None:
    raise error


def or_traceback(what: str, function: Callable[[], object]) -> object:
    """What the function returns. What it raises is the app's own trouble, shown in full."""
    try:
        return function()
    except ConfigurationError:
        raise
    except Exception as exc:
        traceback.print_exception(exc)
        raise ConfigurationError(f"{what} raised {type(exc).__name__}, see above") from exc


def urls_of(texts: Sequence[str], what: str = "--broker-url") -> dict[str, str]:
    """URLs by alias, from `URL` and `alias=URL`. Raises ConfigurationError."""
    found: dict[str, str] = {}
    for text in texts:
        match = _WITH_ALIAS.fullmatch(text)
        alias, url = (match["alias"], match["url"]) if match else ("default", text)
        if alias in found:
            raise ConfigurationError(f"{what} names {alias!r} twice; write another alias=URL")
        found[alias] = url
    return found


def config_of(texts: Sequence[str], more: str = ", or --app") -> Mapping[str, Any] | None:
    """The brokers of --broker-url, as `connect` takes them; None: those of DISPYTCH_URL.

    `more`: what else could be written. Raises ConfigurationError.
    """
    if texts:
        return urls_of(texts)
    if not os.environ.get("DISPYTCH_URL", "").strip():
        raise ConfigurationError(f"there is no broker: write --broker-url kafka://host:9092, or set DISPYTCH_URL{more}")
    return None
