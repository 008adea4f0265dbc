"""Memory: the same contract as the brokers, and what tests and demos need beside it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.errors import ConfigurationError, NotStartedError, RouteError
from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer, Subscription
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from tests.contract import Listen, MakeRoute, ProducerContract, Receive, Received


class Order(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders", maxlen=5)
    __ordering_key__ = "{number}"

    number: int = 0


class Alert(EventBase):
    __route__ = RedisEventRoute(channel="alerts")


class FileRoute(EventRoute):
    """A transport of the user's own."""

    path: str


class Filed(EventBase):
    __route__ = FileRoute(path="a.json")


class TestMemory(ProducerContract):
    carries_keys = True

    @pytest.fixture
    def url(self) -> str:
        return "memory://"

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: RedisStreamEventRoute(stream=destination)

    @pytest.fixture
    async def listen(self) -> Listen:
        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            producer = emitter.producer
            assert isinstance(producer, MemoryProducer)
            start = len(producer.sent)

            async def receive(count: int) -> list[Received]:
                nonlocal start
                async with asyncio.timeout(5):
                    while len(producer.sent) < start + count:
                        await asyncio.sleep(0)
                received = producer.sent[start : start + count]
                start += count
                assert all(message.destination == destination for message in received)
                return [Received(message.payload or b"", message.headers, message.ordering_key) for message in received]

            return receive

        return listen


class TestMemoryAsKafka(TestMemory):
    """`memory://kafka` stands in for Kafka: an app's tests use the routes that the app has."""

    @pytest.fixture
    def url(self) -> str:
        return "memory://kafka"

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: KafkaEventRoute(topic=destination)


async def test_sent_holds_the_messages_until_cleared() -> None:
    """A test looks at what was emitted, then starts afresh."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    await emitter.emit(Order(number=1))
    await emitter.emit_many([Order(number=2), Alert()])
    assert [message.destination for message in producer.sent] == ["orders", "orders", "alerts"]
    assert producer.sent[0].properties == {"kind": "stream", "maxlen": 5, "approximate": True}
    producer.clear()
    assert producer.sent == []


async def test_send_called_directly_makes_a_message() -> None:
    """Code that calls a dispytch producer itself can be tested, too."""
    producer = MemoryProducer(routes=(RedisStreamEventRoute, FileRoute))
    await producer.send(b"body", RedisStreamEventRoute(stream="orders", maxlen=3))
    await producer.send(b"body", FileRoute(path="a.json"))
    stream, file = producer.sent
    assert (stream.destination, stream.payload) == ("orders", b"body")
    assert stream.properties == {"kind": "stream", "maxlen": 3, "approximate": True}
    assert file.destination == "a.json"
    with pytest.raises(RouteError, match="RedisEventRoute"):
        await producer.send(b"body", RedisEventRoute(channel="alerts"))


async def test_subscription_receives_its_destinations_in_order() -> None:
    """A demo's page shows events as they arrive."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    await emitter.emit(Order(number=0))
    with producer.subscribe("orders") as orders, producer.subscribe() as everything:
        await emitter.emit_many([Order(number=1), Alert(), Order(number=2)])
        assert [(await anext(orders)).ordering_key for _ in range(2)] == ["1", "2"]
        waiting = asyncio.create_task(_next(orders))
        await asyncio.sleep(0)
        await emitter.emit(Order(number=3))
        assert (await asyncio.wait_for(waiting, 5)).ordering_key == "3"
    assert [message.destination async for message in everything] == ["orders", "alerts", "orders", "orders"]
    with pytest.raises(StopAsyncIteration):
        await anext(orders)


async def _next(subscription: Subscription) -> Message:
    return await anext(subscription)


async def test_closing_wakes_a_waiting_reader() -> None:
    """An open page must not delay the shutdown."""
    producer = MemoryProducer()
    with producer.subscribe() as messages:
        waiting = asyncio.create_task(_all(messages))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(waiting, 5) == []


async def _all(subscription: Subscription) -> list[Message]:
    return [message async for message in subscription]


async def test_emits_from_other_threads_and_loops_reach_the_reader() -> None:
    """Django and Celery emit from a loop thread of their own; the reader is somewhere else."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)

    def emit(first: int) -> None:
        async def run() -> None:
            for number in range(first, first + 250):
                await emitter.emit(Order(number=number))
                await asyncio.sleep(0)

        asyncio.run(run())

    with producer.subscribe() as messages:
        threads = [threading.Thread(target=emit, args=(first,)) for first in (0, 250, 500, 750)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(20):
            received = [await anext(messages) for _ in range(1000)]
        for thread in threads:
            await asyncio.to_thread(thread.join)
    assert received == producer.sent


async def test_emit_from_another_thread_wakes_an_idle_loop() -> None:
    """Nothing else may happen on the reader's loop for minutes: the event must not wait for that."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    loop = asyncio.get_running_loop()
    with producer.subscribe() as messages:
        threading.Timer(0.1, lambda: asyncio.run(emitter.emit(Order()))).start()
        started = loop.time()
        await asyncio.wait_for(anext(messages), 10)
        assert loop.time() - started < 5


async def test_slow_reader_with_a_limit_loses_the_oldest_and_sees_how_many() -> None:
    """A browser that went to sleep must not fill the server's memory."""
    producer = MemoryProducer()
    with producer.subscribe(limit=10) as messages:
        await EventEmitter(producer).emit_many([Order(number=number) for number in range(100)])
    assert messages.dropped == 90
    assert [message.ordering_key async for message in messages] == [str(number) for number in range(90, 100)]


async def test_memory_url_takes_every_route() -> None:
    """One URL replaces all brokers of an app in its tests."""
    async with connect("memory://") as emitter:
        for event in (Order(), Alert(), Filed()):
            await emitter.emit(event)


async def test_memory_stands_in_for_one_transport() -> None:
    """An app with two brokers is tested with two memories: each event goes where it would go."""
    async with connect({"a": "memory://redis", "b": "memory://kafka"}) as emitter:
        await emitter.emit(Order())
        with pytest.raises(RouteError, match="FileRoute"):
            await emitter.emit(Filed())
        producers = emitter.producers
    a, b = producers["a"], producers["b"]
    assert isinstance(a, MemoryProducer)
    assert isinstance(b, MemoryProducer)
    assert (len(a.sent), len(b.sent)) == (1, 0)


async def test_the_url_alone_is_another_one_in_a_test() -> None:
    """Options of the transport it stands in for are taken and have no effect; what nobody has stays an error."""
    options: dict[str, Any] = {"acks": "all", "topics": ["orders"], "client": {"linger_ms": 5}}
    for url in ("memory://kafka", "memory://?compression_type=gzip"):
        async with connect(url, **options) as emitter:
            assert isinstance(emitter.producer, MemoryProducer)
    wrong: dict[str, Any]
    for wrong in ({"ackss": "all"}, {"client": {"linger": 5}}, {"socket_timeout": 1}):
        with pytest.raises(ConfigurationError, match="unknown option"):
            await connect("memory://kafka", **wrong).start()


@pytest.mark.parametrize("url", ["memory://kafak", "memory://kafka,redis", "memory://kafka/x", "memory:///kafka"])
async def test_unknown_transport_is_told_with_the_nearest(url: str) -> None:
    """`memory://kafak` must not silently take everything, or nothing."""
    with pytest.raises(ConfigurationError, match="memory://kafka"):
        async with connect(url):
            pass


async def test_stopped_memory_refuses_and_keeps_what_was_sent() -> None:
    """A test reads `sent` after the app has shut down; an emit after that is a bug that must show."""
    async with connect("memory://") as emitter:
        await emitter.emit(Order())
        producer = emitter.producer
    assert isinstance(producer, MemoryProducer)
    assert len(producer.sent) == 1
    with pytest.raises(NotStartedError):
        await emitter.emit(Order())
    with pytest.raises(NotStartedError, match="memory://"):
        await producer.deliver(producer.sent)


def test_memory_imports_no_driver() -> None:
    """Tests run where no client library is installed, for memory://kafka too."""
    program = """
import asyncio, sys
from dispytch_integrations import connect
async def run():
    async with connect({"a": "memory://", "k": "memory://kafka", "q": "memory://rabbitmq", "r": "memory://redis"}):
        pass
asyncio.run(run())
loaded = {"aiokafka", "aio_pika", "aiormq", "redis"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
