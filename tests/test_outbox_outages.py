"""Outages and poison: what is down is waited for, what is refused holds up its own key only, and nothing hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from dispytch_integrations import EventBase, connect
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_store import outbox_tables, store_of
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    PermanentFailure,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.outbox.store import Selection, State
from tests.conftest import _unavailable
from tests.kill.arena import Arena
from tests.kill.places import MariaDB, PostgreSQL
from tests.kill.programs import metadata
from tests.support.arrivals import KafkaArrivals
from tests.support.brokers import BrokerMissing

SECONDS = 15.0


class Noted(EventBase):
    __route__ = KafkaEventRoute(topic="{topic}")
    __ordering_key__ = "{name}"

    topic: str = "notes"
    name: str
    number: int
    text: str = ""


class Outbox:
    """An outbox in a file, brokers, and a relay between them that a test starts and stops."""

    def __init__(self, engine: Engine, brokers: Brokers, options: RelayOptions) -> None:
        self.engine = engine
        self.brokers = brokers
        self.outbox = SQLAlchemyOutbox(engine, relay="external", options=options)
        self.store = store_of(engine)
        self.relay = Relay(store_of(engine), brokers.brokers, options)
        self.running: asyncio.Task[None] | None = None

    @property
    def broker(self) -> Any:
        return self.brokers.brokers["default"]

    def put(self, events: Sequence[EventBase]) -> None:
        with self.engine.begin() as connection:
            records = [self.outbox.record_of(self.brokers.emitter.prepare(each)[1]) for each in events]
            self.outbox.insert(connection, records)

    def start(self) -> None:
        self.running = asyncio.create_task(self.relay.run())

    async def stop(self) -> None:
        if self.running is not None:
            self.relay.stop()
            await asyncio.wait_for(self.running, SECONDS)

    def rows(self) -> list[tuple[int, int, int]]:
        """(id, state, attempts) of all that is there."""
        events, _ = outbox_tables(metadata)
        with self.engine.connect() as connection:
            rows = connection.execute(select(events.c.id, events.c.state, events.c.attempts).order_by(events.c.id))
            return [(row[0], row[1], row[2]) for row in rows]


async def until(done: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def opened(
    path: Path, url: str = "memory://", *, timeout: float = 1.0, broker: dict[str, Any] | None = None, **options: Any
) -> AsyncGenerator[Outbox]:
    engine = create_engine(f"sqlite:///{path / 'outbox.db'}", connect_args={"timeout": 10})
    with engine.begin() as connection:
        connection.exec_driver_sql("pragma journal_mode=wal")
        metadata.create_all(connection)
    brokers = connect(url, timeout=timeout, **(broker or {}))
    await brokers.start()
    given: dict[str, Any] = {"backoff": 0.05, "lease": 4.0, "poll_interval": 0.2, **options}
    relaying = Outbox(engine, brokers, RelayOptions(**given))
    try:
        yield relaying
        await relaying.stop()
    finally:
        if relaying.running is not None:
            relaying.running.cancel()
            await asyncio.wait({relaying.running})
        await relaying.store.close()
        await brokers.stop()
        engine.dispose()


# -- poison --------------------------------------------------------------------------------------------------------


class _Fussy(MemoryProducer):
    """Answers each batch as a function says; what it takes is in `sent`."""

    def __init__(self, answer: Callable[[Sequence[Message]], list[Exception | None]]) -> None:
        super().__init__()
        self.answer = answer
        self.batches: list[int] = []

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        await asyncio.sleep(0.001)
        self.batches.append(len(messages))
        outcomes = self.answer(messages)
        taken = [message for message, error in zip(messages, outcomes, strict=True) if error is None]
        if taken:
            await super().deliver(taken, timeout=timeout)
        return outcomes


def _numbers(producer: _Fussy, name: str) -> list[int]:
    events = [Noted.model_validate_json(message.payload or b"") for message in producer.sent]
    return [event.number for event in events if event.name == name]


def _is_poison(message: Message) -> bool:
    return b"poison" in (message.payload or b"")


async def test_a_refused_event_holds_up_its_own_key_only(tmp_path: Path) -> None:
    """One bad event must not stop the business: others go on, and behind it its own key, once it is dead."""
    times: list[float] = []

    def answer(messages: Sequence[Message]) -> list[Exception | None]:
        times.extend(time.monotonic() for message in messages if _is_poison(message))
        return [UnroutableError("nobody takes it") if _is_poison(message) else None for message in messages]

    async with opened(tmp_path, max_attempts=3) as outbox:
        outbox.broker.producer = producer = _Fussy(answer)
        outbox.put([Noted(name=f"k{n % 5}", number=n, text="poison" if n == 10 else "") for n in range(50)])
        outbox.start()
        await until(lambda: len(producer.sent) >= 49)
        [(_, state, attempts)] = outbox.rows()
        assert (state, attempts) == (State.DEAD, 3)
        assert len(times) == 3
        assert times[2] - times[1] > times[1] - times[0]  # backoff grows
    assert _numbers(producer, "k0") == [0, 5, 15, 20, 25, 30, 35, 40, 45]
    for key in range(1, 5):
        assert _numbers(producer, f"k{key}") == list(range(key, 50, 5))
    order = [Noted.model_validate_json(message.payload or b"").number for message in producer.sent]
    assert order.index(15) > order.index(49), "the others waited for the poison"


async def test_a_permanent_failure_is_dead_at_once(tmp_path: Path) -> None:
    """What would be refused again is not tried again, and what follows it goes on."""
    async with opened(tmp_path) as outbox:
        outbox.broker.producer = producer = _Fussy(
            lambda messages: [PermanentFailure("never") if _is_poison(message) else None for message in messages]
        )
        outbox.put([Noted(name="k", number=n, text="poison" if n == 1 else "") for n in range(4)])
        outbox.start()
        await until(lambda: len(producer.sent) == 3)
        await until(lambda: [row[1:] for row in outbox.rows()] == [(State.DEAD, 1)])
    assert _numbers(producer, "k") == [0, 2, 3]


@pytest.mark.parametrize("others", [UnconfirmedError, BrokerUnavailableError, None])
async def test_an_event_that_breaks_the_connection_holds_up_its_own_key_only(
    tmp_path: Path, others: type[DeliveryError] | None
) -> None:
    """A message at which the broker hangs up fails all that are under way with it: they must arrive all the same."""
    broken = 0

    def answer(messages: Sequence[Message]) -> list[Exception | None]:
        nonlocal broken
        at = next((n for n, message in enumerate(messages) if _is_poison(message)), None)
        if at is None:
            return [None] * len(messages)
        broken += 1
        outcomes: list[Exception | None] = [None if others is None else others("hung up") for _ in messages]
        outcomes[at] = UnconfirmedError("hung up")
        outcomes[at + 1 :] = [UnconfirmedError("hung up") for _ in messages[at + 1 :]]
        return outcomes

    async with opened(tmp_path, max_attempts=3, backoff=0.5) as outbox:
        outbox.broker.producer = producer = _Fussy(answer)
        outbox.put([Noted(name=f"k{n % 400}", number=n, text="poison" if n == 150 else "") for n in range(600)])
        outbox.start()
        await until(lambda: len(outbox.rows()) <= 2, 3.0)  # All but it, and the one behind it.
        assert [row[1] for row in outbox.rows()] == [State.WAITING] * 2
        assert len({message.id for message in producer.sent}) == 598
        await until(lambda: [row[1:] for row in outbox.rows()] == [(State.DEAD, 3)])
        assert outbox.relay.counts.attempts_failed == 3, "innocent ones were counted"
        assert broken <= 20
        assert len(outbox.relay._suspects) == 0
    assert _numbers(producer, "k150") == [550]


async def test_a_connection_that_broke_once_counts_for_nobody(tmp_path: Path) -> None:
    """Connections break: that is no attempt, whether one message was under way or many."""
    breaks = 3

    def answer(messages: Sequence[Message]) -> list[Exception | None]:
        nonlocal breaks
        if breaks == 0:
            return [None] * len(messages)
        breaks -= 1
        return [UnconfirmedError("hung up") for _ in messages]

    async with opened(tmp_path) as outbox:

        def all_sent() -> bool:
            return breaks == 0 and not outbox.rows()

        outbox.broker.producer = producer = _Fussy(answer)
        outbox.start()
        for number in range(3):
            breaks = 1
            outbox.put([Noted(name=f"k{n}", number=number) for n in range(1 if number == 0 else 50)])
            outbox.relay.wake()
            await until(all_sent)
        assert outbox.relay.counts.attempts_failed == 0
        assert len(producer.sent) == 101


async def test_what_has_no_leader_waits_and_the_rest_goes_on(tmp_path: Path) -> None:
    """A partition or a node that is away, of a cluster that answers, is an outage of what goes there alone."""
    away = True

    def answer(messages: Sequence[Message]) -> list[Exception | None]:
        return [BrokerUnavailableError("no leader") if away and _is_poison(m) else None for m in messages]

    async with opened(tmp_path, max_attempts=2) as outbox:
        outbox.broker.producer = producer = _Fussy(answer)
        outbox.put([Noted(name=f"k{n}", number=n, text="poison" if n % 2 else "") for n in range(100)])
        outbox.start()
        await until(lambda: len(producer.sent) >= 50)
        for number in range(100, 120):
            outbox.put([Noted(name="other", number=number)])
            outbox.relay.wake()
            await asyncio.sleep(0.05)
        await until(lambda: len(producer.sent) >= 70, 1.0)
        assert [row[1:] for row in outbox.rows()] == [(State.WAITING, 0)] * 50
        assert len(producer.batches) < 200, "it spins"
        away = False
        await until(lambda: not outbox.rows())
    assert len(producer.sent) == 120


async def test_timeouts_of_a_broker_that_answers_are_counted_from_the_second_on(tmp_path: Path) -> None:
    """A message that is never confirmed ends as dead; one that was late once has lost nothing."""
    calls = 0

    def answer(messages: Sequence[Message]) -> list[Exception | None]:
        nonlocal calls
        calls += 1
        return [ProducerTimeout("no answer") if _is_poison(m) or calls == 1 else None for m in messages]

    async with opened(tmp_path, max_attempts=2) as outbox:
        outbox.broker.producer = producer = _Fussy(answer)
        outbox.put([Noted(name="a", number=0, text="poison"), Noted(name="b", number=0)])
        outbox.start()
        await until(lambda: [row[1:] for row in outbox.rows()] == [(State.DEAD, 2)])
        assert outbox.relay.counts.attempts_failed == 2
        assert _numbers(producer, "b") == [0]


async def test_poison_on_a_real_broker(tmp_path: Path, kafka_url: str, unique: str) -> None:
    """A topic that does not exist and a message that is too large: both are told apart by a real client, too."""
    # With a max_size of its own it is not refused at the emit, which knows the client's.
    client = {"allow_auto_create_topics": False, "max_request_size": 20_000, "max_size": 1_000_000}
    async with connect(kafka_url) as emitter:  # Makes the topic.
        await emitter.emit(Noted(topic=unique, name="k0", number=-3))
    arrivals = await asyncio.to_thread(KafkaArrivals, kafka_url, unique)
    try:
        async with opened(tmp_path, kafka_url, timeout=2.0, broker=client, max_attempts=2, lease=8.0) as outbox:
            events = [Noted(topic=unique, name=f"k{n % 3}", number=n) for n in range(30)]
            events[7] = Noted(topic=unique, name="k1", number=7, text="x" * 30_000)
            events[11] = Noted(topic=f"{unique}missing", name="k2", number=11)
            outbox.put(events)
            outbox.start()
            numbers = await asyncio.to_thread(arrivals.numbers, 29)
            assert sorted(numbers) == [-3, *(n for n in range(30) if n not in (7, 11))]
            for key in range(3):
                assert [n for n in numbers if n % 3 == key] == sorted(n for n in numbers if n % 3 == key)
            await until(lambda: [row[1:] for row in outbox.rows()] == [(State.DEAD, 1), (State.DEAD, 2)])
            await outbox.store.open()
            rows = await outbox.store.rows(Selection(states=(State.DEAD,)), 10)
            assert "max_request_size" in (rows[0].last_error or "")
            assert f"{unique}missing" in (rows[1].last_error or "") or "topic" in (rows[1].last_error or "")
            assert "xxxx" not in str(rows)
    finally:
        await asyncio.to_thread(arrivals.close)


# -- outages of the broker -----------------------------------------------------------------------------------------


async def _arena(database: str, broker: str) -> Arena:
    arena = Arena(database, broker)
    try:
        return await arena.__aenter__()
    except (BrokerMissing, OperationalError) as exc:
        _unavailable(str(exc).splitlines()[0])


async def test_a_broker_away_for_a_while_costs_nothing() -> None:
    """An outage at night must not leave dead events, a relay that has grown, or a backlog that stays."""
    async with await _arena("postgresql", "kafka") as arena:
        await arena.work(1.5)
        before = arena.relay_memory()
        attempts = await arena.outage(6.0)
        after = arena.relay_memory()
        verdict = await arena.verdict()
    assert verdict.is_good, f"seed {arena.seed}: {verdict}"
    assert attempts == 0, f"{attempts} attempts of one event were charged to an outage"
    assert after - before < 30, f"{before} MiB before, {after} MiB after"


async def test_a_relay_that_was_suspended_beyond_its_lease_loses_nothing() -> None:
    """A paused container goes on in the belief that its leases hold: what it sends late is a duplicate, no more."""
    async with await _arena("postgresql", "redis") as arena:
        await arena.work(1.0)
        for _ in range(2):
            await arena.suspend_relay()
        verdict = await arena.verdict()
    assert verdict.is_good, f"seed {arena.seed}: {verdict}"


async def test_a_relay_without_work_or_without_a_broker_is_quiet(tmp_path: Path) -> None:
    """Waiting costs next to no CPU: not idle, not while a broker is away, not while the database is."""

    async def busy(seconds: float) -> float:
        started = time.process_time()
        await asyncio.sleep(seconds)
        return (time.process_time() - started) / seconds

    async with opened(tmp_path, poll_interval=1.0) as outbox:
        outbox.start()
        await asyncio.sleep(1.0)
        fetches = outbox.relay.counts.fetches
        assert await busy(1.5) < 0.1
        assert outbox.relay.counts.fetches - fetches <= 4

        away = True

        async def ping() -> None:
            if away:
                raise ConnectionError("away")

        outbox.broker.backend.ping = ping
        outbox.broker.producer = producer = _Fussy(
            lambda messages: [BrokerUnavailableError("away") if away else None for _ in messages]
        )
        outbox.put([Noted(name=f"k{n}", number=n) for n in range(3000)])
        outbox.relay.wake()
        await until(lambda: outbox.relay.outages == ["default"])
        assert await busy(1.5) < 0.15
        assert len(producer.batches) <= 3
        away = False
        await until(lambda: not outbox.rows())
        assert {attempts for _, _, attempts in outbox.rows()} <= {0}
        assert len(producer.sent) == 3000


# -- outages of the database ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _on_server(number: int, server: type[PostgreSQL] | type[MariaDB]) -> AsyncGenerator[tuple[Any, Outbox]]:
    """A relay on a server behind a proxy; `number` chooses the driver: 0 for asyncio, 1 blocking."""
    database = server()
    assert database.proxy is not None
    try:
        await database.open()
    except OperationalError as exc:
        _unavailable(str(exc).splitlines()[0])
    engine: Engine | AsyncEngine
    async with database.proxy:
        await asyncio.to_thread(database.make_tables, 1)
        url = database.relays[number]
        engine = create_async_engine(url) if number == 0 else create_engine(url)
        brokers = connect("memory://", timeout=0.5)
        await brokers.start()
        outbox = Outbox(database.engine, brokers, RelayOptions(lease=1.5, poll_interval=0.2, backoff=0.05))
        outbox.relay = Relay(store_of(engine), brokers.brokers, RelayOptions(lease=1.5, poll_interval=0.2))
        try:
            yield database.proxy, outbox
            await outbox.stop()
        finally:
            if outbox.running is not None:
                outbox.running.cancel()
                await asyncio.wait({outbox.running})
            await database.proxy.cut()
            await brokers.stop()
            await asyncio.sleep(0.1)  # A thread that was left behind closes its connection.
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
            else:
                engine.dispose()
            await database.close()


_SERVERS = [
    pytest.param(0, PostgreSQL, id="asyncpg"),
    pytest.param(1, PostgreSQL, id="psycopg"),
    pytest.param(0, MariaDB, id="asyncmy"),
    pytest.param(1, MariaDB, id="pymysql"),
]


@pytest.mark.parametrize(("number", "server"), _SERVERS)
@pytest.mark.parametrize("how", ["refuse", "freeze"])
async def test_the_relay_goes_on_after_its_database(number: int, server: type[PostgreSQL], how: str) -> None:
    """A restarted database, or one that moved to another host without a word: nobody has to restart the relay."""
    async with _on_server(number, server) as (proxy, outbox):
        outbox.start()
        await until(lambda: outbox.relay.shards == 64)
        outbox.put([Noted(name="k", number=0)])
        await until(lambda: not outbox.rows())
        if how == "refuse":
            await proxy.refuse()
            outbox.put([Noted(name="k", number=1)])
            await asyncio.sleep(2.0)
            assert outbox.relay.last_error is not None
            await proxy.resume()
        else:
            await proxy.freeze()
            outbox.put([Noted(name="k", number=1)])
        await until(lambda: not outbox.rows(), 12.0)
        assert outbox.relay.last_error is None
        sent = [Noted.model_validate_json(m.payload or b"").number for m in outbox.broker.producer.sent]
        assert sent == [0, 1]


# -- the end at a bad moment ---------------------------------------------------------------------------------------


async def _ends(relay: Relay, running: asyncio.Task[None], seconds: float) -> None:
    """`stop` ends it in time, with no task left behind."""
    others = asyncio.all_tasks() - {running}
    relay.stop()
    await asyncio.wait_for(running, seconds)
    await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() - others if task.get_name().startswith("dispytch relay")]
    assert not left


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("moment", ["begin", "work"])
async def test_stop_while_the_database_hangs(number: int, moment: str) -> None:
    """A deployment must not wait for a database that does not answer: the stop takes some leases at most."""
    async with _on_server(number, PostgreSQL) as (proxy, outbox):
        if moment == "begin":
            await proxy.stall()
        outbox.start()
        await (asyncio.sleep(0.3) if moment == "begin" else until(lambda: outbox.relay.shards == 64))
        await proxy.stall()
        await asyncio.sleep(0.4)
        assert outbox.running is not None
        await _ends(outbox.relay, outbox.running, 9.0)
        await proxy.resume()


async def test_stop_before_the_run_and_during_an_outage(tmp_path: Path) -> None:
    """An app that ends as soon as it has started, and one that ends while its broker is away, end."""
    async with opened(tmp_path) as outbox:
        outbox.relay.stop()
        await asyncio.wait_for(outbox.relay.run(), 2.0)
        outbox.start()
        await asyncio.sleep(0)
        assert outbox.running is not None
        await _ends(outbox.relay, outbox.running, 2.0)

        async def ping() -> None:
            raise ConnectionError("away")

        outbox.broker.backend.ping, mended = ping, outbox.broker.backend.ping
        outbox.broker.producer, producer = (
            _Fussy(lambda m: [BrokerUnavailableError("away")] * len(m)),
            (outbox.broker.producer),
        )
        outbox.put([Noted(name="k", number=0)])
        outbox.start()
        await until(lambda: outbox.relay.outages == ["default"])
        await _ends(outbox.relay, outbox.running, 2.0)
        # Run again, the outage of the last time is over.
        outbox.broker.backend.ping, outbox.broker.producer = mended, producer
        outbox.start()
        await until(lambda: not outbox.rows())


async def test_what_waits_for_its_next_try_is_sent_when_it_is_requeued(tmp_path: Path) -> None:
    """The cause is mended and an operator requeues: nobody wants to wait for a backoff of minutes then."""
    broken = True
    async with opened(tmp_path, backoff=100.0) as outbox:
        outbox.broker.producer = producer = _Fussy(
            lambda messages: [UnroutableError("no") if broken else None for _ in messages]
        )
        outbox.put([Noted(name="k", number=0), Noted(name="k", number=1)])
        outbox.start()
        await until(lambda: [row[2] for row in outbox.rows()] == [1, 0])
        broken = False
        await outbox.store.open()
        await outbox.store.requeue(Selection(states=(State.WAITING,)))
        await until(lambda: not outbox.rows(), 8.0)
    assert _numbers(producer, "k") == [0, 1]
