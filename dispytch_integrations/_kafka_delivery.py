"""How messages get to Kafka: one as a record of the client's next batch, many as batches of our own.

Both go into the client's queue of each partition, one after the other, so that their order is that of the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import TopicPartition

from dispytch_integrations._deadlines import Deadlines
from dispytch_integrations._kafka_client import Client
from dispytch_integrations._kafka_errors import BEFORE_SENDING, translate
from dispytch_integrations._kafka_topics import Topic, Topics
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    MessageTooLargeError,
    ProducerTimeout,
    UnroutableError,
)
from dispytch_integrations.message import Message

__all__ = ["Delivery"]

_QUEUE_SECONDS = 86400.0
"""The client's own limit for a place in its queue counts wrongly when many wait; ours ends the wait."""
_RECORD_OVERHEAD, _HEADER_OVERHEAD = 64, 48
"""Bytes, roughly: to tell when a batch of messages without a key is full."""

_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)

Headers = list[tuple[str, bytes]]


class Delivery:
    """Delivers messages through one client."""

    def __init__(self, client: Client, *, create_topics: bool) -> None:
        self.client = client
        self.topics = Topics(client, create=create_topics)
        self._deadlines = Deadlines()
        self._add = client.accumulator.add_message
        self._size = DefaultRecordBatchBuilder.estimate_size_in_bytes

    async def deliver(self, messages: Sequence[Message], timeout: float | None) -> list[Exception | None]:
        """As `Producer.deliver`."""
        if not self.client.check():
            return [
                BrokerUnavailableError(
                    f"{message!r} was not sent: the AIOKafkaProducer has broken down; make a new one"
                )
                for message in messages
            ]
        if len(messages) == 1:
            return [await self._deliver_one(messages[0], timeout)]
        many = _Many(self, messages, timeout)
        try:
            with self._deadlines.limit(timeout):
                await many.run()
        except TimeoutError:
            pass  # `many` knows which ones are still unconfirmed.
        finally:
            many.end()
        return many.outcomes

    async def _deliver_one(self, message: Message, timeout: float | None) -> Exception | None:
        limit = self._deadlines.limit(timeout)
        try:
            with limit:
                topic = self.topics.known.get(message.destination)
                if topic is None:
                    found = await self.topics.find(message.destination, timeout)
                    if isinstance(found, Exception):
                        return translate(found, repr(message), BEFORE_SENDING)
                    topic = found
                properties = message.properties
                key = key_of(message)
                number = properties.get("partition") if properties else None
                place = topic.place(key) if number is None else topic.places.get(number)
                headers = headers_of(message)
                if place is None:
                    return no_such_partition(message, topic)
                if self.is_too_large(key, message.payload, headers):
                    return self.too_large(message)
                # What the client's send() does, without its serializers (the payload is bytes) and its search for
                # the partition (a third of its time).
                future = await self._add(
                    place,
                    key,
                    message.payload,
                    self.client.request_timeout,
                    timestamp_ms=properties.get("timestamp_ms"),
                    headers=headers,
                )
                await future
        except TimeoutError as exc:
            return timed_out(message, timeout) if limit.expired else translate(exc, repr(message))
        except Exception as exc:  # A message's failure is its outcome; the caller sees every one of them.
            return translate(exc, repr(message))
        return None

    def is_too_large(self, key: bytes | None, payload: bytes | None, headers: Headers) -> bool:
        """Would the client itself refuse this record?"""
        return self._size(key, payload, headers) > self.client.max_request_size  # type: ignore[no-any-return]

    def too_large(self, message: Message) -> MessageTooLargeError:
        """The error for such a message."""
        return MessageTooLargeError(
            f"{message!r} is larger than the client's max_request_size of {self.client.max_request_size} bytes; "
            f"send less, or raise max_request_size here and max.message.bytes of the topic"
        )


class _Many:
    """The delivery of several messages: batches per partition, each partition's filled and queued by its own task."""

    def __init__(self, delivery: Delivery, messages: Sequence[Message], timeout: float | None) -> None:
        self._delivery = delivery
        self._client = delivery.client
        self._messages = messages
        self._timeout = timeout
        self.outcomes: list[Exception | None] = [None] * len(messages)
        self._open: set[int] = set(range(len(messages)))
        """Messages without an outcome."""
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

    def end(self) -> None:
        """What has no outcome yet timed out; nothing waits any more."""
        for future in self._waiting:
            future.cancel()  # It stands for the client's own future, which goes on.
        for index in self._open:
            self.outcomes[index] = timed_out(self._messages[index], self._timeout)

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
        """Which messages go to which partition, in order, with their keys.

        Messages without a key go to one partition until a batch is full, then to the next: full batches travel best.
        """
        places: dict[TopicPartition, tuple[list[bytes | None], list[int]]] = {}
        sticky: dict[str, tuple[TopicPartition, int]] = {}
        for index, message in enumerate(self._messages):
            topic = topics.get(message.destination)
            if topic is None:
                continue
            key = key_of(message)
            number = message.properties.get("partition") if message.properties else None
            place: TopicPartition | None
            if number is not None:
                place = topic.places.get(number)
            elif key is not None:
                place = topic.place(key)
            else:
                place, room = sticky.get(message.destination) or (topic.place(None), self._client.max_batch_size)
                room -= len(message.payload or b"") + _RECORD_OVERHEAD + _HEADER_OVERHEAD * len(message.headers)
                if room > 0:
                    sticky[message.destination] = (place, room)
                else:
                    sticky.pop(message.destination, None)
            if place is None:
                self._settle((index,), no_such_partition(message, topic))
                continue
            items = places.get(place)
            if items is None:
                items = places[place] = ([], [])
            items[0].append(key)
            items[1].append(index)
        return places

    async def _queue(self, place: TopicPartition, keys: list[bytes | None], indexes: list[int]) -> None:
        """Fill batches for one partition and queue them, the next one once the last one is under way."""
        for builder, inside in self._batches(keys, indexes):
            try:
                await self._submit(place, builder, inside)
            except Exception as exc:  # The client takes no more; what it has not taken shares the outcome.
                for index in [index for index in indexes if index in self._open and index >= inside[0]]:
                    self._fail(index, exc)
                return

    def _batches(self, keys: list[bytes | None], indexes: list[int]) -> Iterator[tuple[Any, list[int]]]:
        """Full batches, each with the messages in it; the last one is left open for who comes after us."""
        delivery, create = self._delivery, self._client.accumulator.create_builder
        builder, inside = create(), list[int]()
        for key, index in zip(keys, indexes, strict=True):
            message = self._messages[index]
            try:
                headers = headers_of(message)
                while True:
                    if (self._measure_all or not inside) and delivery.is_too_large(key, message.payload, headers):
                        self._settle((index,), delivery.too_large(message))
                        break
                    timestamp = message.properties.get("timestamp_ms") if message.properties else None
                    if builder.append(timestamp=timestamp, key=key, value=message.payload, headers=headers) is not None:
                        inside.append(index)
                        break
                    yield builder, inside
                    builder, inside = create(), []
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
        elif len(inside) > 1 and isinstance(error, _TOO_LARGE):
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

    def _settle(self, indexes: Iterable[int], outcome: Exception | None) -> None:
        self._open.difference_update(indexes)
        if outcome is not None:
            for index in indexes:
                self.outcomes[index] = outcome


def key_of(message: Message) -> bytes | None:
    """The record's key: the partition key, else the ordering key."""
    properties = message.properties
    key = properties.get("key") if properties else None
    if key is None:
        key = message.ordering_key
    return key.encode() if isinstance(key, str) else key


def headers_of(message: Message) -> Headers:
    """The record's headers: names and bytes."""
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
