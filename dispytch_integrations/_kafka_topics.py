"""Topics as the producer knows them: found before their first use, and which partition a key goes to."""

from __future__ import annotations

import asyncio
import random
import weakref
from typing import Any

from aiokafka import errors as kafka_errors  # type: ignore[import-untyped]
from aiokafka.partitioner import DefaultPartitioner  # type: ignore[import-untyped]
from aiokafka.structs import TopicPartition  # type: ignore[import-untyped]

from dispytch_integrations._kafka_client import Client

__all__ = ["Topic", "Topics"]

_CREATION_SECONDS = 2.0
"""How long a broker that creates topics may deny one before we believe it: Kafka 3 creates it and answers no."""
_ASK_AGAIN_SECONDS = 0.1
_MOST_KEYS = 10_000
"""Keys whose partition is remembered per topic; hashing one in Python takes longer than sending it."""


class Topic:
    """A topic's partitions, as of the client's last look at the cluster."""

    __slots__ = ("_any", "_available", "_by_key", "_partitioner", "_partitions", "places")

    def __init__(self, name: str, client: Client) -> None:
        self._partitions: list[int] = sorted(client.cluster.partitions_for_topic(name))
        self._available: list[int] = sorted(client.cluster.available_partitions_for_topic(name))
        self._partitioner: Any = client.partitioner
        self.places: dict[int, TopicPartition] = {number: TopicPartition(name, number) for number in self._partitions}
        # A partitioner of the user's own may do as it likes; aiokafka's gives a key the same partition each time.
        own = not isinstance(self._partitioner, DefaultPartitioner)
        self._by_key: dict[bytes, TopicPartition] | None = None if own else {}
        self._any = [self.places[number] for number in self._available or self._partitions]

    def place(self, key: bytes | None) -> TopicPartition:
        """The partition for a key, as the client's own partitioner says; without a key a random one."""
        by_key = self._by_key
        if by_key is None:
            return self.places[self._partitioner(key, self._partitions, self._available)]
        if key is None:
            return self._any[int(random.random() * len(self._any))]  # As aiokafka's does, in a fifth of the time.
        place = by_key.get(key)
        if place is None:
            if len(by_key) >= _MOST_KEYS:
                by_key.clear()
            place = by_key[key] = self.places[self._partitioner(key, self._partitions, self._available)]
        return place


class Topics:
    """The topics that are known to exist.

    A send to a topic that does not exist hangs in aiokafka until its request timeout. So a topic that the client
    does not know is asked for first, by a request of our own, once for all who wait for it.
    """

    def __init__(self, client: Client, *, create: bool) -> None:
        self._client = client
        self._create = create
        self.known: dict[str, Topic] = {}
        """Forgotten whenever the client has looked at the cluster: topics go, partitions come."""
        self._missing: set[str] = set()
        self._asking: dict[str, asyncio.Task[Exception | None]] = {}
        known = self.known
        listener = _forget(known)
        client.cluster.add_listener(listener)
        weakref.finalize(self, client.cluster.remove_listener, listener).atexit = False

    async def find(self, name: str, timeout: float | None) -> Topic | Exception:
        """The topic, or the client's error why there is none; asks the broker if the client does not know it.

        Nothing is remembered about a topic that is missing, but that it was: no time is given to its creation then.
        """
        for _ in range(3):  # The client may look at the cluster, and forget, while we wait.
            topic = self._look(name)
            if topic is not None:
                return topic
            task = self._asking.get(name)
            if task is None:
                task = self._asking[name] = asyncio.create_task(self._ask(name, timeout), name=f"dispytch topic {name}")
                task.add_done_callback(lambda _: self._asking.pop(name, None))
            await asyncio.wait({task})  # Not awaited itself: whoever is cancelled, the others go on waiting for it.
            error = kafka_errors.ProducerClosed() if task.cancelled() else task.result()
            if error is not None:
                return error
        return self._look(name) or kafka_errors.UnknownTopicOrPartitionError()

    async def check(self, names: list[str]) -> list[str]:
        """Those of `names` that do not exist; none is created. Raises a KafkaError."""
        answers = await self._client.look_up(names, create=False)
        return [name for name, error in answers.items() if error is not None]

    def close(self) -> None:
        """Ask no more."""
        for task in self._asking.values():
            task.cancel()

    def _look(self, name: str) -> Topic | None:
        if not self._client.cluster.partitions_for_topic(name):
            return None
        topic = self.known[name] = Topic(name, self._client)
        return topic

    async def _ask(self, name: str, timeout: float | None) -> Exception | None:
        try:
            async with asyncio.timeout(timeout):
                error = await self._ask_until_created(name, 2 * _CREATION_SECONDS if timeout is None else timeout)
        except Exception as exc:  # Whatever hinders the question is the answer for all who wait for it.
            return exc
        if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
            self._missing.add(name)
        else:
            self._missing.discard(name)
        return error

    async def _ask_until_created(self, name: str, timeout: float) -> Exception | None:
        loop = asyncio.get_running_loop()
        patience = 0.0 if name in self._missing or not self._create else min(_CREATION_SECONDS, timeout / 2)
        end = loop.time() + patience
        while True:
            error = (await self._client.look_up([name], create=self._create))[name]
            if error is None:
                await self._client.learn(name, create=self._create)
                return None
            being_made = error in (kafka_errors.UnknownTopicOrPartitionError, kafka_errors.LeaderNotAvailableError)
            if not being_made or loop.time() >= end:
                return error()
            await asyncio.sleep(_ASK_AGAIN_SECONDS)


def _forget(known: dict[str, Topic]) -> Any:
    # A function of its own: a bound method would keep the object alive that it is to outlive.
    def listener(cluster: object) -> None:
        known.clear()

    return listener
