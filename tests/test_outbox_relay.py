"""The relay: at least once, in order per key, whatever fails; on PostgreSQL, to brokers that fail when told to."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from dispytch_integrations import EventBase, connect
from dispytch_integrations._broker import Broker
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_store import AsyncStore, SyncStore, store_of
from dispytch_integrations.backend import BrokerOptions
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    MessageTooLargeError,
    NotStartedError,
    ProducerTimeout,
    UnroutableError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.outbox import _housekeeping as housekeeping
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import record_of
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.outbox.store import Selection, State
from tests.support.outboxes import (
    Database,
    FakeBackend,
    FakeProducer,
    Watched,
    eventually,
    message,
    record,
    relaying,
    started,
    temporary_database,
)

_REFUSED = UnroutableError("no queue takes it")


@pytest.fixture(scope="module")
def _database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def database(_database: Database) -> Database:
    _database.empty()
    return _database


@pytest.fixture
async def engine(database: Database) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    yield engine
    await engine.dispose()


@pytest.fixture
async def store(engine: AsyncEngine) -> AsyncStore | SyncStore:
    return store_of(engine)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def _arrived(fake: FakeProducer, number: int) -> bool:
    return number in fake.numbers()


def _has_sent(producer: MemoryProducer, count: int) -> bool:
    return len(producer.sent) == count


def _refuse_once(refused: list[int], message: Message) -> Exception | None:
    return _REFUSED if refused and refused.pop() == 0 else None


def _attempts(database: Database) -> list[tuple[int, int]]:
    """(number, attempts) of the rows that are there."""
    rows = database.all("select payload, attempts from dispytch_outbox_event where state = 0 order by id")
    return [(int(bytes(payload)), attempts) for payload, attempts in rows]


# -- order ---------------------------------------------------------------------------------------------------------


async def test_each_key_is_sent_in_order(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """ "Paid" before "placed" breaks consumers; batches, slow answers and failures must not change the order."""
    keys = [f"key{number}" for number in range(9)]
    database.insert([record(number, random.choice(keys)) for number in range(400)])
    chance = random.Random(7)
    backend.fake.answer = lambda message: _REFUSED if chance.random() < 0.05 else None
    backend.fake.delay = lambda message: chance.random() * 0.003
    async with started(default=backend) as brokers, relaying(store, brokers, batch_size=23, backoff=0.01):
        await eventually(lambda: len(backend.fake.sent) == 400)
    for key in keys:
        assert backend.fake.numbers(key) == sorted(backend.fake.numbers(key)), key
    assert sorted(backend.fake.numbers()) == list(range(400)), "each once"
    assert database.count() == 0


async def test_a_late_commit_is_neither_lost_nor_overtaken(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """Ids are given before the commit: a relay with a cursor would never see what is committed behind it."""
    async with started(default=backend) as brokers, relaying(store, brokers) as relay:
        with database.engine.connect() as late:
            database.insert([record(1, "anna"), record(2, "anna")], on=late)
            database.insert([record(3, "bob")])
            relay.wake()
            await eventually(lambda: backend.fake.numbers() == [3])
            database.insert([record(4, "carl")])
            relay.wake()
            await eventually(lambda: backend.fake.numbers() == [3, 4])
            backend.fake.gate.clear()  # Nothing of anna is confirmed before the later one is there, too.
            late.commit()
        database.insert([record(5, "anna")])
        relay.wake()
        await asyncio.sleep(0.05)
        backend.fake.gate.set()
        await eventually(lambda: len(backend.fake.sent) == 5)
    assert backend.fake.numbers("anna") == [1, 2, 5]


async def test_writers_that_commit_in_any_order(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """An app has many transactions at once: every event arrives, and those of one key as their commits were."""
    keys = [f"key{number}" for number in range(5)]
    locks = {key: threading.Lock() for key in keys}  # As a row lock on the order would do.
    numbers: dict[str, list[int]] = {key: [] for key in keys}

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for step in range(20):
            key, number = chance.choice(keys), seed * 1000 + step
            with locks[key], database.engine.connect() as connection:
                database.insert([record(number, key), record(number + 500, key)], on=connection)
                time.sleep(chance.random() * 0.01)
                if chance.random() < 0.1:
                    connection.rollback()
                    continue
                connection.commit()
                numbers[key] += [number, number + 500]

    async with started(default=backend) as brokers, relaying(store, brokers, batch_size=5) as relay:
        backend.fake.delay = lambda message: 0.002
        await asyncio.gather(*(asyncio.to_thread(write, seed) for seed in range(6)))
        relay.wake()
        await eventually(lambda: len(backend.fake.sent) >= sum(map(len, numbers.values())))
    assert {key: backend.fake.numbers(key) for key in keys} == numbers


async def test_a_failing_key_holds_up_only_itself(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """One poison event must not stop the shop; what follows it in its key waits, and comes in order."""
    database.insert([record(number, key) for number, key in enumerate(["anna", "bob", "anna", "carl", "anna", "bob"])])
    backend.fake.answer = lambda message: _REFUSED if message.ordering_key == "anna" else None
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=0.1, batch_size=2):
        await eventually(lambda: backend.fake.numbers("bob") == [1, 5])
        await eventually(lambda: backend.fake.numbers("carl") == [3])
        await eventually(lambda: len(backend.fake.attempts(0)) >= 2)
        assert not backend.fake.attempts(2), "it would overtake"
        assert not backend.fake.attempts(4), "it would overtake"
        database.insert([record(6, "dora")])
        await eventually(lambda: backend.fake.numbers("dora") == [6])
        backend.fake.answer = lambda message: None
        await eventually(lambda: backend.fake.numbers("anna") == [0, 2, 4])
    assert database.count() == 0


async def test_followers_wait_behind_a_retry_after_a_restart(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """A deploy between a failure and its retry must not let the later events of the key pass."""
    database.insert([record(number, "anna") for number in range(3)])
    backend.fake.answer = lambda message: _REFUSED
    async with started(default=backend) as brokers:
        async with relaying(store, brokers, backoff=0.8):
            await eventually(lambda: backend.fake.attempts(0))
        backend.fake.answer = lambda message: None
        assert _attempts(database) == [(0, 1), (1, 0), (2, 0)]
        database.insert([record(3, "anna"), record(4, "bob")])
        async with relaying(store, brokers, backoff=0.8):
            await eventually(lambda: backend.fake.numbers() == [4])
            await asyncio.sleep(0.1)
            assert backend.fake.numbers() == [4]
            await eventually(lambda: len(backend.fake.sent) == 5)
    assert backend.fake.numbers("anna") == [0, 1, 2, 3]
    first, second = backend.fake.attempts(0)
    assert second - first >= 0.8 * 0.75


async def test_no_key_no_order_no_waiting(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """Events without a key promise no order: one that fails holds up none of the others."""
    database.insert([record(number) for number in range(6)])
    backend.fake.answer = lambda message: _REFUSED if message.payload == b"0" else None
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=30):
        await eventually(lambda: sorted(backend.fake.numbers()) == [1, 2, 3, 4, 5])
        await eventually(lambda: database.count() == 1)
    assert _attempts(database) == [(0, 1)]


async def test_the_same_key_elsewhere_is_another_order(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """Order is per destination: a topic that is missing does not hold up the others."""
    database.insert([record(0, "anna", destination="missing"), record(1, "anna", destination="orders")])
    backend.fake.answer = lambda message: _REFUSED if message.destination == "missing" else None
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=30):
        await eventually(lambda: backend.fake.numbers() == [1])


# -- failures ------------------------------------------------------------------------------------------------------


async def test_backoff_grows_with_jitter(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """A broker that refuses must not be hammered, nor by all messages at the same moment."""
    database.insert([record(number, f"key{number}") for number in range(30)])
    backend.fake.answer = lambda message: _REFUSED
    watched = Watched(store)
    async with started(default=backend) as brokers:
        async with relaying(watched, brokers, backoff=0.02, max_backoff=0.05, max_attempts=5):
            await eventually(lambda: database.count("state = 1") == 30)
    for attempt, expected in {1: 0.02, 2: 0.04, 3: 0.05, 4: 0.05}.items():
        delays = [each.delay for each in watched.failures if each.attempts == attempt]
        assert len(delays) == 30
        assert all(each is not None and expected * 0.75 <= each <= expected * 1.25 for each in delays), delays
        assert len(set(delays)) > 20, "they differ"
        assert max(map(float, map(str, delays))) - min(map(float, map(str, delays))) > expected * 0.15
    tried = backend.fake.attempts(7)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert len(pauses) == 4
    assert all(pause >= least for pause, least in zip(pauses, (0.015, 0.03, 0.0375, 0.0375), strict=True)), pauses


async def test_dead_after_max_attempts(
    database: Database, store: AsyncStore, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """What is refused for ever is set aside, visibly; the later events of its key go on."""
    database.insert([record(0, "anna"), record(1, "anna")])
    backend.fake.answer = lambda message: _REFUSED if message.payload == b"0" else None
    async with started(default=backend) as brokers:
        async with relaying(store, brokers, backoff=0.01, max_attempts=3) as relay:
            await eventually(lambda: backend.fake.numbers() == [1])
    assert len(backend.fake.attempts(0)) == 3
    assert database.all("select state, attempts, last_error from dispytch_outbox_event") == [
        (State.DEAD, 3, "no queue takes it")
    ]
    assert (relay.counts.sent, relay.counts.dead, relay.counts.attempts_failed) == (1, 1, 3)
    [error] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "is dead after 3 attempts" in error.getMessage()
    assert error.event_type == "shop.order.placed"  # type: ignore[attr-defined]


async def test_what_is_refused_for_good_is_dead_at_once(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """To try again what is too large is of no use, and would hold up its key for the length of all retries."""
    database.insert([record(0, "anna"), record(1, "anna")])
    backend.fake.answer = lambda message: MessageTooLargeError("too large") if message.payload == b"0" else None
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=30):
        await eventually(lambda: backend.fake.numbers() == [1])
        await eventually(lambda: database.count("state = 1 and attempts = 1") == 1)


async def test_what_is_not_confirmed_counts_while_the_broker_answers(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """A message that makes the broker silent is poison, not an outage: it must not be tried for ever."""
    database.insert([record(0, "anna"), record(1, "bob")])
    backend.fake.answer = lambda message: ProducerTimeout("no answer") if message.payload == b"0" else None
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=0.01, max_attempts=2):
        await eventually(lambda: database.count("state = 1 and attempts = 2") == 1)
    assert backend.fake.numbers() == [1]


async def test_requeued_events_are_sent(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """After the queue was declared, what had died of its absence goes out."""
    database.insert([record(number, "anna") for number in range(3)])
    backend.fake.answer = lambda message: _REFUSED
    async with started(default=backend) as brokers, relaying(store, brokers, max_attempts=1) as relay:
        await eventually(lambda: database.count("state = 1") == 3)
        backend.fake.answer = lambda message: None
        assert await store.requeue(Selection(states=[State.DEAD])) == 3
        relay.wake()
        await eventually(lambda: backend.fake.numbers("anna") == [0, 1, 2])


async def test_errors_of_others_are_told_by_their_type(
    database: Database, store: AsyncStore, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver's error may repeat the message: payloads belong neither into `last_error` nor into logs."""
    database.insert([record(4711, "anna")])
    backend.fake.answer = lambda message: ValueError(f"cannot send {message.payload!r}")
    async with started(default=backend) as brokers, relaying(store, brokers, max_attempts=1):
        await eventually(lambda: database.count("state = 1") == 1)
    assert database.all("select last_error from dispytch_outbox_event") == [("ValueError",)]
    assert "4711" not in caplog.text


async def test_a_long_error_is_cut(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """A broker that answers with a page of text must not fill the table, nor break the column."""
    database.insert([record(0)])
    backend.fake.answer = lambda message: UnroutableError("x" * 100_000)
    async with started(default=backend) as brokers, relaying(store, brokers, max_attempts=1):
        await eventually(lambda: database.count("state = 1") == 1)
    assert database.all("select length(last_error) from dispytch_outbox_event") == [(500,)]


@pytest.mark.parametrize("outcomes", ["raises", "too few", "none"])
async def test_a_producer_with_a_bug_loses_nothing(
    database: Database, store: AsyncStore, backend: FakeBackend, outcomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer of one's own that raises, or forgets an outcome, costs attempts; the rows must not be stuck."""
    database.insert([record(0, "anna"), record(1, "bob"), record(2, "anna")])
    broken = [True]
    deliver = type(backend.fake).deliver_in_order

    async def deliver_in_order(
        producer: Any, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[Exception | None]:
        if not broken:
            return await deliver(producer, messages, timeout=timeout)
        broken.pop()
        if outcomes == "raises":
            raise RuntimeError("a bug")
        return [None] if outcomes == "too few" else []

    monkeypatch.setattr(type(backend.fake), "deliver_in_order", deliver_in_order)
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=0.02):
        await eventually(lambda: len(backend.fake.sent) == 3, 5)
    assert backend.fake.numbers("anna") == [0, 2]


# -- outages -------------------------------------------------------------------------------------------------------


async def test_an_outage_uses_up_no_attempts_and_stops_one_broker_alone(
    database: Database, store: AsyncStore, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """A night without Kafka must not kill events; and the alerts, which go through Redis, are not to wait for it."""
    alerts = FakeBackend()
    down = BrokerUnavailableError("kafka is down")
    backend.fake.answer = lambda message: down if not backend.up else None
    backend.up = True
    database.insert([record(number, "anna") for number in range(4)])
    async with started(default=backend, alerts=alerts) as brokers:
        backend.up = False
        async with relaying(store, brokers, max_attempts=1, backoff=0.01) as relay:
            await eventually(lambda: relay.outages == ["default"])
            for number in range(10, 15):
                database.insert([record(number, broker="alerts"), record(number, "anna")])
                relay.wake()
                await eventually(partial(_arrived, alerts.fake, number))
            assert relay.outages == ["default"]
            assert {attempts for _, attempts in _attempts(database)} == {0}
            assert database.count("state = 1") == 0
            backend.up = True
            await eventually(lambda: backend.fake.numbers("anna") == [0, 1, 2, 3, *range(10, 15)])
            assert relay.outages == []
    assert relay.counts.attempts_failed == 0
    assert database.count() == 0
    told = [each.getMessage() for each in caplog.records if "its events wait in the outbox" in each.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize("confirmed", [0, 3])
async def test_a_broker_that_falls_silent_is_an_outage(
    database: Database, store: AsyncStore, backend: FakeBackend, confirmed: int
) -> None:
    """A broker dies in the middle of a batch: what it did not confirm was not refused, and counts no attempt."""
    database.insert([record(number, f"key{number}") for number in range(6)])

    def answer(message: Message) -> Exception | None:
        if int(message.payload or b"") < confirmed or backend.up:
            return None
        return ProducerTimeout("no answer")

    async with started(default=backend) as brokers:
        backend.up = False
        backend.fake.answer = answer
        async with relaying(store, brokers, max_attempts=1) as relay:
            await eventually(lambda: relay.outages == ["default"])
            assert len(backend.fake.sent) == confirmed
            await eventually(lambda: database.count("state = 0") == 6 - confirmed)
            backend.up = True
            await eventually(lambda: sorted(backend.fake.numbers()) == list(range(6)))
    assert relay.counts.attempts_failed == 0
    assert database.count() == 0


async def test_a_broker_that_is_down_at_the_start_is_waited_for(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """The relay comes up before the broker does: it begins when the broker is there, and nothing is dead by then."""
    backend.up = False
    database.insert([record(0)])
    broker = Broker("default", backend, BrokerOptions(timeout=0.1, startup_timeout=1.0))
    connecting = broker.begin(None)
    async with relaying(store, {"default": broker}, max_attempts=1) as relay:
        await eventually(lambda: relay.outages == ["default"])
        backend.up = True
        await eventually(lambda: backend.fake.numbers() == [0])
    await connecting
    await broker.stop()


# -- the database fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fail", "lose"])
async def test_what_is_confirmed_and_not_deleted_is_not_sent_again(
    database: Database, store: AsyncStore, backend: FakeBackend, kind: str
) -> None:
    """The database is away for a moment when a batch is settled: that costs no duplicates."""
    database.insert([record(number, "anna") for number in range(5)])
    watched = Watched(store)
    getattr(watched, kind)["settle"] = 2
    async with started(default=backend) as brokers, relaying(watched, brokers) as relay:
        await eventually(lambda: database.count() == 0)
        database.insert([record(5, "anna")])
        await eventually(lambda: len(backend.fake.sent) == 6)
        await eventually(lambda: relay.last_error is None)
    assert backend.fake.numbers("anna") == [0, 1, 2, 3, 4, 5]
    assert watched.calls["settle"] >= 4


@pytest.mark.parametrize("kind", ["fail", "lose"])
async def test_a_failure_that_is_not_noted_lets_nobody_pass(
    database: Database, store: AsyncStore, backend: FakeBackend, kind: str
) -> None:
    """The database is away when a failure is to be noted: its followers must wait all the same."""
    database.insert([record(number, "anna") for number in range(4)])
    watched = Watched(store)
    getattr(watched, kind)["settle"] = 3
    refused = [0]
    backend.fake.answer = partial(_refuse_once, refused)
    async with started(default=backend) as brokers, relaying(watched, brokers, backoff=0.02):
        await eventually(lambda: len(backend.fake.sent) == 4)
    assert backend.fake.numbers("anna") == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["open", "renew", "leases", "take", "fetch", "waiting", "discard"])
async def test_a_database_that_fails_for_a_moment(
    database: Database, store: AsyncStore, backend: FakeBackend, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover of the database must not end the relay, and is told once, not at each attempt."""
    database.insert([record(number, "anna") for number in range(4)])
    watched = Watched(store)
    watched.fail[method] = 2
    async with started(default=backend) as brokers, relaying(watched, brokers, keep_dead=1000.0, lease=1.0):
        await eventually(lambda: backend.fake.numbers("anna") == [0, 1, 2, 3])
        await eventually(lambda: database.count() == 0)
    told = [each for each in caplog.records if "does not answer; trying again" in each.getMessage()]
    assert len(told) == 1 or method in ("waiting", "discard", "leases", "renew")
    assert told


async def test_missing_tables_are_told_at_once(engine: AsyncEngine, database: Database, backend: FakeBackend) -> None:
    """A forgotten migration must not look like an idle relay; nothing is left open."""
    store = store_of(engine, schema="elsewhere")
    async with started(default=backend) as brokers:
        for work in (Relay(store, brokers).run, Relay(store, brokers).drain):
            with pytest.raises(ConfigurationError, match="outbox_tables") as caught:
                await asyncio.wait_for(work(), 5)
            assert "'elsewhere'" in str(caught.value)
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_a_drain_that_fails_leaves_nothing_open(
    engine: AsyncEngine, store: AsyncStore, backend: FakeBackend
) -> None:
    """A cron job that drains reports the error, and gives its connection back."""
    watched = Watched(store)
    watched.lose["open"] = 1
    async with started(default=backend) as brokers:
        with pytest.raises(OSError, match="away"):
            await Relay(watched, brokers).drain()  # type: ignore[arg-type]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# -- retention -----------------------------------------------------------------------------------------------------


async def test_sent_events_are_kept_for_a_while(
    database: Database, store: AsyncStore, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who must be able to show what was sent keeps it; afterwards it goes by itself."""
    monkeypatch.setattr(housekeeping, "_SECONDS", 0.05)
    database.insert([record(0, "anna"), record(1, "anna")])
    async with started(default=backend) as brokers:
        async with relaying(store, brokers, keep_sent=0.5, poll_interval=0.05):
            await eventually(lambda: database.count("state = 2") == 2)
            kept_at = time.monotonic()
            await asyncio.sleep(0.2)
            assert database.count("state = 2") == 2
            await eventually(lambda: database.count() == 0)
            assert time.monotonic() - kept_at > 0.4
    assert backend.fake.numbers() == [0, 1]


async def test_dead_events_expire_when_asked(
    database: Database, store: AsyncStore, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Personal data in dead events must not stay for ever; without the option nothing that is dead is deleted."""
    monkeypatch.setattr(housekeeping, "_SECONDS", 0.05)
    old = record(0)
    old.created_ms -= 1_000_000
    database.insert([old])
    backend.fake.answer = lambda message: _REFUSED
    async with started(default=backend) as brokers:
        async with relaying(store, brokers, max_attempts=1, poll_interval=0.05):
            await eventually(lambda: database.count("state = 1") == 1)
            await asyncio.sleep(0.2)
            assert database.count("state = 1") == 1
        async with relaying(store, brokers, keep_dead=600, poll_interval=0.05):
            await asyncio.sleep(0.2)
            assert database.count("state = 1") == 1
        async with relaying(store, brokers, keep_dead=0.2, poll_interval=0.05):
            await eventually(lambda: database.count() == 0)


# -- when and how fast ---------------------------------------------------------------------------------------------


async def test_a_wake_from_another_thread_is_heard_at_once(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """The commit of a `def` route wakes the relay: its event is out in milliseconds, not at the next poll."""
    watched = Watched(store)
    async with started(default=backend) as brokers, relaying(watched, brokers, poll_interval=30) as relay:
        await asyncio.sleep(0.7)  # By now it looks rarely.
        delays: list[float] = []
        for number in range(5):
            database.insert([record(number)])
            begun = time.monotonic()
            await asyncio.to_thread(relay.wake)
            await eventually(partial(_arrived, backend.fake, number), 5)
            delays.append(time.monotonic() - begun)
            await asyncio.sleep(0.05)
        relay.wake()
    relay.wake()  # It has ended: harmless.
    assert sorted(delays)[2] < 0.1, delays


async def test_an_idle_relay_looks_rarely(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """A hundred services with a relay each must not keep the database busy with nothing; but new rows are found."""
    watched = Watched(store)
    async with started(default=backend) as brokers, relaying(watched, brokers, poll_interval=0.4):
        await asyncio.sleep(1.0)
        assert 3 <= watched.calls["fetch"] <= 12
        at_rest = watched.calls["fetch"]
        await asyncio.sleep(0.9)
        assert 1 <= watched.calls["fetch"] - at_rest <= 4
        database.insert([record(0)])
        await eventually(lambda: backend.fake.numbers() == [0], 2)


async def test_a_slow_broker_does_not_hold_up_another(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """One broker answers after a second: those of the other one go out meanwhile, however many wait for the first."""
    slow = FakeBackend()
    slow.fake.delay = lambda message: 1.2
    async with started(timeout=1.5, default=backend, slow=slow) as brokers:
        async with relaying(store, brokers, lease=3.0, batch_size=20) as relay:
            delays: list[float] = []
            for number in range(14):  # Always new keys: none waits for an earlier one.
                database.insert([record(number * 100 + each, broker="slow") for each in range(20)])
                database.insert([record(number)])
                begun = time.monotonic()
                relay.wake()
                await eventually(partial(_arrived, backend.fake, number))
                delays.append(time.monotonic() - begun)
            assert max(delays) < 0.6, delays


async def test_a_slow_lane_does_not_hold_up_others(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """One message takes long: other keys of the same broker go on, and thousands behind it do not fill the batch."""
    backend.fake.delay = lambda message: 1.0 if message.ordering_key == "slow" else 0.0
    async with started(timeout=1.2, default=backend) as brokers:
        async with relaying(store, brokers, lease=3.0, batch_size=10) as relay:
            database.insert([record(0, "slow")])
            await eventually(lambda: backend.fake.attempts(0))
            database.insert([record(number, "slow") for number in range(1, 40)])
            database.insert([record(100, "anna"), record(101, "bob")])
            begun = time.monotonic()
            relay.wake()
            await eventually(lambda: sorted(backend.fake.numbers())[-2:] == [100, 101])
            assert time.monotonic() - begun < 0.8
            backend.fake.delay = lambda message: 0.0
            await eventually(lambda: len(backend.fake.sent) == 42)
    assert backend.fake.numbers("slow") == list(range(40))


async def test_retries_travel_apart(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """What failed before may hang again: new events do not sit in the same delivery with it."""
    database.insert([record(0, "anna")])
    backend.fake.answer = lambda message: _REFUSED if message.ordering_key == "anna" else None
    async with started(timeout=1.0, default=backend) as brokers:
        async with relaying(store, brokers, lease=2.0, backoff=0.3) as relay:
            await eventually(lambda: len(backend.fake.attempts(0)) == 1)
            backend.fake.delay = lambda message: 0.8 if message.ordering_key == "anna" else 0.0
            backend.fake.gate.clear()
            database.insert([record(1, "bob")])
            relay.wake()
            await eventually(lambda: backend.fake.attempts(1))
            await asyncio.sleep(0.4)  # The retry is due; bob's delivery hangs at the gate.
            database.insert([record(2, "carl")])
            backend.fake.gate.set()
            begun = time.monotonic()
            await eventually(lambda: 2 in backend.fake.numbers())
            assert time.monotonic() - begun < 0.5


async def test_a_retry_is_tried_when_its_time_has_come(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """A retry must not wait for the next poll: the relay knows when it is due."""
    database.insert([record(0, "anna")])
    refused = [0]
    backend.fake.answer = partial(_refuse_once, refused)
    async with started(default=backend) as brokers, relaying(store, brokers, backoff=0.8, poll_interval=30):
        await eventually(lambda: backend.fake.numbers() == [0], 5)
    first, second = backend.fake.attempts(0)
    assert 0.6 <= second - first < 1.4


# -- start and end -------------------------------------------------------------------------------------------------


async def test_a_stop_finishes_what_is_under_way(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """A deploy must not make duplicates: what the broker is about to confirm is waited for, and deleted."""
    database.insert([record(0, "anna")])
    async with started(timeout=1.0, default=backend) as brokers:
        relay = Relay(store, brokers, RelayOptions(lease=4.0))
        running = asyncio.create_task(relay.run())
        backend.fake.gate.clear()
        await eventually(lambda: backend.fake.tried)
        database.insert([record(1, "anna"), record(2, "bob")])
        relay.stop()
        await asyncio.sleep(0.1)
        assert not running.done()
        backend.fake.gate.set()
        await asyncio.wait_for(running, 2)
    assert backend.fake.numbers() == [0]
    assert [number for number, _ in _attempts(database)] == [1, 2]
    assert database.all("select count(*) from dispytch_outbox_shard where owner is not null") == [(0,)]


async def test_a_stop_does_not_wait_for_ever(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """A broker that never answers must not hold up the end; the event stays in the table for the next relay."""
    database.insert([record(0, "anna")])
    async with started(timeout=0.3, default=backend) as brokers:
        relay = Relay(store, brokers, RelayOptions(lease=2.0))
        running = asyncio.create_task(relay.run())
        backend.fake.gate.clear()
        await eventually(lambda: backend.fake.tried)
        begun = time.monotonic()
        relay.stop()
        await asyncio.wait_for(running, 5)
        assert time.monotonic() - begun < 1.5
        assert _attempts(database) == [(0, 0)]
        backend.fake.gate.set()
        async with relaying(store, brokers):
            await eventually(lambda: database.count() == 0)
    assert backend.fake.numbers() == [0]


async def test_a_cancelled_relay_gives_its_leases_back(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """Ctrl-C cancels: the next relay begins at once, not when the lease has ended."""
    database.insert([record(0)])
    async with started(default=backend) as brokers:
        running = asyncio.create_task(Relay(store, brokers, RelayOptions(lease=30)).run())
        await eventually(lambda: database.count() == 0)
        running.cancel()
        await asyncio.wait({running}, timeout=5)
        assert running.cancelled()
    assert database.all("select count(*) from dispytch_outbox_shard where owner is not null") == [(0,)]


async def test_a_stopped_relay_can_run_again(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """An app that is started again in one process uses its relay again, also after an outage at its end."""
    relay_options = RelayOptions(lease=2.0)
    async with started(default=backend) as brokers:
        relay = Relay(store, brokers, relay_options)
        for number in range(2):
            database.insert([record(number)])
            running = asyncio.create_task(relay.run())
            await eventually(partial(_arrived, backend.fake, number))
            relay.stop()
            await asyncio.wait_for(running, 5)
        backend.up = False
        backend.fake.answer = lambda message: BrokerUnavailableError("down")
        database.insert([record(2)])
        running = asyncio.create_task(relay.run())
        await eventually(lambda: relay.outages)
        relay.stop()
        await asyncio.wait_for(running, 5)
        backend.up = True
        backend.fake.answer = lambda message: None
        await eventually(lambda: brokers["default"].state == "up", 5)
        running = asyncio.create_task(relay.run())
        await eventually(lambda: backend.fake.numbers() == [0, 1, 2], 5)
        relay.stop()
        await asyncio.wait_for(running, 5)


async def test_drain_sends_what_can_be_sent_and_returns(
    database: Database, store: AsyncStore, backend: FakeBackend
) -> None:
    """A cron job drains: it ends by itself, with what must wait left for the next one."""
    down = FakeBackend()
    database.insert([record(number, f"key{number % 7}") for number in range(100)])
    database.insert([record(100, "poison"), record(101, "poison"), record(102, broker="down")])
    backend.fake.answer = lambda message: _REFUSED if message.ordering_key == "poison" else None
    backend.fake.delay = lambda message: 0.01
    async with started(default=backend, down=down) as brokers:
        down.up = False
        down.fake.answer = lambda message: BrokerUnavailableError("down")
        relay = Relay(store, brokers, RelayOptions(lease=2.0, batch_size=9, backoff=20))
        await asyncio.wait_for(relay.drain(), 10)
        assert sorted(backend.fake.numbers()) == list(range(100))
        assert _attempts(database) == [(100, 1), (101, 0), (102, 0)]
        assert database.all("select count(*) from dispytch_outbox_shard where owner is not null") == [(0,)]
        await asyncio.wait_for(relay.drain(), 10)
        assert _attempts(database) == [(100, 1), (101, 0), (102, 0)]


async def test_a_drain_does_not_hide_the_databases_error(store: AsyncStore, backend: FakeBackend) -> None:
    """A cron job whose database is away must fail, and be seen."""
    watched = Watched(store)
    watched.fail["fetch"] = 1
    async with started(default=backend) as brokers:
        with pytest.raises(OSError, match="away"):
            await asyncio.wait_for(Relay(watched, brokers).drain(), 5)  # type: ignore[arg-type]


async def test_hooks_see_what_is_relayed(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """Metrics and traces rest on hooks: relayed events are not invisible to them."""
    seen: list[tuple[str, str | None]] = []

    class Seen(Hook):
        def sent(self, message: Message) -> None:
            seen.append(("sent", message.id))

        def failed(self, message: Message, error: Exception) -> None:
            seen.append(("failed", message.id))

    database.insert([record(0, id="good"), record(1, id="bad")])
    backend.fake.answer = lambda message: _REFUSED if message.id == "bad" else None
    broker = Broker("default", backend, BrokerOptions(timeout=0.3, hooks=[Seen()]))
    await broker.begin(5)
    async with relaying(store, {"default": broker}, max_attempts=1):
        await eventually(lambda: database.count("state = 0") == 0)
    await broker.stop()
    assert sorted(seen) == [("failed", "bad"), ("sent", "good")]


async def test_what_is_sent_is_what_was_stored(database: Database, store: AsyncStore, backend: FakeBackend) -> None:
    """Identity, headers, keys, properties and tombstones reach the producer as the emit made them."""
    sent = message(7, "ü@example.com", headers={"ce_id": "x", "raw": b"\xff"}, properties={"partition": 3}, id="the-id")
    database.insert([record_of(sent), record(1, payload=None)])
    async with started(default=backend) as brokers, relaying(store, brokers):
        await eventually(lambda: len(backend.fake.sent) == 2)
    [arrived] = [each for each in backend.fake.sent if each.id == "the-id"]
    for slot in ("type", "broker", "destination", "ordering_key", "headers", "properties", "payload", "content_type"):
        assert getattr(arrived, slot) == getattr(sent, slot), slot
    assert [each.payload for each in backend.fake.sent if each.id != "the-id"] == [None]


async def test_a_liveness_file_can_be_touched(store: AsyncStore, backend: FakeBackend) -> None:
    """Orchestrators restart what is stuck: each renewal of the leases is told; what is done then may fail."""
    beats: list[Relay] = []

    def beat(relay: Relay) -> None:
        beats.append(relay)
        if len(beats) == 1:
            raise OSError("the disk is full")

    async with started(default=backend) as brokers:
        relay = Relay(store, brokers, RelayOptions(lease=0.6), on_beat=beat)
        running = asyncio.create_task(relay.run())
        await eventually(lambda: len(beats) >= 3)
        relay.stop()
        await asyncio.wait_for(running, 5)
    assert set(beats) == {relay}


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "lease", "problem"),
    [
        (None, 10.0, "give it a timeout"),
        (8.0, 10.0, "write lease=16"),
        (1.0, 1.3, "write lease=2"),
        (7.5, 10.0, None),
        (5.0, 10.0, None),
    ],
)
async def test_a_timeout_must_fit_the_lease(
    store: AsyncStore, timeout: float | None, lease: float, problem: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A delivery that outlasts its lease breaks the order: such settings are refused, with what to write."""
    brokers = {"default": Broker("default", FakeBackend(), BrokerOptions(timeout=timeout))}
    if problem is None:
        Relay(store, brokers, RelayOptions(lease=lease))
        assert ("write lease=15" in caplog.text) == (timeout == 7.5)
        return
    with pytest.raises(ConfigurationError, match=problem):
        Relay(store, brokers, RelayOptions(lease=lease))


def test_wrong_options_are_told_all_at_once() -> None:
    """A relay that never sends, or sends one row at a time, must not come from a slip in the settings."""
    with pytest.raises(ConfigurationError) as caught:
        RelayOptions(batch_size=0, lease=-1, poll_interval=0, max_attempts=0, backoff=0, max_backoff=0, keep_sent=-1)
    assert len(caught.value.problems) == 7
    with pytest.raises(ConfigurationError) as caught:
        RelayOptions(
            batch_size=2.5,  # type: ignore[arg-type]
            lease="10",  # type: ignore[arg-type]
            max_attempts=True,
            keep_dead="7d",  # type: ignore[arg-type]
            codec=FakeBackend,  # type: ignore[arg-type]
        )
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == [
        *("batch_size", "max_attempts", "lease", "keep_dead", "codec")
    ]
    assert "write codec=FakeBackend()" in str(caught.value)
    RelayOptions(keep_sent=0, keep_dead=0, max_attempts=1)


# -- in an app -----------------------------------------------------------------------------------------------------


class _Placed(EventBase):
    __route__ = KafkaEventRoute(topic="orders")
    __ordering_key__ = "{customer}"

    customer: str = "anna"
    number: int = 0


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "sqlite+pysqlite"])
async def test_embedded_in_an_app(tmp_path: Path, driver: str) -> None:
    """One process, no other service: what is committed is relayed by the app itself, from its start to its end."""
    with temporary_database("sqlite", tmp_path) as database:
        url = database.url(driver)
        engine = create_async_engine(url) if "aio" in driver else create_engine(url)
        outbox = SQLAlchemyOutbox(engine, options=RelayOptions(poll_interval=30))
        brokers = connect("memory://kafka", outbox=outbox)
        with pytest.raises(NotStartedError, match="outbox=outbox"):
            _ = outbox.emitter
        for start in range(2):  # An app that is started again.
            async with brokers as emitter:
                assert outbox.emitter is emitter
                assert len(outbox.relays) == 1
                producer = brokers.producers["default"]
                assert isinstance(producer, MemoryProducer)
                records = [outbox.record_of(emitter.prepare(_Placed(number=number))[1]) for number in range(50)]
                with database.engine.begin() as connection:
                    outbox.insert(connection, records)
                await asyncio.to_thread(outbox.committed)
                await eventually(partial(_has_sent, producer, 50))
                assert [each.id for each in producer.sent] == [each.event_id for each in records]
                await emitter.emit(_Placed(number=99))  # Directly, too.
                assert len(producer.sent) == 51
            assert not outbox.relays
            assert database.count() == 0, start
            owned = "select count(*) from dispytch_outbox_shard where owner is not null"
            assert database.all(owned) == [(0,)]
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
        else:
            engine.dispose()


async def test_relayed_elsewhere_no_connection_is_opened(tmp_path: Path) -> None:
    """Web processes by the hundred need no connection to Kafka; who emits directly there is told what to write."""
    with temporary_database("sqlite", tmp_path) as database:
        engine = create_engine(database.url("sqlite+pysqlite"))
    outbox = SQLAlchemyOutbox(engine, relay="external")
    async with connect("kafka://127.0.0.1:1", startup_timeout=0.5, outbox=outbox) as emitter:
        assert emitter is outbox.emitter
        assert outbox.record_of(emitter.prepare(_Placed(number=1))[1]).destination == "orders"
        with pytest.raises(NotStartedError, match=r"emit_on_commit.*relay='embedded'"):
            await emitter.emit(_Placed())
        with pytest.raises(NotStartedError, match="relayed by another one"):
            await emitter.emit_many([_Placed(), _Placed()])
        assert not outbox.relays
    engine.dispose()


async def test_an_app_without_tables_does_not_start(tmp_path: Path) -> None:
    """A forgotten migration is told at the start of the app, with what to write; its brokers are closed again."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}")
    brokers = connect("memory://", outbox=SQLAlchemyOutbox(engine))
    with pytest.raises(ConfigurationError, match="outbox_tables"):
        await brokers.start()
    assert [broker.state for broker in brokers.brokers.values()] == ["stopped"]
    await engine.dispose()


def test_one_connection_for_all_is_refused() -> None:
    """SQLite in memory has one connection: a relay would read inside the app's transaction, and send what is
    rolled back."""
    with pytest.raises(ConfigurationError, match="use a file"):
        SQLAlchemyOutbox(create_engine("sqlite://", poolclass=StaticPool))
    with pytest.raises(ConfigurationError, match="use a file"):
        SQLAlchemyOutbox(create_async_engine("sqlite+aiosqlite://"))


def test_what_cannot_hold_an_outbox_is_refused() -> None:
    """A wrong argument is told when the app is imported, not when the first order comes."""
    with pytest.raises(ConfigurationError, match="takes an engine, not a str"):
        SQLAlchemyOutbox("postgresql+asyncpg://localhost/shop")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="relay='externally'"):
        SQLAlchemyOutbox(create_engine("sqlite:///x.db"), relay="externally")  # type: ignore[arg-type]


async def test_an_app_whose_timeout_does_not_fit_does_not_start(tmp_path: Path) -> None:
    """The settings of broker and outbox are checked against each other at the start."""
    with temporary_database("sqlite", tmp_path) as database:
        engine = create_async_engine(database.url("sqlite+aiosqlite"))
        with pytest.raises(ConfigurationError, match="does not fit into a lease"):
            await connect("memory://", timeout=20.0, outbox=SQLAlchemyOutbox(engine)).start()
        await engine.dispose()


# -- the connection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite+aiosqlite", "postgresql+asyncpg"])
async def test_a_question_that_is_given_up_leaves_no_connection_behind(kind: str, tmp_path: Path) -> None:
    """A relay that ends while it connects, or waits no longer: each time one connection of the pool would be lost."""
    with temporary_database("sqlite" if "lite" in kind else "postgresql", tmp_path) as database:
        engine = create_async_engine(database.url(kind))
        async with engine.connect():  # What the first one asks the server.
            pass
        for steps in range(0, 400, 3):
            store = AsyncStore(engine)
            asking = asyncio.create_task(store.on_connection(lambda connection: None))
            for _ in range(steps % 50):
                await asyncio.sleep(0)
            await asyncio.sleep(steps * 1e-6)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await store.close()
            pool: Any = engine.pool
            assert pool.checkedout() == 0, f"lost after {steps} steps"
        await engine.dispose()
