"""`tail` of Kafka: partitions assigned by hand, without a consumer group, and nothing committed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from aiokafka import errors as kafka_errors
from aiokafka.structs import TopicPartition  # type: ignore[import-untyped]

from dispytch_integrations._tail import LostError, MissingError, Request, Source
from dispytch_integrations._tail_arrival import Arrival, moment

if TYPE_CHECKING:
    from dispytch_integrations.backend import Backend
    from dispytch_integrations.kafka import KafkaBackend

__all__ = ["KafkaSource"]

_BATCH = 200
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 2.0
"""Between two looks whether the broker answers and the topic has new partitions."""
_ANSWER_SECONDS = 3.0
_STOP_SECONDS = 0.4


class KafkaSource(Source):
    """A topic. Positions are kept here, so that a new connection goes on where the last one ended."""

    resumes = True

    def __init__(self, backend: Backend, request: Request, name: str) -> None:
        super().__init__(backend, request, name)
        self._consumer: Any = None
        self._positions: dict[Any, int] = {}
        self._from_beginning = request.from_beginning
        self._looked = 0.0

    async def open(self) -> str:
        """Look for the topic without creating it, and begin at its end, its beginning, or where it was."""
        await self.backend.start()
        backend = cast("KafkaBackend", self.backend)
        client = backend._client
        if client is None:  # Stopped meanwhile.
            raise LostError(f"the connection to {self.backend.address}")
        error = (await client.look_up([self.name], create=False))[self.name]
        if error is not None and issubclass(error, kafka_errors.UnknownTopicOrPartitionError):
            self._positions.clear()
            self._from_beginning = True  # Whoever waits for it wants its first event.
            raise MissingError(
                f"there is no topic {self.name!r} at {self.backend.address}; look for a typing error, create it, or "
                f"write --wait"
            )
        if error is not None:
            raise MissingError(f"the topic {self.name!r} cannot be read: {error.__name__}; may this user describe it?")
        options = backend._client_options()
        known = inspect.signature(cast("Any", AIOKafkaConsumer)).parameters
        shared = {name: value for name, value in options.items() if name in known}
        shared |= {"group_id": None, "enable_auto_commit": False, "auto_offset_reset": "earliest"}
        shared["metadata_max_age_ms"] = round(_LOOK_SECONDS * 1000)
        hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in backend._hosts]
        self._consumer = cast("Any", AIOKafkaConsumer)(bootstrap_servers=hosts, **shared)
        await self._consumer.start()
        self._consumer._client.set_topics([self.name])
        await self._consumer._client.force_metadata_update()
        await self._assign(begin=self._from_beginning)
        self._looked = time.monotonic()
        count = len(self._consumer.assignment())
        return f"the topic {self.name!r}, {count} partition{'' if count == 1 else 's'}"

    async def _assign(self, *, begin: bool) -> None:
        """Read all partitions; the new ones from their beginning or from their end."""
        consumer = self._consumer
        numbers: set[int] = consumer.partitions_for_topic(self.name) or set()
        partitions = [TopicPartition(self.name, number) for number in sorted(numbers)]
        new = [partition for partition in partitions if partition not in self._positions]
        if not new and len(partitions) == len(consumer.assignment()):
            return
        consumer.assign(partitions)
        if new:
            # Asked now: what comes between two moments "the end" would be lost.
            look_up = consumer.beginning_offsets if begin else consumer.end_offsets
            self._positions.update(await look_up(new))
        for partition in partitions:
            consumer.seek(partition, self._positions[partition])

    async def read(self) -> Sequence[Arrival]:
        """Records of all partitions, each partition's in order."""
        try:
            if time.monotonic() - self._looked > _LOOK_SECONDS:
                await self._look()
            found: dict[Any, list[Any]] = await self._consumer.getmany(
                timeout_ms=round(_POLL_SECONDS * 1000), max_records=_BATCH
            )
        except LostError:
            raise
        except (kafka_errors.KafkaError, OSError) as exc:
            raise LostError(f"the connection to {self.backend.address} ({type(exc).__name__}: {exc})") from exc
        for partition, each in found.items():
            self._positions[partition] = each[-1].offset + 1
        records = [record for each in found.values() for record in each]
        return [self._arrival(record) for record in sorted(records, key=lambda record: record.timestamp)]

    async def _look(self) -> None:
        """aiokafka tries again in silence, for ever: only who asks hears that nobody answers."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self.backend.ping()
        except TimeoutError as exc:
            raise LostError(f"{self.backend.address} does not answer") from exc
        self._looked = time.monotonic()
        if not self._consumer.partitions_for_topic(self.name):
            await self._consumer._client.force_metadata_update()
            if not self._consumer.partitions_for_topic(self.name):
                raise LostError(f"the topic {self.name!r} is gone")
        # One that was added since then has nothing that came before.
        await self._assign(begin=True)

    def _arrival(self, record: Any) -> Arrival:
        at = moment(record.timestamp) if record.timestamp > 0 else None
        headers = {name: _text(value) for name, value in record.headers}
        position = {"partition": record.partition, "offset": record.offset}
        key = None if record.key is None else _text(record.key)
        return Arrival("kafka", record.topic, record.value, headers, key, position, stored_at=at)

    async def close(self) -> None:
        """Close both connections."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            # A task of its own: where nobody answers aiokafka ends as if it had been cancelled, or not at all.
            stopping = asyncio.ensure_future(consumer.stop())
            await asyncio.wait({stopping}, timeout=_STOP_SECONDS)
            if not stopping.done() or stopping.cancelled():
                stopping.cancel()
                await consumer._client.close()
        await cast("KafkaBackend", self.backend)._close_old()  # At once: nothing was sent that could be flushed.


def _text(value: Any) -> Any:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
