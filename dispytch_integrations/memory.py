"""Memory: a full transport without a broker, for demos and tests.

    memory://           takes every route
    memory://kafka      stands in for one transport: takes its routes alone, as its broker would

Options of the transport it stands in for (`acks`, `topics`) are taken and have no effect, so that the URL alone has to
be another one in a test.

`emitter.producer.sent` holds the messages; `emitter.producer.subscribe()` receives them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL
from dispytch_integrations.errors import ConfigurationError, MissingExtraError, NotStartedError, RouteError
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

__all__ = ["MemoryBackend", "MemoryProducer", "Subscription"]


class MemoryProducer(Producer):
    """Keeps what is sent in a list, and hands it to who subscribed.

        producer = MemoryProducer()
        await EventEmitter(producer).emit(OrderPlaced(order_id=1))
        assert producer.sent[0].destination == "orders"

    Always ready, on every event loop and in every thread. `routes`: the routes it takes; by default all.
    """

    immediate = True

    sent: list[Message]
    """All messages, in the order they were sent. It grows until `clear()`."""

    def __init__(self, *, routes: tuple[type[EventRoute], ...] = (EventRoute,)) -> None:
        self.routes = routes  # type: ignore[misc]  # of this object, not of the class
        self.sent = []
        self._subscriptions: list[Subscription] = []
        # Order in `sent` and in the subscriptions is one and the same, whichever threads emit.
        self._lock = threading.Lock()

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Keep the messages and hand them to the subscriptions; never fails, never waits."""
        with self._lock:
            self.sent.extend(messages)
            for subscription in self._subscriptions:
                subscription.feed(messages)
        return [None] * len(messages)

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Keep one payload; for a producer that is called directly, as dispytch's are.

        Raises RouteError for a route that it does not take.
        """
        if not isinstance(route, self.routes):
            taken = " or ".join(each.__name__ for each in self.routes)
            raise RouteError(f"this MemoryProducer takes a {taken}, not a {type(route).__name__}")
        await self.deliver((_message(payload, route, config),))

    def clear(self) -> None:
        """Forget what was sent; what a subscription has received stays there."""
        with self._lock:
            self.sent.clear()

    @contextmanager
    def subscribe(self, *destinations: str, limit: int | None = None) -> Generator[Subscription, None, None]:
        """Receive what is sent from now on, in this process, to any of `destinations` (none given: to all).

            with producer.subscribe("orders") as messages:
                async for message in messages: ...

        Emits may come from other threads and event loops. `limit`: how many messages wait for a slow reader; of
        more, the oldest are dropped and counted (`Subscription.dropped`), since an emit never waits for a reader.
        None (default): no limit.
        """
        subscription = Subscription(destinations, limit)
        with self._lock:
            self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.remove(subscription)
            subscription.close()


def _message(payload: bytes, route: EventRoute, config: BackendConfig | None) -> Message:
    properties = {name: value for name, value in route.__dict__.items() if name != "safe" and value is not None}
    name = route.destination_field or next((name for name, value in properties.items() if isinstance(value, str)), "")
    destination = str(properties.pop(name, ""))
    if route.kind is not None:
        properties["kind"] = route.kind
    route.check_address(destination, properties)
    headers: dict[str, Any] = {}
    if config is not None:
        properties.update((name, value) for name, value in config.__dict__.items() if value is not None)
        if route.supports_headers:
            headers = dict(properties.pop("headers", {}))
    key = route.encode_properties(properties)
    content_type = "application/octet-stream"
    return Message(
        None, "", "default", destination, key, headers, properties, payload, content_type, route=route, config=config
    )


class Subscription(AsyncIterator[Message]):
    """Messages as they arrive: `async for`, until the subscription is closed. Read it from one event loop at a time.

    Iterated after the close, it gives what had arrived before, then ends.
    """

    dropped: int
    """Messages that were dropped since the reader was slower than `limit` allows."""

    def __init__(self, destinations: tuple[str, ...] = (), limit: int | None = None) -> None:
        self.dropped = 0
        self._destinations = frozenset(destinations)
        self._arrived: deque[Message] = deque(maxlen=limit)
        self._closed = False
        self._lock = threading.Lock()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def feed(self, messages: Sequence[Message]) -> None:
        """Hand over what is meant for this subscription; from any thread."""
        names = self._destinations
        wanted = [message for message in messages if message.destination in names] if names else messages
        if not wanted:
            return
        with self._lock:
            size = len(self._arrived)
            self._arrived.extend(wanted)
            self.dropped += size + len(wanted) - len(self._arrived)
        self._wake()

    def close(self) -> None:
        """End the iteration once what has arrived is read; from any thread."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is None:
            return
        loop, arrival = reader
        try:
            loop.call_soon_threadsafe(arrival.set)
        except RuntimeError:
            pass  # The reader's loop is closed: nobody waits any more.

    async def __anext__(self) -> Message:
        while True:
            with self._lock:
                if self._arrived:
                    return self._arrived.popleft()
                if self._closed:
                    raise StopAsyncIteration
                arrival = asyncio.Event()
                self._reader = (asyncio.get_running_loop(), arrival)
            await arrival.wait()


_TRANSPORTS = ("kafka", "rabbitmq", "redis")


class _ManagedProducer(MemoryProducer):
    """The producer of a backend: refuses unless that is started."""

    started = False
    failure_of: Callable[[Message], Exception | None] | None = None

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """As MemoryProducer.deliver. Raises NotStartedError unless the backend is started."""
        if not self.started:
            raise NotStartedError(
                "memory:// is not started: emit inside `async with connect(...) as emitter:`, or after the app's "
                "lifespan has started and before it ends"
            )
        if self.failure_of is None:
            return await super().deliver(messages, timeout=timeout)
        outcomes = [self.failure_of(message) for message in messages]
        taken = [message for message, error in zip(messages, outcomes, strict=True) if error is None]
        await super().deliver(taken, timeout=timeout)
        return outcomes


class MemoryBackend(Backend):
    """`memory://` as a broker: `emitter.producer` is a MemoryProducer, which refuses unless started.

    What was sent stays readable after the stop.
    """

    transport: ClassVar[str] = "memory"
    options_type: ClassVar[type[BrokerOptions]] = BrokerOptions

    @classmethod
    def ignored_option_names(cls, url: BrokerURL) -> Collection[str]:
        """Those of the transport in the URL, else of all: where memory:// is written for a test, the rest stays."""
        return _Foreign([name for name in _TRANSPORTS if not url.hosts or name == url.hosts[0][0].lower()])

    def __init__(self, url: BrokerURL, options: BrokerOptions, client_options: Mapping[str, Any]) -> None:
        self._url = url
        self._producer = _ManagedProducer(routes=_routes(url))
        self.producer: Producer = self._producer

    async def start(self) -> None:
        """Take messages from now on."""
        self._producer.started = True

    async def stop(self) -> None:
        """Refuse messages from now on."""
        self._producer.started = False

    async def ping(self) -> None:
        """Raise NotStartedError unless started."""
        if not self._producer.started:
            raise NotStartedError(f"{self.address} is not started")

    def fail(self, failure_of: Callable[[Message], Exception | None]) -> None:
        """Ask for each message whether it fails, and with what: for tests."""
        self._producer.failure_of = failure_of

    @property
    def address(self) -> str:
        """The URL."""
        return str(self._url)


_BACKENDS = {"kafka": "KafkaBackend", "rabbitmq": "RabbitMQBackend", "redis": "RedisBackend"}
_URLS = {"kafka": ("kafka",), "rabbitmq": ("amqp",), "redis": ("redis", "unix", "redis+sentinel", "redis+cluster")}


class _Foreign(Collection[str]):
    """The options of transports. They are read when somebody asks, since that imports their clients."""

    def __init__(self, transports: Sequence[str]) -> None:
        self._transports = transports

    @cached_property
    def _names(self) -> frozenset[str]:
        names = set[str]()
        for transport in self._transports:
            module = import_module(f"dispytch_integrations.{transport}")
            backend: type[Backend] = getattr(module, _BACKENDS[transport])
            names.update(backend.options_type.model_fields)
            try:
                backend.require_client()
                for scheme in _URLS[transport]:
                    names.update(backend.client_option_names(BrokerURL(scheme, ())))
            except MissingExtraError:
                pass  # Then nobody has given its options.
        return frozenset(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _routes(url: BrokerURL) -> tuple[type[EventRoute], ...]:
    """The routes that a memory:// URL takes. Raises ConfigurationError for an unknown transport."""
    names = [host for host, _ in url.hosts]
    if not names and not url.path.strip("/"):
        return (EventRoute,)
    name = names[0].lower() if len(names) == 1 else ""
    if name not in _TRANSPORTS or url.path.strip("/"):
        given = str(url).removeprefix("memory://")
        raise ConfigurationError(
            f"memory://{given} stands in for nothing known{nearest(given, _TRANSPORTS)}; write memory:// for every "
            f"route, or one of {', '.join(f'memory://{known}' for known in _TRANSPORTS)}"
        )
    producers = {"kafka": "KafkaProducer", "rabbitmq": "RabbitMQProducer", "redis": "RedisProducer"}
    # Imported by name: routes need no driver, and whoever has no use for them does not load them.
    producer: type[Producer] = getattr(import_module(f"dispytch_integrations.{name}"), producers[name])
    return producer.routes
