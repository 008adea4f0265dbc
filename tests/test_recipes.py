"""The recipes of docs/frameworks.md as real processes, over a real Redis: what was answered has arrived."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from celery import Celery
from flask import Flask
from litestar import Litestar, post
from litestar.middleware import DefineMiddleware
from litestar.testing import TestClient
from litestar.types import Scope
from redis.asyncio import Redis

from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import NotStartedError, WrongLoopError
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.starlette import EmitterMiddleware, get_emitter
from tests.apps.asgi import Server
from tests.apps.orders import OrderPlaced
from tests.support.proxy import TCPProxy
from tests.support.servers import Shop, serving

RECIPES = "example_projects.recipes"
PYTHON = [sys.executable, "-m"]
UVICORN = [*PYTHON, "uvicorn", "--host", "127.0.0.1", "--port", "{port}"]

GUNICORN = [
    *PYTHON, "gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "--threads", "4", "--no-control-socket",
]  # fmt: skip


CELERY = [
    *PYTHON, "celery", "--app", f"{RECIPES}.celery_app", "worker", "--pool", "prefork", "--concurrency", "2",
    "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO",
]  # fmt: skip


class Orders:
    """The stream of this test alone; `environment`: what sends a recipe's events to it."""

    def __init__(self, client: Redis, url: str, name: str) -> None:
        self._client = client
        self._name = name
        self._stream = f"{name}.orders"
        self.environment = {"DISPYTCH_URL": f"{url}?prefix={name}."}

    async def arrived(self) -> set[int]:
        """The numbers of the orders in the stream."""
        entries = cast("list[tuple[str, dict[str, str]]]", await self._client.xrange(self._stream))
        return {json.loads(fields["data"])["order_id"] for _, fields in entries}

    async def wait_for(self, numbers: set[int]) -> None:
        """Wait until they have arrived."""
        async with asyncio.timeout(20):
            while not numbers <= await self.arrived():
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Remove the stream, and what Celery keeps of a queue of that name."""
        async for key in self._client.scan_iter(f"*{self._name}*", count=1000):
            await self._client.delete(key)


@pytest.fixture
async def orders(redis_url: str, unique: str) -> AsyncIterator[Orders]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        orders = Orders(client, redis_url, unique)
        yield orders
        await orders.close()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([*UVICORN, f"{RECIPES}.litestar_app:app"], id="Litestar, uvicorn"),
        pytest.param(
            [*PYTHON, "flask", "--app", f"{RECIPES}.flask_app", "run", "--port", "{port}"], id="Flask, flask run"
        ),
        pytest.param([*GUNICORN, f"{RECIPES}.flask_app:create_app()"], id="Flask, gunicorn"),
        pytest.param([*GUNICORN, "--preload", f"{RECIPES}.flask_app:create_app()"], id="Flask, gunicorn --preload"),
        pytest.param([*UVICORN, f"{RECIPES}.sqlmodel_app:app"], id="SQLModel, uvicorn"),
        pytest.param([*UVICORN, f"{RECIPES}.dishka_app:app"], id="dishka, uvicorn"),
    ],
)
async def test_no_event_of_an_answered_request_is_lost(command: list[str], orders: Orders, tmp_path: Path) -> None:
    """Who copies a recipe gets what it promises: the first event arrives, and a deployment under load loses none."""
    # As in tests: nothing in a recipe is deprecated.
    environment = {
        **orders.environment,
        "PYTHONWARNINGS": "error",
        "DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path / 'orders.db'}",
    }
    async with serving(command, tmp_path, environment) as server:
        shop = Shop(server)
        await shop.place_first("orders")
        await orders.wait_for(shop.placed)

        load = [asyncio.create_task(shop.place_until_closed("orders")) for _ in range(4)]
        await shop.wait_for(40)
        server.terminate()
        await asyncio.wait_for(asyncio.gather(*load), 20)
        await server.exit_code(20)
        assert shop.failed == [], server.output()
    assert shop.placed - await orders.arrived() == set()


@pytest.fixture
async def to_redis(redis_url: str) -> AsyncIterator[TCPProxy]:
    """A way to the Redis that nobody else takes, so that connections can be counted."""
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "", address.port or 6379) as proxy:
        yield proxy


@pytest.mark.timeout(120)
async def test_celerys_children_connect_by_themselves(
    orders: Orders, to_redis: TCPProxy, redis_url: str, unique: str, tmp_path: Path
) -> None:
    """A connection that was made before the fork would be shared: answers would go to the wrong child.

    Celery's queue is in the same Redis, and has a name of its own.
    """
    address = urlsplit(redis_url)
    through = address._replace(netloc=f"127.0.0.1:{to_redis.port}", query=f"prefix={unique}.").geturl()
    environment = {"DISPYTCH_URL": through, "CELERY_BROKER_URL": redis_url}
    async with serving([*CELERY, "--queues", unique], tmp_path, environment) as worker:
        await place(range(1, 21), redis_url, unique)
        await orders.wait_for(set(range(1, 21)))
        await worker.wait_for_output("succeeded in", times=20)
        async with asyncio.timeout(20):
            while to_redis.accepted < 2:  # A child may have come when all orders were placed.
                await asyncio.sleep(0.05)
        assert to_redis.connections == to_redis.accepted == 2
        if Path("/proc/net/tcp").exists():
            assert worker.connections_to(to_redis.port) == 0, "the parent has none"

        worker.terminate()
        assert await worker.exit_code(40) == 0, worker.output()
        assert "Traceback" not in worker.output()


async def place(numbers: Iterable[int], redis_url: str, queue: str) -> None:
    """Ask the worker for orders."""

    def send() -> None:
        with Celery(broker=redis_url, set_as_current=False) as app, app.connection_for_write() as connection:
            for number in numbers:
                app.send_task(f"{RECIPES}.celery_app.place_order", [number], queue=queue, connection=connection)

    await asyncio.to_thread(send)


# -- what the page says beside the recipes -------------------------------------------------------------------------


async def test_litestars_own_lifespan_may_emit() -> None:
    """The brokers are open before it, and closed after it."""

    @asynccontextmanager
    async def lifespan(site: Litestar) -> AsyncGenerator[None, None]:
        await get_emitter(app).emit(OrderPlaced(number=1))
        yield
        await get_emitter(site).emit(OrderPlaced(number=2))

    app = EmitterMiddleware(Litestar([], lifespan=[lifespan], logging_config=None), "memory://")
    async with Server(app):
        producer = cast("MemoryProducer", get_emitter(app).producer)
    assert [message.payload for message in producer.sent] == [b'{"number":1}', b'{"number":2}']


async def test_among_litestars_middleware_the_emitter_refuses() -> None:
    """Nothing opens it there, and nothing is swallowed."""
    told: list[Exception] = []

    @post("/")
    async def place_order(scope: Scope) -> None:
        with pytest.raises(NotStartedError) as refused:
            await get_emitter(scope).emit(OrderPlaced(number=1))
        told.append(refused.value)

    middleware = DefineMiddleware(cast("Any", EmitterMiddleware), config="memory://")
    app = Litestar([place_order], middleware=[middleware], logging_config=None)
    with TestClient(app) as client:
        assert client.post("/").status_code == 201
    assert "never opened" in str(told[0])


def test_in_an_async_view_of_flask_the_emitter_refuses() -> None:
    """Flask runs an event loop there, which the emit would block."""
    app = Flask(__name__)
    app.testing = True

    with connect_blocking("memory://") as emitter:

        @app.post("/refused")
        async def refused() -> str:
            emitter.emit(OrderPlaced(number=1))
            return ""

        @app.post("/threaded")
        async def threaded() -> str:
            await asyncio.to_thread(emitter.emit, OrderPlaced(number=2))
            return ""

        with pytest.raises(WrongLoopError, match="to_thread"):
            app.test_client().post("/refused")
        assert app.test_client().post("/threaded").status_code == 200
        [message] = cast("MemoryProducer", emitter.producers["default"]).sent
    assert message.payload == b'{"number":2}'
