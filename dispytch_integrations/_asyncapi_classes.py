"""Which event classes there are: all that are imported, those of a package, or those that are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from types import ModuleType
from typing import TypeGuard, cast

from dispytch_integrations._prepare import require_route
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.events import EventBase

__all__ = ["Events", "event_classes"]

Events = Iterable[type[EventBase]] | ModuleType | str | None
"""Classes, a module, its dotted name, or None for all that are imported."""


def event_classes(events: Events = None) -> list[type[EventBase]]:
    """The event classes with a route, by module and name.

    `events`: classes; a module, or its dotted name, which is imported: the classes that are defined in it or below it,
    and those that it has imported by name, itself or with their module; None: every class that has been imported.

    Of a class that was defined twice under one name the last one counts; a generic's parametrizations are left out,
    unless they are given, or bound to a name in the module (`OrderEnvelope = Envelope[Order]`).

    Raises ConfigurationError for a module that cannot be found or has no events, RouteError for a class that is no
    event or has no route.
    """
    if events is None:
        return _ordered(_named(_below(EventBase)))
    if isinstance(events, (str, ModuleType)):
        return _of_module(_imported(events) if isinstance(events, str) else events)
    given: object = (events,) if isinstance(events, type) else events
    if not isinstance(given, Iterable):
        raise ConfigurationError(
            f"a {type(given).__name__} names no events; give a list of event classes, or a module such as 'shop.events'"
        )
    classes = list(dict.fromkeys(cast("Iterable[type[EventBase]]", given)))
    for cls in classes:
        if not isinstance(cls, type):
            raise ConfigurationError(
                f"the catalogue is made of event classes, not of a {type(cls).__name__}; write [OrderPlaced, ...]"
            )
        require_route(cls)
    return _ordered(classes)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        # A module that is there, and imports one that is not, says so itself.
        if exc.name is None or not (name == exc.name or name.startswith(f"{exc.name}.")):
            raise
        raise ConfigurationError(
            f"there is no module {exc.name!r}, so {name!r} cannot be imported; write its dotted name, as in "
            f"'shop.events', and run it where `python -c 'import {name.partition('.')[0]}'` works"
        ) from exc
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(f"{name!r} is no dotted name of a module; write for example 'shop.events'") from exc


def _of_module(module: ModuleType) -> list[type[EventBase]]:
    name = module.__name__
    inside = (name, f"{name}.")
    bound = list(vars(module).values())
    classes = [value for value in bound if _is_event(value)]
    modules = {value.__name__ for value in bound if isinstance(value, ModuleType)}
    below = [
        cls
        for cls in _named(_below(EventBase))
        if cls.__module__ == inside[0] or cls.__module__.startswith(inside[1]) or cls.__module__ in modules
    ]
    found = _ordered(dict.fromkeys([*below, *classes]))
    if not found:
        raise ConfigurationError(
            f"the module {name!r} has no event classes: none that derives from EventBase and has a __route__ is "
            f"defined in it or below it, or imported there by name; name the module that has, or import it there"
        )
    return found


def _is_event(value: object) -> TypeGuard[type[EventBase]]:
    return isinstance(value, type) and issubclass(value, EventBase) and getattr(value, "__route__", None) is not None


def _named(classes: Iterable[type[EventBase]]) -> list[type[EventBase]]:
    """One class for each name, the last."""
    return list({(cls.__module__, cls.__qualname__): cls for cls in classes}.values())


def _ordered(classes: Iterable[type[EventBase]]) -> list[type[EventBase]]:
    return sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))


def _below(cls: type[EventBase]) -> Iterator[type[EventBase]]:
    for each in cls.__subclasses__():
        generic = each.__pydantic_generic_metadata__
        if getattr(each, "__route__", None) is not None and generic["origin"] is None:
            yield each
        yield from _below(each)
