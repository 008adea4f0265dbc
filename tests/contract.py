"""What every transport promises, as tests: real brokers and memory pass the same ones.

A transport's test module subclasses `ProducerContract` and says how to reach its broker:

    class TestRedisStreams(ProducerContract):
        @pytest.fixture
        def url(self, redis_url: str) -> str:
            return redis_url

        @pytest.fixture
        def route(self) -> MakeRoute:
            return lambda destination: RedisStreamEventRoute(stream=destination)

        @pytest.fixture
        async def listen(self, redis_url: str) -> AsyncIterator[Listen]:
            client = Redis.from_url(redis_url)

            async def listen(emitter: EventEmitter, destination: str) -> Receive:
                async def receive(count: int) -> list[Received]:
                    ...  # wait until `count` have arrived, with the raw client, not with ours

                return receive

            yield listen
            await client.aclose()
"""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, ClassVar, TypeVar, cast
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from dispytch_integrations import EventBase, EventEmitter, connect, event_id
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import HeaderError, NotStartedError, RouteError, WrongLoopError
from dispytch_integrations.events import EventRoute
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message

__all__ = ["Listen", "MakeRoute", "ProducerContract", "Receive", "Received"]


@dataclass(frozen=True)
class Received:
    """One message as the broker handed it out."""

    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Headers as text; of a Redis stream its other fields."""
    key: str | None = None
    """The Kafka key as text; None on transports without keys."""


MakeRoute = Callable[[str], EventRoute]
"""A route to the topic, exchange, channel or stream of that name; it may hold `{field}` parts."""
Receive = Callable[[int], Awaitable[list[Received]]]
"""Wait for so many messages, in order of arrival; called again, it gives the next ones."""
Listen = Callable[[EventEmitter, str], Awaitable[Receive]]
"""Called before the first emit: subscribe, or declare exchange and queue, for a destination; the emitter is open."""


class _Status(StrEnum):
    NEW = "new"


class _Address(BaseModel):
    city: str


class _Order(EventBase):
    __ordering_key__ = "{customer}"
    __event_type__ = "shop.order.placed"

    customer: str = "anna"
    number: int = 0


class _Rich(EventBase):
    """Fields of the types whose JSON is easy to get wrong."""

    id: UUID = UUID("0b0ff5a0-5d0f-4b23-a0b5-2b1f26a3c111")
    placed_at: datetime = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    total: Decimal = Decimal("10.50")
    status: _Status = _Status.NEW
    ship_to: _Address = _Address(city="Zürich")
    tags: tuple[str, ...] = ("a", "b")
    note: str | None = None
    raw: bytes = b"bytes"
    camel_case: int = Field(default=1, serialization_alias="camelCase")
    secret: str = Field(default="not for the wire", exclude=True)


_E = TypeVar("_E", bound=EventBase)


def _routed(cls: type[_E], route: EventRoute) -> type[_E]:
    """`cls` with a route: a class of its own, as a user would declare it."""
    namespace = {"__route__": route, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return cast("type[_E]", types.new_class(cls.__name__, (cls,), exec_body=lambda made: made.update(namespace)))


class _Seen(Hook):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def before_send(self, message: Message) -> None:
        self.events.append(("before_send", message.destination))

    def sent(self, message: Message) -> None:
        self.events.append(("sent", message.destination))


class ProducerContract:
    """Subclass it, and override the fixtures `url`, `route` and `listen`; see the module's docstring for an example."""

    options: ClassVar[Mapping[str, Any]] = {}
    """Options for every `connect`."""
    carries_keys: ClassVar[bool] = False
    """Does the broker hand out the ordering key with the message (`Received.key`)?"""

    @pytest.fixture
    def url(self) -> str:
        """What `connect` is given."""
        raise NotImplementedError("override the fixture `url`")

    @pytest.fixture
    def route(self) -> MakeRoute:
        """A function that makes a route from a destination."""
        raise NotImplementedError("override the fixture `route`")

    @pytest.fixture
    def listen(self) -> Listen:
        """A coroutine function that listens to a destination with the raw client."""
        raise NotImplementedError("override the fixture `listen`")

    def open(self, url: str, **options: Any) -> Brokers:
        """`connect` with the options of this transport."""
        return connect(url, **{**self.options, **options})

    # -- what arrives ----------------------------------------------------------------------------------------------

    async def test_body_is_the_json_that_dispytch_sends(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """Consumers written with dispytch, or anything that reads JSON, must go on working."""
        event = _routed(_Rich, route(unique))()
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit(event)
            [received] = await receive(1)
        assert json.loads(received.payload) == event.model_dump(mode="json", by_alias=True)
        assert b"not for the wire" not in received.payload

    async def test_identity_arrives_with_the_event(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """Consumers drop duplicates by id and tell events apart by type: the headers must be there, and right."""
        event = _routed(_Order, made := route(unique))()
        async with self.open(url, source="/shop") as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit(event)
            [received] = await receive(1)
        prefix = made.cloudevents_prefix
        if not made.supports_headers:
            assert not [name for name in received.headers if name.startswith(prefix)]
            return
        assert received.headers[f"{prefix}specversion"] == "1.0"
        assert received.headers[f"{prefix}id"] == event_id(event)
        assert received.headers[f"{prefix}type"] == "shop.order.placed"
        assert received.headers[f"{prefix}source"] == "/shop"
        sent_at = datetime.fromisoformat(received.headers[f"{prefix}time"])
        assert abs((datetime.now(UTC) - sent_at).total_seconds()) < 30
        if made.content_type_header is not None:
            assert received.headers[made.content_type_header] == "application/json"

    async def test_ordering_key_arrives(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """A key decides the partition: events of one customer must stay together."""
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit(_routed(_Order, route(unique))(customer="bob@example.com"))
            [received] = await receive(1)
        assert received.key == ("bob@example.com" if self.carries_keys else None)

    async def test_emit_many_arrives_complete_and_in_order_per_key(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """A batch is the fast way, not another promise: nothing is missing, and a key's events keep their order."""
        order = _routed(_Order, route(unique))
        events = [order(customer=f"customer{number % 7}", number=number) for number in range(500)]
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit_many(events)
            bodies = [json.loads(received.payload) for received in await receive(500)]
        assert sorted(body["number"] for body in bodies) == list(range(500))
        for customer in {event.customer for event in events}:
            numbers = [body["number"] for body in bodies if body["customer"] == customer]
            assert numbers == sorted(numbers), f"the events of {customer} overtook each other"

    async def test_concurrent_emits_all_arrive(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """A web app emits from many requests at once; raw clients run out of connections or lose track there."""
        order = _routed(_Order, route(unique))
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            await asyncio.gather(*(emitter.emit(order(number=number)) for number in range(200)))
            numbers = [json.loads(received.payload)["number"] for received in await receive(200)]
        assert sorted(numbers) == list(range(200))

    async def test_emits_in_flight_at_the_close_arrive(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """A worker that is replaced must not lose what it has already accepted."""
        order = _routed(_Order, route(unique))
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit(order(number=0))
            emits = [asyncio.create_task(emitter.emit(order(number=number))) for number in range(1, 51)]
            await asyncio.sleep(0)  # Each runs up to its first wait: all are in flight.
        await asyncio.gather(*emits)
        numbers = [json.loads(received.payload)["number"] for received in await receive(51)]
        assert sorted(numbers) == list(range(51))

    async def test_prefix_goes_in_front_of_the_destination(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """Staging and production share a broker: neither may hear the other's events."""
        async with self.open(url, prefix="staging.") as emitter:
            receive = await listen(emitter, f"staging.{unique}")
            await emitter.emit(_routed(_Order, route(unique))(number=7))
            [received] = await receive(1)
        assert json.loads(received.payload)["number"] == 7

    # -- headers and identity --------------------------------------------------------------------------------------

    async def test_headers_of_the_caller_arrive(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """Tenant and trace travel beside the body; where a transport cannot carry them, it must say so."""
        event = _routed(_Order, made := route(unique))()
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            if not made.supports_headers:
                with pytest.raises(HeaderError, match="no headers"):
                    await emitter.emit(event, headers={"tenant": "acme"})
                return
            await emitter.emit(event, headers={"tenant": "acme", "attempt": 3, "dropped": None})
            await emitter.emit_many([event], headers={"tenant": "umlaut: ü"})
            first, second = await receive(2)
        assert first.headers["tenant"] == "acme"
        assert first.headers["attempt"] == "3"
        assert "dropped" not in first.headers
        assert second.headers["tenant"] == "umlaut: ü"

    async def test_reserved_header_is_refused(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """A user's own `id` header would make consumers drop the wrong events."""
        event = _routed(_Order, made := route(unique))()
        async with self.open(url) as emitter:
            await listen(emitter, unique)
            with pytest.raises(HeaderError):
                await emitter.emit(event, headers={f"{made.cloudevents_prefix}ID": "mine"})

    async def test_cloudevents_false_sends_no_identity(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """Who does not want the headers pays nothing for them."""
        event = _routed(_Order, made := route(unique))()
        async with self.open(url, cloudevents=False) as emitter:
            receive = await listen(emitter, unique)
            await emitter.emit(event)
            [received] = await receive(1)
        assert not [name for name in received.headers if name.startswith(made.cloudevents_prefix)]

    async def test_emitting_again_repeats_the_id(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """After a timeout the same event is emitted again: consumers recognise it, and do not take a twin for it."""
        order = _routed(_Order, made := route(unique))
        event, twin = order(), order()
        async with self.open(url) as emitter:
            receive = await listen(emitter, unique)
            for each in (event, event, twin):
                await emitter.emit(each)
            received = await receive(3)
        if made.supports_headers:
            first, second, third = (message.headers[f"{made.cloudevents_prefix}id"] for message in received)
            assert first == second != third

    # -- what is refused -------------------------------------------------------------------------------------------

    async def test_route_error_comes_before_anything_is_sent(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """A customer named "x.y" or "" must not choose where events go, and a batch with one is not sent by half."""
        order = _routed(_Order, route(f"{unique}-{{customer}}"))
        good = order(customer="anna", number=1)
        async with self.open(url) as emitter:
            receive = await listen(emitter, f"{unique}-anna")
            for customer in ("", "a.b", "a*", "a b", "a\n", "a/b"):
                with pytest.raises(RouteError, match="customer"):
                    await emitter.emit(order(customer=customer))
            with pytest.raises(ExceptionGroup) as caught:
                await emitter.emit_many([order(customer="anna", number=0), order(customer="")])
            assert [type(error) for error in caught.value.exceptions] == [RouteError]
            await emitter.emit(good)
            [received] = await receive(1)
        assert json.loads(received.payload)["number"] == 1

    async def test_emit_before_start_and_after_close_raises(
        self, url: str, route: MakeRoute, listen: Listen, unique: str
    ) -> None:
        """A forgotten `async with` must fail at once and say so; raw clients hang or reconnect silently."""
        event = _routed(_Order, route(unique))()
        brokers = self.open(url)
        with pytest.raises(NotStartedError, match="async with"):
            await brokers.emitter.emit(event)
        async with brokers as emitter:
            await listen(emitter, unique)
            await emitter.emit(event)
        with pytest.raises(NotStartedError):
            await emitter.emit(event)
        with pytest.raises(NotStartedError):
            await emitter.emit_many([event])

    async def test_use_from_another_loop_raises(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """A client bound to another event loop hangs for ever in the raw libraries."""
        event = _routed(_Order, route(unique))()
        async with self.open(url) as emitter:
            await listen(emitter, unique)
            await emitter.emit(event)
            with pytest.raises(WrongLoopError):
                await asyncio.to_thread(asyncio.run, emitter.emit(event))
            await emitter.emit(event)

    # -- start and stop --------------------------------------------------------------------------------------------

    async def test_entering_twice_is_harmless(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """FastAPI enters the lifespan of a router included twice two times: the first exit must not close it."""
        event = _routed(_Order, route(unique))()
        brokers = self.open(url)
        async with brokers as emitter:
            await listen(emitter, unique)
            async with brokers as again:
                assert again is emitter
            await emitter.emit(event)

    async def test_opens_again_after_a_close(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """Tests start an app many times over; each start gets a fresh connection."""
        event = _routed(_Order, route(unique))()
        brokers = self.open(url)
        for _ in range(2):
            async with brokers as emitter:
                await listen(emitter, unique)
                await emitter.emit(event)

    async def test_ping_is_answered(self, url: str) -> None:
        """A health check needs an answer from the broker, not from memory."""
        brokers = self.open(url)
        async with brokers:
            assert await brokers.ping(timeout=5) == {"default": None}

    async def test_hooks_see_each_message(self, url: str, route: MakeRoute, listen: Listen, unique: str) -> None:
        """Metrics and traces rest on hooks: before the send and after the confirmation."""
        seen = _Seen()
        async with self.open(url, hooks=[seen]) as emitter:
            await listen(emitter, unique)
            await emitter.emit(_routed(_Order, route(unique))())
        assert seen.events == [("before_send", unique), ("sent", unique)]
