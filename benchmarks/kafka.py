"""Kafka: concurrent emits and emit_many beside the raw client with the same headers, and FastStream."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from faststream.kafka import KafkaBroker

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from tests.support.brokers import Tansu

_CONCURRENT = 200
_MANY = 10_000
_REPEATS = 10
_KEYS = [f"customer-{number}" for number in range(50)]


class OrderPlaced(EventBase):
    """An event of usual size, without a key."""

    __route__ = KafkaEventRoute(topic="bench-orders")
    order_id: int
    customer: str
    total: float
    currency: str = "EUR"


class KeyedOrderPlaced(OrderPlaced):
    """The same with a key."""

    __backend_config__ = KafkaEventConfig(partition_key="{customer}")


def _events(cls: type[OrderPlaced], count: int) -> list[OrderPlaced]:
    return [cls(order_id=number, customer=_KEYS[number % len(_KEYS)], total=12.5) for number in range(count)]


def _identity(cls: type[OrderPlaced]) -> list[tuple[str, bytes]]:
    """What a careful user of the raw client would write for one message."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", cls.__qualname__.encode()),
        ("ce_source", b"/benchmarks"),
        ("content-type", b"application/json"),
        ("ce_id", secrets.token_hex(16).encode()),
        ("ce_time", datetime.now(UTC).isoformat().encode()),
    ]


async def run() -> list[Row]:
    """All rows; starts a Kafka-compatible broker unless KAFKA_URL names one."""
    url = os.environ.get("KAFKA_URL")
    if url:
        return await _run(url)
    broker = Tansu()
    with broker:
        return await _run(broker.url)


async def _run(url: str) -> list[Row]:
    rows: list[Row] = []
    client = AIOKafkaProducer(bootstrap_servers=url.removeprefix("kafka://"), acks="all")
    faststream = KafkaBroker(url.removeprefix("kafka://"))
    await client.start()
    await faststream.start()
    # A full collection over all modules takes as long as 10,000 events: whom it hits is chance, not merit.
    gc.collect()
    gc.freeze()
    try:
        async with connect(url, cloudevents=False, source="/benchmarks") as plain:
            async with connect(url, source="/benchmarks") as managed:
                publisher = faststream.publisher("bench-orders")
                for emitter, identity in ((plain, False), (managed, True)):
                    for cls in (OrderPlaced, KeyedOrderPlaced):
                        rows += await _concurrent(client, publisher, emitter, cls, identity)
                        rows += await _many(client, emitter, cls, identity)
    finally:
        gc.unfreeze()
        await faststream.stop()
        await client.stop()
    return rows


def _label(cls: type[OrderPlaced], identity: bool) -> str:
    return f"identity headers {'on' if identity else 'off'}, {'keyed' if cls is KeyedOrderPlaced else 'no key'}"


def _repeated(once: Callable[[], Awaitable[object]], times: int) -> Callable[[], Awaitable[object]]:
    async def repeat() -> None:
        for _ in range(times):
            await once()

    return repeat


async def _concurrent(
    client: Any, publisher: Any, emitter: EventEmitter, cls: type[OrderPlaced], identity: bool
) -> list[Row]:
    events = _events(cls, _CONCURRENT)
    keyed = cls is KeyedOrderPlaced

    async def raw_one(event: OrderPlaced) -> None:
        await client.send_and_wait(
            "bench-orders",
            event.model_dump_json().encode(),
            key=event.customer.encode() if keyed else None,
            headers=_identity(cls) if identity else None,
        )

    async def raw() -> None:
        await asyncio.gather(*(raw_one(event) for event in events))

    async def ours() -> None:
        await asyncio.gather(*(emitter.emit(event) for event in events))

    async def faststream() -> None:
        await asyncio.gather(
            *(
                publisher.publish(
                    event,
                    key=event.customer.encode() if keyed else None,
                    headers={name: value.decode() for name, value in _identity(cls)} if identity else None,
                )
                for event in events
            )
        )

    contestants = {name: _repeated(once, _REPEATS) for name, once in (("raw", raw), ("ours", ours))}
    contestants["faststream"] = _repeated(faststream, _REPEATS)
    times = await interleaved(contestants, rounds=9)
    what = f"Kafka, {_CONCURRENT} concurrent emits, {_label(cls, identity)}"
    rate = f"raw: {_CONCURRENT * _REPEATS / min(times['raw']) / 1000:.0f} k/s"
    return [
        Row(
            what=what,
            measured=ratio(times, "ours", "raw"),
            unit="x",
            reach=">= 0.75" if identity else ">= 0.9",
            note=rate,
        ),
        Row(what=f"{what}: FastStream", measured=ratio(times, "faststream", "raw"), unit="x"),
    ]


async def _many(client: Any, emitter: EventEmitter, cls: type[OrderPlaced], identity: bool) -> list[Row]:
    events = _events(cls, _MANY)
    keyed = cls is KeyedOrderPlaced

    async def raw() -> None:
        futures = [
            await client.send(
                "bench-orders",
                event.model_dump_json().encode(),
                key=event.customer.encode() if keyed else None,
                headers=_identity(cls) if identity else None,
            )
            for event in events
        ]
        await asyncio.gather(*futures)

    async def ours() -> None:
        await emitter.emit_many(events)

    times = await interleaved({"raw": raw, "ours": ours}, rounds=7)
    return [
        Row(
            what=f"Kafka, emit_many of {_MANY:,}, {_label(cls, identity)}",
            measured=ratio(times, "ours", "raw"),
            unit="x",
            reach=">= 1.6" if identity else ">= 3",
            note=f"raw: {_MANY / min(times['raw']) / 1000:.0f} k/s",
        )
    ]
