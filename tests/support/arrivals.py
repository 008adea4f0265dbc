"""What has arrived at a real broker, read by another client than ours, and an event class for each transport.

All methods block. Events of one place keep their order.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar
from urllib.parse import urlsplit

import redis
from pydantic import Field

from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute

__all__ = ["SECONDS", "Arrivals", "KafkaArrivals", "KafkaPlaced", "Placed", "RabbitMQArrivals", "RabbitMQPlaced",
           "RedisArrivals"]  # fmt: skip

SECONDS = 20.0
"""How long is waited for what has to come, on a busy machine."""


class Placed(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __ordering_key__ = "{place}"
    __event_type__ = "tests.redis.placed"

    place: str = Field(exclude=True)
    number: int = 0


class KafkaPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="{place}")
    __ordering_key__ = "{place}"
    __event_type__ = "tests.kafka.placed"

    place: str = Field(exclude=True)
    number: int = 0


class RabbitMQPlaced(EventBase):
    __route__ = RabbitMQEventRoute(exchange="amq.topic", routing_key="{place}")
    __ordering_key__ = "{place}"
    __event_type__ = "tests.rabbitmq.placed"

    place: str = Field(exclude=True)
    number: int = 0


class Arrivals(ABC):
    """The place `place` of the broker `url`, empty at first. `close` removes it."""

    event: ClassVar[Callable[..., EventBase]]

    def __init__(self, url: str, place: str) -> None:
        self.url = url
        self.place = place
        self._payloads: list[bytes] = []

    def placed(self, number: int = 0) -> EventBase:
        """An event that goes there."""
        return self.event(place=self.place, number=number)

    def numbers(self, count: int) -> list[int]:
        """The numbers of the events that have arrived, in their order, once there are `count` or SECONDS are over."""
        end = time.monotonic() + SECONDS
        while len(self._payloads) < count and time.monotonic() < end:
            self._payloads += self._more()
        return [json.loads(payload)["number"] for payload in self._payloads]

    @abstractmethod
    def _more(self) -> list[bytes]:
        """What has arrived since the last call; waits a little for it."""

    @abstractmethod
    def close(self) -> None:
        """Remove the place, and disconnect."""


class RedisArrivals(Arrivals):
    """A stream."""

    event = Placed

    def __init__(self, url: str, place: str) -> None:
        super().__init__(url, place)
        self.client = redis.Redis.from_url(url)
        self._last = b"0"

    def _more(self) -> list[bytes]:
        answer: Any = self.client.xread({self.place: self._last}, block=200)
        if not answer:
            return []
        [[_, entries]] = answer.items() if isinstance(answer, dict) else answer
        self._last = entries[-1][0]
        return [fields[b"data"] for _, fields in entries]

    def headers(self) -> list[dict[str, str]]:
        """The fields beside the body of all that has arrived."""
        entries: Any = self.client.xrange(self.place)
        return [
            {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
            for _, fields in entries
        ]

    def close(self) -> None:
        self.client.delete(self.place)
        self.client.close()


class KafkaArrivals(Arrivals):
    """A topic, which the broker makes when it is asked for."""

    event = KafkaPlaced

    def __init__(self, url: str, place: str) -> None:
        super().__init__(url, place)
        import confluent_kafka as kafka

        self._consumer = kafka.Consumer(
            {"bootstrap.servers": url.removeprefix("kafka://"), "group.id": place, "enable.auto.commit": False,
             "log_level": 0}
        )  # fmt: skip
        partitions = self._consumer.list_topics(place, timeout=SECONDS).topics[place].partitions
        self._consumer.assign(
            [kafka.TopicPartition(place, number, kafka.OFFSET_BEGINNING) for number in partitions or range(4)]
        )

    def _more(self) -> list[bytes]:
        messages = self._consumer.consume(1000, timeout=0.2)
        return [value for message in messages if message.error() is None and (value := message.value()) is not None]

    def close(self) -> None:
        self._consumer.close()


class RabbitMQArrivals(Arrivals):
    """A queue that gets what has its name as routing key."""

    event = RabbitMQPlaced

    def __init__(self, url: str, place: str) -> None:
        super().__init__(url, place)
        import amqp

        address = urlsplit(url)
        self._connection = amqp.Connection(
            f"{address.hostname}:{address.port}",
            userid=address.username or "guest",
            password=address.password or "guest",
        )
        self._connection.connect()
        self._channel: Any = self._connection.channel()
        self._channel.queue_declare(place, exclusive=True)
        self._channel.queue_bind(place, "amq.topic", place)

    def _more(self) -> list[bytes]:
        found: list[bytes] = []
        while (message := self._channel.basic_get(self.place, no_ack=True)) is not None:
            body = message.body
            found.append(body if isinstance(body, bytes) else str(body).encode())
        if not found:
            time.sleep(0.02)
        return found

    def close(self) -> None:
        self._connection.close()
