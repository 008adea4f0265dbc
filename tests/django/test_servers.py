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
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from urllib.parse import urlsplit

import aio_pika
import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from redis.asyncio import Redis

from dispytch_integrations.django import emit
from dispytch_integrations.django.testing import override_brokers
from dispytch_integrations.errors import ConfigurationError
from tests.django.project.shop.events import OrderPlaced
from tests.support.proxy import TCPProxy
from tests.support.servers import ROOT, Server, Shop, serving

SETTINGS = """
from django.core.servers.basehttp import WSGIServer

from tests.django.project.settings import *

for _database in DATABASES.values():
    # Two hundred requests write at once: they take turns.
    _database["OPTIONS"] = {
        "timeout": 20,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF",
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
    *PYTHON, "celery", "--app", "tests.django.project.celery", "worker", "--pool", "prefork", "--concurrency", "12",
    "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO",
]  # fmt: skip

needs_uwsgi = pytest.mark.skipif(not Path(UWSGI[0]).exists(), reason="uWSGI is not installed: pip install pyuwsgi")
TOLD_BY_PROC = Path("/proc/net/tcp").exists()
needs_proc = pytest.mark.skipif(not TOLD_BY_PROC, reason="only Linux tells what a process has open")


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


Entries = list[tuple[str, list[tuple[str, dict[str, str]]]]]
"""What Redis gives of several streams: the name of each, and its entries' ids and fields."""


class Arrivals:
    """The orders that have arrived at a broker."""

    def __init__(self, numbers: AsyncIterator[int]) -> None:
        self._numbers = numbers
        self.seen: set[int] = set()

    async def missing(self, placed: set[int]) -> set[int]:
        """Those of `placed` that have not arrived, and do not in twenty seconds."""
        try:
            async with asyncio.timeout(20):
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
            got = cast("Entries", await redis.xread({unique: last}, block=1000))
            for _, entries in got or []:
                for entry, fields in entries:
                    last = entry
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
        # One that does not wait for its events ends meanwhile.
        await ended_within(0.7, server)
        await slow.resume()
    await asyncio.wait_for(asyncio.gather(*load), 20)
    await server.exit_code(20)
    assert shop.failed == [], server.output()


async def ended_within(seconds: float, server: Server) -> None:
    """Wait for the server's end, but no longer than so many seconds."""
    await asyncio.wait({asyncio.create_task(server.process.wait())}, timeout=seconds)


@needs_proc
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(RUNSERVER, id="runserver"),
        pytest.param(GUNICORN, id="gunicorn"),
        pytest.param(PRELOAD, id="gunicorn --preload"),
        pytest.param(UVICORN_WORKERS, id="uvicorn --workers 2"),
        pytest.param(UWSGI, id="uwsgi", marks=needs_uwsgi),
    ],
)
async def test_the_master_has_neither_thread_nor_connection(
    command: Sequence[str], stream: Arrivals, slow: TCPProxy, redis_url: str, unique: str, folder: Path
) -> None:
    """A thread does not survive the fork, and a connection that two processes share mixes up their answers."""
    async with serving_project(command, folder, broker=url_of(slow, redis_url), name=unique) as server:
        shop = Shop(server)
        await shop.place_first("emit")
        assert await stream.missing(shop.placed) == set()
        worker = json.loads(await shop.get_first("/process"))["pid"]
        assert worker != server.process.pid
        assert (server.threads, server.connections_to(slow.port)) == (1, 0)


@pytest.mark.parametrize(
    ("command", "loops"),
    [pytest.param([*GTHREAD, "--workers", "1"], 0, id="gunicorn gthread"), pytest.param(UVICORN, 1, id="uvicorn")],
)
async def test_parallel_first_requests_share_one_start(
    command: Sequence[str], loops: int, stream: Arrivals, slow: TCPProxy, redis_url: str, unique: str, folder: Path
) -> None:
    """A process holds one event loop in one thread and one connection, however many requests find it without.

    A server with our lifespan has them before the first request, the others from the first event on.
    """
    async with serving_project(command, folder, broker=url_of(slow, redis_url), name=unique) as server:
        shop = Shop(server)
        assert threads_in(await shop.get_first("/process")).count("dispytch loop") == loops
        await place_at_once(shop, 40)
        assert await stream.missing(shop.placed) == set()
        threads = threads_in(await shop.get_first("/process"))
        assert [name for name in threads if name.startswith("dispytch")] == [
            "dispytch hand-off",
            "dispytch loop",
            "dispytch signals",
        ]
        assert slow.accepted == 1


def threads_in(page: bytes) -> list[str]:
    return cast("list[str]", json.loads(page)["threads"])


@pytest.mark.parametrize(
    ("command", "warnings"),
    [
        pytest.param(UVICORN, 0, id="uvicorn, our application"),
        pytest.param(UVICORN_PLAIN, 1, id="uvicorn, Django's application"),
        pytest.param(DAPHNE, 1, id="daphne"),
    ],
)
async def test_an_asgi_server_without_our_lifespan_is_told_of_once(
    command: Sequence[str], warnings: int, stream: Arrivals, redis_url: str, unique: str, folder: Path
) -> None:
    """The log says what is wrong, and is not filled with it; events arrive all the same."""
    async with serving_project(command, folder, broker=redis_url, name=unique) as server:
        shop = Shop(server)
        await shop.place_first("aemit")
        await place_at_once(shop, 8)
        assert await stream.missing(shop.placed) == set()
        assert server.output().count("runs no lifespan of dispytch") == warnings, server.output()


async def test_a_broker_that_hangs_does_not_keep_the_worker(
    redis: Redis, slow: TCPProxy, redis_url: str, unique: str, folder: Path
) -> None:
    """A deployment goes on during an outage; the log names each event that was committed and not delivered."""
    with (folder / "server_settings.py").open("a") as settings:
        settings.write('DISPYTCH["default"]["TIMEOUT"] = 1\n')
    async with serving_project(GUNICORN, folder, broker=url_of(slow, redis_url), name=unique) as server:
        shop = Shop(server)
        await shop.place_first("emit")
        await slow.stall()
        before = set(shop.placed)
        await asyncio.gather(*(shop.place("commit") for _ in range(10)))
        server.terminate()
        await server.exit_code(20)
        told = server.output().count("was not delivered after its transaction was committed")
        assert (len(shop.placed - before), told) == (10, 10), server.output()


async def test_a_reload_of_the_code_loses_no_event(
    stream: Arrivals, slow: TCPProxy, redis_url: str, unique: str, folder: Path
) -> None:
    """Who saves a file a moment after a request would look for the event in vain, and for a bug that is not there."""
    async with serving_project(RUNSERVER, folder, broker=url_of(slow, redis_url), name=unique) as server:
        shop = Shop(server)
        await shop.place_first("commit")
        first = json.loads(await shop.get_first("/process"))["pid"]
        await slow.stall()
        await asyncio.gather(*(shop.place("commit") for _ in range(20)))
        os.utime(folder / "server_settings.py")
        await server.wait_for_output("changed, reloading")
        await slow.resume()
        assert await stream.missing(shop.placed) == set(), server.output()
        async with asyncio.timeout(20):
            while json.loads(await shop.get_first("/process"))["pid"] == first:
                pass
        await shop.place_first("commit")
        assert await stream.missing(shop.placed) == set(), server.output()


def test_uwsgi_without_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its older versions stop all threads between requests: events would wait in the process for the next request."""
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(has_threads=0))
    with override_brokers("memory"), pytest.raises(ConfigurationError, match="start uWSGI with --enable-threads"):
        emit(OrderPlaced(number=1))
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(has_threads=1))
    with override_brokers("memory"):
        emit(OrderPlaced(number=1))


async def test_no_event_is_lost_with_kafka_either(kafka_url: str, unique: str, folder: Path) -> None:
    """aiokafka keeps messages back to send them together, and its library is loaded before the fork."""
    async with serving_project(PRELOAD, folder, broker=kafka_url, name=unique) as server:
        shop = Shop(server)
        await shop.place_first("emit")
        servers = kafka_url.removeprefix("kafka://")
        async with AIOKafkaConsumer(unique, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:

            async def numbers() -> AsyncIterator[int]:
                async for message in consumer:
                    yield number_of(message.value or b"")

            topic = Arrivals(numbers())
            await place_at_once(shop, 200)
            assert await topic.missing(shop.placed) == set()
            await end_under_load(server, shop, signal.SIGTERM, None)
            assert await topic.missing(shop.placed) == set(), server.output()


async def test_no_event_is_lost_with_rabbitmq_either(rabbitmq_url: str, unique: str, folder: Path) -> None:
    """Confirms of RabbitMQ come one by one: the shutdown waits for the last."""
    address = urlsplit(rabbitmq_url)
    connection = await aio_pika.connect(rabbitmq_url)
    async with connection, TCPProxy(address.hostname or "127.0.0.1", address.port or 5672) as slow:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(unique, auto_delete=True)
        queue = await channel.declare_queue(unique, exclusive=True)
        await queue.bind(exchange, "placed")

        async def numbers() -> AsyncIterator[int]:
            async with queue.iterator(no_ack=True) as messages:
                async for message in messages:
                    yield number_of(message.body)

        arrivals = Arrivals(numbers())
        broker = address._replace(netloc=f"{address.username}:{address.password}@{slow.host}:{slow.port}").geturl()
        async with serving_project(UVICORN_WORKERS, folder, broker=broker, name=unique) as server:
            shop = Shop(server)
            await shop.place_first("commit")
            await place_at_once(shop, 200)
            assert await arrivals.missing(shop.placed) == set()
            await end_under_load(server, shop, signal.SIGTERM, slow)
            assert await arrivals.missing(shop.placed) == set(), server.output()


async def test_migrate_opens_no_connection(slow: TCPProxy, redis_url: str, unique: str, tmp_path: Path) -> None:
    """Migrations run where no broker can be reached: in builds, and in jobs before a deployment."""
    (tmp_path / "server_settings.py").write_text(SETTINGS)
    command = [*PYTHON, "django", "migrate", "--verbosity", "0"]
    async with serving_project(command, tmp_path, broker=url_of(slow, redis_url), name=unique) as migration:
        assert await migration.exit_code(40) == 0, migration.output()
    assert slow.accepted == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("options", [(), ("--max-tasks-per-child", "1")], ids=["celery", "celery, a process per task"])
async def test_no_event_of_a_celery_task_that_has_committed_is_lost(
    options: Sequence[str], stream: Arrivals, slow: TCPProxy, redis_url: str, unique: str, folder: Path
) -> None:
    """A child of the prefork pool ends without exit functions, and with it what was left to its event loop.

    The first event arrives, those of eight tasks at a time do, and SIGTERM while the broker hangs loses none.
    (Twelve children: Celery takes up to five seconds to replace one that has ended.)
    """
    environment = {"CELERY_BROKER": redis_url}
    async with serving_project(
        [*CELERY, *options], folder, broker=url_of(slow, redis_url), name=unique, **environment
    ) as worker:
        tasks = TaskQueue(redis_url, unique)
        await tasks.place(1)
        assert await stream.missing({1}) == set(), worker.output()
        assert not TOLD_BY_PROC or worker.connections_to(slow.port) == 0
        await tasks.place(*range(2, 10))
        assert await stream.missing(set(range(2, 10))) == set(), worker.output()

        await slow.stall()
        await tasks.place(10, 11)
        await worker.wait_for_output("succeeded in", times=10)
        worker.terminate()
        # A child sleeps for a second at its end, in which what was left to its event loop may still go out.
        await ended_within(2, worker)
        await slow.resume()
        # A child whose last result the parent has not read yet waits half a minute for it, before it ends.
        await worker.exit_code(45)
        assert await stream.missing(committed_in(folder)) == set(), worker.output()


class TaskQueue:
    """Where the worker finds its tasks."""

    def __init__(self, redis_url: str, prefix: str) -> None:
        from celery import Celery

        self._app = Celery(broker=redis_url, set_as_current=False)
        self._app.conf.broker_transport_options = {"global_keyprefix": prefix}

    async def place(self, *numbers: int) -> None:
        def send() -> None:
            with self._app.connection_for_write() as connection:
                for number in numbers:
                    self._app.send_task("place", [number], connection=connection)

        await asyncio.to_thread(send)


def committed_in(folder: Path) -> set[int]:
    """The orders in the database."""
    with closing(sqlite3.connect(folder / "default.sqlite3", timeout=20)) as database:
        rows = database.execute("SELECT customer FROM shop_order").fetchall()
    return {int(customer.removeprefix("customer ")) for (customer,) in rows}
