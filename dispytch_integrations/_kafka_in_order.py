"""Kafka, strictly in order: of each partition one batch at a time, the next one when the last is confirmed.

A batch is taken whole or not at all: behind a message that failed nothing of its key is sent. Batches are larger than
the client's own, so that few round trips are needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from aiokafka import errors as kafka_errors  # type: ignore[import-untyped]
from aiokafka.structs import TopicPartition  # type: ignore[import-untyped]

from dispytch_integrations._kafka_delivery import (
    TOO_LARGE,
    Delivery,
    broken_down,
    by_partition,
    headers_of,
    timed_out,
)
from dispytch_integrations._kafka_errors import BEFORE_SENDING, translate
from dispytch_integrations.errors import (
    DeliveryError,
    DispytchError,
    NotAttemptedError,
    PermanentFailure,
)
from dispytch_integrations.message import Message

__all__ = ["deliver_in_order"]

_BATCH_BYTES = 256 * 1024
"""How large a batch may be before compression, where the client's `max_request_size` allows it."""
_SMALL_BATCH_BYTES = 16 * 1024
"""To what size they are cut down for good, at most, when a broker refuses larger ones."""
_QUEUE_SECONDS = 86400.0
"""The client's own limit for a place in its queue; ours ends the wait."""
_OF_ONE = (kafka_errors.UnknownError, kafka_errors.CorruptRecordException)
"""Beside permanent failures: what brokers answer to a record that they refuse and aiokafka has no name for."""
_OPEN = DeliveryError("without an outcome")
"""Stands where an outcome is still to come."""

_Items = tuple[list[bytes | None], list[int]]


async def deliver_in_order(
    delivery: Delivery, messages: Sequence[Message], timeout: float | None
) -> list[Exception | None]:
    """As Producer.deliver_in_order. Raises as `Client.check`."""
    if not delivery.client.check():
        return [broken_down(message) for message in messages]
    sending = _InOrder(delivery, messages, timeout)
    try:
        with delivery.deadlines.limit(timeout):
            await sending.run()
    except TimeoutError:
        pass  # `sending` knows which ones are still unconfirmed.
    return sending.end()


class _InOrder:
    """The delivery of several messages: a task for each topic, and in it one for each partition."""

    def __init__(self, delivery: Delivery, messages: Sequence[Message], timeout: float | None) -> None:
        self._delivery = delivery
        self._client = delivery.client
        self._messages = messages
        self._timeout = timeout
        # What is sent with too little time looks like a failure, and is none.
        self._last_start = None if timeout is None else self._client.loop.time() + timeout / 2
        self._outcomes: list[Exception | None] = [_OPEN] * len(messages)
        self._under_way: set[int] = set()

    async def run(self) -> None:
        """Return when nothing is under way and nothing more may be sent."""
        topics: dict[str, list[int]] = {}
        for index, message in enumerate(self._messages):
            topics.setdefault(message.destination, []).append(index)
        await _together([self._to_topic(name, indexes) for name, indexes in topics.items()])

    def end(self) -> list[Exception | None]:
        """The outcomes: what is still under way has timed out, what has none was not attempted."""
        outcomes = self._outcomes
        if _OPEN in outcomes:
            for index, message in enumerate(self._messages):
                if outcomes[index] is _OPEN:
                    under_way = index in self._under_way
                    outcomes[index] = timed_out(message, self._timeout) if under_way else NotAttemptedError()
        return outcomes

    async def _to_topic(self, name: str, indexes: list[int]) -> None:
        topics = self._delivery.topics
        topic = topics.known.get(name) or await topics.find(name, self._timeout)
        if isinstance(topic, Exception):
            for index in indexes:
                self._outcomes[index] = translate(topic, repr(self._messages[index]), BEFORE_SENDING)
            return
        places = by_partition(topic, self._messages, indexes, self._batch_size(name), self._refuse)
        scattered = self._take_scattered(places)
        sending = [self._to_partition(place, *items) for place, items in places.items()]
        sending += [self._one_by_one(lane) for lane in scattered]
        await _together(sending)

    def _take_scattered(self, places: dict[TopicPartition, _Items]) -> list[list[int]]:
        """Messages whose ordering key goes to several partitions, by key and in order; taken out of `places`."""
        if len(places) < 2:
            return []
        home: dict[str | None, TopicPartition] = {}
        lanes: dict[str | None, list[int]] = {}
        for place, (_, indexes) in places.items():
            for index in indexes:
                key = self._messages[index].ordering_key
                if key is not None and home.setdefault(key, place) is not place:
                    lanes[key] = []
        if lanes:
            for place, (keys, indexes) in places.items():
                kept: _Items = ([], [])
                for record_key, index in zip(keys, indexes, strict=True):
                    lane = lanes.get(self._messages[index].ordering_key)
                    if lane is None:
                        kept[0].append(record_key)
                        kept[1].append(index)
                    else:
                        lane.append(index)
                places[place] = kept
        return [sorted(lane) for lane in lanes.values()]

    async def _one_by_one(self, indexes: list[int]) -> None:
        for index in indexes:
            if not self._has_time():
                return
            self._under_way.add(index)
            error = await self._delivery.deliver_one(self._messages[index], None)
            self._under_way.discard(index)
            self._outcomes[index] = error
            if error is not None:
                return

    async def _to_partition(self, place: TopicPartition, keys: list[bytes | None], indexes: list[int]) -> None:
        """Batch after batch. One that is refused for what is in it is halved, until it is one message that is."""
        closed = set[str]()  # keys behind whose failed message nothing is sent
        start, most = 0, len(indexes)
        while start < len(indexes) and self._has_time():
            builder, inside, end = self._batch(place.topic, keys, indexes, start, most, closed)
            size: int = builder.size()
            error = await self._send(place, builder, inside) if inside else None
            of_one = error is not None and _is_of_one(error)
            if of_one and len(inside) > 1:
                most = len(inside) // 2
                if isinstance(error, TOO_LARGE):
                    self._delivery.largest_batches[place.topic] = max(size // 2, _SMALL_BATCH_BYTES)
                continue
            for index in inside:
                self._outcomes[index] = None if error is None else translate(error, repr(self._messages[index]))
            if of_one:
                self._close(inside[0], closed)
            elif error is not None:
                return
            start, most = end, most * 2

    def _batch(
        self, topic: str, keys: list[bytes | None], indexes: list[int], start: int, most: int, closed: set[str]
    ) -> tuple[Any, list[int], int]:
        """A batch of at most `most` messages, which are in it, and where the next one begins."""
        delivery, messages = self._delivery, self._messages
        builder, inside = self._client.builder(self._batch_size(topic)), list[int]()
        append = builder.append
        for position in range(start, len(indexes)):
            index, key = indexes[position], keys[position]
            message = messages[index]
            if closed and message.ordering_key in closed:
                continue
            if len(inside) >= most:
                return builder, inside, position
            try:
                headers = headers_of(message)
                # A batch takes its first record whatever its size; the others fit, if a batch does.
                if not inside and delivery.is_too_large(key, message.payload, headers):
                    raise delivery.too_large(message)
                timestamp = message.properties.get("timestamp_ms") if message.properties else None
                if append(timestamp=timestamp, key=key, value=message.payload, headers=headers) is None:
                    return builder, inside, position
                inside.append(index)
            except (AttributeError, TypeError, DispytchError) as exc:
                # Of a type that cannot be written, from a hook; or too large.
                self._outcomes[index] = translate(exc, repr(message))
                self._close(index, closed)
        return builder, inside, len(indexes)

    async def _send(self, place: TopicPartition, builder: Any, inside: list[int]) -> Exception | None:
        """Send a batch; its error, None: it is confirmed. Cancelled, its messages stay under way."""
        builder.close()  # Nobody else's message gets in, and the client does not wait for more.
        try:
            future = await self._client.accumulator.add_batch(builder, place, _QUEUE_SECONDS)
        except Exception as exc:  # The client takes no more.
            return exc
        self._under_way.update(inside)
        error: Exception | None = None
        try:
            await future
        except Exception as exc:  # It is the outcome of all that are in it.
            error = exc
        self._under_way.difference_update(inside)
        return error

    def _batch_size(self, topic: str) -> int:
        client = self._client
        size = min(max(_BATCH_BYTES, client.max_batch_size), client.max_request_size)
        return self._delivery.largest_batches.get(topic, size)

    def _close(self, index: int, closed: set[str]) -> None:
        key = self._messages[index].ordering_key
        if key is not None:
            closed.add(key)

    def _refuse(self, index: int, error: Exception) -> None:
        self._outcomes[index] = error

    def _has_time(self) -> bool:
        return self._last_start is None or self._client.loop.time() <= self._last_start


def _is_of_one(error: Exception) -> bool:
    """May a single message be what a batch was refused for?"""
    return isinstance(error, _OF_ONE) or isinstance(translate(error, ""), PermanentFailure)


async def _together(sending: Sequence[Coroutine[Any, Any, None]]) -> None:
    if len(sending) == 1:
        await sending[0]
        return
    tasks = [asyncio.create_task(each) for each in sending]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
