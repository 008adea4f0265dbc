"""Outages and poison: what is down is waited for, what is refused holds up its own key only, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
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
from dispytch_integrations.outbox.relay import Relay, RelayOptions
from dispytch_integrations.outbox.store import Selection, State
from tests.conftest import _unavailable
from tests.kill.arena import Arena
from tests.kill.places import MariaDB, PostgreSQL
from tests.kill.programs import metadata
from tests.support.arrivals import KafkaArrivals
from tests.support.brokers import BrokerMissing, Tansu

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
    relaying = Outbox(engine, brokers, RelayOptions(**{"backoff": 0.05, "lease": 4.0, "poll_interval": 0.2, **options}))
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
        outbox.broker.producer = producer = _Fussy(answer)
        outbox.start()
        for number in range(3):
            breaks = 1
            outbox.put([Noted(name=f"k{n}", number=number) for n in range(1 if number == 0 else 50)])
            outbox.relay.wake()
            await until(lambda: breaks == 0 and not outbox.rows())
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
    client = {"allow_auto_create_topics": False, "max_request_size": 20_000}
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
