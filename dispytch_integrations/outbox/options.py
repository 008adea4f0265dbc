"""How a relay works: its options, and whether they fit each other and the brokers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from dispytch_integrations._broker import Broker
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.record import Codec

__all__ = ["MOST", "RelayOptions", "needed_time"]

logger = logging.getLogger("dispytch_integrations.outbox")

_LONGEST = 1e12
MOST: Mapping[str, float] = {
    **dict.fromkeys(("batch_size", "max_attempts"), 2**31 - 1),
    **dict.fromkeys(("lease", "poll_interval", "backoff", "max_backoff", "keep_sent", "keep_dead"), _LONGEST),
}
"""Of each option that is a number: beyond that databases cannot count, in milliseconds, and the relay would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOptions:
    """How a relay works.

    `batch_size`: rows read and sent at once. `lease`: seconds a shard stays this relay's without being renewed: what a
    killed relay held goes on after that time. `poll_interval`: seconds between two looks when nothing happens and
    nobody wakes it, at most; it begins shorter. `max_attempts`: after as many failures a message is dead.
    `backoff`, `max_backoff`: seconds before the second attempt, doubled each time up to the latter, ±25 %.
    `keep_sent`: seconds a sent row stays in the table; None: it is deleted at once. `keep_dead`: seconds after which
    dead rows are deleted; None: never. `codec`: that of the writers. `notify`: PostgreSQL wakes the relay at each
    commit, over a connection of its own; it serializes commits, so a busy database does better without.
    """

    batch_size: int = 2000
    lease: float = 10.0
    poll_interval: float = 1.0
    max_attempts: int = 10
    backoff: float = 1.0
    max_backoff: float = 300.0
    keep_sent: float | None = None
    keep_dead: float | None = None
    codec: Codec | None = None
    notify: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number above 0"
            for name in ("batch_size", "max_attempts")
            if not _is_number(getattr(self, name), int) or getattr(self, name) <= 0
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}; it must be a number of seconds above 0"
            for name in ("lease", "poll_interval", "backoff", "max_backoff")
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}; it must be 0 or more seconds, or None"
            for name in ("keep_sent", "keep_dead")
            if getattr(self, name) is not None and not (_is_number(getattr(self, name)) and getattr(self, name) >= 0)
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}, which is more than a database can count; write less"
            for name, most in MOST.items()
            if _is_number(getattr(self, name)) and getattr(self, name) > most
        ]
        codec: object = self.codec
        if isinstance(codec, type):
            problems.append(f"codec is the class {codec.__name__}; write codec={codec.__name__}()")
        elif codec is not None and not (callable(getattr(codec, "encode", None)) and hasattr(codec, "decode")):
            problems.append(f"codec is a {type(codec).__name__}, which has no encode() and decode(); see Codec")
        if problems:
            raise ConfigurationError(problems)


def _is_number(value: object, kind: type = object) -> bool:
    return isinstance(value, (int, float)) and isinstance(value, kind) and not isinstance(value, bool)


def needed_time(brokers: Mapping[str, Broker], options: RelayOptions) -> float:
    """Seconds that a lease must last when a delivery begins. Raises ConfigurationError when it never does."""
    longest = 0.0
    for alias, broker in brokers.items():
        if broker.timeout is None:
            raise ConfigurationError(
                f"broker {alias!r} has timeout=None, and a relay must know when a delivery is over: a lease lasts "
                f"{options.lease:g} s; give it a timeout"
            )
        longest = max(longest, broker.timeout)
    left = options.lease * 0.75  # renewed each quarter
    if longest > left:
        raise ConfigurationError(
            f"a timeout of {longest:g} s does not fit into a lease of {options.lease:g} s, which is renewed each "
            f"{options.lease / 4:g} s: the relay could never send; write lease={longest * 2:g}, or a shorter timeout"
        )
    if longest > options.lease / 2:
        logger.warning(
            "a timeout of %g s leaves little of a lease of %g s: a slow database stops the relay; write lease=%g",
            *(longest, options.lease, longest * 2),
        )
    return longest
