"""Who an event is: an id made once per instance."""

from __future__ import annotations

import os
import time
from collections import deque
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from dispytch_integrations.events import EventBase

__all__ = ["event_id", "now_rfc3339", "uuid7"]


def event_id(event: EventBase) -> str:
    """The identity of this event object: a UUID of version 7 (RFC 9562), as text.

    Made once per instance, at first use: emitting the object again repeats it, so that consumers can drop the
    duplicate. A copy, an unpickled or an equal event has an id of its own.
    """
    try:
        return cast("str", _id_slot(event))
    except AttributeError:
        made = uuid7()
        try:
            object.__setattr__(event, "_dispytch_event_id", made)
        except AttributeError:
            raise TypeError(f"a {type(event).__name__} is not an event; events derive from EventBase") from None
        return made


_id_slot = attrgetter("_dispytch_event_id")


class _Randomness:
    """Random parts of ids, drawn many at a time: a call of os.urandom costs more than all the rest of an id."""

    __slots__ = ("parts", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.parts: deque[str] = deque()

    def take(self) -> str:
        """The next part. Atomic: two threads never get the same."""
        if self.pid != os.getpid():
            # A forked child must not repeat its parent's ids; fork hooks do not run under uWSGI.
            self.parts, self.pid = deque(), os.getpid()
        while True:
            try:
                return self.parts.pop()
            except IndexError:
                self._refill()

    def _refill(self) -> None:
        drawn = os.urandom(10 * 128).hex()
        self.parts.extend([drawn[start : start + 20] for start in range(0, len(drawn), 20)])


_randomness = _Randomness()


def uuid7() -> str:
    """A UUID of version 7 (RFC 9562) as text: ordered by time, so that an index over ids stays compact."""
    part = _randomness.take()
    now = f"{time.time_ns() // 1_000_000:012x}"
    return f"{now[:8]}-{now[8:]}-7{part[:3]}-{_VARIANT[part[3]]}{part[4:7]}-{part[8:]}"


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def now_rfc3339() -> str:
    """The time in UTC with microseconds, as RFC 3339 writes it and CloudEvents asks for."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    return f"{_second(seconds)}.{microseconds:06d}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
