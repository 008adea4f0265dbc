"""Memory: a full transport without a broker, for demos and tests. Takes every route, or stands in for one transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

__all__ = ["MemoryProducer", "Subscription"]


class MemoryProducer(Producer):
    """Keeps what is sent in a list.

        producer = MemoryProducer()
        await EventEmitter(producer).emit(OrderPlaced(order_id=1))
        assert producer.sent[0].destination == "orders"

    `sent`: list of Message, in order. `routes`: the routes it takes, by default all.
    """

    def __init__(self, *, routes: tuple[type[EventRoute], ...] = (EventRoute,)) -> None:
        self.routes = routes  # type: ignore[misc]
        self.sent: list[Message] = []
        self._subscriptions: list[Subscription] = []

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Keep the messages and hand them to the subscriptions; never fails."""
        self.sent.extend(messages)
        for subscription in self._subscriptions:
            subscription.feed(messages)
        return [None] * len(messages)

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Keep one payload; for a producer that is called directly."""
        raise NotImplementedError("todo")

    @contextmanager
    def subscribe(self, *destinations: str) -> Iterator[Subscription]:
        """Receive what is sent from now on, in this process, to any of `destinations` (none given: to all).

            with producer.subscribe("orders") as messages:
                async for message in messages: ...
        """
        subscription = Subscription(destinations)
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)
            subscription.close()


class Subscription(AsyncIterator[Message]):
    """Messages as they arrive: `async for`, until the subscription is closed."""

    def __init__(self, destinations: tuple[str, ...]) -> None:
        self._destinations = destinations
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._closed = False

    def feed(self, messages: Sequence[Message]) -> None:
        """Hand over what is meant for this subscription."""
        for message in messages:
            if not self._destinations or message.destination in self._destinations:
                self._queue.put_nowait(message)

    def close(self) -> None:
        """End the iteration once what has arrived is read."""
        self._closed = True
        self._queue.put_nowait(None)

    async def __anext__(self) -> Message:
        if self._closed and self._queue.empty():
            raise StopAsyncIteration
        message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        return message
