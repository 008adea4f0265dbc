"""Holding events back: for imports, data migrations and tests."""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from dispytch_integrations._decorating import Decorating
from dispytch_integrations._prepare import require_route
from dispytch_integrations.events import EventBase

__all__ = ["HeldBack", "held_back", "suppress_emits"]

_innermost: ContextVar[HeldBack | None] = ContextVar("dispytch_held_back", default=None)

_Entered = tuple["HeldBack | None", Any]
_entered: ContextVar[_Entered | None] = ContextVar("dispytch_held_back_entered", default=None)
"""What counted before the innermost block was entered, and the same of the block around it."""


class HeldBack:
    """What `suppress_emits` has held back: `count` in all, `by_type` per event class."""

    def __init__(self) -> None:
        self.by_type: Counter[type[EventBase]] = Counter()

    @property
    def count(self) -> int:
        """How many events were not sent."""
        return self.by_type.total()

    def add(self, event: EventBase) -> None:
        """Count an event. Raises RouteError for what is no event, as an emit does."""
        require_route(type(event), event)
        self.by_type[type(event)] += 1

    def __repr__(self) -> str:
        each = ", ".join(f"{cls.__qualname__}: {count}" for cls, count in self.by_type.most_common())
        return f"<HeldBack {self.count}{f' ({each})' if each else ''}>"


def held_back() -> HeldBack | None:
    """Who counts the events that are not to be sent here; None: they are sent."""
    return _innermost.get()


class suppress_emits(Decorating[HeldBack]):  # noqa: N801 - as Django's override_settings
    """Send nothing inside the block, in this thread or task; a decorator, too.

        with suppress_emits() as held:
            import_orders(file)
        print(held.count, "events were not sent")

    Nothing of `emit`, `emit_on_commit` and `@emits` goes out, whatever brokers are configured. Events that were given
    to `emit_on_commit` before the block are sent as their transaction says. Threads started inside are not affected.
    """

    def __enter__(self) -> HeldBack:
        held = HeldBack()
        # Kept in the context itself: one object may be entered by several tasks, and within itself. Without a token:
        # a fixture or generator may be left in a copy of the context that it was entered in.
        _entered.set((_innermost.get(), _entered.get()))
        _innermost.set(held)
        return held

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entry = _entered.get()
        if entry is not None:
            before, around = entry
            _innermost.set(before)
            _entered.set(around)
