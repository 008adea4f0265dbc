"""Real servers as real processes: what a deployment can rely on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from redis.asyncio import Redis

from tests.support.brokers import free_port

ROOT = Path(__file__).parent.parent

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


class Server:
    """A server's process. `port`; `output()`: all it has printed; its process group is killed at the end."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def terminate(self) -> None:
        """SIGTERM to the parent alone, as an init system or a container runtime sends it."""
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self, timeout: float) -> int:
        return await asyncio.wait_for(self.process.wait(), timeout)


@asynccontextmanager
async def serving(
    command: list[str], app: str, directory: Path, *, broker: str, stream: str, startup_timeout: float = 20
) -> AsyncGenerator[Server, None]:
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TEST_BROKER": broker,
        "TEST_STREAM": stream,
        "TEST_STARTUP_TIMEOUT": str(startup_timeout),
    }
    arguments = [argument.format(app=app, port=port) for argument in command]
    log = directory / "server.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Server(process, port, log)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()


class Shop:
    """A client that places orders; `placed`: the numbers that were answered with 2xx. `failed`: other answers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._numbers = itertools.count(1)
        self.placed: set[int] = set()
        self.failed: list[int] = []
        self.busy = asyncio.Event()

    async def place(self, way: str) -> None:
        """Place one order, over a connection of its own. Raises OSError when there was no answer."""
        number = next(self._numbers)
        status = await self._post(f"/{way}/{number}")
        if 200 <= status < 300:
            self.placed.add(number)
        else:
            self.failed.append(status)

    async def _post(self, path: str) -> int:
        # By hand: httpx takes ten times as long, and the load is to be on the server.
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            writer.write(
                f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError("closed without an answer")
        return int(answer.split(b" ", 2)[1])

    async def place_first(self) -> None:
        """Place an order as soon as the server answers."""
        while True:
            try:
                await self.place("awaited")
                return
            except OSError:
                if self._server.process.returncode is not None:
                    pytest.fail(f"the server ended:\n{self._server.output()}")
                await asyncio.sleep(0.05)

    async def place_until_closed(self, way: str, enough: int) -> None:
        """Place orders until the server is gone; `busy` is set when there are `enough` of all."""
        while True:
            try:
                await self.place(way)
            except OSError:
                return
            if len(self.placed) >= enough:
                self.busy.set()


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
    async with serving(command, "tests.apps.orders:app", tmp_path, broker=redis_url, stream=unique) as server:
        shop = Shop(server)
        await shop.place_first()
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
    async with serving(UVICORN, f"tests.apps.orders:{app}", tmp_path, broker=kafka_url, stream=unique) as server:
        shop = Shop(server)
        await shop.place_first()
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
    load = [asyncio.create_task(shop.place_until_closed(way, enough)) for way in ways]
    await asyncio.wait_for(shop.busy.wait(), 30)
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
    async with serving(
        command, f"tests.apps.orders:{app}", tmp_path, broker=broker, stream=unique, startup_timeout=0.3
    ) as server:
        code = await server.exit_code(20)
        told = server.output()
    assert f"broker 'default': redis://{address}/0" in told
    assert "not connected within startup_timeout=0.3 s" in told
    assert "hunter2" not in told
    # (Under `uvicorn --workers` the server ends as well, but its supervisor gives 0, whatever the workers' reason.)
    assert code != 0
