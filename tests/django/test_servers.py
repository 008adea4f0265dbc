"""Django under real servers, each a real process: what a deployment can rely on.

Brokers are real. Between servers and Redis stands a proxy that makes Redis hang on demand, so that events of answered
requests are in flight whenever a test wants them to be.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import aio_pika
import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from redis.asyncio import Redis

from tests.support.proxy import TCPProxy
from tests.support.servers import ROOT, Server, Shop, serving

SETTINGS = """
from django.core.servers.basehttp import WSGIServer

from tests.django.project.settings import *

for _database in DATABASES.values():
    # Two hundred requests write at once: they take turns.
    _database["OPTIONS"] = {
        "timeout": 20, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF",
    }
# The queue of runserver takes ten connections; the kernel would drop the others, which come again after seconds.
WSGIServer.request_queue_size = 256
"""

PYTHON = [sys.executable, "-m"]
RUNSERVER = [*PYTHON, "django", "runserver", "127.0.0.1:{port}"]
NORELOAD = [*RUNSERVER, "--noreload"]
GUNICORN = [
    *PYTHON, "gunicorn", "tests.django.project.wsgi", "--bind", "127.0.0.1:{port}", "--workers", "2",
    "--no-control-socket",
]  # fmt: skip
GTHREAD = [*GUNICORN, "--worker-class", "gthread", "--threads", "8"]
PRELOAD = [*GUNICORN, "--preload"]
UVICORN = [*PYTHON, "uvicorn", "tests.django.project.asgi:application", "--host", "127.0.0.1", "--port", "{port}"]
UVICORN_PLAIN = [argument.replace(":application", ":plain") for argument in UVICORN]
UVICORN_WORKERS = [*UVICORN, "--workers", "2"]
DAPHNE = [*PYTHON, "daphne", "tests.django.project.asgi:application", "--port", "{port}"]
UWSGI = [
    str(Path(sys.executable).with_name("uwsgi")), "--http-socket", "127.0.0.1:{port}", "--listen", "100",
    "--module", "tests.django.project.wsgi", "--need-app", "--master", "--processes", "2", "--enable-threads",
    # SIGTERM kills requests, and then uWSGI runs no exit functions, unless told to wait for them:
    "--hook-master-start", "unix_signal:15 gracefully_kill_them_all",
]  # fmt: skip
UWSGI_THREADS = [*UWSGI, "--threads", "8"]
CELERY = [
    *PYTHON, "celery", "--app", "tests.django.project.celery", "worker", "--pool", "prefork", "--concurrency", "8",
    "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO",
]  # fmt: skip

needs_uwsgi = pytest.mark.skipif(not Path(UWSGI[0]).exists(), reason="uWSGI is not installed: pip install pyuwsgi")
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux tells what a process has open")


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database to copy."""
    folder = tmp_path_factory.mktemp("migrated")
    (folder / "server_settings.py").write_text(SETTINGS)
    environment = {**os.environ, **in_folder(folder)}
    command = [*PYTHON, "django", "migrate", "--verbosity", "0"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60)
    return folder


@pytest.fixture
def folder(migrated: Path, tmp_path: Path) -> Path:
    """A folder with the settings and a database, for this test alone."""
    for file in (migrated / "server_settings.py", migrated / "default.sqlite3"):
        shutil.copy(file, tmp_path)
    return tmp_path


def in_folder(folder: Path) -> dict[str, str]:
    """The environment of the project whose settings and databases are in `folder`."""
    return {
        "DJANGO_SETTINGS_MODULE": "server_settings",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "TEST_FOLDER": str(folder),
    }


def serving_project(
    command: Sequence[str], folder: Path, *, broker: str, name: str, **environment: str
) -> AbstractAsyncContextManager[Server]:
    """Serve the project; its events go to `broker`, to what is called `name` there."""
    return serving(command, folder, {**in_folder(folder), "TEST_BROKER": broker, "TEST_NAME": name, **environment})


class Arrivals:
    """The orders that have arrived at a broker."""

    def __init__(self, numbers: AsyncIterator[int]) -> None:
        self._numbers = numbers
        self.seen: set[int] = set()

    async def missing(self, placed: set[int]) -> set[int]:
        """Those of `placed` that have not arrived, and do not in ten seconds."""
        try:
            async with asyncio.timeout(10):
                while not placed <= self.seen:
                    self.seen.add(await anext(self._numbers))
        except TimeoutError:
            pass
        return placed - self.seen


@pytest.fixture
async def redis(redis_url: str, unique: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        keys = [key async for key in client.scan_iter(match=f"{unique}*")]
        if keys:
            await client.delete(*keys)


@pytest.fixture
async def slow(redis_url: str) -> AsyncIterator[TCPProxy]:
    """What stands between a server and Redis."""
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        yield proxy


@pytest.fixture
def stream(redis: Redis, unique: str) -> Arrivals:
    """What arrives in the Redis stream."""

    async def numbers() -> AsyncIterator[int]:
        last = "0"
        while True:
            got = cast(
                "list[tuple[str, list[tuple[str, dict[str, str]]]]]", await redis.xread({unique: last}, block=1000)
            )
            for _, entries in got or []:
                for last, fields in entries:
                    yield number_of(fields["data"])

    return Arrivals(numbers())


def number_of(body: str | bytes) -> int:
    return cast("int", json.loads(body)["number"])


def url_of(proxy: TCPProxy, redis_url: str) -> str:
    return f"redis://{proxy.host}:{proxy.port}{urlsplit(redis_url).path}"


@pytest.mark.parametrize(
    ("command", "end"),
    [
        pytest.param(RUNSERVER, None, id="runserver"),
        pytest.param(NORELOAD, signal.SIGINT, id="runserver --noreload"),
        pytest.param(GUNICORN, signal.SIGTERM, id="gunicorn"),
        pytest.param(GTHREAD, signal.SIGTERM, id="gunicorn gthread"),
        pytest.param(PRELOAD, signal.SIGTERM, id="gunicorn --preload"),
        pytest.param(UVICORN, signal.SIGTERM, id="uvicorn"),
        pytest.param(UVICORN_WORKERS, signal.SIGTERM, id="uvicorn --workers 2"),
        pytest.param(DAPHNE, signal.SIGTERM, id="daphne"),
        pytest.param(UWSGI, signal.SIGTERM, id="uwsgi", marks=needs_uwsgi),
        pytest.param(UWSGI_THREADS, signal.SIGTERM, id="uwsgi --threads", marks=needs_uwsgi),
    ],
)
async def test_no_event_of_an_answered_request_is_lost(
    command: Sequence[str],
    end: signal.Signals | None,
    stream: Arrivals,
    slow: TCPProxy,
    redis_url: str,
    unique: str,
    folder: Path,
) -> None:
    """The first event arrives, 200 at a time arrive, and a deployment in the middle of the load loses none.

    Except under `runserver`: it dies of SIGTERM at once, and its reloader leaves its child a quarter of a second.
    """
    async with serving_project(command, folder, broker=url_of(slow, redis_url), name=unique) as server:
        shop = Shop(server)
        await shop.place_first("commit")
        assert await stream.missing(shop.placed) == set(), server.output()

        await place_at_once(shop, 200)
        assert await stream.missing(shop.placed) == set()

        if end is not None:
            await end_under_load(server, shop, end, slow)
            assert await stream.missing(shop.placed) == set(), server.output()


async def place_at_once(shop: Shop, count: int) -> None:
    """Place so many orders at a time, in all ways: sync and async views, after the commit or confirmed."""
    before = len(shop.placed)
    ways = ["emit", "aemit", "commit", "acommit"] * (count // 4)
    await asyncio.gather(*(shop.place(way) for way in ways))
    assert (len(shop.placed), shop.failed) == (before + count, [])


async def end_under_load(server: Server, shop: Shop, end: signal.Signals, slow: TCPProxy | None) -> None:
    """Send the signal while many orders are being placed, and are not confirmed yet; return when the server has ended.

    `slow`: hangs from before the signal until after it.
    """
    load = [asyncio.create_task(shop.place_until_closed(way)) for way in ["commit", "acommit"] * 8]
    await shop.wait_for(len(shop.placed) + 50)
    if slow is not None:
        await slow.stall()
        await shop.wait_for(len(shop.placed) + 20)
    server.terminate(end)
    if slow is not None:
        # Some servers close what they listen on when they end, and answer nothing more; others not before.
        await asyncio.wait(load, timeout=0.5)
        await slow.resume()
    await asyncio.wait_for(asyncio.gather(*load), 20)
    await server.exit_code(20)
    assert shop.failed == [], server.output()
