"""System checks of `manage.py check`.

    dispytch.E001   DISPYTCH is missing, empty, or no dict
    dispytch.E002   an unknown key or option, with the nearest known one
    dispytch.E003   a URL or a value that is wrong
    dispytch.E004   a client library is not installed
    dispytch.E005   an event's __broker__ is no alias of DISPYTCH
    dispytch.E006   no broker takes an event's route, or several would
    dispytch.E007   two event classes have the same __event_type__
    dispytch.E008   and further: of the outbox, see `outbox/checks.py`
    dispytch.W001   memory:// with DEBUG=False: events go nowhere

Servers run no checks: middleware, `get_asgi_application` and the first emit raise E001 to E004 themselves, and of the
outbox E008 to E010.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.conf import settings
from django.core import checks

from dispytch_integrations._overriding import overriding
from dispytch_integrations._templates import nearest
from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._events import event_classes
from dispytch_integrations.events import EventBase, event_type

__all__ = ["TAG", "check_dispytch", "register"]

TAG = "dispytch"
"""`manage.py check --tag dispytch` runs these alone."""


def register() -> None:
    """Register the checks with Django."""
    checks.register(check_dispytch, TAG)


def check_dispytch(app_configs: Any = None, **arguments: Any) -> list[checks.CheckMessage]:
    """All that is wrong with the settings and the event classes; opens no connection."""
    read = connections.settings()
    found: list[checks.CheckMessage] = [
        checks.Error(problem.message, hint=problem.hint, id=problem.id) for problem in read.problems
    ]
    found += _memory_in_production(read)
    classes = event_classes()
    # With a wrong setting it is not known what the brokers take.
    if not read.problems and len(read.specs) == len(read.config):
        for cls in classes:
            found += _destination(cls, read)
    found += _duplicate_types(classes)
    return found


def _memory_in_production(read: conf.Read) -> Iterator[checks.CheckMessage]:
    if settings.DEBUG or overriding.active:
        return
    for alias, spec in read.specs.items():
        if spec.backend.transport == "memory":
            yield checks.Warning(
                f"DISPYTCH[{alias!r}] is memory://, and DEBUG is False: its events leave this process nowhere.",
                hint="Give it the URL of a broker; in tests override_brokers('memory') does the same.",
                id="dispytch.W001",
            )


def _destination(cls: type[EventBase], read: conf.Read) -> Iterator[checks.CheckMessage]:
    name = f"{cls.__module__}.{cls.__qualname__}"
    aliases = list(read.specs)
    takers = [alias for alias, spec in read.specs.items() if isinstance(cls.__route__, spec.backend.producer.routes)]
    route = type(cls.__route__).__name__
    broker = cls.__broker__
    if broker is not None and broker not in aliases:
        yield checks.Error(
            f"{name}.__broker__ is {broker!r}, which is no alias of DISPYTCH{nearest(broker, aliases)}.",
            hint=f"There are {', '.join(repr(alias) for alias in aliases)}.",
            obj=cls,
            id="dispytch.E005",
        )
    elif broker is not None and broker not in takers:
        yield checks.Error(
            f"{name} has a {route}, which its broker {broker!r} does not take.",
            hint="Give it another __broker__, or another route.",
            obj=cls,
            id="dispytch.E006",
        )
    elif not takers:
        yield checks.Error(
            f"{name} has a {route}, which no broker of DISPYTCH takes.",
            hint=f"Add a broker of that kind, or give the event another route; there are "
            f"{', '.join(f'{alias!r} ({spec.backend.address})' for alias, spec in read.specs.items())}.",
            obj=cls,
            id="dispytch.E006",
        )
    elif broker is None and len(takers) > 1 and "default" not in takers:
        yield checks.Error(
            f"{name} has a {route}, which {' and '.join(repr(alias) for alias in takers)} would take.",
            hint=f"Write __broker__ = {takers[0]!r} on the class, or call one of them 'default'.",
            obj=cls,
            id="dispytch.E006",
        )


def _duplicate_types(classes: Sequence[type[EventBase]]) -> Iterator[checks.CheckMessage]:
    by_type: dict[str, list[type[EventBase]]] = {}
    for cls in classes:
        by_type.setdefault(event_type(cls), []).append(cls)
    for type_, same in by_type.items():
        if len(same) > 1:
            names = " and ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in same)
            yield checks.Error(
                f"{names} have the same event type {type_!r}: their consumers cannot tell them apart.",
                hint=f'Write __event_type__ = "{same[-1].__module__.partition(".")[0]}.{type_}" on one of them.',
                obj=same[-1],
                id="dispytch.E007",
            )
