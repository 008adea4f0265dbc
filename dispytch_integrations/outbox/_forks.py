"""A fork waits until no thread of an outbox is in the middle of something.

SQLite's locks are the whole process's: one that a thread holds in the moment of a fork stays locked in the child for
ever, and with it every connection that the child makes, its web framework's included.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["not_in_a_fork"]

_PATIENCE = 1.0
"""Seconds that a fork waits at most: a call to a database that is away may take its time."""


class _Gate:
    """Either functions run, as many as there are, or processes are forked."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new: in a child, where those that ran do not."""
        self._changed = threading.Condition()
        self._running = self._forking = 0

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._running += 1

    def leave(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def before_fork(self) -> None:
        with self._changed:
            self._forking += 1
            self._changed.wait_for(lambda: not self._running, _PATIENCE)

    def after_fork(self) -> None:
        with self._changed:
            self._forking -= 1
            self._changed.notify_all()


_gate = _Gate()
if hasattr(os, "register_at_fork"):  # Not on Windows, where nothing forks. uWSGI forks without a word.
    os.register_at_fork(before=_gate.before_fork, after_in_parent=_gate.after_fork, after_in_child=_gate.reset)


@contextmanager
def not_in_a_fork() -> Generator[None, None, None]:
    """What runs inside is done before this process forks, unless it takes longer than a second."""
    _gate.enter()
    try:
        yield
    finally:
        _gate.leave()
