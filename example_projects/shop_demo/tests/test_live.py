"""The feed behind the page, and the routes of the other brokers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from example_projects.shop_demo.live.feed import Arrived, BrokerState, Feed, Item, OutboxState, Received, WaitingEvent
from example_projects.shop_demo.live.follow import following
from example_projects.shop_demo.transports import route_for, transport_of


@pytest.fixture
def feed() -> Feed:
    return Feed(BrokerState(transport="memory", address="memory://", connected=True), history=3)


def received(number: int, **headers: str) -> Received:
    return Received("orders.placed", json.dumps({"order_id": number}).encode(), headers)


def numbers(items: list[Item]) -> list[int]:
    return [item.body["order_id"] for item in items if isinstance(item, Arrived)]


async def taken(feed: Feed, count: int, after: str | None = None) -> list[Item]:
    items: list[Item] = []
    async for item in feed.listen(after):
        items.append(item)
        if len(items) == count:
            break
    return items


async def test_a_page_opened_late_sees_the_last_events(feed: Feed) -> None:
    """Whoever opens the page after the orders were placed still sees something."""
    for number in range(5):
        feed.publish(received(number))

    assert numbers(await taken(feed, 4)) == [2, 3, 4]


async def test_a_page_that_was_cut_off_goes_on_where_it_was(feed: Feed) -> None:
    """The browser says the last number it has; it gets what came since, nothing twice."""
    feed.publish(received(1))
    seen = [item for item in await taken(feed, 2) if isinstance(item, Arrived)]
    feed.publish(received(2))

    assert numbers(await taken(feed, 2, after=seen[0].number)) == [2]
    assert numbers(await taken(feed, 3, after="another-run")) == [1, 2]


async def test_a_page_opened_late_sees_how_the_outbox_is_doing(feed: Feed) -> None:
    """Its last state comes with the first look, and what has not changed is not told again."""
    state = OutboxState(
        waiting=1,
        oldest=1.5,
        dead=0,
        first=[WaitingEvent(type="order.placed", key="7")],
        relays=1,
        heartbeat=2,
        relaying=True,
    )
    feed.set_outbox(state)
    page = feed.listen()
    assert [await anext(page), await anext(page)] == [feed.state, state]

    feed.set_outbox(state.model_copy())
    feed.set_outbox(state.model_copy(update={"waiting": 0, "oldest": None}))

    told = await anext(page)
    assert isinstance(told, OutboxState)
    assert told.waiting == 0


async def test_closing_ends_open_pages_and_later_ones(feed: Feed) -> None:
    """An open page must not keep the server from ending."""

    async def read_to_the_end() -> int:
        return len([item async for item in feed.listen()])

    reading = asyncio.create_task(read_to_the_end())
    await asyncio.sleep(0)
    feed.close()

    async with asyncio.timeout(5):
        assert await reading == 1
        assert await read_to_the_end() == 0


async def test_a_reader_that_is_too_slow_is_cut_off(feed: Feed) -> None:
    """A page that is open and not read must not eat the server's memory."""
    slow = feed.listen()
    await anext(slow)
    for number in range(3000):
        feed.publish(received(number))

    async with asyncio.timeout(5):
        assert len([item async for item in slow]) < 1001


@pytest.mark.parametrize("prefix", ["ce_", "cloudEvents_", "cloudEvents:"])
async def test_identity_is_read_under_every_transports_prefix(feed: Feed, prefix: str) -> None:
    """The page shows id, type and time whichever broker brought the event."""
    time = "2026-01-02T03:04:05.678Z"
    feed.publish(received(1, **{f"{prefix}id": "42", f"{prefix}type": "order.placed", f"{prefix}time": time}))

    arrived = (await taken(feed, 2))[1]

    assert isinstance(arrived, Arrived)
    assert (arrived.id, arrived.type, arrived.time.microsecond) == ("42", "order.placed", 678000)


async def test_a_body_that_is_no_json_is_shown_all_the_same(feed: Feed) -> None:
    """Somebody else writes to the topic, too: the page goes on."""
    feed.publish(Received("orders.placed", b"\xffhello"))

    arrived = (await taken(feed, 2))[1]

    assert isinstance(arrived, Arrived)
    assert arrived.body == "\ufffdhello"


async def test_a_consumer_that_broke_is_opened_again(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker's restart is shown on the page, and is not its end."""
    monkeypatch.setattr("example_projects.shop_demo.live.follow._RETRY_SECONDS", 0)
    opened = 0

    @asynccontextmanager
    async def consumer() -> AsyncGenerator[AsyncIterator[Received], None]:
        nonlocal opened
        opened += 1

        async def messages() -> AsyncIterator[Received]:
            yield received(opened)
            if opened == 1:
                raise ConnectionError
            await asyncio.Event().wait()

        yield messages()

    page = feed.listen()
    items = [await anext(page)]
    async with asyncio.timeout(5), following(feed, consumer):
        while len(items) < 5:
            items.append(await anext(page))

    assert numbers(items) == [1, 2]
    assert [item.connected for item in items if isinstance(item, BrokerState)] == [True, False, True]


async def test_a_broker_that_is_not_there_fails_the_start(feed: Feed) -> None:
    """An app whose page never hears anything must not look healthy."""

    @asynccontextmanager
    async def consumer() -> AsyncGenerator[AsyncIterator[Received], None]:
        raise ConnectionRefusedError
        yield

    with pytest.raises(ConnectionRefusedError):
        async with following(feed, consumer):
            pass


@pytest.mark.parametrize(
    ("url", "route"),
    [
        ("kafka+ssl://h", KafkaEventRoute(topic="orders.placed")),
        ("amqps://h", RabbitMQEventRoute(exchange="shop", routing_key="orders.placed")),
        ("valkey://h", RedisStreamEventRoute(stream="orders.placed", maxlen=10_000)),
        ("memory://kafka", KafkaEventRoute(topic="orders.placed")),
    ],
)
def test_each_broker_has_its_route(url: str, route: object) -> None:
    """The example runs on every broker with the same events."""
    assert route_for(transport_of(url), KafkaEventRoute(topic="orders.placed")) == route
