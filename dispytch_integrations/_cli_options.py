"""The options of both command lines, `dispytch-integrations` and `manage.py dispytch`: the same in both.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispytch_integrations.outbox.options import RelayOptions
    from dispytch_integrations.outbox.store import Selection

__all__ = [
    "EXIT_CODES",
    "OUTBOX",
    "RELAY",
    "RELAY_JSON",
    "SELECTORS",
    "Argument",
    "Option",
    "above_zero",
    "duration",
    "relay_options",
    "selection_of",
    "state",
    "whole",
]

STATES = ("waiting", "dead", "sent")

RELAY_JSON = """with --json, one object per line:
  event "progress", and "end" for the last one: time, level, sent, rate (events per second since the line
  before; at the end since the start), failed (attempts), died (given up), waiting, retrying, dead (rows; null:
  not known), oldest_seconds, shards of all_shards, outages (brokers), away (databases), workers, seconds,
  and at the end of --once left
  event "log": time, level, logger, message
"""
_STATS_JSON = """with --json, one object per database:
  database, address, time, waiting, retrying (of the waiting, failed before), dead, sent (kept),
  oldest_seconds (of the waiting), oldest_dead_seconds, brokers (of the waiting, {alias: count}),
  relays ({name: shards}), heartbeat_seconds (since a relay last renewed its lease); null: there is none
"""
_LIST_JSON = """with --json, one object per row:
  database, id, event_id, type, broker, destination, key, state, attempts, age_seconds, next_try_seconds,
  last_error, size (bytes of the payload)
"""
_CHANGE_JSON = """with --json, one object per database:
  database, address, operation, selected, done (how many were changed; 0 in a dry run), dry_run,
  rows (up to 20, as of `list`)
"""
_OPERATION_CODES = """exit codes:
  0  done, or shown
  1  the answer was no
  2  a wrong option or setting, missing tables
  3  the database does not answer
"""
EXIT_CODES = """exit codes:
  0  stopped as asked; with --once: all that was there is delivered
  1  with --once: something is left (a broker is down, a retry, another relay's shards), or was given up
  2  a wrong option or setting, missing tables, a broker that refuses the user
  3  the database does not answer (--once; else the relay waits for it)
  128 and the signal's number: a second signal ended it at once
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `read`: from text to value, raises ValueError; None: it is a flag. `many`: it may be repeated."""

    flag: str
    help: str
    read: Callable[[str], Any] | None = str
    metavar: str = "TEXT"
    many: bool = False
    short: str = ""
    """As "-o"; empty: it has none."""

    @property
    def flags(self) -> tuple[str, ...]:
        """What is written on the command line."""
        return (self.flag, self.short) if self.short else (self.flag,)

    @property
    def name(self) -> str:
        """What the value is called: "max_attempts"."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Argument:
    """What is given by its place. `optional`: it may be left out; `many`: there may be several, in a tuple."""

    name: str
    help: str
    metavar: str
    optional: bool = False
    many: bool = False


def whole(text: str) -> int:
    """A whole number above 0."""
    if re.fullmatch("[0-9]{1,18}", text) is None or int(text) < 1:
        raise ValueError(f"{text!r} is no whole number above 0")
    return int(text)


_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "": 1.0, "ms": 0.001}


def duration(text: str) -> float:
    """Seconds of "90", "2.5", "45s", "30m", "12h", "7d", "2w"."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no duration; write seconds, or 45s, 30m, 12h, 7d")
    return float(match[1]) * _UNITS[match[2]]


def above_zero(text: str) -> float:
    """A duration that is not 0."""
    seconds = duration(text)
    if seconds <= 0:
        raise ValueError("it must be above 0 seconds")
    return seconds


def state(text: str) -> str:
    """The name of a state."""
    if text not in STATES:
        raise ValueError(f"{text!r} is no state; write one of {', '.join(STATES)}")
    return text


_JSON = Option("--json", "One JSON object per line.", None)

RELAY = (
    Option("--once", "Relay what is there, then end.", None),
    Option("--workers", "Processes that share the work (default: 1).", whole, "N"),
    Option("--liveness-file", "Touched after each renewal of the leases, removed at the end.", str, "PATH"),
    Option("--batch-size", "Events read and sent at once (default: 2000).", whole, "N"),
    Option("--lease", "How long a killed relay's share waits for another one (default: 10).", above_zero, "SECONDS"),
    Option("--poll-interval", "Between two looks when nothing happens, at most (default: 1).", above_zero, "SECONDS"),
    Option("--notify", "PostgreSQL wakes it at each commit of an app whose outbox has notify=True.", None),
    Option("--max-attempts", "After as many failures an event is dead (default: 10).", whole, "N"),
    Option("--keep-sent", "Keep what was sent in the table for that long (default: delete it).", duration, "SECONDS"),
    Option("--keep-dead", "Delete dead events after that time (default: never).", duration, "SECONDS"),
    Option("--report-every", "Between two lines of progress (default: 10; on a terminal 1).", above_zero, "SECONDS"),
    Option("--json", "Progress and log as JSON, one object per line.", None),
)
"""Options of `relay`; durations are seconds, or 30m, 12h, 7d."""

_RELAY_OPTIONS = ("batch_size", "lease", "poll_interval", "max_attempts", "keep_sent", "keep_dead")

SELECTORS = (
    Option("--id", "The row's id.", whole, "N", many=True),
    Option("--event-id", "The event's id.", many=True),
    Option("--key", "The ordering key."),
    Option("--type", "The event's type."),
    Option("--broker", "The broker's alias."),
    Option("--destination", "The topic, exchange, stream or channel."),
    Option("--state", "waiting, dead or sent (kept).", state, "STATE", many=True),
    Option("--older-than", "Stored, or dead or sent, before that time: 90s, 30m, 12h, 7d.", duration, "AGE"),
)
"""Which events: all that are given must hold; of one that is repeated, any."""

_LIST = (*SELECTORS, Option("--limit", "How many rows at most (default: 50).", whole, "N"), _JSON)
_OPERATIONS = (
    *SELECTORS,
    Option("--all", "Without any selector: all of them.", None),
    Option("--yes", "Do it; else it is shown, and asked on a terminal.", None),
    _JSON,
)
"""Options of `requeue` and `discard`."""
_PRUNE = (
    Option("--older-than", "Dead or sent for longer than that: 90s, 30m, 12h, 7d.", duration, "AGE"),
    Option("--yes", "Do it; else it is shown, and asked on a terminal.", None),
    _JSON,
)
_STATS = (_JSON,)

_REQUEUE = (
    "Let dead events wait again, with no attempt counted; with --state sent those that were kept, which are then sent "
    "twice."
)
_DISCARD = "Delete dead events; those that wait or are kept with --state waiting or --state sent."

OUTBOX: Mapping[str, tuple[tuple[Option, ...], str, tuple[str, ...]]] = {
    "stats": (
        _STATS,
        "How many events wait, are dead, or are kept; which relays run.",
        (_OPERATION_CODES, _STATS_JSON),
    ),
    "list": (
        _LIST,
        "List events, oldest first. All selectors that are given must hold.",
        (_OPERATION_CODES, _LIST_JSON),
    ),
    "requeue": (_OPERATIONS, _REQUEUE, (_OPERATION_CODES, _CHANGE_JSON)),
    "discard": (_OPERATIONS, _DISCARD, (_OPERATION_CODES, _CHANGE_JSON)),
    "prune": (_PRUNE, "Delete dead and kept events that are older than an age.", (_OPERATION_CODES, _CHANGE_JSON)),
}
"""The commands of `outbox`: their options, their help, and what stands below it."""


def relay_options(given: Mapping[str, Any], base: RelayOptions) -> RelayOptions:
    """`base` with what was given on the command line. Raises ConfigurationError for what does not fit."""
    from dataclasses import replace

    options = {name: given[name] for name in _RELAY_OPTIONS if given.get(name) is not None}
    return replace(base, **options, notify=base.notify or bool(given.get("notify")))


def selection_of(given: Mapping[str, Any]) -> Selection:
    """The selectors that were given; none: everything."""
    from dispytch_integrations.outbox.store import Selection, State

    return Selection(
        ids=tuple(given.get("id") or ()),
        event_ids=tuple(given.get("event_id") or ()),
        key=given.get("key"),
        type=given.get("type"),
        broker=given.get("broker"),
        destination=given.get("destination"),
        states=tuple(State[name.upper()] for name in given.get("state") or ()),
        older_than=given.get("older_than"),
    )
