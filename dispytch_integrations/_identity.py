"""Who an event is: an id made once per instance."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispytch_integrations.events import EventBase

__all__ = ["event_id", "uuid7"]


def event_id(event: EventBase) -> str:
    """The identity of this event object: a UUID of version 7 (RFC 9562), as text.

    Made once per instance, at first use: emitting the object again repeats it, so that consumers can drop the
    duplicate. A copy, an unpickled or an equal event has an id of its own.
    """
    try:
        known: str = event._dispytch_event_id  # type: ignore[attr-defined]
    except AttributeError:
        known = uuid7()
        object.__setattr__(event, "_dispytch_event_id", known)
    return known


def uuid7() -> str:
    """A UUID of version 7 (RFC 9562) as text."""
    # By hand: uuid.UUID objects cost 4.5 µs, this 1. Ordered by time, so that an index over ids stays compact.
    text = f"{time.time_ns() // 1_000_000:012x}7{os.urandom(10).hex()}"
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{variant}{text[17:20]}-{text[20:32]}"
