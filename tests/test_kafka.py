"""Kafka: the contract, the raw client's API as in dispytch, keys, topics, batches, options, errors."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import trustme
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition  # type: ignore[import-untyped]
from aiokafka import errors as kafka_errors

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations._kafka_client import Client
from dispytch_integrations._kafka_errors import BEFORE_SENDING, TRANSLATIONS, translate
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    DispytchError,
    MessageTooLargeError,
    NotStartedError,
    RouteError,
    StartupError,
    UnconfirmedError,
    UnroutableError,
    WrongLoopError,
)
from dispytch_integrations.kafka import (
    KafkaBackend,
    KafkaEventConfig,
    KafkaEventRoute,
    KafkaOptions,
    KafkaProducer,
)
from tests.contract import Listen, MakeRoute, ProducerContract, Receive, Received


def _address(url: str) -> str:
    return url.removeprefix("kafka://")


class _Reader:
    """Reads all partitions of a topic from their beginning, with the raw client."""

    def __init__(self, url: str) -> None:
        self.consumer: Any = AIOKafkaConsumer(bootstrap_servers=_address(url), auto_offset_reset="earliest")

    async def read(self, topic: str, count: int) -> list[Any]:
        if not self.consumer.assignment():
            await self.consumer._client._wait_on_metadata(topic)
            partitions = self.consumer.partitions_for_topic(topic)
            self.consumer.assign([TopicPartition(topic, number) for number in partitions])
        records: list[Any] = []
        async with asyncio.timeout(15):
            while len(records) < count:
                for found in (await self.consumer.getmany(timeout_ms=500)).values():
                    records += found
        return records


@pytest.fixture
async def reader(kafka_url: str) -> AsyncIterator[_Reader]:
    """A consumer of the shared broker."""
    reader = _Reader(kafka_url)
    await reader.consumer.start()
    yield reader
    await reader.consumer.stop()


@pytest.fixture
async def raw(kafka_url: str) -> AsyncIterator[Any]:
    """A client of aiokafka, started, as a user has it."""
    client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url), acks="all")
    await client.start()
    yield client
    await client.stop()


class TestKafka(ProducerContract):
    carries_keys = True

    @pytest.fixture
    def url(self, kafka_url: str) -> str:
        return kafka_url

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: KafkaEventRoute(topic=destination)

    @pytest.fixture
    async def listen(self, reader: _Reader) -> Listen:
        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            async def receive(count: int) -> list[Received]:
                return [
                    Received(
                        payload=record.value,
                        headers={name: value.decode() for name, value in record.headers},
                        key=None if record.key is None else record.key.decode(),
                    )
                    for record in await reader.read(destination, count)
                ]

            return receive

        return listen


def _event(topic: str, config: KafkaEventConfig | None = None, **attributes: Any) -> type[Any]:
    class Placed(EventBase):
        __route__ = KafkaEventRoute(topic=topic)
        __backend_config__ = config

        customer: str = "anna"
        number: int = 0
        note: str = ""

    for name, value in attributes.items():
        setattr(Placed, name, value)
    return Placed


class TestRawClient:
    """dispytch's own way: a client that the user started."""

    async def test_page_of_dispytch_works(self, raw: Any, reader: _Reader, unique: str) -> None:
        """Who comes from dispytch changes the import and nothing else."""

        class UserEvent(EventBase):
            __route__ = KafkaEventRoute(topic=unique)

            user_id: str
            timestamp: str

        emitter = EventEmitter(KafkaProducer(raw))
        await emitter.emit(UserEvent(user_id="abc123", timestamp="2025-07-07T12:00:00Z"))
        [record] = await reader.read(unique, 1)
        assert record.value == b'{"user_id":"abc123","timestamp":"2025-07-07T12:00:00Z"}'
        assert record.headers == ()

    async def test_send_called_directly(self, raw: Any, reader: _Reader, unique: str) -> None:
        """dispytch's producers are called so by wrappers and tests of users."""
        producer = KafkaProducer(raw)
        config = KafkaEventConfig(partition_key=7, partition=0, timestamp_ms=1700000000000, headers={"a": 1})
        await producer.send(b"body", KafkaEventRoute(topic=unique), config)
        [record] = await reader.read(unique, 1)
        assert (record.value, record.key, record.partition, record.timestamp) == (b"body", b"7", 0, 1700000000000)
        assert record.headers == (("a", b"1"),)
        with pytest.raises(RouteError, match="topic"):
            await producer.send(b"body", KafkaEventRoute(topic="no good"))

    async def test_never_started_is_refused_at_once(self, kafka_url: str, unique: str) -> None:
        """aiokafka would hang for ever, and nothing would tell why."""
        client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url))
        started = time.monotonic()
        with pytest.raises(NotStartedError, match=r"await raw_kafka_producer\.start\(\)"):
            await EventEmitter(KafkaProducer(client)).emit(_event(unique)())
        assert time.monotonic() - started < 1
        await client.stop()

    async def test_stopped_is_refused_at_once(self, kafka_url: str, unique: str) -> None:
        """A stopped client cannot be started again: a second start() would only look as if."""
        client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url))
        await client.start()
        emitter = EventEmitter(KafkaProducer(client))
        await emitter.emit(_event(unique)())
        await client.stop()
        with pytest.raises(NotStartedError, match="stopped"):
            await emitter.emit(_event(unique)())

    async def test_another_loop_is_refused(self, raw: Any, unique: str) -> None:
        """Awaiting a client of another loop hangs."""
        emitter = EventEmitter(KafkaProducer(raw))

        def elsewhere() -> None:
            asyncio.run(emitter.emit(_event(unique)()))

        with pytest.raises(WrongLoopError):
            await asyncio.to_thread(elsewhere)

    async def test_another_object_is_refused(self) -> None:
        """confluent's producer, or the class instead of an instance, must not fail at the first emit."""
        with pytest.raises(ConfigurationError, match="AIOKafkaProducer, not a object"):
            KafkaProducer(cast("Any", object()))

    async def test_serializers_of_the_client_are_not_applied_twice(
        self, kafka_url: str, reader: _Reader, unique: str
    ) -> None:
        """A client shared with other code may turn dicts into JSON; our payload is bytes already."""
        client: Any = AIOKafkaProducer(
            bootstrap_servers=_address(kafka_url),
            value_serializer=lambda value: 1 / 0,
            key_serializer=lambda key: 1 / 0,
        )
        await client.start()
        emitter = EventEmitter(KafkaProducer(client))
        event = _event(unique, KafkaEventConfig(partition_key="{customer}"))
        await emitter.emit(event())
        await emitter.emit_many([event(), event()])
        assert [record.key for record in await reader.read(unique, 3)] == [b"anna"] * 3
        await client.stop()


class TestKeysAndHeaders:
    @pytest.mark.parametrize(
        ("key", "encoded", "ordering"),
        [
            ("text ü", "text ü".encode(), "text ü"),
            (5, b"5", "5"),
            (UUID(int=1), str(UUID(int=1)).encode(), str(UUID(int=1))),
            ({"b": 1, "a": UUID(int=2)}, b'{"a":"%s","b":1}' % str(UUID(int=2)).encode(), None),
            (b"bytes", b"bytes", "bytes"),
            (b"\xff\x00", b"\xff\x00", "ff00"),
        ],
    )
    def test_keys_are_encoded(self, key: object, encoded: bytes, ordering: str | None) -> None:
        """aiokafka takes bytes only; equal keys must give equal bytes, or their order is lost."""
        properties: dict[str, Any] = {"partition_key": key, "partition": 3}
        assert KafkaEventRoute.encode_properties(properties) == (encoded.decode() if ordering is None else ordering)
        assert properties == {"key": encoded, "partition": 3}

    def test_key_of_another_type_is_refused_at_import(self) -> None:
        """An object's repr holds its address: it would be another key each time."""
        with pytest.raises(TypeError, match="object"):
            KafkaEventConfig(partition_key=object())

    async def test_partition_key_beats_the_ordering_key(self, raw: Any, reader: _Reader, unique: str) -> None:
        """The record's key is what the user called so; the ordering key is used where there is none."""
        emitter = EventEmitter(KafkaProducer(raw))
        both = _event(unique, KafkaEventConfig(partition_key="{number}"))
        both.__ordering_key__ = "{customer}"
        only = _event(unique)
        only.__ordering_key__ = "{customer}"
        await emitter.emit(both(number=5))
        await emitter.emit(only())
        assert {record.key for record in await reader.read(unique, 2)} == {b"5", b"anna"}

    async def test_headers_are_encoded(self, raw: Any, reader: _Reader, unique: str) -> None:
        """aiokafka takes a list of str and bytes; a dict, a str or a UUID raises deep in it."""
        config = KafkaEventConfig(
            headers={"id": UUID(int=3), "n": 1, "json": {"a": 1}, "raw": b"\xff", "t": "{customer}"}
        )
        await EventEmitter(KafkaProducer(raw)).emit(_event(unique, config)())
        [record] = await reader.read(unique, 1)
        assert dict(record.headers) == {
            "id": str(UUID(int=3)).encode(),
            "n": b"1",
            "json": b'{"a":1}',
            "raw": b"\xff",
            "t": b"anna",
        }

    def test_headers_as_pairs(self) -> None:
        """What was written for aiokafka is taken, too; a name that stands twice would lose one value."""
        pairs: Any = [("a", b"1"), ("b", b"2")]
        assert KafkaEventConfig(headers=pairs).headers == {"a": b"1", "b": b"2"}
        with pytest.raises(ValueError, match="twice"):
            KafkaEventConfig(headers=[*pairs, ("a", b"3")])  # type: ignore[arg-type]

    async def test_tombstone(self, raw: Any, reader: _Reader, unique: str) -> None:
        """In a compacted topic the null payload is what deletes a key: `b""` or `null` would not."""

        class Gone(EventBase):
            __route__ = KafkaEventRoute(topic=unique)
            __ordering_key__ = "{customer}"
            __tombstone__ = True

            customer: str

        emitter = EventEmitter(KafkaProducer(raw))
        await emitter.emit(Gone(customer="anna"))
        await emitter.emit_many([Gone(customer="anna"), Gone(customer="bob")])
        assert [record.value for record in await reader.read(unique, 3)] == [None] * 3

    @pytest.mark.parametrize("name", ["", ".", "..", "a b", "ä", "a/b", "x" * 250, "a\n"])
    def test_topic_names_are_checked(self, name: str) -> None:
        """The broker would refuse them after a round trip, or close the connection."""
        with pytest.raises(RouteError, match="no name for a Kafka topic"):
            KafkaEventRoute.check_address(name, {})

    @pytest.mark.parametrize("name", ["a", "x" * 249, "A.b_c-9"])
    def test_good_topic_names_pass(self, name: str) -> None:
        """What Kafka allows, we allow."""
        KafkaEventRoute.check_address(name, {})


class TestBatches:
    async def test_order_per_key_mixed_with_single_emits(self, raw: Any, reader: _Reader, unique: str) -> None:
        """Batches and single records share the client's queue: what was called later must not arrive earlier."""
        event = _event(unique, KafkaEventConfig(partition_key="{customer}"))
        emitter = EventEmitter(KafkaProducer(raw))

        def events(first: int, count: int) -> list[Any]:
            return [event(customer=f"c{n % 5}", number=n, note="x" * 200) for n in range(first, first + count)]

        await emitter.emit_many(events(0, 1000))
        tasks = [asyncio.create_task(emitter.emit(each)) for each in events(1000, 300)]
        await asyncio.sleep(0)
        await emitter.emit_many(events(1300, 1000))
        await asyncio.gather(*tasks)
        await asyncio.gather(*(emitter.emit(each) for each in events(2300, 100)))
        numbers: dict[bytes, list[int]] = {}
        for record in await reader.read(unique, 2400):
            numbers.setdefault(record.key, []).append(int(record.value.partition(b'"number":')[2].partition(b",")[0]))
        assert sum(map(len, numbers.values())) == 2400
        assert all(found == sorted(found) for found in numbers.values())

    async def test_batches_respect_max_batch_size(self, kafka_url: str, unique: str) -> None:
        """The user set it, for memory or for the broker's limit."""
        sizes: list[int] = []
        client: Any = AIOKafkaProducer(bootstrap_servers=_address(kafka_url), max_batch_size=2000)
        await client.start()
        add_batch = client._message_accumulator.add_batch

        async def counted(builder: Any, *args: Any) -> Any:
            sizes.append(builder.size())
            return await add_batch(builder, *args)

        client._message_accumulator.add_batch = counted
        await EventEmitter(KafkaProducer(client)).emit_many([_event(unique)(note="x" * 100) for _ in range(200)])
        assert len(sizes) > 10
        assert max(sizes) <= 2000
        await client.stop()

    async def test_partition_of_a_key_is_the_clients(self, raw: Any, reader: _Reader, unique: str) -> None:
        """Other producers of the same topic, in Java too, put a key where we put it."""
        keys = [f"key{number}" for number in range(40)]
        for key in keys:
            await raw.send(unique, b'{"number":0}', key=key.encode())
        await raw.flush()
        emitter = EventEmitter(KafkaProducer(raw))
        event = _event(unique, KafkaEventConfig(partition_key="{customer}"))
        await emitter.emit_many([event(customer=key) for key in keys])
        await asyncio.gather(*(emitter.emit(event(customer=key)) for key in keys))
        places: dict[bytes, set[int]] = {}
        for record in await reader.read(unique, 120):
            places.setdefault(record.key, set()).add(record.partition)
        assert all(len(found) == 1 for found in places.values())
        assert len({number for found in places.values() for number in found}) > 1

    async def test_partition_and_timestamp_are_kept(self, raw: Any, reader: _Reader, unique: str) -> None:
        """Who names a partition means it; an unknown one is told at once."""
        event = _event(unique, KafkaEventConfig(partition=1, timestamp_ms=1700000000123))
        emitter = EventEmitter(KafkaProducer(raw))
        await emitter.emit_many([event(), event()])
        await emitter.emit(event())
        records = await reader.read(unique, 3)
        assert {(record.partition, record.timestamp) for record in records} == {(1, 1700000000123)}
        nowhere = _event(unique, KafkaEventConfig(partition=99))
        with pytest.raises(UnroutableError, match="partition 99"):
            await emitter.emit(nowhere())
        with pytest.raises(ExceptionGroup) as caught:
            await emitter.emit_many([event(), nowhere()])
        assert [type(error) for error in caught.value.exceptions] == [UnroutableError]

    async def test_too_large_fails_alone(self, raw: Any, reader: _Reader, unique: str) -> None:
        """One message that is too large must not take its neighbours with it."""
        event = _event(unique)
        events = [event(number=0), event(number=1, note="x" * 2_000_000), event(number=2)]
        emitter = EventEmitter(KafkaProducer(raw))
        with pytest.raises(ExceptionGroup) as caught:
            await emitter.emit_many(events)
        assert [type(error) for error in caught.value.exceptions] == [MessageTooLargeError]
        assert "xxx" not in str(caught.value.exceptions[0])
        with pytest.raises(MessageTooLargeError, match="max_request_size"):
            await emitter.emit(events[1])
        assert len(await reader.read(unique, 2)) == 2

    async def test_too_large_in_the_middle_of_a_large_batch(self, kafka_url: str, reader: _Reader, unique: str) -> None:
        """Where a batch may hold more than a request, each record is measured."""
        client: Any = AIOKafkaProducer(
            bootstrap_servers=_address(kafka_url), max_request_size=5_000, max_batch_size=100_000
        )
        await client.start()
        event = _event(unique)
        with pytest.raises(ExceptionGroup) as caught:
            await EventEmitter(KafkaProducer(client)).emit_many([event(), event(note="x" * 6000), event()])
        assert [type(error) for error in caught.value.exceptions] == [MessageTooLargeError]
        assert len(await reader.read(unique, 2)) == 2
        await client.stop()

    async def test_batch_the_broker_finds_too_large_is_sent_one_by_one(
        self, raw: Any, reader: _Reader, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A broker with a small limit refuses whole batches; only the message that exceeds it may fail."""
        # Neither test broker has such a limit: its answer is put in place of the real one.
        from aiokafka.producer.message_accumulator import MessageBatch  # type: ignore[import-untyped]

        done = MessageBatch.done

        def limited(batch: Any, *args: Any, **options: Any) -> None:
            if len(batch.get_data_buffer()) > 1000:
                batch.failure(kafka_errors.MessageSizeTooLargeError())
            else:
                done(batch, *args, **options)

        monkeypatch.setattr(MessageBatch, "done", limited)
        event = _event(unique, KafkaEventConfig(partition=0))
        events = [event(note="y" * (2000 if number == 3 else 100)) for number in range(20)]
        with pytest.raises(ExceptionGroup) as caught:
            await EventEmitter(KafkaProducer(raw)).emit_many(events)
        assert [type(error) for error in caught.value.exceptions] == [MessageTooLargeError]

    async def test_several_topics_in_one_call(self, raw: Any, reader: _Reader, unique: str) -> None:
        """emit_many takes events of several classes; one topic's trouble is not the other's."""
        other = _event(f"{unique}-other")
        await EventEmitter(KafkaProducer(raw)).emit_many([_event(unique)(), other(), other()])
        assert len(await reader.read(f"{unique}-other", 2)) == 2

    async def test_idempotent_producer(self, kafka_mock_url: str, unique: str) -> None:
        """Who asks for idempotence gets it, for batches too: sequence numbers must fit, or the broker refuses."""
        event = _event(unique, KafkaEventConfig(partition_key="{customer}"))
        async with connect(kafka_mock_url, enable_idempotence=True) as emitter:
            await emitter.emit_many([event(customer=f"c{n % 9}", number=n, note="x" * 100) for n in range(1000)])
            await asyncio.gather(*(emitter.emit(event(number=n)) for n in range(50)))


class TestTopics:
    async def test_missing_topic_is_unroutable_at_once(self, kafka_url: str, unique: str) -> None:
        """aiokafka would wait until its request timeout, and the emit would look like an outage."""
        async with connect(kafka_url, allow_auto_create_topics=False) as emitter:
            for _ in range(2):
                started = time.monotonic()
                with pytest.raises(UnroutableError, match=unique):
                    await emitter.emit(_event(unique)())
                assert time.monotonic() - started < 1
            with pytest.raises(ExceptionGroup) as caught:
                await emitter.emit_many([_event(unique)(), _event(unique)()])
            first, second = caught.value.exceptions
            assert isinstance(first, UnroutableError)
            assert first is not second  # Each has notes of its own.

    async def test_topic_created_later_works(self, kafka_url: str, raw: Any, reader: _Reader, unique: str) -> None:
        """Nobody restarts an app because a topic came after it."""
        async with connect(kafka_url, allow_auto_create_topics=False) as emitter:
            with pytest.raises(UnroutableError):
                await emitter.emit(_event(unique)())
            await raw.partitions_for(unique)  # creates it
            await emitter.emit(_event(unique)())
        assert len(await reader.read(unique, 1)) == 1

    async def test_missing_topic_where_creation_is_denied(
        self, kafka_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A broker that creates topics denies them at first: it is given time, but not the whole deadline."""
        look_up, asked = Client.look_up, list[bool]()

        async def denied(client: Client, topics: Any, *, create: bool) -> Any:
            asked.append(create)
            return await look_up(client, topics, create=False)

        monkeypatch.setattr(Client, "look_up", denied)  # Tansu creates whatever is asked for with `create`.
        async with connect(kafka_url, timeout=2.0) as emitter:
            started = time.monotonic()
            with pytest.raises(UnroutableError):
                await emitter.emit(_event(unique)())
            assert 0.5 < time.monotonic() - started < 1.8
            assert asked[0] is True
            # Known to be missing, it is not waited for again.
            started = time.monotonic()
            with pytest.raises(UnroutableError):
                await emitter.emit(_event(unique)())
            assert time.monotonic() - started < 0.5

    async def test_first_use_by_many_asks_once(
        self, kafka_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """200 requests at the start of an app must not ask 200 times."""
        look_up, asked = Client.look_up, list[str]()

        async def counted(client: Client, topics: Any, *, create: bool) -> Any:
            asked.extend(topics)
            return await look_up(client, topics, create=create)

        monkeypatch.setattr(Client, "look_up", counted)
        event = _event(unique)
        async with connect(kafka_url) as emitter:
            await asyncio.gather(*(emitter.emit(event(number=number)) for number in range(200)))
        assert asked == [unique]

    async def test_cancelled_first_use_does_not_harm_the_others(self, kafka_url: str, unique: str) -> None:
        """The question for a topic is shared; whoever asked first may have been cancelled."""
        event = _event(unique)
        async with connect(kafka_url) as emitter:
            first = asyncio.create_task(emitter.emit(event()))
            second = asyncio.create_task(emitter.emit(event()))
            await asyncio.sleep(0)
            first.cancel()
            await second

    async def test_topics_are_checked_at_start(self, kafka_url: str, raw: Any, unique: str) -> None:
        """A typing error in a topic's name is found when the app starts, and nothing is created by looking."""
        await raw.partitions_for(f"p.{unique}")
        async with connect(kafka_url, topics=[unique], prefix="p."):
            pass
        for _ in range(2):
            with pytest.raises((ConfigurationError, StartupError), match=f"missing-{unique}"):
                async with connect(kafka_url, topics=[f"p.{unique}", f"missing-{unique}"]):
                    pass
        async with connect(f"{kafka_url}?topics=p.{unique},p.{unique}"):
            pass

    async def test_change_of_the_cluster_is_noticed(self, raw: Any, unique: str) -> None:
        """Partitions come and topics go: what was remembered is looked at again."""
        producer = KafkaProducer(raw)
        await EventEmitter(producer).emit(_event(unique)())
        delivery = producer._delivery
        assert delivery is not None
        assert unique in delivery.topics.known
        await raw.client.force_metadata_update()
        assert unique not in delivery.topics.known
        await EventEmitter(producer).emit(_event(unique)())

    async def test_producers_made_and_dropped_leave_nothing_behind(self, raw: Any) -> None:
        """Some make a producer per request: the client must not collect listeners for ever."""
        before = len(raw.client.cluster._listeners)
        for _ in range(10):
            KafkaProducer(raw)
        assert len(raw.client.cluster._listeners) == before


class TestOptions:
    def backend(self, url: str, client: dict[str, Any] | None = None, **options: Any) -> KafkaBackend:
        return KafkaBackend(BrokerURL.parse(url), KafkaOptions(**options), client or {})

    def test_defaults(self) -> None:
        """Confirmed by all replicas, not idempotent, and a request gives up when the emit does."""
        given = self.backend("kafka://h", timeout=7.5)._client_options()
        assert given == {"acks": "all", "request_timeout_ms": 7500, "security_protocol": "PLAINTEXT"}
        given = self.backend("kafka://h", {"acks": 1, "request_timeout_ms": 9}, timeout=7.5)._client_options()
        assert (given["acks"], given["request_timeout_ms"]) == (1, 9)
        assert self.backend("kafka://h", timeout=0.1)._client_options()["request_timeout_ms"] == 1000

    def test_hosts_and_default_port(self) -> None:
        """Several brokers, one without a port, one IPv6 address."""
        assert self.backend("kafka://a,b:1,[::1]:2")._hosts == [("a", 9092), ("b", 1), ("::1", 2)]

    def test_sasl(self, tmp_path: Path) -> None:
        """Credentials come from the URL, options, a file or a function, and are read when they are used."""
        secret = tmp_path / "password"
        secret.write_text("hidden\n")
        backend = self.backend("kafka://ann:old@h", sasl_mechanism="SCRAM-SHA-512", password=secret)
        given = backend._client_options()
        assert given["security_protocol"] == "SASL_PLAINTEXT"
        assert (given["sasl_plain_username"], given["sasl_plain_password"]) == ("ann", "hidden")
        secret.write_text("rotated")
        assert backend._client_options()["sasl_plain_password"] == "rotated"
        assert {"hidden", "rotated", "old"} <= set(backend.secrets)
        assert "old" not in backend.address
        given = self.backend(
            "kafka+ssl://h", sasl_mechanism="PLAIN", username="u", password=lambda: "p"
        )._client_options()
        assert (given["security_protocol"], given["sasl_plain_password"]) == ("SASL_SSL", "p")
        assert isinstance(given["ssl_context"], ssl.SSLContext)

    @pytest.mark.parametrize(
        ("url", "options", "client", "advice"),
        [
            ("kafka://ann:pw@h", {}, {}, "sasl_mechanism='SCRAM-SHA-512'"),
            ("kafka://h", {"sasl_mechanism": "PLAIN"}, {}, "username=... and password=..."),
            ("kafka://h", {"sasl_mechanism": "OAUTHBEARER"}, {}, "sasl_oauth_token_provider"),
            ("kafka://h", {"cafile": "/ca.pem"}, {}, r"kafka\+ssl://"),
            ("kafka+ssl://h", {"cafile": "/ca.pem"}, {"ssl_context": 1}, "one of them"),
            ("kafka://h", {}, {"security_protocol": "SSL"}, "instead"),
            ("kafka://h/topic", {}, {}, "no path"),
            ("kafka://h", {}, {"ssl_context": ssl.create_default_context()}, r"kafka\+ssl://"),
            ("kafka://h", {"topics": ["no pe"]}, {}, "'no pe' is no name"),
            ("kafka://h", {"topics": ["orders"], "prefix": "a b."}, {}, "'a b.orders' is no name"),
            ("kafka://h", {}, {"request_timeout_ms": "abc"}, "request_timeout_ms is of type str; write a number"),
            ("kafka://h", {}, {"max_request_size": "1MB"}, "such as max_request_size=1048576"),
            ("kafka://h", {}, {"linger_ms": None}, "linger_ms is of type NoneType"),
            ("kafka://h", {}, {"client_id": 7}, "client_id is of type int; write one of type str"),
            ("kafka://h", {}, {"enable_idempotence": "yes"}, "write True or False"),
            ("kafka://h", {}, {"transactional_id": "shop"}, "connect\\(\\) opens none"),
        ],
    )
    def test_contradictions_are_told(self, url: str, options: Any, client: Any, advice: str) -> None:
        """Each with what to write, and without the password."""
        with pytest.raises(ConfigurationError, match=advice) as caught:
            self.backend(url, client, **options)
        assert "pw" not in str(caught.value)

    async def test_options_of_the_client_can_be_reached(self, kafka_url: str) -> None:
        """Every option of aiokafka is ours, too, typed in a URL as well; a wrong one is told with the nearest."""
        names = KafkaBackend.client_option_names(BrokerURL.parse(kafka_url))
        assert {"acks", "linger_ms", "enable_idempotence", "ssl_context", "max_batch_size"} <= set(names)
        async with connect(f"{kafka_url}?linger_ms=3&acks=all") as emitter:
            producer: Any = emitter.producer
            assert producer._delivery.client.accumulator._linger_time == 0.003
        with pytest.raises(ConfigurationError, match="linger_ms"):
            async with connect(kafka_url, lingerms=3):
                pass

    async def test_options_that_aiokafka_refuses(self) -> None:
        """Trying again would be of no use: the start fails at once, broker or no broker."""
        wrong: dict[str, Any] = {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_provider": "token"}
        started = time.monotonic()
        with pytest.raises(ConfigurationError, match="refuses its options"):
            async with connect("kafka://127.0.0.1:1", **wrong):
                pass
        assert time.monotonic() - started < 5

    async def test_tls_and_a_certificate_that_is_not_trusted(self, kafka_url: str, tmp_path: Path, unique: str) -> None:
        """cafile makes kafka+ssl:// work with a private authority; without it the start says why it cannot."""
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        host, _, port = _address(kafka_url).partition(":")
        handshakes: list[bool] = []

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handshakes.append(True)
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

        async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as server:
            url = f"kafka+ssl://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(ConfigurationError, match="cafile"):
                await KafkaBackend(BrokerURL.parse(url), KafkaOptions(), {}).start()
            assert not handshakes
            # Tansu advertises its plain address, so that it goes no further than the first connection.
            backend = KafkaBackend(BrokerURL.parse(url), KafkaOptions(cafile=tmp_path / "ca.pem"), {})
            from dispytch_integrations._kafka_client import knock

            await knock(backend._hosts, backend._client_options())
            assert handshakes

    async def test_certificate_files_that_do_not_exist(self) -> None:
        """A wrong path is told at the start."""
        backend = self.backend("kafka+ssl://127.0.0.1:1", cafile="/does/not/exist.pem")
        with pytest.raises(ConfigurationError, match="cafile"):
            await backend.start()

    def test_routes_need_no_aiokafka(self) -> None:
        """Events are declared in places that never send; loading the driver there costs 11 MiB."""
        code = """
import sys
sys.modules["aiokafka"] = None
from dispytch_integrations.kafka import KafkaEventRoute, KafkaProducer
from dispytch_integrations.errors import MissingExtraError
KafkaEventRoute(topic="a")
try:
    KafkaProducer(None)
except MissingExtraError as exc:
    print(exc)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "pip install 'dispytch-integrations[kafka]'" in done.stdout


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class TestErrors:
    @pytest.mark.parametrize("table", [TRANSLATIONS, BEFORE_SENDING], ids=["sent", "before"])
    def test_every_entry_is_reached(self, table: Any) -> None:
        """An entry behind a base class of its own would never be used."""
        seen: set[type[Exception]] = set()
        for raised, ours, advice in table:
            if raised in seen:
                continue  # BEFORE_SENDING overrides what it repeats.
            seen.add(raised)
            error = translate(raised("text"), "<Message x>", table)
            assert type(error) is ours
            assert str(error).startswith("<Message x>")
            assert advice in str(error)
            assert isinstance(error.__cause__, raised)

    def test_unknown_and_own_errors(self) -> None:
        """Whatever a client raises is a DeliveryError; ours stay what they are."""
        assert type(translate(ZeroDivisionError("x"), "m")) is DeliveryError
        assert type(translate(kafka_errors.UnknownError(), "m")) is DeliveryError
        own = UnroutableError("x")
        assert translate(own, "m") is own

    def test_doubt_is_never_called_a_no(self) -> None:
        """A connection that broke may have carried the message; before sending it certainly did not."""
        for raised in (kafka_errors.KafkaConnectionError, kafka_errors.NodeNotReadyError, ConnectionResetError):
            assert isinstance(translate(raised("x"), "m"), UnconfirmedError)
            assert isinstance(translate(raised("x"), "m", BEFORE_SENDING), BrokerUnavailableError)

    def test_all_are_ours(self) -> None:
        """`except DispytchError` catches whatever a broker does."""
        for name in kafka_errors.__all__:
            kind: Any = getattr(kafka_errors, name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    error = kind("x")
                except TypeError:
                    continue
                assert isinstance(translate(error, "m"), DispytchError)
