"""What a database must implement to hold an outbox; third parties may add one.

`dispytch_integrations.testing.outbox_contract` holds the tests that every store passes. A store over a
synchronous driver runs it on a `dispytch_integrations.outbox.threads.OneThread`.

Times are the database's: a relay whose clock is wrong must not take another one's lease.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, Protocol

from dispytch_integrations.outbox.record import Record

__all__ = [
    "Failure",
    "Fetched",
    "HeldUp",
    "Lease",
    "OutboxStore",
    "Query",
    "Row",
    "Selection",
    "State",
    "Stats",
    "Waiting",
]


class State(IntEnum):
    """What became of a row."""

    WAITING = 0
    """To be sent."""
    DEAD = 1
    """Given up: refused for good, or too often. Requeued or discarded by hand."""
    SENT = 2
    """Confirmed, and kept since retention was asked for."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One shard. `owner`: the relay that has it, None: nobody ever; `left`: seconds until its lease ends by the
    database's clock, below 0: it has ended. `wanted_by`, `wanted_left`: the relay that asks for it, and how long yet.
    """

    shard: int
    owner: str | None
    left: float
    wanted_by: str | None
    wanted_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which waiting rows a relay wants: of these shards and brokers, not newer than `format`, without those that it
    has in hand (`not_ids`) and those of lanes that are held up (`not_lanes`); the `limit` oldest.
    """

    shards: Sequence[int]
    brokers: Sequence[str]
    format: int
    limit: int
    not_ids: Sequence[int] = ()
    not_lanes: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Fetched:
    """Rows in the order of their ids, and the database's time (milliseconds since 1970) for their `next_try_ms`.

    Rows whose next try is still to come are among them: they hold up what stands behind them in their lane.
    """

    records: list[Record]
    now_ms: int


@dataclass(frozen=True, slots=True)
class HeldUp:
    """Lanes that wait for the next try of a message that has failed; those of messages without a key are not told.

    `seconds`: until the first of them may go on; None: there are none.
    """

    lanes: Sequence[int]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that was not delivered. `attempts`: how many count so far; `delay`: seconds until the next one, None: it is
    dead; `error`: what happened, without payload or secrets, at most 500 characters.
    """

    id: int
    attempts: int
    delay: float | None
    error: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Rows that a relay does not read: `unknown`: by broker alias that is none of its own; `newer`: how many have a
    newer format.
    """

    unknown: dict[str, int]
    newer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The state of an outbox. Ages in seconds, None: there is none. `relays`: how many shards each of them holds."""

    waiting: int
    retrying: int
    """Those of the waiting that have failed before."""
    dead: int
    sent: int
    oldest: float | None
    """Age of the oldest waiting row."""
    oldest_dead: float | None
    brokers: dict[str, int] = field(default_factory=dict[str, int])
    """How many wait for which broker, by its alias."""
    relays: dict[str, int] = field(default_factory=dict[str, int])
    """Those whose lease has not ended."""
    heartbeat: float | None = None
    """Seconds since a relay last renewed its lease; None: no relay has ever run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows an operation means; what is None or empty does not matter. All given must hold.

    `ids`: ids of rows; `event_ids`; `key`: the ordering key; `type`, `broker`, `destination`; `states`;
    `older_than`: seconds since it was stored, or, of a dead or sent one, since it became that.
    """

    ids: Sequence[int] = ()
    event_ids: Sequence[str] = ()
    key: str | None = None
    type: str | None = None
    broker: str | None = None
    destination: str | None = None
    states: Sequence[State] = ()
    older_than: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as operators see it: no payload, no headers. `age`: seconds since it was stored; `next_try`: seconds until
    its next try, None: at once or never; `last_error`: None: it has not failed.
    """

    id: int
    event_id: str
    type: str
    broker: str
    destination: str
    ordering_key: str | None
    state: State
    attempts: int
    age: float
    next_try: float | None
    last_error: str | None
    size: int
    """Bytes of the stored payload."""


class OutboxStore(Protocol):
    """The rows and the leases of one outbox. Every method may raise the driver's errors: a relay tries again.

    Called from one event loop, one call at a time or several.
    """

    @property
    def address(self) -> str:
        """The database for logs, without secrets."""
        ...

    async def open(self) -> None:
        """Connect. Raises ConfigurationError when the tables are missing or the database cannot lease."""
        ...

    async def close(self) -> None:
        """Close what `open` has opened. Harmless when not open; after it, `open` may be called again."""
        ...

    async def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, when rows were committed; only for relays with `notify=True`.

        Runs until it is cancelled, on a connection of its own; raises when that is lost, and is called again.
        Raises ConfigurationError where the database or its driver cannot.
        """
        ...

    # -- rows ----------------------------------------------------------------------------------------------------

    async def fetch(self, query: Query) -> Fetched:
        """The oldest waiting rows, all as of one moment, in the order of their ids. Locks nothing."""
        ...

    async def held_up(self, shards: Sequence[int]) -> HeldUp:
        """Which lanes of these shards wait for a next try. Asked now and then, while there are any: thousands of them
        would fill every batch."""
        ...

    async def settle(self, sent: Sequence[int], failed: Sequence[Failure], action: Literal["delete", "keep"]) -> None:
        """Delete what was sent, or keep it as State.SENT; note what failed. Rows that are gone do not matter.

        Must not wait for rows of transactions that are still open.
        """
        ...

    async def waiting(self, brokers: Sequence[str], format: int) -> Waiting:
        """What waits, and is not for a relay with these brokers and this format."""
        ...

    # -- leases --------------------------------------------------------------------------------------------------

    async def leases(self) -> list[Lease]:
        """All shards, in order; makes their rows where they are missing."""
        ...

    async def renew(self, relay: str, seconds: float) -> None:
        """Let the lease of all that `relay` owns end in `seconds` from now."""
        ...

    async def take(self, relay: str, shards: Sequence[int], seconds: float) -> None:
        """Give `relay` those of the shards that nobody has a lease on. What it got shows in `leases`."""
        ...

    async def want(self, relay: str, shards: Sequence[int], seconds: float) -> None:
        """Ask the owners for shards, for as long as `seconds`; those that somebody else asks for are left out."""
        ...

    async def hand_over(self, relay: str, shards: Sequence[int], to: str | None, seconds: float) -> None:
        """Give shards that `relay` owns to another relay, for `seconds`; None: to whoever takes them."""
        ...

    # -- operations ----------------------------------------------------------------------------------------------

    async def stats(self) -> Stats:
        """Counts and ages. Reads the whole index: not for every request."""
        ...

    async def rows(self, selection: Selection, limit: int) -> list[Row]:
        """The selected rows, oldest first."""
        ...

    async def count(self, selection: Selection) -> int:
        """How many are selected."""
        ...

    async def requeue(self, selection: Selection) -> int:
        """Let the selected dead or sent rows wait again, with no attempt counted; return how many. Those that wait
        for their next try are tried at once."""
        ...

    async def discard(self, selection: Selection) -> int:
        """Delete the selected rows; return how many. They are not sent."""
        ...
