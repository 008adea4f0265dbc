"""RabbitMQ: concurrent emits and emit_many beside raw aio-pika and FastStream, same headers, same delivery mode.

Needs a RabbitMQ; RABBITMQ_URL names it (default: guest at 127.0.0.1:5672).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import aio_pika
from aio_pika.abc import AbstractExchange
from faststream.rabbit import RabbitBroker, RabbitExchange

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.rabbitmq import RabbitMQEventRoute, RabbitMQProducer

__all__ = ["run"]

_CONCURRENT = 200
_BATCHES = 4
_MANY = 4000


async def run() -> list[Row]:
    """Measure; one row per contestant."""
    url = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/")
    name = f"bench{secrets.token_hex(4)}"
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    exchange = await channel.declare_exchange(name, "direct", auto_delete=True)
    # Ten messages long: what is measured is publishing, not a queue that grows.
    queue = await channel.declare_queue(name, auto_delete=True, arguments={"x-max-length": 10})
    await queue.bind(exchange, "placed")
    try:
        return await _measure(url, name, exchange)
    finally:
        await queue.delete(if_unused=False, if_empty=False)
        await connection.close()


async def _measure(url: str, name: str, exchange: AbstractExchange) -> list[Row]:
    class Placed(EventBase):
        __route__ = RabbitMQEventRoute(exchange=name, routing_key="placed")
        __event_type__ = "shop.order.placed"

        order_id: int
        customer: str
        total: float

    events = [Placed(order_id=number, customer="anna", total=9.5) for number in range(_MANY)]
    faststream = RabbitBroker(url, logger=None)
    fast_exchange = RabbitExchange(name, auto_delete=True, declare=False)
    async with (
        faststream,
        connect(url) as managed,
        connect(url, cloudevents=False) as plain,
    ):
        bare = EventEmitter(RabbitMQProducer([exchange]))

        async def raw(event: Placed) -> None:
            await exchange.publish(_raw_message(event, _identity(event)), "placed")

        async def raw_plain(event: Placed) -> None:
            await exchange.publish(_raw_message(event, None), "placed")

        async def fast(event: Placed) -> None:
            await faststream.publish(
                event, exchange=fast_exchange, routing_key="placed", headers=_identity(event), persist=True
            )

        async def raw_many() -> None:
            for start in range(0, _MANY, 1000):
                await asyncio.gather(*(raw(event) for event in events[start : start + 1000]))

        times = await interleaved(
            {
                "raw": _concurrent(raw, events),
                "ours": _concurrent(managed.emit, events),
                "raw plain": _concurrent(raw_plain, events),
                "ours plain": _concurrent(plain.emit, events),
                "bare": _concurrent(bare.emit, events),
                "faststream": _concurrent(fast, events),
                "raw many": raw_many,
                "ours many": lambda: managed.emit_many(events),
            }
        )
    rate = _CONCURRENT * _BATCHES / sorted(times["raw"])[len(times["raw"]) // 2]
    note = f"raw: {rate:,.0f}/s"
    what = f"RabbitMQ, {_CONCURRENT} concurrent confirmed emits"
    return [
        Row(what=what, measured=ratio(times, "ours", "raw"), unit="x", reach=">= 1.2", note=note),
        Row(
            what=f"{what}, no identity headers",
            measured=ratio(times, "ours plain", "raw plain"),
            unit="x",
            reach=">= 1.2",
        ),
        Row(what=f"{what}, exchange of the user's", measured=ratio(times, "bare", "raw plain"), unit="x"),
        Row(what=f"{what}, FastStream", measured=ratio(times, "faststream", "raw"), unit="x", note="elsewhere 0.8"),
        Row(what=f"RabbitMQ, emit_many of {_MANY:,}", measured=ratio(times, "ours many", "raw many"), unit="x"),
    ]


def _concurrent(publish: Callable[[Any], Awaitable[object]], events: list[Any]) -> Callable[[], Awaitable[None]]:
    async def contestant() -> None:
        for batch in range(_BATCHES):
            start = batch * _CONCURRENT
            await asyncio.gather(*(publish(event) for event in events[start : start + _CONCURRENT]))

    return contestant


def _identity(event: Any) -> dict[str, Any]:
    """The headers that our managed emitter adds."""
    return {
        "cloudEvents_specversion": "1.0",
        "cloudEvents_type": "shop.order.placed",
        "cloudEvents_source": "/benchmarks",
        "cloudEvents_id": secrets.token_hex(16),
        "cloudEvents_time": datetime.now(UTC).isoformat(),
    }


def _raw_message(event: Any, headers: dict[str, Any] | None) -> aio_pika.Message:
    return aio_pika.Message(
        json.dumps(event.model_dump(mode="json")).encode(),
        headers=headers,
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


if __name__ == "__main__":
    for row in asyncio.run(run()):
        print(f"{row.what:70} {row.measured:6.2f} {row.unit:3} {row.reach:8} {row.note}")
