"""The event classes of a project."""

from __future__ import annotations

from collections.abc import Iterator

from dispytch_integrations.events import EventBase

__all__ = ["event_classes"]


def event_classes() -> list[type[EventBase]]:
    """Every event class that has been imported and has a route, by module and name; `events.py` of apps among them.

    Of a class that was defined twice under one name the last one counts; a generic's parametrizations are left out.
    """
    found = {(cls.__module__, cls.__qualname__): cls for cls in _below(EventBase)}
    return [found[name] for name in sorted(found)]


def _below(cls: type[EventBase]) -> Iterator[type[EventBase]]:
    for each in cls.__subclasses__():
        generic = each.__pydantic_generic_metadata__
        if getattr(each, "__route__", None) is not None and generic["origin"] is None:
            yield each
        yield from _below(each)
