"""A task of an event loop that sleeps until somebody in any thread wakes it."""

from __future__ import annotations

import asyncio
import os

__all__ = ["Waking"]


class Waking:
    """What a relay's loop waits for. Between `end` and `begin` there is nobody to be woken."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self.event = asyncio.Event()
        """Set while there is something to look at. Of the loop, and of no other thread."""

    def begin(self) -> None:
        """From now on the event loop that runs here is woken."""
        self._loop, self._pid, self.event = asyncio.get_running_loop(), os.getpid(), asyncio.Event()

    def end(self) -> None:
        """It is not any more."""
        self._loop = None

    def wake(self) -> None:
        """From any thread; harmless when nobody sleeps."""
        loop = self._loop
        if loop is None or self._pid != os.getpid():  # A forked child has a copy of the loop, which never runs.
            return
        try:
            if asyncio.get_running_loop() is loop:
                self.event.set()
                return
        except RuntimeError:
            pass
        try:
            loop.call_soon_threadsafe(self.event.set)
        except RuntimeError:
            pass  # The loop is closed: another relay will find it.
