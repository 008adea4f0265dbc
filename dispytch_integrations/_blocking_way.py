"""What the blocking emitters share: an emitter with the way to its event loop, and what is carried there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dispytch_integrations._blocking_calls import Calls
from dispytch_integrations._outlet import Outlet
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.message import Message

__all__ = ["PING_SECONDS", "Failed", "Prepared", "Way", "confirmed_of", "longest_timeout"]

PING_SECONDS = 60.0
"""Seconds after which a ping without a timeout is given up, should the loop be stuck; brokers end it long before."""

Prepared = tuple[Outlet, Message]
Failed = tuple[Outlet, Message, Exception]


class Way(NamedTuple):
    """An emitter, and the way to its event loop."""

    emitter: EventEmitter
    calls: Calls


def longest_timeout(prepared: Iterable[Prepared]) -> float | None:
    """Seconds after which the delivery of these messages ends by itself; None: there is no end."""
    longest = 0.0
    for outlet, _ in prepared:
        if outlet.timeout is None:
            return None
        longest = max(longest, outlet.timeout)
    return longest


def confirmed_of(prepared: Sequence[Prepared], failed: Sequence[Failed]) -> Sequence[Prepared]:
    """Those of `prepared` that are not among `failed`."""
    if not failed:
        return prepared
    missing = {id(message) for _, message, _ in failed}
    return [each for each in prepared if id(each[1]) not in missing]
