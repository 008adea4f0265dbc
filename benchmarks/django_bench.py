"""Django: emit from a sync view, emit_on_commit in a request, threads, and what a process holds in memory."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from benchmarks.harness import Row, interleaved, ratio
from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.redis import RedisEventRoute
from tests.support.brokers import Redis, Tansu

__all__ = ["run"]

THREADS, EVENTS = 8, 250
REQUESTS = 200
CALLS = 20
_KINDS = {"redis": "Redis", "kafka": "Kafka"}


class Published(EventBase):
    """To Redis."""

    __route__ = RedisEventRoute(channel="bench.django")
    order_id: int = 12345
    customer: str = "someone@example.org"


class Recorded(EventBase):
    """To Kafka."""

    __route__ = KafkaEventRoute(topic="bench-django")
    order_id: int = 12345
    customer: str = "someone@example.org"


async def run() -> list[Row]:
    """All rows; a broker of each kind is started unless REDIS_URL or KAFKA_URL names one."""
    with Redis() as redis, Tansu() as kafka, tempfile.TemporaryDirectory() as folder:
        urls = {
            "redis": os.environ.get("REDIS_URL", redis.url),
            "kafka": os.environ.get("KAFKA_URL", kafka.url),
        }
        _configure(urls, Path(folder))
        rows = await asyncio.to_thread(_measure, urls)
        return [*rows, *_memory(urls)]


def _configure(urls: dict[str, str], folder: Path) -> None:
    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY="benchmark",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=["dispytch_integrations.django"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "bench.sqlite3")}},
        DISPYTCH={alias: {"URL": url} for alias, url in urls.items()},
    )
    django.setup()


def __getattr__(name: str) -> Any:
    """`urlpatterns`, once Django is configured."""
    if name != "urlpatterns":
        raise AttributeError(name)
    from django.db import connection, transaction
    from django.http import HttpResponse
    from django.urls import path

    from dispytch_integrations.django import emit_on_commit

    def store() -> None:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE orders SET customer = 'someone'")

    def without(request: Any) -> HttpResponse:
        with transaction.atomic():
            store()
        return HttpResponse()

    def with_event(event: EventBase) -> Callable[[Any], HttpResponse]:
        def view(request: Any) -> HttpResponse:
            with transaction.atomic():
                store()
                emit_on_commit(event.model_copy())
            return HttpResponse()

        return view

    return [
        path("without", without),
        path("redis", with_event(Published())),
        path("kafka", with_event(Recorded())),
    ]


def _measure(urls: dict[str, str]) -> list[Row]:
    return [*_emit_alone(urls), *_requests(), *_threads(urls)]


# -- emit from a sync view -----------------------------------------------------------------------------------------


def _emit_alone(urls: dict[str, str]) -> list[Row]:
    import redis.asyncio
    from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
    from asgiref.sync import async_to_sync

    from dispytch_integrations.django import emit

    async def through_kafka(event: Recorded) -> None:
        async with AIOKafkaProducer(bootstrap_servers=urls["kafka"].removeprefix("kafka://"), acks="all") as client:
            await client.send_and_wait("bench-django", event.model_dump_json().encode())

    async def through_redis(event: Published) -> None:
        async with redis.asyncio.Redis.from_url(urls["redis"]) as client:
            await client.publish("bench.django", event.model_dump_json())

    contestants = {
        "kafka": lambda: emit(Recorded()),
        "kafka per call": lambda: async_to_sync(through_kafka)(Recorded()),
        "redis": lambda: emit(Published()),
        "redis per call": lambda: async_to_sync(through_redis)(Published()),
    }
    times = asyncio.run(interleaved({name: _in_thread(call, CALLS) for name, call in contestants.items()}))

    def each(name: str) -> float:
        return statistics.median(times[name]) / CALLS * 1e3

    return [
        Row(
            what=f"Django: emit to {kind} in a sync view, time to async_to_sync with a client per call",
            measured=each(name) / each(f"{name} per call"),
            unit="x",
            reach="<= 0.1" if name == "kafka" else "",
            note=f"{each(name):.2f} ms; per call {each(f'{name} per call'):.2f} ms",
        )
        for name, kind in (("kafka", "Kafka"), ("redis", "Redis"))
    ]


def _in_thread(call: Callable[[], object], times: int, threads: int = 1) -> Callable[[], Any]:
    """`call()` so many times in each of so many threads, as `interleaved` wants it; sync code has no running loop."""

    def work() -> None:
        for _ in range(times):
            call()

    async def contestant() -> None:
        running = [threading.Thread(target=work) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()

    return contestant


# -- emit_on_commit in a request -----------------------------------------------------------------------------------


def _start_response(status: str, headers: Any, exc_info: Any = None) -> None:
    assert status == "200 OK", status


def _requests() -> list[Row]:
    from django.core.wsgi import get_wsgi_application
    from django.db import connection

    from dispytch_integrations.django import emit
    from dispytch_integrations.django.lifecycle import flush_events

    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE orders (customer text)")
        cursor.execute("INSERT INTO orders VALUES ('someone')")
    application = get_wsgi_application()

    def request(path: str) -> float:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": f"/{path}",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "wsgi.input": io.BytesIO(),
            "wsgi.url_scheme": "http",
        }
        started = time.perf_counter()
        response = application(environ, cast("Any", _start_response))
        took = time.perf_counter() - started
        response.close()
        return took

    def rested(path: str) -> float:
        emit(Published())
        took = request(path)
        flush_events()
        return took

    # Medians of single requests: a disk's hiccup hits whom it hits. Rested, the kinds of requests take turns, and an
    # event is delivered before the next one begins (something else was sent before each, so that all find the caches
    # equally cold). Back to back, its delivery (by another thread, under the same GIL) slows the next one down.
    ways: dict[str, Callable[[str], float]] = {"rested": rested, "back to back": request}
    times: dict[tuple[str, str], list[float]] = {(way, path): [] for way in ways for path in ("without", *_KINDS)}
    for way, path in times:
        for _ in range(20):
            ways[way](path)
    gc.collect()
    gc.freeze()
    for _ in range(10):
        for _ in range(REQUESTS):
            for path in ("without", *_KINDS):
                times["rested", path].append(rested(path))
        for path in ("without", *_KINDS):
            times["back to back", path].extend(request(path) for _ in range(REQUESTS))
            flush_events()
    gc.unfreeze()
    rows: list[Row] = []
    for way in ways:
        base = statistics.median(times[way, "without"]) * 1e6
        rows += [
            Row(
                what=f"Django: emit_on_commit to {kind}, time added to the request"
                + (", requests back to back" if way != "rested" else ""),
                measured=statistics.median(times[way, path]) * 1e6 - base,
                unit="us",
                reach="<= 60" if way == "rested" else "",
                note=f"the request without it takes {base:.0f} us",
            )
            for path, kind in _KINDS.items()
        ]
    return rows


# -- threads -------------------------------------------------------------------------------------------------------


def _threads(urls: dict[str, str]) -> list[Row]:
    import redis

    from dispytch_integrations.django import emit

    local = threading.local()

    def publish() -> None:
        client = getattr(local, "client", None)
        if client is None:
            client = local.client = redis.Redis.from_url(urls["redis"])
        client.publish("bench.django", Published().model_dump_json())

    contestants = {
        "ours": _in_thread(lambda: emit(Published()), EVENTS, THREADS),
        "redis-py": _in_thread(publish, EVENTS, THREADS),
    }
    times = asyncio.run(interleaved(contestants))
    return [
        Row(
            what=f"Django: {THREADS} sync threads emit to Redis, to one redis-py client each",
            measured=ratio(times, "ours", "redis-py"),
            unit="x",
            reach=">= 1",
            note=f"{THREADS * EVENTS / statistics.median(times['ours']):,.0f} events/s",
        )
    ]


# -- memory --------------------------------------------------------------------------------------------------------

_PROCESS = """
import sys, os, django
from django.conf import settings
url = sys.argv[1]
apps = ["dispytch_integrations.django"] if url else []
settings.configure(
    SECRET_KEY="x", INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", *apps],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    DISPYTCH={"default": {"URL": url}}, ROOT_URLCONF="django.contrib.auth.urls",
)
django.setup()
import django.core.handlers.wsgi, django.test, asyncio, pydantic
class Model(pydantic.BaseModel): x: int
if url:
    from benchmarks.django_bench import Published, Recorded
    from dispytch_integrations.django import emit
    for _ in range(50):
        emit(Published() if url.startswith("redis") else Recorded())
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmRSS")))
"""


def _memory(urls: dict[str, str]) -> list[Row]:
    def resident(url: str) -> float:
        runs = [
            subprocess.run([sys.executable, "-c", _PROCESS, url], capture_output=True, text=True, check=True).stdout
            for _ in range(3)
        ]
        return statistics.median(int(text) for text in runs) / 1024

    alone = resident("")
    return [
        Row(
            what=f"Django: memory per process with one {kind} broker, above Django and pydantic alone",
            measured=resident(urls[alias]) - alone,
            unit="MiB",
            reach=reach,
            note=f"alone {alone:.0f} MiB",
        )
        for alias, kind, reach in (("kafka", "Kafka", "<= 15"), ("redis", "Redis", "<= 35"))
    ]
