"""Real servers as real processes: what a deployment can rely on."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import cast

import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from redis.asyncio import Redis

from tests.support.brokers import free_port
from tests.support.servers import Server, Shop, serving

UVICORN = ["uvicorn", "{app}", "--host", "127.0.0.1", "--port", "{port}"]
WORKERS = [*UVICORN, "--workers", "2"]
GUNICORN = ["gunicorn", "{app}", "--bind", "127.0.0.1:{port}", "--workers", "2", "--no-control-socket"]
UVICORN_WORKER = [*GUNICORN, "--worker-class", "uvicorn_worker.UvicornWorker"]
ASGI_WORKER = [*GUNICORN, "--worker-class", "asgi"]

every_server = pytest.mark.parametrize(
    "command",
    [UVICORN, WORKERS, UVICORN_WORKER, ASGI_WORKER],
    ids=["uvicorn", "uvicorn --workers 2", "gunicorn with uvicorn's worker", "gunicorn's own worker"],
)


def serving_app(
    command: list[str], app: str, directory: Path, *, broker: str, stream: str, startup_timeout: float = 20
) -> AbstractAsyncContextManager[Server]:
    environment = {
        "TEST_BROKER": broker,
        "TEST_STREAM": stream,
        "TEST_STARTUP_TIMEOUT": str(startup_timeout),
    }
    arguments = [argument.replace("{app}", app) for argument in command]
    return serving([sys.executable, "-m", *arguments], directory, environment)


@pytest.fixture
async def redis(redis_url: str, unique: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        await client.delete(unique)


async def arrived(redis: Redis, stream: str) -> set[int]:
    """The orders in the stream."""
    entries = cast("list[tuple[str, dict[str, str]]]", await redis.xrange(stream))
    return {json.loads(fields["data"])["number"] for _, fields in entries}


@every_server
async def test_no_event_of_an_answered_request_is_lost(
    command: list[str], redis: Redis, redis_url: str, unique: str, tmp_path: Path
) -> None:
    """The first event arrives, 200 at a time arrive, and a deployment in the middle of the load loses none.

    A third of the orders is awaited, a third emitted by `def` routes, a third by background tasks after the answer.
    """
    async with serving_app(command, "tests.apps.orders:app", tmp_path, broker=redis_url, stream=unique) as server:
        shop = Shop(server)
        await shop.place_first("awaited")
        assert await arrived(redis, unique) == shop.placed, "the first event"

        before = len(shop.placed)
        ways = ["awaited", "threaded"] * 100
        await asyncio.gather(*(shop.place(way) for way in ways))
        assert await arrived(redis, unique) == shop.placed, "200 at a time"
        assert (len(shop.placed), shop.failed) == (before + 200, [])

        await terminate_under_load(server, shop)
        lost = shop.placed - await arrived(redis, unique)
        assert lost == set(), "SIGTERM under load"


@pytest.mark.parametrize("app", ["app", "raw"], ids=["emitter_lifespan", "EmitterMiddleware"])
async def test_no_event_is_lost_with_kafka_either(app: str, kafka_url: str, unique: str, tmp_path: Path) -> None:
    """aiokafka keeps messages back to send them together: the shutdown has to wait for them."""
    async with serving_app(UVICORN, f"tests.apps.orders:{app}", tmp_path, broker=kafka_url, stream=unique) as server:
        shop = Shop(server)
        await shop.place_first("awaited")
        await terminate_under_load(server, shop)
    async with AIOKafkaConsumer(
        unique, bootstrap_servers=kafka_url.removeprefix("kafka://"), auto_offset_reset="earliest"
    ) as consumer:
        missing = set(shop.placed)
        async with asyncio.timeout(20):
            async for message in consumer:
                missing.discard(json.loads(message.value or b"")["number"])
                if not missing:
                    break


async def terminate_under_load(server: Server, shop: Shop) -> None:
    """SIGTERM while many orders are being placed; returns when the server has ended."""
    enough = len(shop.placed) + 400
    ways = ["awaited", "threaded", "later"] * 8
    load = [asyncio.create_task(shop.place_until_closed(way)) for way in ways]
    await shop.wait_for(enough)
    server.terminate()
    await asyncio.wait_for(asyncio.gather(*load), 20)
    await server.exit_code(20)
    assert shop.failed == [], server.output()
    assert "abandoned" not in server.output()


@pytest.mark.parametrize(
    ("command", "app"),
    [
        (UVICORN, "app"),
        (UVICORN, "raw"),
        (UVICORN_WORKER, "app"),
    ],
    ids=[
        "uvicorn, emitter_lifespan",
        "uvicorn, EmitterMiddleware",
        "gunicorn with uvicorn's worker, emitter_lifespan",
    ],
)
async def test_a_broker_that_is_down_ends_the_server_with_a_message(
    command: list[str], app: str, tmp_path: Path, unique: str
) -> None:
    """An app that serves with nothing started loses every event; the operator reads which broker is down."""
    address = f"127.0.0.1:{free_port()}"
    broker = f"redis://app:hunter2@{address}/0"
    async with serving_app(
        command, f"tests.apps.orders:{app}", tmp_path, broker=broker, stream=unique, startup_timeout=0.3
    ) as server:
        code = await server.exit_code(20)
        told = server.output()
    assert f"broker 'default': redis://{address}/0" in told
    assert "not connected within startup_timeout=0.3 s" in told
    assert "hunter2" not in told
    # (Under `uvicorn --workers` the server ends as well, but its supervisor gives 0, whatever the workers' reason.)
    assert code != 0
