"""How messages get to Kafka: one as a record of the client's next batch, many as batches of our own.

Both go into the client's queue of each partition, one after the other, so that their order is that of the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from types import coroutine
from typing import Any, TypeVar, cast

from aiokafka import errors as kafka_errors  # type: ignore[import-untyped]
from aiokafka.record.default_records import DefaultRecordBatchBuilder  # type: ignore[import-untyped]
from aiokafka.structs import TopicPartition  # type: ignore[import-untyped]

from dispytch_integrations._deadlines import Deadlines
from dispytch_integrations._kafka_client import Client
from dispytch_integrations._kafka_errors import BEFORE_SENDING, translate
from dispytch_integrations._kafka_expiry import Expiry
from dispytch_integrations._kafka_topics import Topic, Topics
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    MessageTooLargeError,
    ProducerTimeout,
    UnroutableError,
)
from dispytch_integrations.message import Message

__all__ = ["TOO_LARGE", "Delivery", "broken_down", "by_partition", "headers_of", "timed_out"]

_QUEUE_SECONDS = 86400.0
"""The client's own limit for a place in its queue counts wrongly when many wait; ours ends the wait."""
_RECORD_OVERHEAD, _HEADER_OVERHEAD = 16, 48
"""Bytes, roughly: to tell when a batch of messages without a key is full."""

TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
"""What a broker answers to a batch that is larger than it takes."""

Headers = list[tuple[str, bytes]]
_T = TypeVar("_T")


class Delivery:
    """Delivers messages through one client."""

    def __init__(self, client: Client, *, create_topics: bool) -> None:
        self.client = client
        self.topics = Topics(client, create=create_topics)
        self.deadlines = Deadlines()
        self.largest_batches: dict[str, int] = {}
        """By topic: bytes of a batch that was refused as too large, halved. For deliveries in order."""
        self._expiry = Expiry(client.loop)
        self._add: Callable[..., Coroutine[Any, Any, asyncio.Future[Any]]] = client.accumulator.add_message
        self._max_size = client.max_request_size
        self._size: Any = DefaultRecordBatchBuilder.estimate_size_in_bytes

    async def deliver_one(self, message: Message, timeout: float | None) -> Exception | None:
        """The outcome of one message: None, or its error. Raises as `Client.check`."""
        client = self.client
        if not client.check():
            return broken_down(message)
        topic = self.topics.known.get(message.destination)
        if topic is None:
            return await self._deliver_slowly(message, timeout)
        try:
            adding = self._record(message, topic)
            # The client takes a record at once, unless its batch is full: only then there is something to wait for
            # before there is a future, and a limit on this task is needed, which costs more than one on the future.
            try:
                awaited = adding.send(None)
            except StopIteration as done:
                future: asyncio.Future[Any] = done.value
                if timeout is not None:
                    self._expiry.watch(future, timeout)
                await future
            else:
                with self.deadlines.limit(timeout):
                    await (await resumed(adding, awaited))
        except TimeoutError:
            return timed_out(message, timeout)
        except Exception as exc:  # A message's failure is its outcome; the caller sees every one of them.
            return translate(exc, repr(message))
        return None

    async def _deliver_slowly(self, message: Message, timeout: float | None) -> Exception | None:
        """`deliver_one` to a topic that is not known yet."""
        try:
            with self.deadlines.limit(timeout):
                topic = await self.topics.find(message.destination, timeout)
                if isinstance(topic, Exception):
                    return translate(topic, repr(message), BEFORE_SENDING)
                await (await self._record(message, topic))
        except TimeoutError:
            return timed_out(message, timeout)
        except Exception as exc:  # As above.
            return translate(exc, repr(message))
        return None

    def _record(self, message: Message, topic: Topic) -> Coroutine[Any, Any, asyncio.Future[Any]]:
        """Put a message into the client's queue, as its send() does.

        But without its serializers (the payload is bytes) and its search for the partition (a third of its time).
        Raises UnroutableError, MessageTooLargeError.
        """
        key, payload, headers = key_of(message), message.payload, headers_of(message)
        properties = message.properties
        if self._size(key, payload, headers) > self._max_size:
            raise self.too_large(message)
        if not properties:
            return self._add(topic.place(key), key, payload, self.client.request_timeout, None, headers)
        number = properties.get("partition")
        place = topic.place(key) if number is None else topic.places.get(number)
        if place is None:
            raise no_such_partition(message, topic)
        return self._add(place, key, payload, self.client.request_timeout, properties.get("timestamp_ms"), headers)

    async def deliver_many(self, messages: Sequence[Message], timeout: float | None) -> list[Exception | None]:
        """The outcomes of several messages; those of one partition keep their order. Raises as `Client.check`."""
        if not self.client.check():
            return [broken_down(message) for message in messages]
        many = _Many(self, messages, timeout)
        try:
            with self.deadlines.limit(timeout):
                await many.run()
        except TimeoutError:
            pass  # `many` knows which ones are still unconfirmed.
        return many.end()

    def is_too_large(self, key: bytes | None, payload: bytes | None, headers: Headers) -> bool:
        """Would the client itself refuse this record?"""
        return bool(self._size(key, payload, headers) > self._max_size)

    def too_large(self, message: Message) -> MessageTooLargeError:
        """The error for such a message."""
        return MessageTooLargeError(
            f"{message!r} is larger than the client's max_request_size of {self._max_size} bytes; "
            f"send less, or raise max_request_size here and max.message.bytes of the topic"
        )


_OPEN = DeliveryError("without an outcome")
"""Stands where an outcome is still to come."""


class _Many:
    """The delivery of several messages: batches per partition, each partition's filled and queued by its own task."""

    def __init__(self, delivery: Delivery, messages: Sequence[Message], timeout: float | None) -> None:
        self._delivery = delivery
        self._client = delivery.client
        self._messages = messages
        self._timeout = timeout
        self._outcomes: list[Exception | None] = [_OPEN] * len(messages)
        self._waiting: dict[asyncio.Future[Any], tuple[TopicPartition, list[int]]] = {}
        """Batches in the client's queue, or on their way, with the messages in them."""
        # A batch takes its first record whatever its size, so that one is measured. The others fit, if a batch does.
        self._measure_all = self._client.max_batch_size > self._client.max_request_size

    async def run(self) -> None:
        """Return when every message has its outcome."""
        topics = await self._find_topics()
        places = self._places(topics)
        if len(places) == 1:
            for place, (keys, indexes) in places.items():
                await self._queue(place, keys, indexes)
        elif places:
            tasks = [asyncio.create_task(self._queue(place, *items)) for place, items in places.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        while self._waiting:
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_EXCEPTION)
            for future in done:
                await self._read(future, *self._waiting.pop(future))

    def end(self) -> list[Exception | None]:
        """The outcomes; what has none timed out. Nothing waits any more."""
        outcomes = self._outcomes
        if self._waiting or _OPEN in outcomes:
            for future in self._waiting:
                future.cancel()  # It stands for the client's own future, which goes on.
            for index, message in enumerate(self._messages):
                if outcomes[index] is _OPEN:
                    outcomes[index] = timed_out(message, self._timeout)
        return outcomes

    async def _find_topics(self) -> dict[str, Topic]:
        known, find = self._delivery.topics.known, self._delivery.topics.find
        names = {message.destination for message in self._messages}
        topics = {name: known[name] for name in names if name in known}
        if len(topics) == len(names):
            return topics
        unknown = [name for name in names if name not in topics]
        found = await asyncio.gather(*(find(name, self._timeout) for name in unknown))
        failures: dict[str, Exception] = {}
        for name, topic in zip(unknown, found, strict=True):
            if isinstance(topic, Exception):
                failures[name] = topic
            else:
                topics[name] = topic
        if failures:
            for index, message in enumerate(self._messages):
                error = failures.get(message.destination)
                if error is not None:
                    self._settle((index,), translate(error, repr(message), BEFORE_SENDING))
        return topics

    def _places(self, topics: dict[str, Topic]) -> dict[TopicPartition, tuple[list[bytes | None], list[int]]]:
        """Which messages go to which partition, in order, with their keys."""
        messages, full = self._messages, self._client.max_batch_size
        by_topic: dict[str, list[int]] = {name: [] for name in topics}
        for index, message in enumerate(messages):
            if (indexes := by_topic.get(message.destination)) is not None:
                indexes.append(index)
        places: dict[TopicPartition, tuple[list[bytes | None], list[int]]] = {}
        for name, indexes in by_topic.items():
            places.update(by_partition(topics[name], messages, indexes, full, self._settle_one))
        return places

    async def _queue(self, place: TopicPartition, keys: list[bytes | None], indexes: list[int]) -> None:
        """Fill batches for one partition and queue them, the next one once the last one is under way."""
        for builder, inside in self._batches(keys, indexes):
            try:
                await self._submit(place, builder, inside)
            except Exception as exc:  # The client takes no more; what it has not taken shares the outcome.
                for index in indexes:
                    if index >= inside[0] and self._outcomes[index] is _OPEN:
                        self._fail(index, exc)
                return

    def _batches(self, keys: list[bytes | None], indexes: list[int]) -> Iterator[tuple[Any, list[int]]]:
        """Full batches, each with the messages in it; the last one is left open for who comes after us."""
        delivery, create = self._delivery, self._client.accumulator.create_builder
        builder, inside = create(), list[int]()
        append = builder.append
        for key, index in zip(keys, indexes, strict=True):
            message = self._messages[index]
            try:
                headers = headers_of(message)
                while True:
                    if (self._measure_all or not inside) and delivery.is_too_large(key, message.payload, headers):
                        self._settle((index,), delivery.too_large(message))
                        break
                    timestamp = message.properties.get("timestamp_ms") if message.properties else None
                    if append(timestamp=timestamp, key=key, value=message.payload, headers=headers) is not None:
                        inside.append(index)
                        break
                    yield builder, inside
                    builder, inside = create(), []
                    append = builder.append
            except (AttributeError, TypeError) as exc:  # Something of a type that cannot be written, from a hook.
                self._fail(index, exc)
        if inside:
            yield builder, inside

    async def _submit(self, place: TopicPartition, builder: Any, inside: list[int]) -> None:
        future = await self._client.accumulator.add_batch(builder, place, _QUEUE_SECONDS)
        self._waiting[future] = (place, inside)

    async def _read(self, future: asyncio.Future[Any], place: TopicPartition, inside: list[int]) -> None:
        error = future.exception()
        if error is None:
            self._settle(inside, None)
        elif len(inside) > 1 and isinstance(error, TOO_LARGE):
            # The broker takes less than our batches hold. Which message is too large shows when each goes alone.
            for index in inside:
                for builder, alone in self._batches([key_of(self._messages[index])], [index]):
                    builder.close()
                    await self._submit(place, builder, alone)
        elif isinstance(error, Exception):
            for index in inside:
                self._fail(index, error)

    def _fail(self, index: int, error: Exception) -> None:
        self._settle((index,), translate(error, repr(self._messages[index])))

    def _settle_one(self, index: int, outcome: Exception) -> None:
        self._outcomes[index] = outcome

    def _settle(self, indexes: Iterable[int], outcome: Exception | None) -> None:
        outcomes = self._outcomes
        for index in indexes:
            outcomes[index] = outcome


@coroutine
def resumed(started: Coroutine[Any, Any, _T], awaited: Any) -> Generator[Any, Any, _T]:
    """Await the rest of a coroutine whose first step, which gave `awaited`, is done."""
    while True:
        try:
            yield awaited
        except BaseException as exc:  # Whatever is thrown in belongs to the coroutine, as in `await`.
            try:
                awaited = started.throw(exc)
            except StopIteration as done:
                return cast("_T", done.value)
        else:
            return (yield from cast("Generator[Any, Any, _T]", started))


def by_partition(
    topic: Topic,
    messages: Sequence[Message],
    indexes: Iterable[int],
    full: int,
    refuse: Callable[[int, Exception], None],
) -> dict[TopicPartition, tuple[list[bytes | None], list[int]]]:
    """Which messages of one topic go to which partition, in order, with their keys; `refuse` gets those of none.

    Messages without a key go to one partition until a batch is `full`, then to the next: full batches travel best.
    """
    places: dict[TopicPartition, tuple[list[bytes | None], list[int]]] = {}
    sticky: TopicPartition | None = None
    room = 0
    for index in indexes:
        message = messages[index]
        number = message.properties.get("partition") if message.properties else None
        key = key_of(message)
        place: TopicPartition | None
        if number is not None:
            place = topic.places.get(number)
        elif key is not None:
            place = topic.place(key)
        else:
            if sticky is None or room <= 0:
                sticky, room = topic.place(None), full
            place, payload = sticky, message.payload
            room -= _RECORD_OVERHEAD + (len(payload) if payload else 0) + _HEADER_OVERHEAD * len(message.headers)
        if place is None:
            refuse(index, no_such_partition(message, topic))
            continue
        items = places.get(place)
        if items is None:
            items = places[place] = ([], [])
        items[0].append(key)
        items[1].append(index)
    return places


def key_of(message: Message) -> bytes | None:
    """The record's key: the partition key, else the ordering key."""
    key: str | bytes | None = message.properties.get("key") if message.properties else None
    if key is None:
        key = message.ordering_key
    return key.encode() if isinstance(key, str) else key


def headers_of(message: Message) -> Headers:
    """The record's headers: names and bytes."""
    if not message.headers:
        return []
    return [(name, value.encode() if value.__class__ is str else value) for name, value in message.headers.items()]


def no_such_partition(message: Message, topic: Topic) -> UnroutableError:
    """The error for a message whose `partition` its topic does not have."""
    return UnroutableError(
        f"{message!r} is for partition {message.properties.get('partition')}, "
        f"but its topic has partitions 0 to {len(topic.places) - 1}"
    )


def timed_out(message: Message, timeout: float | None) -> ProducerTimeout:
    """The error for a message whose time is over."""
    return ProducerTimeout(f"{message!r} was not confirmed within {timeout} s: it may have been delivered")


def broken_down(message: Message) -> BrokerUnavailableError:
    """The error for a message whose client can send no more."""
    return BrokerUnavailableError(f"{message!r} was not sent: the AIOKafkaProducer has broken down; make a new one")
