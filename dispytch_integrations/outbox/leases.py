"""Which shards belong to this relay: taken, renewed, shared with the others, and given back.

A relay believes in a lease until the time it ends by its own monotonic clock, counted from before the statement that
renewed it: it stops no later than the database would let another one begin.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable

from dispytch_integrations.outbox.record import SHARDS
from dispytch_integrations.outbox.store import Lease, OutboxStore

__all__ = ["Leases"]

logger = logging.getLogger("dispytch_integrations.outbox")


class Leases:
    """The leases of one relay. `seconds`: how long one lasts; it is renewed four times in that time."""

    def __init__(self, store: OutboxStore, relay: str, seconds: float) -> None:
        self.relay = relay
        self.seconds = seconds
        self.interval = seconds / 4
        self.renewed_at: float | None = None
        """When it was last renewed, on the monotonic clock; None: not yet."""
        self._store = store
        self._held: dict[int, float] = {}
        self._wanted: dict[int, str] = {}
        self._new: set[int] = set()

    @property
    def held(self) -> frozenset[int]:
        """The shards whose lease has not ended."""
        now = time.monotonic()
        return frozenset(shard for shard, until in self._held.items() if until > now)

    def usable(self, seconds: float) -> frozenset[int]:
        """The shards that stay ours for that long, and that no other relay waits for."""
        end = time.monotonic() + seconds
        return frozenset(shard for shard, until in self._held.items() if until >= end and shard not in self._wanted)

    async def renew(self) -> None:
        """Renew what is held, take what is free, ask for a fair share, and see who asks us."""
        started = time.monotonic()
        await self._store.renew(self.relay, self.seconds)
        leases = await self._store.leases()
        others = _others(leases, self.relay)
        mine = [lease.shard for lease in leases if lease.owner == self.relay]
        free = [lease.shard for lease in leases if lease.owner != self.relay and _is_free(lease)]
        # Rounded up: shards that are left over go to who comes first.
        share = -(-SHARDS // (len(others) + 1))
        taken = free if not others else free[: max(share - len(mine), 0)]
        if taken:
            await self._store.take(self.relay, taken, self.seconds)
            leases = await self._store.leases()
            mine = [lease.shard for lease in leases if lease.owner == self.relay]
        self._note(mine, leases, started + self.seconds)
        if not free:
            await self._ask(leases, SHARDS // (len(others) + 1) - len(mine))
        self.renewed_at = started

    def _note(self, mine: Iterable[int], leases: Iterable[Lease], until: float) -> None:
        before, now = len(self._held), time.monotonic()
        self._held, old = dict.fromkeys(mine, until), self._held
        self._new.update(shard for shard in self._held if old.get(shard, 0.0) <= now)
        self._wanted = {
            lease.shard: lease.wanted_by
            for lease in leases
            if lease.shard in self._held and lease.wanted_by not in (None, self.relay) and lease.wanted_left > 0
        }
        if len(self._held) != before:
            logger.info("relay %s holds %d of %d shards", self.relay, len(self._held), SHARDS)

    async def _ask(self, leases: Iterable[Lease], missing: int) -> None:
        """Ask those that hold most for what is missing to a fair share."""
        if missing <= 0:
            return
        theirs: dict[str, list[int]] = {}
        asked = 0
        for lease in leases:
            if lease.wanted_by == self.relay and lease.wanted_left > 0:
                asked += 1
            elif lease.owner not in (None, self.relay) and (lease.wanted_by is None or lease.wanted_left <= 0):
                theirs.setdefault(str(lease.owner), []).append(lease.shard)
        wanted: list[int] = []
        while theirs and asked + len(wanted) < missing:
            richest = max(theirs, key=lambda owner: len(theirs[owner]))
            wanted.append(theirs[richest].pop())
            if not theirs[richest]:
                del theirs[richest]
        if wanted:
            await self._store.want(self.relay, wanted, self.seconds)

    def take_new(self) -> frozenset[int]:
        """The shards that have come since the last call, or come back: what was read of them before may be outdated."""
        new = frozenset(self._new)
        self._new.clear()
        return new

    async def give_away(self, busy: frozenset[int]) -> None:
        """Hand over what others wait for, unless something of it is still in hand."""
        ready: dict[str, list[int]] = {}
        for shard, relay in self._wanted.items():
            if shard not in busy:
                ready.setdefault(relay, []).append(shard)
        for relay, shards in ready.items():
            await self._store.hand_over(self.relay, shards, relay, self.seconds)
            for shard in shards:
                self._held.pop(shard, None)
                self._wanted.pop(shard, None)
            logger.info("relay %s handed %d shards over to %s", self.relay, len(shards), relay)

    @property
    def is_asked(self) -> bool:
        """Does another relay wait for some of the shards?"""
        return bool(self._wanted)

    async def release(self, busy: frozenset[int]) -> None:
        """Give back all but what is still in hand, at the end."""
        self._held.clear()
        self._wanted.clear()
        # Of all: what another relay has handed over since the last renewal is ours, too.
        await self._store.hand_over(
            self.relay, [shard for shard in range(SHARDS) if shard not in busy], None, self.seconds
        )


def _is_free(lease: Lease) -> bool:
    return lease.owner is None or lease.left < 0


def _others(leases: Iterable[Lease], me: str) -> Counter[str]:
    """The relays that live: those that hold a lease, and those that ask for one."""
    found: Counter[str] = Counter()
    for lease in leases:
        if lease.owner is not None and lease.owner != me and lease.left >= 0:
            found[lease.owner] += 1
        if lease.wanted_by is not None and lease.wanted_by != me and lease.wanted_left >= 0:
            found.setdefault(lease.wanted_by, 0)
    return found
