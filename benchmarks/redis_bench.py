"""Redis: emit alone, concurrent emits and emit_many, beside redis.asyncio and FastStream, on pub/sub and streams."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from faststream.redis import RedisBroker
from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase, connect
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from tests.support.brokers import Redis as Server

CONCURRENT, ALONE, MANY = 500, 200, 5000
CHANNEL, STREAM = "bench", "bench-stream"


class Published(EventBase):
    __route__ = RedisEventRoute(channel=CHANNEL)

    user_id: str
    value: int


class Added(EventBase):
    __route__ = RedisStreamEventRoute(stream=STREAM, maxlen=1000)

    user_id: str
    value: int


EVENT, STREAMED = Published(user_id="abc123", value=3), Added(user_id="abc123", value=3)
BODY: Any = {"user_id": "abc123", "value": 3}
PAYLOAD = b'{"user_id":"abc123","value":3}'


def concurrently(one: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    async def run() -> None:
        await asyncio.gather(*(one() for _ in range(CONCURRENT)))

    return run


def one_by_one(one: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    async def run() -> None:
        for _ in range(ALONE):
            await one()

    return run


async def run() -> list[Row]:
    """Measure everything against a Redis of our own (or REDIS_URL)."""
    logging.getLogger("dispytch_integrations.redis").setLevel(logging.ERROR)  # Nobody listens, on purpose.
    async with _server() as url:
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(url)
        raw = Redis(connection_pool=pool)
        # With its default of 100, 400 of the 500 fail.
        fast = RedisBroker(url, max_connections=CONCURRENT)
        await fast.connect()
        async with connect(url) as emitter, connect(url, cloudevents=False) as plain:

            async def raw_pipeline() -> None:
                async with raw.pipeline(transaction=False) as pipeline:
                    for _ in range(MANY):
                        pipeline.publish(CHANNEL, PAYLOAD)
                    await pipeline.execute()

            def raw_publish() -> Awaitable[object]:
                return raw.publish(CHANNEL, PAYLOAD)

            def raw_add() -> Awaitable[object]:
                return raw.xadd(STREAM, {"data": PAYLOAD}, maxlen=1000)

            concurrent = await interleaved(
                {
                    "raw": concurrently(raw_publish),
                    "emit": concurrently(lambda: emitter.emit(EVENT)),
                    "faststream": concurrently(lambda: fast.publish(BODY, CHANNEL)),
                }
            )
            alone = await interleaved(
                {
                    "raw": one_by_one(raw_publish),
                    "emit": one_by_one(lambda: emitter.emit(EVENT)),
                    "faststream": one_by_one(lambda: fast.publish(BODY, CHANNEL)),
                }
            )
            many = await interleaved({"raw": raw_pipeline, "emit_many": lambda: emitter.emit_many([EVENT] * MANY)})
            streams = await interleaved(
                {
                    "raw": concurrently(raw_add),
                    "off": concurrently(lambda: plain.emit(STREAMED)),
                    "on": concurrently(lambda: emitter.emit(STREAMED)),
                }
            )
        await fast.stop()
        await raw.delete(STREAM)
        await pool.aclose()
    rate = CONCURRENT / sorted(concurrent["emit"])[len(concurrent["emit"]) // 2]
    return [
        Row(
            what=f"Redis pub/sub, {CONCURRENT} concurrent emits / raw publish, blocking pool",
            measured=ratio(concurrent, "emit", "raw"),
            unit="x",
            reach=">= 3",
            note=f"{rate / 1000:.1f} k/s",
        ),
        Row(
            what=f"  FastStream, {CONCURRENT} concurrent",
            measured=ratio(concurrent, "faststream", "raw"),
            unit="x",
            note="with max_connections=500; by default 400 of them fail",
        ),
        Row(
            what="Redis pub/sub, emit alone / raw publish",
            measured=ratio(alone, "emit", "raw"),
            unit="x",
            reach=">= 0.9",
        ),
        Row(what="  FastStream, alone", measured=ratio(alone, "faststream", "raw"), unit="x"),
        Row(
            what=f"Redis pub/sub, emit_many of {MANY} / one raw pipeline of {MANY}",
            measured=ratio(many, "emit_many", "raw"),
            unit="x",
        ),
        Row(
            what=f"Redis streams, {CONCURRENT} concurrent emits / raw xadd, identity headers off",
            measured=ratio(streams, "off", "raw"),
            unit="x",
        ),
        Row(
            what=f"Redis streams, {CONCURRENT} concurrent emits / raw xadd of the body alone, identity headers on",
            measured=ratio(streams, "on", "raw"),
            unit="x",
            note="six more fields per entry",
        ),
    ]


@asynccontextmanager
async def _server() -> AsyncGenerator[str, None]:
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
        return
    server = Server()
    await asyncio.to_thread(server.start)
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.close)
