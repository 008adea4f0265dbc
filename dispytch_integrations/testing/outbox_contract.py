"""What a store of an outbox promises, as tests: the stores of this package and those of third parties pass the same.

A store's test module subclasses `OutboxStoreContract`, and says how to open it, empty, and how to commit records:

    class TestMyStore(OutboxStoreContract):
        @pytest.fixture
        async def store(self) -> AsyncIterator[OutboxStore]:
            store = MyStore("mydb://localhost/tests")
            await store.open()
            ...  # delete the rows and the leases that other tests have left
            yield store
            await store.close()

        @pytest.fixture
        def insert(self) -> Insert:
            async def insert(records: Sequence[Record]) -> None:
                ...  # as your writers do it; an event id that is there stays as it is

            return insert

The tests take some seconds: leases end by the database's clock.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.record import FORMAT, SHARDS, Record, record_of
from dispytch_integrations.outbox.store import Failure, HeldUp, Lease, OutboxStore, Query, Selection, State

__all__ = ["Insert", "OutboxStoreContract"]

Insert = Callable[[Sequence[Record]], Awaitable[None]]
"""Store records and commit them, in this order."""

_SHORT, _LONG = 0.25, 60.0
"""Seconds of a lease that shall end soon, and of one that shall not."""


def _record(
    number: int = 0,
    key: str | None = None,
    *,
    broker: str = "default",
    destination: str = "orders",
    event_id: str | None = None,
    type: str = "shop.order.placed",
    payload: bytes | None = b"{}",
    headers: Mapping[str, Any] | None = None,
    format: int = FORMAT,
) -> Record:
    record = record_of(
        Message(
            event_id or f"{number}-{secrets.token_hex(8)}",
            type,
            broker,
            destination,
            key,
            dict(headers or {}),
            {"number": number},
            payload,
            "application/json",
        )
    )
    record.format = format
    return record


def _query(**given: Any) -> Query:
    defaults: dict[str, Any] = {"shards": range(SHARDS), "brokers": ["default"], "format": FORMAT, "limit": 1000}
    return Query(**{**defaults, **given})


async def _ids(store: OutboxStore, **given: Any) -> list[int]:
    return [record.id for record in (await store.fetch(_query(**given))).records]


async def _numbers(store: OutboxStore, **given: Any) -> list[int]:
    """The numbers of the rows that are fetched, from their event ids."""
    return [_number(record.event_id) for record in (await store.fetch(_query(**given))).records]


def _number(event_id: str) -> int:
    return int(event_id.partition("-")[0])


async def _owned(store: OutboxStore, relay: str) -> list[int]:
    return [lease.shard for lease in await store.leases() if lease.owner == relay]


async def _shard(store: OutboxStore, shard: int) -> Lease:
    return (await store.leases())[shard]


class OutboxStoreContract:
    """Subclass it, and override the fixtures `store` and `insert`; see the module's docstring for an example."""

    listens: ClassVar[bool] = False
    """Can the store's `listen` be woken by a commit? Then override the fixture `notify`, too."""

    @pytest.fixture
    def store(self) -> OutboxStore:
        """The store: open, without rows, and without leases."""
        raise NotImplementedError("override the fixture `store`")

    @pytest.fixture
    def insert(self) -> Insert:
        """A coroutine function that commits records to the store's database."""
        raise NotImplementedError("override the fixture `insert`")

    @pytest.fixture
    def notify(self) -> Insert:
        """The same, waking those that listen."""
        raise NotImplementedError("override the fixture `notify`")

    # -- rows ------------------------------------------------------------------------------------------------------

    async def test_rows_come_back_as_they_were_stored(self, store: OutboxStore, insert: Insert) -> None:
        """What is relayed must be what was committed, byte for byte: a tombstone is not an empty message."""
        contents: list[tuple[str | None, bytes | None]] = [
            (None, b"{}"),
            ("anna", None),
            ("", b""),
            ("bob@example.com / ü € 💶 '\";--%:x\n", bytes(range(256))),
            ("k" * 2000, b"x" * 300_000),
        ]
        headers = {"tenant": "ü €", "raw": b"\x00\xff"}
        stored = [
            _record(number, key, payload=payload, headers=headers, destination="o.ü")
            for number, (key, payload) in enumerate(contents)
        ]
        await insert(stored)
        fetched = await store.fetch(_query())
        for record, original in zip(fetched.records, stored, strict=True):
            for column in Record.__slots__:
                if column not in ("id", "attempts", "next_try_ms"):
                    assert getattr(record, column) == getattr(original, column), column
            assert (record.attempts, record.next_try_ms) == (0, 0)
            assert record.id > 0
        assert abs(fetched.now_ms - time.time() * 1000) < 3_600_000, "milliseconds since 1970"

    async def test_an_event_id_is_stored_once(self, store: OutboxStore, insert: Insert) -> None:
        """A request that is tried again must not send its event twice, nor fail for it."""
        await insert([_record(1, event_id="1-same", payload=b"first")])
        await insert([_record(2, event_id="1-same", payload=b"second"), _record(3)])
        records = (await store.fetch(_query())).records
        assert [record.payload for record in records] == [b"first", b"{}"]

    async def test_fetch_gives_the_oldest_in_order(self, store: OutboxStore, insert: Insert) -> None:
        """Order per key rests on the order of the ids, and a backlog is worked off from its old end."""
        await insert([_record(number, "anna") for number in range(20)])
        assert await _numbers(store) == list(range(20))
        assert await _numbers(store, limit=7) == list(range(7))
        ids = await _ids(store)
        assert ids == sorted(set(ids))

    async def test_fetch_of_nothing_is_empty(self, store: OutboxStore) -> None:
        """An idle outbox is the common case."""
        assert (await store.fetch(_query())).records == []

    async def test_fetch_keeps_to_its_shards(self, store: OutboxStore, insert: Insert) -> None:
        """Another relay has the other shards: to read them would break their order."""
        records = [_record(number, f"key{number}") for number in range(200)]
        await insert(records)
        shards = [3, 17, 40]
        expected = [_number(record.event_id) for record in records if record.shard in shards]
        assert expected
        assert await _numbers(store, shards=shards) == expected
        assert await _numbers(store, shards=[]) == []

    async def test_fetch_keeps_to_its_brokers(self, store: OutboxStore, insert: Insert) -> None:
        """Rows of a broker that is down, or that the relay does not have, are left alone."""
        await insert([_record(0), _record(1, broker="alerts"), _record(2), _record(3, broker="audit")])
        assert await _numbers(store) == [0, 2]
        assert await _numbers(store, brokers=["audit", "alerts"]) == [1, 3]
        assert await _numbers(store, brokers=[]) == []

    async def test_fetch_leaves_newer_formats(self, store: OutboxStore, insert: Insert) -> None:
        """While versions change, an old relay must not send what it would misread."""
        await insert([_record(0, format=FORMAT + 1), _record(1), _record(2, format=FORMAT + 2)])
        assert await _numbers(store) == [1]
        assert await _numbers(store, format=FORMAT + 1) == [0, 1]

    async def test_fetch_leaves_what_is_in_hand(self, store: OutboxStore, insert: Insert) -> None:
        """What is under way must not be sent a second time; a relay may have thousands in hand."""
        await insert([_record(number) for number in range(1200)])
        ids = await _ids(store, limit=2000)
        assert len(ids) == 1200
        assert await _ids(store, not_ids=ids[:1190], limit=5) == ids[1190:1195]
        assert await _ids(store, not_ids=ids) == []

    async def test_fetch_leaves_lanes_that_are_held_up(self, store: OutboxStore, insert: Insert) -> None:
        """A thousand messages behind one that fails must not fill the relay's hands, nor be sent before it."""
        anna, bob = ([_record(number, key) for number in range(10)] for key in ("anna", "bob"))
        await insert([*anna, *bob])
        records = (await store.fetch(_query(not_lanes=[anna[0].lane]))).records
        assert [record.ordering_key for record in records] == ["bob"] * 10
        assert await _ids(store, not_lanes=[anna[0].lane, bob[0].lane]) == []

    async def test_rows_to_be_tried_later_hold_up_their_lane(self, store: OutboxStore, insert: Insert) -> None:
        """A relay that starts anew sees which lanes are held up: those behind a failed message wait for it."""
        await insert([_record(0, "anna"), _record(1, "anna"), _record(2), _record(3, "bob")])
        [first, second, keyless, bob] = (await store.fetch(_query())).records
        assert await store.held_up(range(SHARDS)) == HeldUp((), None)
        failures = [Failure(first.id, 3, 30.0, "refused"), Failure(keyless.id, 1, 20.0, "refused")]
        await store.settle([], failures, "delete")
        held_up = await store.held_up(range(SHARDS))
        assert list(held_up.lanes) == [first.lane], "of a message without a key nothing waits behind it"
        assert held_up.seconds is not None
        assert 29.0 < held_up.seconds <= 30.0
        fetched = await store.fetch(_query())
        assert [(record.id, record.attempts) for record in fetched.records] == [
            (first.id, 3),
            (second.id, 0),
            (bob.id, 0),
        ]
        assert 29_000 < fetched.records[0].next_try_ms - fetched.now_ms <= 30_000
        assert await _ids(store, not_lanes=held_up.lanes) == [bob.id]
        assert (await store.held_up([shard for shard in range(SHARDS) if shard != first.shard])).lanes == ()
        # Its time has come.
        await store.settle([], [Failure(first.id, 4, 0.001, "refused")], "delete")
        await asyncio.sleep(0.05)
        assert await _ids(store) == [first.id, second.id, bob.id]
        assert (await store.held_up(range(SHARDS))).lanes == ()

    async def test_thousands_of_failures_are_noted_at_once(self, store: OutboxStore, insert: Insert) -> None:
        """A topic that is refused: each of its events fails, with its own number of attempts and its own pause."""
        await insert([_record(number) for number in range(1200)])
        records = (await store.fetch(_query(limit=2000))).records
        failures = [
            Failure(
                record.id,
                1 + number % 3,
                None if number % 4 == 0 else 60.0 + number % 5,
                f"refused: it's {number % 7} % \\ :x",
            )
            for number, record in enumerate(records)
        ]
        started = time.monotonic()
        await store.settle([], failures, "delete")
        assert time.monotonic() - started < 5, "one statement for each row takes too long"
        rows = {row.id: row for row in await store.rows(Selection(), 2000)}
        for failure in failures:
            row = rows[failure.id]
            assert (row.attempts, row.last_error) == (failure.attempts, failure.error)
            assert row.state == (State.DEAD if failure.delay is None else State.WAITING)
            if failure.delay is not None:
                assert row.next_try is not None
                assert failure.delay - 10 < row.next_try <= failure.delay

    async def test_settle_deletes_what_was_sent(self, store: OutboxStore, insert: Insert) -> None:
        """A table that only grows slows everything down; thousands are settled at once."""
        await insert([_record(number) for number in range(1300)])
        ids = await _ids(store, limit=2000)
        await store.settle(ids[:1299], [], "delete")
        assert await _ids(store) == ids[1299:]
        assert await store.count(Selection()) == 1

    async def test_settle_keeps_what_was_sent_when_asked(self, store: OutboxStore, insert: Insert) -> None:
        """Who wants to look back can; what is kept is not sent again."""
        await insert([_record(0), _record(1)])
        ids = await _ids(store)
        await store.settle([ids[0]], [], "keep")
        assert await _ids(store) == [ids[1]]
        [row] = await store.rows(Selection(states=[State.SENT]), 10)
        assert (row.id, row.state, row.last_error) == (ids[0], State.SENT, None)

    async def test_a_dead_row_is_not_fetched(self, store: OutboxStore, insert: Insert) -> None:
        """What is given up lets its lane go on, and stays to be looked at."""
        await insert([_record(0, "anna"), _record(1, "anna")])
        ids = await _ids(store)
        await store.settle([], [Failure(ids[0], 10, None, "refused: too large")], "delete")
        assert await _ids(store) == [ids[1]]
        [row] = await store.rows(Selection(states=[State.DEAD]), 10)
        assert (row.id, row.state, row.attempts) == (ids[0], State.DEAD, 10)
        assert (row.last_error, row.next_try) == ("refused: too large", None)

    async def test_settle_does_not_mind_rows_that_are_gone(self, store: OutboxStore, insert: Insert) -> None:
        """An operator may discard a row while it is under way; the others must be settled all the same."""
        await insert([_record(0), _record(1), _record(2)])
        ids = await _ids(store)
        await store.discard(Selection(ids=ids[:2]))
        await store.settle([ids[0], ids[2]], [Failure(ids[1], 1, None, "refused")], "delete")
        assert await store.count(Selection()) == 0

    async def test_a_failure_does_not_wake_the_dead(self, store: OutboxStore, insert: Insert) -> None:
        """A relay that comes late with its news must not bring back what another has settled."""
        await insert([_record(0), _record(1)])
        ids = await _ids(store)
        await store.settle([ids[0]], [Failure(ids[1], 5, None, "dead")], "keep")
        await store.settle([ids[1]], [Failure(ids[0], 1, 0.0, "late"), Failure(ids[1], 1, 0.0, "late")], "keep")
        assert await _ids(store) == []
        states = {row.id: (row.state, row.last_error) for row in await store.rows(Selection(), 10)}
        assert states == {ids[0]: (State.SENT, None), ids[1]: (State.DEAD, "dead")}

    async def test_waiting_tells_of_strangers(self, store: OutboxStore, insert: Insert) -> None:
        """Rows that no relay takes must be noticed: an alias that was renamed, a version that was not rolled out."""
        assert (await store.waiting(["default"], FORMAT)).unknown == {}
        strangers = [_record(broker="audit"), _record(broker="audit"), _record(broker="alerts")]
        newer = [_record(format=FORMAT + 1), _record(format=FORMAT + 1, broker="audit")]
        await insert([_record(), *strangers, *newer])
        waiting = await store.waiting(["default"], FORMAT)
        assert (waiting.unknown, waiting.newer) == ({"audit": 2, "alerts": 1}, 2)
        waiting = await store.waiting(["default", "audit", "alerts"], FORMAT + 1)
        assert (waiting.unknown, waiting.newer) == ({}, 0)
        await store.settle(await _ids(store, brokers=["audit", "alerts"]), [], "keep")
        assert (await store.waiting(["default"], FORMAT)).unknown == {}

    # -- leases ----------------------------------------------------------------------------------------------------

    async def test_all_shards_are_there_and_free(self, store: OutboxStore) -> None:
        """The first relay of a new database needs no preparation."""
        leases = await store.leases()
        assert [lease.shard for lease in leases] == list(range(SHARDS))
        assert {(lease.owner, lease.wanted_by) for lease in leases} == {(None, None)}
        assert await store.leases() == leases or len(leases) == SHARDS

    async def test_a_shard_is_taken_once(self, store: OutboxStore) -> None:
        """Two relays on one shard would break the order of its keys: whoever comes second gets nothing."""
        await store.leases()
        await asyncio.gather(*(store.take(f"relay{number}", range(SHARDS), _LONG) for number in range(4)))
        owners = {lease.owner for lease in await store.leases()}
        assert len(owners) == 1
        await store.take("late", range(SHARDS), _LONG)
        assert {lease.owner for lease in await store.leases()} == owners

    async def test_take_leaves_the_others_alone(self, store: OutboxStore) -> None:
        """A relay takes its share, not all."""
        await store.leases()
        await store.take("a", [0, 1, 2], _LONG)
        await store.take("b", [2, 3], _LONG)
        assert await _owned(store, "a") == [0, 1, 2]
        assert await _owned(store, "b") == [3]
        lease = await _shard(store, 0)
        assert _LONG - 5 < lease.left <= _LONG

    async def test_a_lease_ends_and_is_taken_by_another(self, store: OutboxStore) -> None:
        """The shards of a relay that was killed move on."""
        await store.leases()
        await store.take("a", [5], _SHORT)
        assert (await _shard(store, 5)).left > 0
        await asyncio.sleep(_SHORT + 0.05)
        assert (await _shard(store, 5)).left < 0
        await store.take("b", [5], _LONG)
        assert await _owned(store, "b") == [5]

    async def test_renewing_keeps_what_is_owned_alone(self, store: OutboxStore) -> None:
        """A relay that lives keeps its shards, and touches no other's."""
        await store.leases()
        await store.take("a", [0, 1], _SHORT)
        await store.take("b", [2], _SHORT)
        await store.renew("a", _LONG)
        leases = await store.leases()
        assert all(leases[shard].left > _SHORT for shard in (0, 1))
        assert leases[2].left <= _SHORT
        await store.renew("nobody", _LONG)
        assert await _owned(store, "nobody") == []

    async def test_a_lost_lease_is_not_renewed(self, store: OutboxStore) -> None:
        """A relay that was stopped for long must not go on with what another has taken."""
        await store.leases()
        await store.take("a", [9], 0.05)
        await asyncio.sleep(0.1)
        await store.take("b", [9], _LONG)
        await store.renew("a", _LONG)
        assert await _owned(store, "b") == [9]

    async def test_a_wish_is_seen_and_ends(self, store: OutboxStore) -> None:
        """A newcomer asks for its share; if it dies before it gets it, its wish must not bind anyone."""
        await store.leases()
        await store.take("a", range(SHARDS), _LONG)
        await store.want("b", [1, 2], _SHORT)
        assert [lease.shard for lease in await store.leases() if lease.wanted_by == "b"] == [1, 2]
        assert 0 < (await _shard(store, 1)).wanted_left <= _SHORT
        await store.want("c", [2, 3], _LONG)
        wanted = {lease.shard: lease.wanted_by for lease in await store.leases() if lease.wanted_by}
        assert wanted == {1: "b", 2: "b", 3: "c"}
        await asyncio.sleep(_SHORT + 0.05)
        assert (await _shard(store, 1)).wanted_left < 0
        await store.want("c", [1, 2], _LONG)
        wanted = {lease.shard: lease.wanted_by for lease in await store.leases() if lease.wanted_by}
        assert wanted == {1: "c", 2: "c", 3: "c"}
        assert await _owned(store, "a") == list(range(SHARDS))

    async def test_a_shard_is_handed_over(self, store: OutboxStore) -> None:
        """The newcomer has it at once, with a whole lease, and nobody else can come between."""
        await store.leases()
        await store.take("a", [1, 2, 3], _SHORT)
        await store.want("b", [1, 3], _LONG)
        await store.hand_over("a", [1, 3], "b", _LONG)
        assert await _owned(store, "b") == [1, 3]
        assert await _owned(store, "a") == [2]
        lease = await _shard(store, 1)
        assert lease.left > _SHORT
        assert lease.wanted_by is None

    async def test_a_shard_is_released(self, store: OutboxStore) -> None:
        """A relay that ends well leaves nothing to wait for."""
        await store.leases()
        await store.take("a", [1, 2], _LONG)
        await store.hand_over("a", [1], None, _LONG)
        await store.take("b", [1, 2], _LONG)
        assert await _owned(store, "b") == [1]
        assert await _owned(store, "a") == [2]

    async def test_nobody_gives_away_what_is_anothers(self, store: OutboxStore) -> None:
        """A relay that has lost its lease without knowing it must not give it to a third."""
        await store.leases()
        await store.take("a", [1], _LONG)
        await store.hand_over("b", [1], "c", _LONG)
        await store.hand_over("b", [1], None, _LONG)
        assert await _owned(store, "a") == [1]
        assert (await _shard(store, 1)).left > 0

    # -- operations ------------------------------------------------------------------------------------------------

    async def test_stats_of_an_empty_outbox(self, store: OutboxStore) -> None:
        """Nothing waits: no age, and no relay has ever run."""
        stats = await store.stats()
        assert (stats.waiting, stats.retrying, stats.dead, stats.sent) == (0, 0, 0, 0)
        assert (stats.oldest, stats.oldest_dead, stats.heartbeat, stats.relays) == (None, None, None, {})

    async def test_stats_count_and_tell_ages(self, store: OutboxStore, insert: Insert) -> None:
        """Alerts rest on these numbers: how much waits, for how long, and whether anybody relays."""
        old = _record(0)
        old.created_ms -= 100_000
        await insert([old, *(_record(number) for number in range(1, 6))])
        ids = await _ids(store)
        failed = [Failure(ids[4], 1, 30.0, "later"), Failure(ids[5], 9, None, "dead")]
        await store.settle([ids[3]], failed, "keep")
        await store.leases()
        await store.take("a", [0, 1, 2], _LONG)
        await store.take("b", [3], 0.001)
        await asyncio.sleep(0.05)
        stats = await store.stats()
        assert (stats.waiting, stats.retrying, stats.dead, stats.sent) == (4, 1, 1, 1)
        assert stats.oldest is not None
        assert 90 < stats.oldest < 3700
        assert stats.oldest_dead is not None
        assert 0 <= stats.oldest_dead < 30
        assert stats.relays == {"a": 3}
        assert stats.heartbeat is not None
        assert 0 <= stats.heartbeat < 30

    async def test_the_heartbeat_is_that_of_the_last_renewal(self, store: OutboxStore) -> None:
        """An outbox that nobody relays any more is noticed, also after its leases were given back."""
        await store.leases()
        await store.take("a", [0], _LONG)
        await store.hand_over("a", [0], None, _LONG)
        await asyncio.sleep(0.2)
        heartbeat = (await store.stats()).heartbeat
        assert heartbeat is not None
        assert 0.15 < heartbeat < 30
        await store.take("a", [0], _LONG)
        await store.renew("a", _LONG)
        renewed = (await store.stats()).heartbeat
        assert renewed is not None
        assert renewed < heartbeat

    async def test_rows_tell_what_an_operator_needs(self, store: OutboxStore, insert: Insert) -> None:
        """Who is called at night sees which event it is, and why it does not go out."""
        stored = _record(1, "anna", payload=b"12345", destination="orders.eu")
        await insert([stored, _record(2, payload=None)])
        [first, _] = await _ids(store)
        await store.settle([], [Failure(first, 2, 60.0, "not confirmed")], "delete")
        [row, tombstone] = await store.rows(Selection(), 10)
        assert (row.id, row.event_id, row.type) == (first, stored.event_id, "shop.order.placed")
        assert (row.broker, row.destination, row.ordering_key) == ("default", "orders.eu", "anna")
        assert (row.state, row.attempts, row.last_error, row.size) == (State.WAITING, 2, "not confirmed", 5)
        assert row.next_try is not None
        assert 55 < row.next_try <= 60
        assert 0 <= row.age < 3600
        assert (tombstone.size, tombstone.next_try, tombstone.last_error) == (0, None, None)
        assert [row.id for row in await store.rows(Selection(), 1)] == [first]

    async def test_a_selection_takes_what_meets_all_of_it(self, store: OutboxStore, insert: Insert) -> None:
        """What is discarded by hand is gone: a selection must not take one row too many."""
        records = [
            _record(0, "anna"),
            _record(1, "bob"),
            _record(2, "anna", type="shop.order.paid"),
            _record(3, "anna", destination="invoices"),
            _record(4, broker="alerts"),
            _record(5),
        ]
        records[5].created_ms -= 100_000
        await insert(records)
        ids = [row.id for row in await store.rows(Selection(), 10)]
        await store.settle([ids[1]], [Failure(ids[0], 1, None, "dead")], "keep")
        expected: list[tuple[Selection, list[int]]] = [
            (Selection(), [0, 1, 2, 3, 4, 5]),
            (Selection(ids=[ids[2], ids[4], 10**12]), [2, 4]),
            (Selection(event_ids=[records[3].event_id, records[5].event_id, "none"]), [3, 5]),
            (Selection(key="anna"), [0, 2, 3]),
            (Selection(key="ann"), []),
            (Selection(key="anna", type="shop.order.paid"), [2]),
            (Selection(broker="alerts"), [4]),
            (Selection(destination="invoices"), [3]),
            (Selection(states=[State.DEAD]), [0]),
            (Selection(states=[State.WAITING, State.SENT]), [1, 2, 3, 4, 5]),
            (Selection(older_than=90), [5]),
            (Selection(older_than=90, key="anna"), []),
            (Selection(states=[State.DEAD], older_than=60), []),
        ]
        for selection, numbers in expected:
            assert [_number(row.event_id) for row in await store.rows(selection, 10)] == numbers, selection
            assert await store.count(selection) == len(numbers), selection

    async def test_the_age_of_the_dead_counts_from_their_death(self, store: OutboxStore, insert: Insert) -> None:
        """Dead rows expire some time after they died, so that somebody can look at them, however old the event is."""
        old = [_record(0), _record(1)]
        for each in old:
            each.created_ms -= 1_000_000
        await insert(old)
        ids = await _ids(store)
        await store.settle([ids[0]], [Failure(ids[1], 1, None, "dead")], "keep")
        assert await store.count(Selection(older_than=0.2)) == 0
        await asyncio.sleep(0.3)
        assert await store.count(Selection(older_than=0.2, states=[State.DEAD])) == 1
        assert await store.count(Selection(older_than=0.2)) == 2

    async def test_requeued_rows_wait_again(self, store: OutboxStore, insert: Insert) -> None:
        """The bug is mended, and what had died of it goes out, from its first attempt on."""
        await insert([_record(0, "anna"), _record(1, "anna"), _record(2)])
        ids = await _ids(store)
        await store.settle([ids[2]], [Failure(ids[0], 10, None, "dead"), Failure(ids[1], 4, 300.0, "later")], "keep")
        assert await store.requeue(Selection(states=[State.DEAD])) == 1
        [first, second] = (await store.fetch(_query())).records
        assert (first.id, first.attempts, first.next_try_ms) == (ids[0], 0, 0)
        assert second.attempts == 4
        assert await store.requeue(Selection(key="anna")) >= 1
        assert [(each.attempts, each.next_try_ms) for each in (await store.fetch(_query())).records] == [(0, 0)] * 2
        assert await store.requeue(Selection(states=[State.SENT])) == 1
        assert await _ids(store) == ids

    async def test_discarded_rows_are_gone(self, store: OutboxStore, insert: Insert) -> None:
        """What must not be sent any more is not."""
        await insert([_record(number, "anna" if number < 3 else "bob") for number in range(5)])
        assert await store.discard(Selection(key="anna")) == 3
        assert await _numbers(store) == [3, 4]
        assert await store.discard(Selection(key="nobody")) == 0

    # -- opening, closing, listening -------------------------------------------------------------------------------

    async def test_closing_is_harmless_and_it_opens_again(self, store: OutboxStore, insert: Insert) -> None:
        """An app that is started again in the same process relays again."""
        await insert([_record(0)])
        await store.close()
        await store.close()
        await store.open()
        assert await _numbers(store) == [0]

    async def test_calls_at_the_same_time(self, store: OutboxStore, insert: Insert) -> None:
        """Leases are renewed while rows are read: neither may disturb the other."""
        await insert([_record(number) for number in range(50)])
        await store.leases()
        await store.take("a", range(SHARDS), _LONG)
        fetched = await asyncio.gather(
            *(_numbers(store) for _ in range(5)), *(store.renew("a", _LONG) for _ in range(5))
        )
        assert [each for each in fetched if each is not None] == [list(range(50))] * 5

    async def test_a_cancelled_call_leaves_the_store_usable(self, store: OutboxStore, insert: Insert) -> None:
        """A relay that is cancelled in the middle of a statement can be run again."""
        await insert([_record(0)])
        for steps in range(6):
            call = asyncio.create_task(_numbers(store))
            for _ in range(steps):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
        assert await _numbers(store) == [0]

    async def test_the_address_is_for_logs(self, store: OutboxStore) -> None:
        """A log says which database it is about."""
        assert store.address

    async def test_listening(self, store: OutboxStore, request: pytest.FixtureRequest) -> None:
        """A commit wakes the relay, or the operator is told at once that this database cannot."""
        if not self.listens:
            with pytest.raises(ConfigurationError):
                await asyncio.wait_for(store.listen(lambda: None), 5)
            return
        notify: Insert = request.getfixturevalue("notify")
        woken: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.put_nowait, None)

        listening = asyncio.create_task(store.listen(wake))
        try:
            await asyncio.wait_for(woken.get(), 5)  # At the start: what was missed before is looked for.
            for number in range(3):
                while not woken.empty():
                    woken.get_nowait()
                await notify([_record(number)])
                await asyncio.wait_for(woken.get(), 5)
        finally:
            listening.cancel()
            await asyncio.wait({listening}, timeout=5)
        assert listening.cancelled()
        assert await _numbers(store) == [0, 1, 2]
