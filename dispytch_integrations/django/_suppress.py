"""Holding events back: for imports, data migrations and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from dispytch_integrations._prepare import require_route
from dispytch_integrations.events import EventBase

__all__ = ["HeldBack", "held_back", "suppress_emits"]

_innermost: ContextVar[HeldBack | None] = ContextVar("dispytch_held_back", default=None)


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
        require_route(type(event))
        self.by_type[type(event)] += 1

    def __repr__(self) -> str:
        each = ", ".join(f"{cls.__qualname__}: {count}" for cls, count in self.by_type.most_common())
        return f"<HeldBack {self.count}{f' ({each})' if each else ''}>"


def held_back() -> HeldBack | None:
    """Who counts the events that are not to be sent here; None: they are sent."""
    return _innermost.get()


@contextmanager
def suppress_emits() -> Generator[HeldBack, None, None]:
    """Send nothing inside the block, in this thread or task; a decorator, too.

        with suppress_emits() as held:
            import_orders(file)
        print(held.count, "events were not sent")

    Nothing of `emit`, `emit_on_commit` and `@emits` goes out, whatever brokers are configured. Events that were given
    to `emit_on_commit` before the block are sent as their transaction says. Threads started inside are not affected.
    """
    held = HeldBack()
    token = _innermost.set(held)
    try:
        yield held
    finally:
        _innermost.reset(token)
