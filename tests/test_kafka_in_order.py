"""Kafka, strictly in order: of a key nothing is delivered behind a message that failed. What the outbox relay needs."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition  # type: ignore[import-untyped]
from aiokafka import errors as kafka_errors
from aiokafka.producer.message_accumulator import MessageBatch  # type: ignore[import-untyped]

from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    DeliveryError,
    MessageTooLargeError,
    NotAttemptedError,
    NotStartedError,
    PermanentFailure,
    ProducerTimeout,
    UnroutableError,
)
from dispytch_integrations.kafka import KafkaBackend, KafkaOptions, KafkaProducer
from dispytch_integrations.message import Message
from tests.support.brokers import Tansu
from tests.support.proxy import TCPProxy

Outcomes = Sequence[Exception | None]


def _address(url: str) -> str:
    return url.removeprefix("kafka://")


def _message(topic: str, number: int, key: str | None = "k", *, size: int = 0, **properties: Any) -> Message:
    payload = json.dumps({"number": number, "key": key, "note": "x" * size}).encode()
    return Message(None, "placed", "default", topic, key, {"h": "v"}, properties, payload)


async def _read(address: str, topic: str, *, until: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The bodies in the order of each partition, until they suffice; then whatever comes within a moment."""
    consumer: Any = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
    await consumer.start()
    try:
        await consumer._client._wait_on_metadata(topic)
        consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)])
        bodies: list[dict[str, Any]] = []
        async with asyncio.timeout(15):
            while not until(bodies):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    bodies += [json.loads(record.value) for record in records]
        for records in (await consumer.getmany(timeout_ms=200)).values():
            bodies += [json.loads(record.value) for record in records]
        return bodies
    finally:
        await consumer.stop()


def _types(outcomes: Outcomes) -> list[type[Exception] | None]:
    return [None if error is None else type(error) for error in outcomes]


def _refuse(monkeypatch: pytest.MonkeyPatch, error: Exception, when: Callable[[MessageBatch], bool]) -> list[int]:
    """Let the broker answer `error` to some batches; the sizes in messages of all that were sent, as they are sent."""
    done = MessageBatch.done
    sizes: list[int] = []

    def answered(batch: Any, *args: Any, **options: Any) -> None:
        sizes.append(batch.record_count)
        if when(batch):
            batch.failure(error)
        else:
            done(batch, *args, **options)

    monkeypatch.setattr(MessageBatch, "done", answered)
    return sizes


def _holds(text: bytes) -> Callable[[Any], bool]:
    return lambda batch: text in bytes(batch.get_data_buffer())


@pytest.fixture
async def producer(kafka_url: str) -> AsyncIterator[KafkaProducer]:
    """On a client of aiokafka that is started."""
    client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url), acks="all")
    await client.start()
    yield KafkaProducer(client)
    await client.stop()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """aiokafka tells much of a broken connection."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("aiokafka").setLevel(logging.NOTSET)


class TestOrder:
    async def test_each_key_arrives_in_order(self, kafka_url: str, producer: KafkaProducer, unique: str) -> None:
        """The order per key is why a relay sends this way."""
        messages = [_message(unique, number, f"k{number % 70}") for number in range(5000)]
        assert await producer.deliver_in_order(messages, timeout=5.0) == [None] * 5000
        bodies = await _read(_address(kafka_url), unique, until=lambda read: len(read) >= 5000)
        for key in {body["key"] for body in bodies}:
            numbers = [body["number"] for body in bodies if body["key"] == key]
            assert numbers == list(range(int(key[1:]), 5000, 70))

    async def test_one_key_takes_few_round_trips(
        self, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch for each message of a busy key would be a thousandth of the rate."""
        sizes = _refuse(monkeypatch, kafka_errors.UnknownError(), lambda batch: False)
        messages = [_message(unique, number, size=100) for number in range(2000)]
        assert await producer.deliver_in_order(messages, timeout=5.0) == [None] * 2000
        assert sum(sizes) == 2000
        assert len(sizes) <= 3

    async def test_never_two_batches_of_a_partition_at_once(
        self, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is queued behind a batch would be sent whatever becomes of it."""
        delivery = producer._delivery
        assert delivery is not None
        accumulator = delivery.client.accumulator
        add = accumulator.add_batch

        async def alone(builder: Any, place: Any, timeout: float) -> Any:
            waiting = [batch for batch in accumulator._pending_batches if batch.tp == place]
            assert not waiting
            assert not accumulator._batches.get(place)
            return await add(builder, place, timeout)

        monkeypatch.setattr(accumulator, "add_batch", alone)
        messages = [_message(unique, number, f"k{number % 9}", size=1000) for number in range(3000)]
        assert await producer.deliver_in_order(messages, timeout=10.0) == [None] * 3000

    async def test_messages_without_a_key(self, kafka_url: str, producer: KafkaProducer, unique: str) -> None:
        """They have no order, and one that fails holds up nobody."""
        messages = [_message(unique, number, None, size=2_000_000 if number == 5 else 10) for number in range(50)]
        outcomes = await producer.deliver_in_order(messages, timeout=5.0)
        assert _types(outcomes) == [MessageTooLargeError if number == 5 else None for number in range(50)]
        assert len(await _read(_address(kafka_url), unique, until=lambda read: len(read) >= 49)) == 49

    async def test_key_that_is_spread_over_partitions(
        self, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An ordering key need not be the partition key; the promise is the ordering key's."""
        assert await producer.deliver_in_order([_message(unique, 0), _message(unique, 1)], timeout=5.0) == [None] * 2
        delivery = producer._delivery
        assert delivery is not None
        places = sorted(delivery.topics.known[unique].places)
        assert len(places) > 1
        _refuse(monkeypatch, kafka_errors.InvalidTimestampError(), _holds(b'"number": 4,'))
        messages = [_message(unique, number, "k", partition=places[number % 2]) for number in range(8)]
        messages.append(_message(unique, 8, "other", partition=places[0]))
        outcomes = await producer.deliver_in_order(messages, timeout=5.0)
        assert _types(outcomes) == [None] * 4 + [PermanentFailure] + [NotAttemptedError] * 3 + [None]

    async def test_idempotent_producer_on_a_cluster(self, kafka_mock_url: str, unique: str) -> None:
        """Sequence numbers must fit the larger batches, on several brokers at once."""
        backend = KafkaBackend(BrokerURL.parse(kafka_mock_url), KafkaOptions(), {"enable_idempotence": True})
        await backend.start()
        messages = [_message(unique, number, f"k{number % 30}", size=300) for number in range(6000)]
        assert await backend.producer.deliver_in_order(messages, timeout=10.0) == [None] * 6000
        assert await backend.producer.deliver_in_order(messages[:40], timeout=10.0) == [None] * 40
        await backend.stop()


class TestFailures:
    async def test_too_large_closes_its_key_alone(self, kafka_url: str, producer: KafkaProducer, unique: str) -> None:
        """What follows a message that cannot be sent waits, and other keys do not."""
        messages = [
            _message(unique, number, f"k{number % 4}", size=2_000_000 if number == 6 else 10) for number in range(40)
        ]
        outcomes = await producer.deliver_in_order(messages, timeout=5.0)
        for number, error in enumerate(outcomes):
            if number == 6:
                assert isinstance(error, MessageTooLargeError)
            elif number > 6 and number % 4 == 2:
                assert isinstance(error, NotAttemptedError)
            else:
                assert error is None
        delivered = sum(error is None for error in outcomes)
        bodies = await _read(_address(kafka_url), unique, until=lambda read: len(read) >= delivered)
        assert sorted(body["number"] for body in bodies) == [n for n, error in enumerate(outcomes) if error is None]

    @pytest.mark.parametrize(
        "error",
        [kafka_errors.InvalidTimestampError(), kafka_errors.UnknownError(), kafka_errors.MessageSizeTooLargeError()],
    )
    async def test_poison_fails_alone(
        self, error: Exception, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A broker refuses the batch for one message in it: the thousand others are not to blame, nor to die."""
        sizes = _refuse(monkeypatch, error, _holds(b'"number": 700,'))
        messages = [_message(unique, number, f"k{number % 20}") for number in range(1000)]
        outcomes = await producer.deliver_in_order(messages, timeout=10.0)
        failed = {number: error for number, error in enumerate(outcomes) if error is not None}
        assert not isinstance(failed.pop(700), NotAttemptedError)
        assert sorted(failed) == list(range(720, 1000, 20))
        assert all(isinstance(each, NotAttemptedError) for each in failed.values())
        assert len(sizes) < 60  # halved, not one by one

    async def test_broker_that_takes_small_batches_only(
        self, kafka_url: str, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """max.message.bytes of a topic may be small: batches become so, and stay so."""
        sizes = _refuse(
            monkeypatch, kafka_errors.MessageSizeTooLargeError(), lambda batch: len(batch.get_data_buffer()) > 20_000
        )
        messages = [_message(unique, number, size=100) for number in range(1500)]
        assert await producer.deliver_in_order(messages, timeout=10.0) == [None] * 1500
        refused = sum(sizes) > 1500
        del sizes[:]
        assert await producer.deliver_in_order(messages, timeout=10.0) == [None] * 1500
        assert refused
        assert sum(sizes) == 1500

    async def test_what_cannot_be_written_fails_alone(self, producer: KafkaProducer, unique: str) -> None:
        """A hook may have put anything into a header."""
        wrong = _message(unique, 1, "a")
        wrong.headers["h"] = object()
        messages = [_message(unique, 0, "a"), wrong, _message(unique, 2, "a"), _message(unique, 3, "b")]
        outcomes = await producer.deliver_in_order(messages, timeout=5.0)
        assert _types(outcomes) == [None, DeliveryError, NotAttemptedError, None]

    async def test_outage_of_a_partition_ends_it(
        self, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A partition without enough replicas takes nothing: the rest of it is not even tried."""
        await producer.deliver_in_order([_message(unique, 0), _message(unique, 1)], timeout=5.0)
        refused = _refuse(monkeypatch, kafka_errors.NotEnoughReplicasError(), lambda batch: True)
        messages = [_message(unique, number, size=1000) for number in range(1000)]
        outcomes = await producer.deliver_in_order(messages, timeout=5.0)
        [first] = refused
        assert _types(outcomes) == [DeliveryError] * first + [NotAttemptedError] * (1000 - first)

    async def test_missing_topic_is_not_the_others_trouble(self, kafka_url: str, unique: str) -> None:
        """One batch of the relay holds events of many topics."""
        backend = KafkaBackend(BrokerURL.parse(kafka_url), KafkaOptions(allow_auto_create_topics=False), {})
        await backend.start()
        client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url))
        await client.start()
        await client.send_and_wait(unique, b'{"number": -1, "key": ""}')
        await client.stop()
        messages = [_message(f"{unique}-no", 0), _message(unique, 1), _message(f"{unique}-no", 2), _message(unique, 3)]
        outcomes = await backend.producer.deliver_in_order(messages, timeout=5.0)
        assert _types(outcomes) == [UnroutableError, None, UnroutableError, None]
        await backend.stop()
        with pytest.raises(NotStartedError):
            await backend.producer.deliver_in_order(messages, timeout=5.0)


class _BehindProxy(Tansu):
    """A broker that tells its clients to come through a proxy."""

    advertised_port = 0

    def command(self) -> list[str]:
        command = super().command()
        command[-1] = f"tcp://127.0.0.1:{self.advertised_port}"
        return command


@asynccontextmanager
async def _proxied() -> AsyncGenerator[tuple[TCPProxy, _BehindProxy]]:
    broker = _BehindProxy()
    async with TCPProxy("127.0.0.1", broker.port) as proxy:
        broker.advertised_port = proxy.port
        try:
            await asyncio.to_thread(broker.start)
            yield proxy, broker
        finally:
            await asyncio.to_thread(broker.close)


class TestBrokenConnections:
    async def test_time_is_up(self) -> None:
        """What was sent may have arrived; what was not sent surely has not, and the relay need not count it."""
        async with _proxied() as (proxy, _):
            backend = KafkaBackend(BrokerURL.parse(f"kafka://127.0.0.1:{proxy.port}"), KafkaOptions(timeout=2.0), {})
            await backend.start()
            assert (
                await backend.producer.deliver_in_order([_message("t", 0), _message("t", 1)], timeout=5.0) == [None] * 2
            )
            await proxy.stall()
            started = time.monotonic()
            outcomes = await backend.producer.deliver_in_order(
                [_message("t", number, size=1000) for number in range(2, 1002)], timeout=0.5
            )
            assert 0.4 < time.monotonic() - started < 2
            sent = _types(outcomes).index(NotAttemptedError)
            assert 0 < sent < 500
            assert _types(outcomes) == [ProducerTimeout] * sent + [NotAttemptedError] * (1000 - sent)
            await proxy.resume()
            await backend.stop()

    async def test_nothing_is_begun_in_the_second_half_of_the_time(
        self, producer: KafkaProducer, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With too little time left a healthy broker would look as if it failed, and an attempt would count."""
        await producer.deliver_in_order([_message(unique, 0), _message(unique, 1)], timeout=5.0)
        delivery = producer._delivery
        assert delivery is not None
        add = delivery.client.accumulator.add_batch

        async def slow(*arguments: Any) -> Any:
            confirmed = await add(*arguments)

            async def late() -> Any:
                await asyncio.sleep(0.3)
                return await confirmed

            return asyncio.ensure_future(late())

        monkeypatch.setattr(delivery.client.accumulator, "add_batch", slow)
        messages = [_message(unique, number, size=1000) for number in range(1000)]
        outcomes = await producer.deliver_in_order(messages, timeout=1.0)
        assert set(_types(outcomes)) == {None, NotAttemptedError}

    async def test_cuts_at_random_never_let_a_later_message_overtake(self) -> None:
        """Whatever breaks: what a consumer sees of a key, duplicates aside, is a beginning of it, without a hole."""
        dice = random.Random(4)
        async with _proxied() as (proxy, _):
            options = KafkaOptions(timeout=1.0)
            backend = KafkaBackend(
                BrokerURL.parse(f"kafka://127.0.0.1:{proxy.port}"), options, {"retry_backoff_ms": 20}
            )
            await backend.start()
            await backend.producer.deliver_in_order([_message("t", -1), _message("t", -2)], timeout=5.0)
            keys, next_number = [f"k{number}" for number in range(12)], 0
            todo: list[Message] = []
            failed_rounds = 0
            for _ in range(20):
                while len(todo) < 1500:
                    todo.append(_message("t", next_number, dice.choice(keys), size=500))
                    next_number += 1
                sending = asyncio.create_task(backend.producer.deliver_in_order(todo, timeout=0.4))
                await asyncio.sleep(dice.uniform(0.0, 0.02))
                breaking = dice.choice((proxy.cut, proxy.refuse, proxy.stall))
                await breaking()
                await asyncio.sleep(dice.uniform(0.0, 0.7))
                outcomes = await sending if breaking == proxy.stall else await _resumed(proxy, sending)
                await proxy.resume()
                failed_rounds += any(error is not None for error in outcomes)
                broken_keys = set[str | None]()
                for message, error in zip(todo, outcomes, strict=True):
                    if error is not None:
                        broken_keys.add(message.ordering_key)
                    assert error is not None or message.ordering_key not in broken_keys
                todo = [message for message, error in zip(todo, outcomes, strict=True) if error is not None]
            async with asyncio.timeout(20):
                while todo:
                    outcomes = await backend.producer.deliver_in_order(todo, timeout=2.0)
                    todo = [message for message, error in zip(todo, outcomes, strict=True) if error is not None]
            await backend.stop()
            bodies = await _read(
                f"127.0.0.1:{proxy.port}", "t", until=lambda read: len({b["number"] for b in read}) >= next_number + 2
            )
        assert failed_rounds > 5
        seen = set[int]()
        last: dict[str, int] = {}
        for body in bodies:
            number = body["number"]
            if number >= 0 and number not in seen:
                seen.add(number)
                assert number > last.get(body["key"], -1)
                last[body["key"]] = number
        assert seen == set(range(next_number))


async def _resumed(proxy: TCPProxy, sending: asyncio.Task[list[Exception | None]]) -> list[Exception | None]:
    await proxy.resume()
    return await sending
