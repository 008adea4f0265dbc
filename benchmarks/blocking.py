"""The blocking bridge: threads that emit to Redis, beside a synchronous redis-py client for each of them."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
from collections.abc import Callable
from typing import Any

import redis

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase
from dispytch_integrations._blocking_calls import Calls
from dispytch_integrations.blocking import BlockingEmitter, connect_blocking
from dispytch_integrations.redis import RedisEventRoute
from tests.support.brokers import Redis

THREADS, EVENTS, ALONE = 8, 250, 500
PAYLOAD = b'{"order_id":12345,"customer":"someone@example.org","total":"99.90"}'


class OrderPlaced(EventBase):
    __route__ = RedisEventRoute(channel="bench.blocking")

    order_id: int = 12345
    customer: str = "someone@example.org"
    total: str = "99.90"


async def run() -> list[Row]:
    """The rows of the table."""
    with Redis() as broker:
        url = os.environ.get("REDIS_URL", broker.url)
        # In a thread of its own: the bridge refuses to block a running event loop.
        return await asyncio.to_thread(_measure, url)


def _measure(url: str) -> list[Row]:
    clients = [redis.Redis.from_url(url) for _ in range(THREADS)]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with connect_blocking(url) as emitter:
        contestants = {
            "emit from threads": _threads(lambda number: _emit(emitter, EVENTS)),
            "redis-py in threads": _threads(lambda number: _publish(clients[number], EVENTS)),
            "emit": _threads(lambda number: _emit(emitter, ALONE), threads=1),
            "redis-py": _threads(lambda number: _publish(clients[number], ALONE), threads=1),
            "emit_many": _threads(lambda number: emitter.emit_many([OrderPlaced()] * ALONE), threads=1),
            "run_coroutine_threadsafe": _threads(lambda number: _hand_over(loop, ALONE), threads=1),
            "bridge": _threads(lambda number: _bridge(Calls(loop), ALONE), threads=1),
        }
        times = asyncio.run(interleaved(contestants))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    for client in clients:
        client.close()

    def each(name: str, events: int = ALONE) -> float:
        return statistics.median(times[name]) / events * 1e6

    rate = f"{1e6 / each('emit from threads', THREADS * EVENTS):,.0f} events/s"
    return [
        Row(
            what=f"blocking: {THREADS} threads emit to Redis, to one redis-py client each",
            measured=ratio(times, "emit from threads", "redis-py in threads"),
            unit="x",
            reach=">= 1",
            note=rate,
        ),
        Row(
            what="blocking: emit_many of 500, to 500 times redis-py",
            measured=ratio(times, "emit_many", "redis-py"),
            unit="x",
        ),
        Row(
            what="blocking: one emit alone to Redis",
            measured=each("emit"),
            unit="us",
            note=f"redis-py {each('redis-py'):.0f} us",
        ),
        Row(
            what="blocking: the bridge alone (a coroutine that does nothing)",
            measured=each("bridge"),
            unit="us",
            note=f"run_coroutine_threadsafe().result() {each('run_coroutine_threadsafe'):.0f} us",
        ),
    ]


def _threads(work: Callable[[int], object], *, threads: int = THREADS) -> Callable[[], Any]:
    """`work(number)` in so many threads at once, as `interleaved` wants it."""

    async def contestant() -> None:
        running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    return contestant


def _emit(emitter: BlockingEmitter, count: int) -> None:
    for _ in range(count):
        emitter.emit(OrderPlaced())


def _publish(client: redis.Redis, count: int) -> None:
    for _ in range(count):
        client.publish("bench.blocking", PAYLOAD)


def _hand_over(loop: asyncio.AbstractEventLoop, count: int) -> None:
    for _ in range(count):
        asyncio.run_coroutine_threadsafe(_nothing(), loop).result()


def _bridge(calls: Calls, count: int) -> None:
    for _ in range(count):
        calls.run(_nothing, limit=5.0)


async def _nothing() -> None:
    return
