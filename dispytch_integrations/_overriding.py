"""What is put on brokers from outside: other ones in tests, and hooks of tests and of OpenTelemetry.

Looked at when settings are read, when an outlet is made, and after a commit: nothing of it costs an emit anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from dispytch_integrations.hooks import Hook
    from dispytch_integrations.message import Message

__all__ = ["AfterCommit", "CommitState", "Overriding", "overriding"]

CommitState = Literal["pending", "stored", "committed", "under way", "rolled back"]
"""Of a message that waits for a transaction. "stored": pending, and in an outbox, which a test may relay at any time.
"under way": committed, and left to an event loop that has perhaps not come to it yet."""


class AfterCommit(Protocol):
    """Messages that wait for the end of a transaction. `advice`: what to write so that it ends in a test."""

    advice: str

    def states(self) -> Iterable[tuple[Message, CommitState]]:
        """What has become of each."""
        ...


class Overriding:
    """What is in force now."""

    def __init__(self) -> None:
        self.load: Callable[[Any, Mapping[str, Any]], list[Any]] | None = None
        """Reads settings instead of `settings.load_brokers`; None: nothing is replaced."""
        self.hooks: list[Hook] = []
        """Hooks that each new outlet has beside its own."""
        self.observers: list[Callable[[AfterCommit], None]] = []
        """Told of each message that waits for a commit."""
        self.parts: list[Callable[[], AbstractContextManager[Callable[[], object]]]] = []
        """Entered with each override, by integrations that keep brokers of their own (Django); each gives a function
        that waits until all that was left to its event loop is delivered."""
        self.opened: WeakSet[Any] = WeakSet()
        """Brokers that have read their settings."""

    @property
    def active(self) -> bool:
        """Are brokers replaced?"""
        return self.load is not None

    def tell(self, waiting: AfterCommit) -> None:
        """Tell the observers."""
        for observer in self.observers:
            observer(waiting)


overriding = Overriding()
"""That of this process."""
