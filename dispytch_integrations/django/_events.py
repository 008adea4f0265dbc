"""The event classes of a project."""

from __future__ import annotations

from dispytch_integrations import _asyncapi_classes
from dispytch_integrations.events import EventBase

__all__ = ["event_classes"]


def event_classes() -> list[type[EventBase]]:
    """Every event class that has been imported and has a route, by module and name; `events.py` of apps among them.

    Of a class that was defined twice under one name the last one counts; a generic's parametrizations are left out.
    """
    return _asyncapi_classes.event_classes()
