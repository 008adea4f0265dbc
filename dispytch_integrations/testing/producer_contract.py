"""What a producer promises, as tests that one of your own should pass.

    class TestFileProducer(ProducerContract):
        @pytest.fixture
        def producer(self, tmp_path: Path) -> Producer:
            return FileProducer(tmp_path)

        @pytest.fixture
        def route(self) -> EventRoute:
            return FileRoute(path="orders")

        @pytest.fixture
        def received(self, tmp_path: Path) -> Received:
            async def received(count: int) -> list[bytes]:
                ...  # wait until `count` payloads have arrived there, read by another client than the producer's

            return received

The tests are coroutine functions: they need pytest-asyncio in its mode "auto", or anyio's plugin.
"""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import DispytchError, RouteError
from dispytch_integrations.events import EventBase, EventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.record import message_of, record_of
from dispytch_integrations.producer import Producer

__all__ = ["ProducerContract", "Received"]

Received = Callable[[int], Awaitable[list[bytes]]]
"""Wait for so many payloads at the route's place; give all that have arrived there, in their order."""


class _Placed(EventBase):
    __ordering_key__ = "{customer}"

    customer: str = "anna"
    number: int = 0
    text: str = ""


class _ElsewhereRoute(EventRoute):
    """A route that no producer knows."""

    place: str = "elsewhere"


def _routed(route: EventRoute) -> type[_Placed]:
    namespace = {"__route__": route, "__module__": __name__, "__qualname__": "Placed"}
    return cast("type[_Placed]", types.new_class("Placed", (_Placed,), exec_body=lambda made: made.update(namespace)))


def _numbers(payloads: list[bytes], customer: str | None = None) -> list[int]:
    bodies: list[dict[str, Any]] = [json.loads(payload) for payload in payloads]
    return [body["number"] for body in bodies if customer is None or body["customer"] == customer]


class ProducerContract:
    """Subclass it, and override the fixtures `producer`, `route` and `received`; see the module's docstring."""

    @pytest.fixture
    def producer(self) -> Producer:
        """The producer, ready to send."""
        raise NotImplementedError("override the fixture `producer`")

    @pytest.fixture
    def route(self) -> EventRoute:
        """A route to a place where nothing has arrived yet."""
        raise NotImplementedError("override the fixture `route`")

    @pytest.fixture
    def received(self) -> Received:
        """A coroutine function that waits for payloads."""
        raise NotImplementedError("override the fixture `received`")

    @pytest.fixture
    def refused(self) -> EventRoute | None:
        """A route whose messages the broker refuses, or that nobody takes; None: there is no such thing."""
        return None

    async def test_the_body_arrives_as_it_was_made(
        self, producer: Producer, route: EventRoute, received: Received
    ) -> None:
        """Consumers read the JSON of the fields, whatever is in it, and however long it is."""
        placed = _routed(route)
        events = [placed(number=1, text='Zürich "\n\\ 東京'), placed(number=2, text="x" * 100_000)]
        for event in events:
            await EventEmitter(producer).emit(event)
        assert [json.loads(payload) for payload in await received(2)] == [event.model_dump() for event in events]

    async def test_when_emit_returns_it_has_been_sent(
        self, producer: Producer, route: EventRoute, received: Received
    ) -> None:
        """A process that ends after its emit has lost nothing."""
        await EventEmitter(producer).emit(_routed(route)(number=7))
        assert _numbers(await received(1)) == [7]

    async def test_many_arrive_complete_and_in_order_per_key(
        self, producer: Producer, route: EventRoute, received: Received
    ) -> None:
        """`emit_many` may send side by side; of one ordering key nothing overtakes anything."""
        placed = _routed(route)
        events = [placed(customer=f"c{number % 7}", number=number) for number in range(200)]
        await EventEmitter(producer).emit_many(events)
        payloads = await received(200)
        assert sorted(_numbers(payloads)) == list(range(200))
        for customer in {event.customer for event in events}:
            assert _numbers(payloads, customer) == sorted(_numbers(payloads, customer))

    async def test_concurrent_emits_all_arrive(self, producer: Producer, route: EventRoute, received: Received) -> None:
        """Requests emit at the same time, over one producer."""
        placed, emitter = _routed(route), EventEmitter(producer)
        await asyncio.gather(*(emitter.emit(placed(number=number)) for number in range(100)))
        assert sorted(_numbers(await received(100))) == list(range(100))

    async def test_one_outcome_for_each_message(
        self, producer: Producer, route: EventRoute, received: Received
    ) -> None:
        """`deliver` never raises for a single message: who sends many knows of each what became of it."""
        messages = _messages(producer, route, 5)
        assert await producer.deliver(messages, timeout=5.0) == [None] * 5
        assert await producer.deliver([], timeout=5.0) == []
        assert _numbers(await received(5)) == list(range(5))

    async def test_in_order(self, producer: Producer, route: EventRoute, received: Received) -> None:
        """The outbox relay sends this way."""
        messages = _messages(producer, route, 20)
        assert await producer.deliver_in_order(messages, timeout=10.0) == [None] * 20
        assert _numbers(await received(20)) == list(range(20))

    async def test_what_was_stored_can_be_sent(self, producer: Producer, route: EventRoute, received: Received) -> None:
        """The outbox stores messages without their route: `deliver` has to do without it."""
        if type(producer).deliver is Producer.deliver:
            pytest.skip("it implements send() alone, and cannot be used with an outbox")
        stored = [message_of(record_of(message)) for message in _messages(producer, route, 3)]
        assert await producer.deliver_in_order(stored, timeout=5.0) == [None] * 3
        assert _numbers(await received(3)) == [0, 1, 2]

    async def test_routes_of_others_are_refused_before_anything_is_sent(self, producer: Producer) -> None:
        """A wrong route is told by name, and not by what the client makes of it. Declare `routes`."""
        if EventRoute in type(producer).routes:
            pytest.skip("it takes every route")
        with pytest.raises(RouteError):
            await EventEmitter(producer).emit(_routed(_ElsewhereRoute())())

    async def test_what_is_refused_does_not_take_the_others_with_it(
        self, producer: Producer, route: EventRoute, refused: EventRoute | None, received: Received
    ) -> None:
        """One bad message among many: its error is an error of ours, and the others arrive."""
        if refused is None:
            pytest.skip("nothing is refused there")
        good, bad = _routed(route), _routed(refused)
        with pytest.raises(ExceptionGroup) as caught:
            await EventEmitter(producer).emit_many([good(number=1), bad(number=2), good(number=3)])
        [error] = caught.value.exceptions
        assert isinstance(error, DispytchError), f"translate the client's {type(error).__name__} into a DeliveryError"
        assert sorted(_numbers(await received(2))) == [1, 3]

    async def test_a_cancelled_emit_leaves_it_usable(
        self, producer: Producer, route: EventRoute, received: Received
    ) -> None:
        """A client hangs up in the middle of a request; the next one finds the producer as it was."""
        placed, emitter = _routed(route), EventEmitter(producer)
        cancelled = asyncio.create_task(emitter.emit(placed(number=1)))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        await emitter.emit(placed(number=2))
        arrived = _numbers(await received(1))
        if 2 not in arrived:  # The first one may have been on its way already.
            arrived = _numbers(await received(2))
        assert 2 in arrived


def _messages(producer: Producer, route: EventRoute, count: int) -> list[Message]:
    emitter, placed = EventEmitter(producer), _routed(route)
    return [emitter.prepare(placed(number=number))[1] for number in range(count)]
