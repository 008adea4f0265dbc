"""Leases: relays share the shards, nobody has one twice, and what a killed relay held goes on when its lease ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations._sqlalchemy_store import AsyncStore
from dispytch_integrations.outbox.leases import Leases
from dispytch_integrations.outbox.record import SHARDS
from tests.support.outboxes import (
    Database,
    FakeBackend,
    Watched,
    eventually,
    record,
    relaying,
    started,
    temporary_database,
)

ALL = frozenset(range(SHARDS))
NOTHING = frozenset[int]()


@pytest.fixture(scope="module")
def _database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def database(_database: Database) -> Database:
    _database.empty()
    return _database


@pytest.fixture
async def store(database: Database) -> AsyncIterator[AsyncStore]:
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    store = AsyncStore(engine)
    await store.open()
    yield store
    await store.close()
    await engine.dispose()


async def _turn(*relays: Leases, busy: frozenset[int] = NOTHING) -> None:
    """Each of them renews, and gives away what it is asked for, as a relay does."""
    for leases in relays:
        await leases.renew()
        await leases.give_away(busy)


def _shares(*relays: Leases) -> list[int]:
    """How many shards each has. Fails when one of them belongs to two."""
    held = [shard for leases in relays for shard in leases.held]
    assert len(held) == len(set(held)), "a shard has two relays"
    return [len(leases.held) for leases in relays]


# -- sharing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 20, 70])
async def test_relays_share_fairly(store: AsyncStore, count: int) -> None:
    """Four processes are started so that each does a quarter of the work, whichever of them came first."""
    relays = [Leases(store, f"relay{number}", 60.0) for number in range(count)]
    await _turn(relays[0])
    assert _shares(relays[0]) == [SHARDS], "alone it has all"
    for _ in range(7):  # Less than two leases.
        await _turn(*relays)
    shares = _shares(*relays)
    assert sum(shares) == SHARDS, "a shard has no relay"
    assert min(shares) >= SHARDS // count, shares
    assert max(shares) - min(shares) <= 2, shares


async def test_what_a_relay_gives_back_is_taken_by_the_others(store: AsyncStore) -> None:
    """A deploy stops one of three: its part goes on at the next renewal of the others, not after a lease."""
    first, second, third = relays = [Leases(store, name, 60.0) for name in ("first", "second", "third")]
    for _ in range(4):
        await _turn(*relays)
    await first.release(NOTHING)
    assert _shares(*relays)[0] == 0
    for _ in range(2):
        await _turn(second, third)
    assert _shares(second, third) == [32, 32]


async def test_what_is_in_hand_is_not_given_away(store: AsyncStore) -> None:
    """A batch under way belongs to its relay until it is settled: the other one would send it a second time."""
    first, second = Leases(store, "first", 60.0), Leases(store, "second", 60.0)
    await first.renew()
    await second.renew()
    await first.renew()
    assert first.is_asked
    busy = ALL - {next(iter(ALL - first.usable(0.0)))}
    await first.give_away(busy)
    await second.renew()
    assert _shares(first, second) == [SHARDS - 1, 1]
    await first.give_away(NOTHING)
    await second.renew()
    assert _shares(first, second) == [32, 32]
    assert not first.is_asked


async def test_what_is_asked_for_takes_on_nothing_new(store: AsyncStore) -> None:
    """Under load there is always something in hand: without a stop the other relay would wait for ever."""
    first, second = Leases(store, "first", 60.0), Leases(store, "second", 60.0)
    await first.renew()
    await second.renew()
    assert first.usable(0.0) == ALL
    await first.renew()
    assert len(first.usable(0.0)) == 32
    assert first.held == ALL


async def test_a_shard_that_is_handed_over_is_never_free(store: AsyncStore, database: Database) -> None:
    """A third relay must not come between those two, and the one that gets it need not hurry."""
    first, second, third = (Leases(store, name, 60.0) for name in ("first", "second", "third"))
    await first.renew()
    await second.renew()
    await _turn(first)
    [(handed, left)] = database.all(
        "select count(*), min(until_ms) - cast(extract(epoch from clock_timestamp()) * 1000 as bigint) "
        "from dispytch_outbox_shard where owner = 'second'"
    )
    assert handed == 32
    assert left > 55_000
    await third.renew()
    assert _shares(first, third) == [32, 0]


async def test_what_a_relay_asked_for_before_it_died_comes_back(store: AsyncStore) -> None:
    """A relay is killed while shards are on their way to it: they must not be stuck with its name on them."""
    first, dead = Leases(store, "first", 0.6), Leases(store, "dead", 0.6)
    await first.renew()
    await dead.renew()
    await _turn(first)
    assert len(first.held) == 32
    begun = time.monotonic()
    while len(first.held) < SHARDS:
        assert time.monotonic() - begun < 3
        await asyncio.sleep(first.interval)
        await _turn(first)
    assert time.monotonic() - begun > 0.3
    assert first.usable(0.0) == ALL, "it still waits for the dead"


# -- a killed relay ------------------------------------------------------------------------------------------------


async def test_a_killed_relays_events_go_on_within_its_lease(database: Database, store: AsyncStore) -> None:
    """kill -9 of one process costs its keys a pause of a lease, and nobody has to do anything."""
    dead, backend = Leases(store, "dead", 1.2), FakeBackend()
    begun = time.monotonic()
    await dead.renew()  # It is never heard of again.
    database.insert([record(number, f"key{number}") for number in range(20)])
    async with started(default=backend) as brokers:
        async with relaying(AsyncStore(store._engine), brokers, lease=1.2, poll_interval=0.1) as relay:
            await asyncio.sleep(0.6)
            assert backend.fake.sent == [], "the dead one might still be sending them"
            await eventually(lambda: len(backend.fake.sent) == 20, 5)
            waited = time.monotonic() - begun
            assert relay.shards == SHARDS
    assert waited >= 1.1
    assert waited < 1.2 * 1.25 + 1.5, "a lease, a quarter of one until the next look, and what a slow machine takes"


async def test_two_relays_send_everything_once_while_they_come_and_go(database: Database, store: AsyncStore) -> None:
    """Scaling up and down is an ordinary day: no duplicates, no gaps, and the order of each key."""
    backend = FakeBackend()
    backend.fake.delay = lambda message: 0.002
    written = 0

    def write(count: int) -> None:
        nonlocal written
        database.insert([record(number, f"key{number % 40}") for number in range(written, written + count)])
        written += count

    async with started(default=backend) as brokers:
        async with relaying(AsyncStore(store._engine), brokers, batch_size=20, poll_interval=0.05) as first:
            await asyncio.to_thread(write, 400)
            async with relaying(AsyncStore(store._engine), brokers, batch_size=20, poll_interval=0.05) as second:
                while min(first.shards, second.shards) < 32:
                    await asyncio.to_thread(write, 40)
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(write, 400)
                await eventually(lambda: first.counts.sent > 400 and second.counts.sent > 40)
            await asyncio.to_thread(write, 200)
            await eventually(lambda: len(backend.fake.sent) >= written)
            await eventually(lambda: first.shards == SHARDS)
    assert sorted(backend.fake.numbers()) == list(range(written))
    for key in range(40):
        numbers = backend.fake.numbers(f"key{key}")
        assert numbers == sorted(numbers), key


# -- clocks --------------------------------------------------------------------------------------------------------


def _shift_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(seconds * 1e9))


@pytest.mark.parametrize("seconds", [-86_400.0, 86_400.0])
async def test_a_host_whose_clock_is_wrong_takes_nobodys_lease(
    database: Database, store: AsyncStore, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of hosts differ, and are set: a relay that is a day ahead must neither steal shards nor lose its own."""
    backend, good = FakeBackend(), Leases(store, "good", 60.0)
    await good.renew()
    _shift_clock(monkeypatch, seconds)
    wrong = Leases(store, "wrong", 60.0)
    await wrong.renew()
    await wrong.renew()
    assert _shares(good, wrong) == [SHARDS, 0]
    await _turn(good, wrong)
    assert _shares(good, wrong) == [32, 32]
    await good.release(NOTHING)
    await wrong.release(NOTHING)
    # Its retries come when they are due, and what it stores does not look as if it came from the future.
    refused = [0]
    backend.fake.answer = lambda message: ValueError("no") if refused and refused.pop() == 0 else None
    database.insert([record(0, "anna"), record(1, "anna")])
    async with started(default=backend) as brokers:
        async with relaying(AsyncStore(store._engine), brokers, backoff=0.3, poll_interval=0.1):
            await eventually(lambda: backend.fake.numbers() == [0, 1], 5)
    first, second = backend.fake.attempts(0)
    assert 0.2 < second - first < 3


async def test_a_clock_that_jumps_ends_and_prolongs_no_lease(
    store: AsyncStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NTP sets a clock, a virtual machine wakes up: what a relay believes rests on time that passes alone."""
    leases = Leases(store, "relay", 0.5)
    await leases.renew()
    _shift_clock(monkeypatch, 3600.0)
    assert leases.held == ALL
    _shift_clock(monkeypatch, -7200.0)
    await asyncio.sleep(0.55)
    assert leases.held == NOTHING


async def test_a_lease_counts_from_before_it_was_asked_for(store: AsyncStore) -> None:
    """The answer of a slow database comes late: by then a part of the lease is gone, and the relay must know it."""
    watched: Any = Watched(store)
    watched.after = {name: (lambda: asyncio.sleep(0.2)) for name in ("renew", "take", "leases")}
    leases = Leases(watched, "relay", 1.0)
    asked_at = time.monotonic()
    await leases.renew()
    took = time.monotonic() - asked_at
    assert took > 0.6
    assert leases.usable(1.0 - took + 0.05) == NOTHING
    assert leases.held == ALL
    await asyncio.sleep(max(asked_at + 1.01 - time.monotonic(), 0))
    assert leases.held == NOTHING


async def test_what_was_lost_meanwhile_is_read_again(store: AsyncStore) -> None:
    """A relay that was suspended holds rows in memory that another one has sent since: they are not to be trusted."""
    suspended, other = Leases(store, "suspended", 0.4), Leases(store, "other", 0.4)
    await suspended.renew()
    assert suspended.take_new() == ALL
    await suspended.renew()
    assert suspended.take_new() == NOTHING, "renewed in time, it has them still"
    await asyncio.sleep(0.5)
    await other.renew()
    await suspended.renew()
    assert _shares(suspended, other) == [0, SHARDS]
    await asyncio.sleep(0.5)
    await suspended.renew()
    assert suspended.held == ALL
    assert suspended.take_new() == ALL
