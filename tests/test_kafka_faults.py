"""Kafka when things break: brokers that refuse, vanish, hang, restart and move; stops that must not hang."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import confluent_kafka
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition  # type: ignore[import-untyped]

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    NotStartedError,
    ProducerTimeout,
    StartupError,
    UnconfirmedError,
)
from dispytch_integrations.kafka import KafkaBackend, KafkaEventConfig, KafkaEventRoute, KafkaOptions, KafkaProducer
from dispytch_integrations.message import Message
from tests.support.brokers import Tansu, free_port
from tests.support.proxy import TCPProxy


class Placed(EventBase):
    __route__ = KafkaEventRoute(topic="orders")
    __backend_config__ = KafkaEventConfig(partition_key="{customer}")

    customer: str = "anna"
    number: int = 0


class _BehindProxy(Tansu):
    """A broker that tells its clients to come through a proxy."""

    advertised_port = 0

    def command(self) -> list[str]:
        command = super().command()
        command[-1] = f"tcp://127.0.0.1:{self.advertised_port}"
        return command


@asynccontextmanager
async def _proxied() -> AsyncGenerator[tuple[TCPProxy, _BehindProxy, str]]:
    broker = _BehindProxy()
    async with TCPProxy("127.0.0.1", broker.port) as proxy:
        broker.advertised_port = proxy.port
        try:
            await asyncio.to_thread(broker.start)
            yield proxy, broker, f"kafka://127.0.0.1:{proxy.port}"
        finally:
            await asyncio.to_thread(broker.close)


async def _read_all(port: int, count: int) -> list[int]:
    """The numbers of the first `count` events, duplicates removed."""
    consumer: Any = AIOKafkaConsumer(bootstrap_servers=f"127.0.0.1:{port}", auto_offset_reset="earliest")
    await consumer.start()
    try:
        await consumer._client._wait_on_metadata("orders")
        consumer.assign([TopicPartition("orders", number) for number in consumer.partitions_for_topic("orders")])
        numbers: set[int] = set()
        async with asyncio.timeout(15):
            while len(numbers) < count:
                for records in (await consumer.getmany(timeout_ms=300)).values():
                    numbers.update(json.loads(record.value)["number"] for record in records)
        return sorted(numbers)
    finally:
        await consumer.stop()


def _message(number: int = 0) -> Message:
    return Message(None, "x", "default", "orders", None, {}, {}, b'{"number":%d}' % number)


def _backend(url: str, **options: Any) -> KafkaBackend:
    return KafkaBackend(BrokerURL.parse(url), KafkaOptions(**options), {})


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """aiokafka tells much of a broken connection; warnings about leaks are errors all the same (pyproject.toml)."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("aiokafka").setLevel(logging.NOTSET)


def _tasks_of_the_client() -> list[str]:
    # Asked right after the end: a forgotten task may be garbage, and gone, by the time a fixture looks.
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    return [each.__qualname__ for each in coroutines if "aiokafka" in each.cr_code.co_filename]


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Whatever was started has ended when the test has."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0.05)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, left


class TestStart:
    async def test_refused_connection_names_each_host(self, no_task_left: None) -> None:
        """aiokafka says only that it could not; why stands in its log."""
        ports = free_port(), free_port()
        backend = _backend(f"kafka://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}")
        with pytest.raises(BrokerUnavailableError) as caught:
            await backend.start()
        assert all(f"127.0.0.1:{port}" in str(caught.value) for port in ports)
        with pytest.raises(NotStartedError):
            await backend.producer.deliver([_message()])
        with pytest.raises(StartupError):
            async with connect(f"kafka://127.0.0.1:{ports[0]}", startup_timeout=0.5):
                pass

    async def test_one_of_several_hosts_is_enough(self, kafka_url: str, no_task_left: None) -> None:
        """A list of brokers is given so that one may be away."""
        backend = _backend(f"kafka://127.0.0.1:{free_port()},{kafka_url.removeprefix('kafka://')}")
        await backend.start()
        assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
        await backend.stop()

    async def test_hanging_host_leaves_nothing_open(self, no_task_left: None) -> None:
        """A start that is cut off is tried again: each attempt must clean up after itself."""
        async with _proxied() as (proxy, _, url):
            await proxy.stall()
            backend = _backend(url)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await backend.start()
            await proxy.resume()
            await backend.start()
            await backend.ping()
            await backend.stop()

    async def test_stopped_backend_starts_again(self, kafka_url: str, no_task_left: None) -> None:
        """A lifespan entered twice, or a test suite, starts the same backend more than once."""
        backend = _backend(kafka_url)
        for _ in range(2):
            with pytest.raises(NotStartedError):
                await backend.producer.deliver([_message()])
            await backend.start()
            assert await backend.producer.deliver([_message(), _message()], timeout=5.0) == [None, None]
            await backend.ping()
            await backend.stop()
            await backend.stop()
        with pytest.raises(NotStartedError):
            await backend.ping()

    def test_backend_starts_again_on_another_loop(self, kafka_url: str) -> None:
        """Tests run a loop each, and the backend of a module outlives them."""
        backend = _backend(kafka_url)

        async def once() -> None:
            await backend.start()
            assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
            await backend.stop()

        asyncio.run(once())
        asyncio.run(once())

    async def test_login_that_is_refused_is_told(self, kafka_url: str) -> None:
        """A wrong user must not look like a broker that is away, and is not tried for half a minute."""
        url = kafka_url.replace("kafka://", "kafka://ann:very-secret@")
        started = time.monotonic()
        with pytest.raises((ConfigurationError, StartupError)) as caught:
            async with connect(url, sasl_mechanism="PLAIN", startup_timeout=3.0):
                pass
        assert time.monotonic() - started < 10
        assert "very-secret" not in str(caught.value)


class TestOutage:
    async def test_broker_that_vanishes_mid_load(self, no_task_left: None) -> None:
        """Every event that was confirmed is there; every other one has its error, in time."""
        async with _proxied() as (proxy, _, url):
            async with connect(url, timeout=1.5, shutdown_timeout=2.0) as emitter:
                confirmed: list[int] = []
                failed: list[Exception] = []

                async def emit(number: int) -> None:
                    try:
                        await emitter.emit(Placed(number=number))
                    except DeliveryError as exc:
                        failed.append(exc)
                    else:
                        confirmed.append(number)

                await emit(-1)
                tasks = [asyncio.create_task(emit(number)) for number in range(300)]
                while len(confirmed) < 2:
                    await asyncio.sleep(0)
                await proxy.refuse()
                started = time.monotonic()
                tasks += [asyncio.create_task(emit(number)) for number in range(300, 400)]
                await asyncio.gather(*tasks)
                assert time.monotonic() - started < 4
                assert failed
                assert all(isinstance(error, UnconfirmedError | BrokerUnavailableError) for error in failed)
                # The outage is noticed, and later emits fail at once.
                async with asyncio.timeout(8):
                    while not isinstance(failed[-1], BrokerUnavailableError):
                        await emit(1000)
                started = time.monotonic()
                await emit(1001)
                assert time.monotonic() - started < 0.3
                # It comes back, and so do we.
                await proxy.resume()
                async with asyncio.timeout(10):
                    while 2000 not in confirmed:
                        await emit(2000)
                        await asyncio.sleep(0.05)
            assert set(confirmed) <= set(await _read_all(proxy.port, len(set(confirmed))))

    async def test_half_open_connection_is_replaced_by_ping(self, no_task_left: None) -> None:
        """A firewall that forgot the connection: it looks alive for minutes, and nothing comes back."""
        async with _proxied() as (proxy, _, url):
            backend = _backend(url, timeout=20.0)
            await backend.start()
            assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
            await proxy.stall()
            started = time.monotonic()
            [outcome] = await backend.producer.deliver([_message(1)], timeout=0.5)
            assert isinstance(outcome, ProducerTimeout)
            many = await backend.producer.deliver([_message(2), _message(3)], timeout=0.5)
            assert [type(each) for each in many] == [ProducerTimeout, ProducerTimeout]
            assert time.monotonic() - started < 2
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await backend.ping()
            accepted = proxy.accepted
            await proxy.resume()
            async with asyncio.timeout(5):
                await backend.ping()
            assert proxy.accepted > accepted
            assert await backend.producer.deliver([_message(4)], timeout=5.0) == [None]
            await backend.stop()

    async def test_restarted_broker_is_found_again(self, own_kafka: Callable[[], Tansu]) -> None:
        """Brokers are updated one by one, and nobody restarts the apps for it."""
        broker = await asyncio.to_thread(own_kafka)
        async with connect(broker.url, timeout=1.0, shutdown_timeout=1.0) as emitter:
            await emitter.emit(Placed())
            await asyncio.to_thread(broker.kill)
            with pytest.raises((UnconfirmedError, BrokerUnavailableError)):
                await emitter.emit(Placed())
            await asyncio.to_thread(broker.start)
            async with asyncio.timeout(15):
                while True:
                    try:
                        await emitter.emit(Placed(number=7))
                        break
                    except DeliveryError:
                        await asyncio.sleep(0.1)

    async def test_cluster_that_moved_is_found_by_its_first_address(self, no_task_left: None) -> None:
        """In Kubernetes all brokers may get new addresses; aiokafka asks its bootstrap servers once only."""
        first, second = _BehindProxy(), _BehindProxy()
        first.advertised_port, second.advertised_port = first.port, second.port
        try:
            await asyncio.to_thread(first.start)
            async with TCPProxy("127.0.0.1", first.port) as entrance:
                backend = _backend(f"kafka://127.0.0.1:{entrance.port}", timeout=2.0)
                await backend.start()
                assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
                await asyncio.to_thread(first.kill)
                await asyncio.to_thread(second.start)
                entrance._target = ("127.0.0.1", second.port)
                async with asyncio.timeout(5):
                    await backend.ping()
                assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
                await backend.stop()
        finally:
            await asyncio.to_thread(first.close)
            await asyncio.to_thread(second.close)

    async def test_client_that_broke_down_is_replaced_by_ping(self, kafka_url: str, no_task_left: None) -> None:
        """When aiokafka's sending task dies, its client never sends again: a managed one is made anew."""
        backend = _backend(kafka_url)
        await backend.start()
        sender: Any = backend._client.raw._sender  # type: ignore[union-attr]

        def broken(*args: Any, **options: Any) -> Any:
            raise ZeroDivisionError

        sender._message_accumulator.drain_by_nodes = broken
        outcomes = await backend.producer.deliver([_message()], timeout=2.0)
        assert isinstance(outcomes[0], DeliveryError)
        many = await backend.producer.deliver([_message(), _message()], timeout=2.0)
        assert [type(each) for each in many] == [BrokerUnavailableError] * 2
        await backend.ping()
        assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
        await backend.stop()

    async def test_client_that_broke_down_in_an_outage_is_replaced_after_it(self, no_task_left: None) -> None:
        """The broker is away when the client is to be replaced: the next ping tries again, not never."""
        async with _proxied() as (proxy, _, url):
            backend = _backend(url)
            await backend.start()
            backend._client.raw._sender.sender_task.cancel()  # type: ignore[union-attr]
            await proxy.refuse()
            for _ in range(2):
                with pytest.raises(BrokerUnavailableError):
                    await backend.ping()
                [outcome] = await backend.producer.deliver([_message()], timeout=2.0)
                assert isinstance(outcome, BrokerUnavailableError)
            await proxy.resume()
            await asyncio.gather(backend.ping(), backend.ping())  # Two at a time leave one client, not two.
            assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
            await backend.stop()
            with pytest.raises(NotStartedError):
                await backend.ping()


class TestStop:
    async def test_stop_flushes(self, own_kafka: Callable[[], Tansu], no_task_left: None) -> None:
        """What was handed over before the stop is delivered."""
        broker = await asyncio.to_thread(own_kafka)
        backend = _backend(broker.url)
        await backend.start()
        await backend.producer.deliver([_message(-1)], timeout=5.0)
        emits = [asyncio.create_task(backend.producer.deliver([_message(n)], timeout=5.0)) for n in range(300)]
        await asyncio.sleep(0)
        await backend.stop()
        assert [await emit for emit in emits] == [[None]] * 300
        assert await _read_all(broker.port, 301) == list(range(-1, 300))

    @pytest.mark.parametrize("how", ["refuse", "stall"])
    async def test_stop_with_a_dead_broker_ends_when_cut_off(self, how: str, no_task_left: None) -> None:
        """aiokafka's stop would wait for the flush without end; a worker would be killed instead of ending."""
        async with _proxied() as (proxy, _, url):
            backend = _backend(url, timeout=20.0)
            await backend.start()
            await backend.producer.deliver([_message()], timeout=5.0)
            await (proxy.refuse() if how == "refuse" else proxy.stall())
            pending = [
                asyncio.create_task(backend.producer.deliver([_message(1)], timeout=20.0)),
                asyncio.create_task(backend.producer.deliver([_message(2), _message(3)], timeout=20.0)),
            ]
            await asyncio.sleep(0.2)
            started = time.monotonic()
            stopping = asyncio.create_task(backend.stop())
            await asyncio.sleep(0.3)
            stopping.cancel()
            await asyncio.wait({stopping}, timeout=2)
            assert stopping.cancelled()
            assert _tasks_of_the_client() == []
            assert time.monotonic() - started < 1.5
            outcomes = [outcome for emit in pending for outcome in await emit]
            assert [isinstance(outcome, UnconfirmedError) for outcome in outcomes] == [True] * 3
            await proxy.resume()

    async def test_stop_of_an_idempotent_client_with_a_dead_cluster(self, no_task_left: None) -> None:
        """Idempotent batches never expire: without a cut, aiokafka's send and stop both hang for ever."""
        keeper: Any = confluent_kafka.Producer({"test.mock.num.brokers": 1, "log_level": 2})
        [address] = [f"{broker.host}:{broker.port}" for broker in keeper.list_topics(timeout=10).brokers.values()]
        backend = KafkaBackend(
            BrokerURL.parse(f"kafka://{address}"), KafkaOptions(timeout=1.0), {"enable_idempotence": True}
        )
        await backend.start()
        assert await backend.producer.deliver([_message()], timeout=5.0) == [None]
        del keeper  # and with it the cluster
        [outcome] = await backend.producer.deliver([_message(1)], timeout=0.5)
        assert isinstance(outcome, ProducerTimeout)
        stopping = asyncio.create_task(backend.stop())
        await asyncio.wait({stopping}, timeout=1.5)
        assert not stopping.done()
        stopping.cancel()
        await asyncio.wait({stopping}, timeout=2)
        assert stopping.cancelled()
        assert _tasks_of_the_client() == []

    async def test_emits_waiting_for_their_topic_end_with_the_stop(self, no_task_left: None) -> None:
        """A question that nobody answers any more must not hold up who asked."""
        async with _proxied() as (proxy, _, url):
            backend = _backend(url, timeout=20.0)
            await backend.start()
            await proxy.stall()
            pending = asyncio.create_task(backend.producer.deliver([_message()], timeout=20.0))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(backend.stop())
            await asyncio.sleep(0.2)
            stopping.cancel()
            await asyncio.wait({stopping})
            [outcome] = await asyncio.wait_for(pending, 2)
            assert isinstance(outcome, Exception)
            await proxy.resume()


class TestCancellation:
    async def test_cancelled_emits_leave_the_others_alone(self, kafka_url: str, no_task_left: None) -> None:
        """A request that is cancelled shares its batch with requests that are not."""
        async with connect(kafka_url) as emitter:
            await emitter.emit(Placed())
            tasks = [asyncio.create_task(emitter.emit(Placed(number=n))) for n in range(50)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
            assert results[1::2] == [None] * 25

    async def test_deadline_while_the_queue_is_full(self, no_task_left: None) -> None:
        """Under back pressure a record waits for a place before it has a future: that wait has an end, too."""
        async with _proxied() as (proxy, _, url):
            client: Any = AIOKafkaProducer(
                bootstrap_servers=url.removeprefix("kafka://"), max_batch_size=500, request_timeout_ms=20_000
            )
            await client.start()
            emitter = EventEmitter(KafkaProducer(client, timeout=0.6))
            raised: list[Any] = []
            emitter.on_timeout(raised.append)
            await emitter.emit(Placed())
            await proxy.stall()
            started = time.monotonic()
            await asyncio.gather(*(emitter.emit(Placed(number=n)) for n in range(40)))
            assert len(raised) == 40
            assert time.monotonic() - started < 2
            await proxy.resume()
            await client.stop()
