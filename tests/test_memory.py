"""The memory transport passes the contract of the real ones, so that a test on it means something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import ClassVar

import pytest

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.errors import ConfigurationError, RouteError
from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisEventRoute
from tests.contract import Listen, MakeRoute, ProducerContract, Receive, Received


class MailRoute(EventRoute):
    """A route of a user's own."""

    transport: ClassVar[str] = "mail"
    supports_headers: ClassVar[bool] = True

    mailbox: str


class OrderPlaced(EventBase):
    __route__ = MailRoute(mailbox="orders")

    number: int = 0


def _received(message: Message) -> Received:
    return Received(message.payload or b"", dict(message.headers), message.ordering_key)


class TestMemory(ProducerContract):
    """`memory://` takes every route, a user's own too."""

    carries_keys = True

    @pytest.fixture
    def url(self) -> str:
        return "memory://"

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: MailRoute(mailbox=destination)

    @pytest.fixture
    def listen(self) -> Iterator[Listen]:
        subscriptions = ExitStack()

        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            producer = emitter.producer
            assert isinstance(producer, MemoryProducer)
            messages = subscriptions.enter_context(producer.subscribe(destination))

            async def receive(count: int) -> list[Received]:
                return [_received(await anext(messages)) for _ in range(count)]

            return receive

        with subscriptions:
            yield listen


class TestMemoryAsKafka(TestMemory):
    """`memory://kafka` stands in for Kafka: an app's tests use the routes that the app has."""

    @pytest.fixture
    def url(self) -> str:
        return "memory://kafka"

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: KafkaEventRoute(topic=destination)


async def test_sent_holds_the_messages_in_order() -> None:
    """What a user's test looks at: every message, complete, in the order of the emits."""
    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    await emitter.emit(OrderPlaced(number=1), headers={"tenant": "acme"})
    await emitter.emit_many([OrderPlaced(number=2), OrderPlaced(number=3)])
    assert [message.payload for message in producer.sent] == [b'{"number":1}', b'{"number":2}', b'{"number":3}']
    first = producer.sent[0]
    assert (first.destination, first.type, first.headers) == ("orders", "OrderPlaced", {"tenant": "acme"})


async def test_direct_send_is_kept() -> None:
    """The producer can be called as dispytch's producers are, and a test sees it."""
    producer = MemoryProducer()
    await producer.send(b"{}", MailRoute(mailbox="direct"))
    [message] = producer.sent
    assert (message.destination, message.payload) == ("direct", b"{}")


async def test_memory_in_place_of_one_transport_refuses_the_routes_of_others() -> None:
    """A test on `memory://kafka` must fail where the app would fail on Kafka."""

    class Alert(EventBase):
        __route__ = RedisEventRoute(channel="alerts")

    async with connect("memory://kafka") as emitter:
        with pytest.raises(RouteError, match="RedisEventRoute"):
            await emitter.emit(Alert())


async def test_memory_in_place_of_an_unknown_transport_is_refused() -> None:
    """A misspelt stand-in must not silently take nothing."""
    with pytest.raises(ConfigurationError, match="kafk"):
        async with connect("memory://kafk"):
            pass


async def test_subscription_gets_its_destinations_only() -> None:
    """The demo's page follows two topics; the others are not its business."""

    class Cancelled(EventBase):
        __route__ = MailRoute(mailbox="cancellations")

    producer = MemoryProducer()
    emitter = EventEmitter(producer)
    with producer.subscribe("orders") as orders, producer.subscribe() as everything:
        await emitter.emit(Cancelled())
        await emitter.emit(OrderPlaced(number=1))
        assert (await anext(orders)).destination == "orders"
        assert [(await anext(everything)).destination for _ in range(2)] == ["cancellations", "orders"]


async def test_subscription_ends_when_closed() -> None:
    """A page that follows the events must not hold up the shutdown."""
    producer = MemoryProducer()
    with producer.subscribe("orders") as orders:
        reading = asyncio.create_task(_count(orders))
        await EventEmitter(producer).emit(OrderPlaced())
    assert await asyncio.wait_for(reading, 5) == 1


async def _count(messages: AsyncIterator[Message]) -> int:
    return len([message async for message in messages])
