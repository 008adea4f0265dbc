"""The blocking bridge: emits from threads, forks, exits, and the places where it must refuse."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from dispytch_integrations import EventBase, EventEmitter
from dispytch_integrations.blocking import BlockingEmitter, connect_blocking
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    HeaderError,
    NotStartedError,
    ProducerTimeout,
    RouteError,
    StartupError,
    UnconfirmedError,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.producer import BackendConfig, EventRoute, Producer
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.support.brokers import Redis, free_port
from tests.support.proxy import TCPProxy

ROOT = Path(__file__).parents[1]


class Ordered(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str
    number: int = 0


class Queued(EventBase):
    __route__ = RabbitMQEventRoute(exchange="amq.topic", routing_key="{key}", mandatory=False)

    key: str


class Anywhere(EventBase):
    class Route(EventRoute):
        topic: str

    __route__ = Route(topic="orders")

    number: int = 0


class Stuck(Producer):
    """A broker that never confirms."""

    timeout = 0.05

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An app's event loop, in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = threading.Event()
    loop.call_soon_threadsafe(running.set)
    running.wait()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def length(client: redis.Redis, stream: str) -> int:
    found = client.xlen(stream)
    assert isinstance(found, int)
    return found


def script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own; `Ordered` and `connect_blocking` are imported."""
    return subprocess.run(
        command(code, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=40, check=False
    )


def command(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "default", "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


PREAMBLE = """
import logging, os, sys, threading, time
logging.basicConfig()
from dispytch_integrations import EventBase
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.redis import RedisStreamEventRoute
class Ordered(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")
    stream: str
    number: int = 0
url, stream = (sys.argv + ["", ""])[1:3]
"""


# -- emitting ------------------------------------------------------------------------------------------------------


def test_an_emit_returns_when_the_broker_has_confirmed(redis_url: str, client: redis.Redis, unique: str) -> None:
    """A script that printed "done" has its events in the broker."""
    with connect_blocking(redis_url) as emitter:
        emitter.emit(Ordered(stream=unique, number=1), headers={"tenant": "acme"})
        assert length(client, unique) == 1
        emitter.emit_many(Ordered(stream=unique, number=number) for number in range(2, 12))
        assert length(client, unique) == 11
        assert emitter.ping() == {"default": None}
    entries: Any = client.xrange(unique)
    assert [entry[b"data"] for _, entry in entries][:2] == [
        f'{{"stream":"{unique}","number":{number}}}'.encode() for number in (1, 2)
    ]
    assert entries[0][1][b"tenant"] == b"acme"


def test_it_works_with_rabbitmq_too(rabbitmq_url: str, unique: str) -> None:
    """The bridge is the same for every transport."""
    with connect_blocking(rabbitmq_url) as emitter:
        emitter.emit(Queued(key=unique))
        emitter.emit_many([Queued(key=unique)] * 50)
        assert emitter.ping() == {"default": None}


def test_it_works_with_kafka_too(kafka_url: str, unique: str) -> None:
    """The bridge is the same for every transport."""
    from dispytch_integrations.kafka import KafkaEventRoute

    class Sent(EventBase):
        __route__ = KafkaEventRoute(topic=unique)

    with connect_blocking(kafka_url) as emitter:
        emitter.emit(Sent())
        emitter.emit_many([Sent()] * 50)


def test_a_storm_of_threads_loses_nothing(redis_url: str, client: redis.Redis, unique: str) -> None:
    """A threaded server emits from all its threads at once."""
    with connect_blocking(redis_url) as emitter, ThreadPoolExecutor(16) as pool:

        def emit(thread: int) -> None:
            for number in range(200):
                emitter.emit(Ordered(stream=unique, number=thread * 200 + number))

        list(pool.map(emit, range(16)))
    assert length(client, unique) == 16 * 200


def test_messages_are_made_in_the_callers_thread_and_context(redis_url: str, unique: str) -> None:
    """Request ids, tenants and trace contexts live in context variables of the thread that emits."""
    tenant = contextvars.ContextVar("tenant", default="none")
    seen: list[tuple[str, str, str]] = []

    class Look(Hook):
        def before_send(self, message: Message) -> None:
            seen.append(("before", tenant.get(), threading.current_thread().name))

        def sent(self, message: Message) -> None:
            seen.append(("sent", tenant.get(), threading.current_thread().name))

    with connect_blocking(redis_url, hooks=[Look()]) as emitter:
        emitter.emit(Ordered(stream=unique))  # the loop's thread has been started by another context
        tenant.set("acme")
        seen.clear()
        emitter.emit(Ordered(stream=unique))
    assert seen == [("before", "acme", threading.current_thread().name), ("sent", "acme", "dispytch loop")]


def test_mistakes_are_raised_where_they_are_made(redis_url: str, unique: str) -> None:
    """A bad value is found before anything is handed over, with a traceback that ends at the caller's line."""
    with connect_blocking(redis_url) as emitter:
        with pytest.raises(RouteError):
            emitter.emit(Ordered(stream="a b"))
        with pytest.raises(HeaderError):
            emitter.emit(Ordered(stream=unique), headers={"ce_id": "mine", "id": "mine"})
        with pytest.raises(ExceptionGroup) as caught:
            emitter.emit_many([Ordered(stream=unique), Ordered(stream="a b")])
        assert caught.group_contains(RouteError)
        assert "event 1" in caught.value.exceptions[0].__notes__[0]


def test_emit_many_of_nothing_does_nothing(redis_url: str) -> None:
    """An empty list is no mistake."""
    with connect_blocking(redis_url) as emitter:
        emitter.emit_many([])


def test_errors_of_the_broker_reach_the_caller_with_a_usable_traceback(
    own_redis: Callable[..., Redis], unique: str
) -> None:
    """The error names the message, and its traceback shows both the caller's line and the cause."""
    broker = own_redis()
    with connect_blocking(broker.url, timeout=2, shutdown_timeout=1) as emitter:
        emitter.emit(Ordered(stream=unique))
        broker.kill()
        with pytest.raises((BrokerUnavailableError, UnconfirmedError)) as caught:
            emitter.emit(Ordered(stream=unique))
        text = "".join(traceback.format_exception(caught.value))
        assert "emitter.emit(Ordered(stream=unique))" in text
        assert unique in str(caught.value)
        with pytest.raises(ExceptionGroup) as group:
            emitter.emit_many([Ordered(stream=unique)] * 3)
        assert len(group.value.exceptions) == 3


def test_an_emitter_lives_through_an_outage(own_redis: Callable[..., Redis], unique: str) -> None:
    """A worker that runs for weeks sees its broker restart."""
    broker = own_redis()
    with connect_blocking(broker.url, timeout=2) as emitter:
        broker.kill()
        with pytest.raises((BrokerUnavailableError, ProducerTimeout)):
            emitter.emit(Ordered(stream=unique))
        broker.start()
        end = time.monotonic() + 20
        while True:
            try:
                emitter.emit(Ordered(stream=unique))
                break
            except (BrokerUnavailableError, ProducerTimeout):
                assert time.monotonic() < end
                time.sleep(0.05)


# -- start and stop ------------------------------------------------------------------------------------------------


def test_an_emit_outside_the_block_says_what_to_write(redis_url: str, unique: str) -> None:
    """Before the start and after the end: an error at once, never a hang."""
    brokers = connect_blocking(redis_url)
    with pytest.raises(NotStartedError, match=r"with connect_blocking\(\.\.\.\)"):
        brokers.emitter.emit(Ordered(stream=unique))
    with brokers as emitter:
        emitter.emit(Ordered(stream=unique))
    with pytest.raises(NotStartedError, match=r"with connect_blocking\(\.\.\.\)"):
        emitter.emit(Ordered(stream=unique))
    with brokers as again:
        again.emit(Ordered(stream=unique))
        assert again is emitter


def test_an_emit_after_a_start_that_failed_says_why(unique: str) -> None:
    """Celery logs what a signal's receiver raises, and goes on: the error of the task is the one that is read."""
    brokers = connect_blocking(f"redis://127.0.0.1:{free_port()}", startup_timeout=0.3)
    with pytest.raises(StartupError) as caught:
        brokers.start()
    with pytest.raises(NotStartedError, match=r"start\(\) has failed: not connected within .*does not answer") as told:
        brokers.emitter.emit(Ordered(stream=unique))
    assert told.value.__cause__ is caught.value


async def test_a_start_on_an_event_loop_says_what_to_write() -> None:
    """Its emitter is not the one to be written there."""
    with pytest.raises(WrongLoopError, match=r"`async with connect\(.*asyncio.to_thread\(brokers.start\)"):
        connect_blocking("memory://").start()


def test_start_and_stop_are_counted(redis_url: str, unique: str) -> None:
    """Two parts of a program that each start the emitter do not close it for each other."""
    brokers = connect_blocking(redis_url)
    brokers.stop()
    brokers.start()
    with brokers as emitter:
        emitter.emit(Ordered(stream=unique))
    emitter.emit(Ordered(stream=unique))
    brokers.stop()
    with pytest.raises(NotStartedError):
        emitter.emit(Ordered(stream=unique))


def test_two_threads_that_start_at_once_connect_once(redis_url: str, unique: str) -> None:
    """Lazy initialisation in a threaded server starts from several requests."""
    brokers = connect_blocking(redis_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: brokers.start(), range(8)))
        for _ in range(7):
            brokers.stop()
        brokers.emitter.emit(Ordered(stream=unique))
        brokers.stop()
    with pytest.raises(NotStartedError):
        brokers.emitter.emit(Ordered(stream=unique))


def test_all_connections_share_one_thread(redis_url: str, unique: str) -> None:
    """A process pays for one loop thread, however many emitters it has, and failed starts leave none behind."""
    with connect_blocking(redis_url) as one, connect_blocking("memory://") as two:
        one.emit(Ordered(stream=unique))
        two.emit(Anywhere())
    for _ in range(3):
        with pytest.raises(StartupError), connect_blocking("redis://127.0.0.1:1", startup_timeout=0.05):
            pass
    assert sum(thread.name == "dispytch loop" for thread in threading.enumerate()) == 1


def test_a_start_that_fails_says_why_and_can_be_tried_again(own_redis: Callable[..., Redis], unique: str) -> None:
    """The broker comes up after the script."""
    broker = own_redis()
    broker.stop()
    brokers = connect_blocking(broker.url, startup_timeout=0.2)
    with pytest.raises(StartupError, match=str(broker.port)):
        brokers.start()
    with pytest.raises(NotStartedError):
        brokers.emitter.emit(Ordered(stream=unique))
    broker.start()
    with brokers as emitter:
        emitter.emit(Ordered(stream=unique))


def test_wrong_settings_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration is an error, and an unknown option is named with the nearest known one."""
    monkeypatch.delenv("DISPYTCH_URL", raising=False)
    with pytest.raises(ConfigurationError, match="DISPYTCH_URL"):
        connect_blocking().start()
    with pytest.raises(ConfigurationError, match="startup_timeout"):
        connect_blocking("memory://", startup_timeuot=2).start()


def test_the_environment_is_read_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are loaded after the import count."""
    brokers = connect_blocking()
    monkeypatch.setenv("DISPYTCH_URL", "memory://")
    with brokers as emitter:
        emitter.emit(Anywhere())
        producer = emitter.producers["default"]
        assert isinstance(producer, MemoryProducer)
        assert len(producer.sent) == 1


def test_the_end_of_the_block_waits_for_emits_of_other_threads(
    redis_url: str, client: redis.Redis, unique: str
) -> None:
    """Leaving the block while a thread emits loses nothing that was accepted."""
    confirmed, refused = 0, threading.Event()
    with connect_blocking(redis_url) as emitter:

        def emit() -> None:
            nonlocal confirmed
            while True:
                try:
                    emitter.emit(Ordered(stream=unique))
                except NotStartedError:
                    refused.set()
                    return
                confirmed += 1

        thread = threading.Thread(target=emit)
        thread.start()
        while confirmed < 20:
            time.sleep(0.001)
    assert refused.wait(10)
    thread.join()
    assert length(client, unique) == confirmed


# -- timeouts ------------------------------------------------------------------------------------------------------


async def test_an_emit_ends_at_its_deadline(redis_url: str, own_redis: Callable[..., Redis], unique: str) -> None:
    """A broker that hangs does not hang the worker."""
    broker = own_redis()
    async with TCPProxy("127.0.0.1", broker.port) as proxy:

        def emit_stalled(stall: Callable[[], None]) -> float:
            url = f"redis://127.0.0.1:{proxy.port}/0"
            with connect_blocking(url, timeout=0.3, shutdown_timeout=0.2) as emitter:
                stall()
                started = time.monotonic()
                with pytest.raises(ProducerTimeout, match="may have been delivered"):
                    emitter.emit(Ordered(stream=unique))
                return time.monotonic() - started

        loop = asyncio.get_running_loop()

        def stall() -> None:
            asyncio.run_coroutine_threadsafe(proxy.stall(), loop).result()

        took = await asyncio.to_thread(emit_stalled, stall)
    assert 0.25 < took < 2


def test_a_plain_timeout_callback_runs_in_the_emitting_thread(loop: asyncio.AbstractEventLoop) -> None:
    """It may block, use the ORM and emit again: nothing of that would work on the loop's thread."""
    emitter = BlockingEmitter(EventEmitter(Stuck()), loop)
    called: list[tuple[int, int]] = []

    @emitter.on_timeout
    def missed(event: Anywhere) -> None:
        called.append((event.number, threading.get_ident()))

    emitter.emit(Anywhere(number=1))
    emitter.emit_many([Anywhere(number=2), Anywhere(number=3)])
    assert called == [(number, threading.get_ident()) for number in (1, 2, 3)]


def test_an_async_timeout_callback_runs_on_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    """What the app registered on its own emitter serves its threads too; its errors are the emit's."""
    own = EventEmitter(Stuck())
    called: list[asyncio.AbstractEventLoop] = []

    @own.on_timeout
    async def missed(event: Anywhere) -> None:
        await asyncio.sleep(0)
        called.append(asyncio.get_running_loop())
        if event.number == 2:
            raise LookupError("from the callback")

    BlockingEmitter(own, loop).emit(Anywhere(number=1))
    assert called == [loop]
    with pytest.raises(LookupError, match="from the callback"):
        BlockingEmitter(own, loop).emit(Anywhere(number=2))


def test_on_timeout_log_logs(loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture) -> None:
    """A bare emitter behaves as dispytch's, from a thread too."""
    with caplog.at_level(logging.WARNING):
        BlockingEmitter(EventEmitter(Stuck()), loop).emit(Anywhere())
    assert "not confirmed in time" in caplog.text


def test_a_blocked_loop_does_not_hang_the_caller(loop: asyncio.AbstractEventLoop) -> None:
    """Somebody's time.sleep in a coroutine: the emit ends with an error that says so, and nothing is sent later."""
    producer = MemoryProducer()
    producer.timeout = 0.05
    emitter = BlockingEmitter(EventEmitter(producer), loop)
    emitter.emit(Anywhere())
    release = threading.Event()
    loop.call_soon_threadsafe(release.wait)
    try:
        with pytest.raises(BrokerUnavailableError, match="event loop took no work"):
            emitter.emit(Anywhere())
    finally:
        release.set()
    emitter.emit(Anywhere())
    assert len(producer.sent) == 2


def test_a_loop_that_is_blocked_after_the_send_is_a_timeout(loop: asyncio.AbstractEventLoop) -> None:
    """Once the loop has begun, the event may have been delivered, and the error says that."""
    release = threading.Event()

    class Blocking(Stuck):
        async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
            release.wait()

    emitter = BlockingEmitter(EventEmitter(Blocking()), loop)
    emitter.on_timeout(_raise_again)
    try:
        with pytest.raises(ProducerTimeout, match="may have been delivered"):
            emitter.emit(Anywhere())
    finally:
        release.set()


def _raise_again(event: EventBase) -> None:
    raise ProducerTimeout


# -- places where it must refuse -----------------------------------------------------------------------------------


async def test_inside_an_event_loop_it_is_refused(unique: str) -> None:
    """It would block every other request of the app; on the loop's own thread it would wait for itself for ever."""
    emitter = BlockingEmitter(EventEmitter(MemoryProducer()), asyncio.get_running_loop())
    with pytest.raises(WrongLoopError, match=r"await emitter\.emit\("):
        emitter.emit(Anywhere())
    with pytest.raises(WrongLoopError, match=r"await emitter\.emit_many\("):
        emitter.emit_many([Anywhere()])
    with pytest.raises(WrongLoopError):
        connect_blocking("memory://").start()
    await asyncio.to_thread(emitter.emit, Anywhere())


def test_a_hook_cannot_emit_on_the_loops_own_thread(
    redis_url: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A `sent` hook that emits through the bridge would deadlock; it gets an error, which is logged."""

    class Again(Hook):
        def sent(self, message: Message) -> None:
            emitter.emit(Ordered(stream=unique))

    with connect_blocking(redis_url, hooks=[Again()]) as emitter:
        emitter.emit(Ordered(stream=unique))
    assert "WrongLoopError" in caplog.text


def test_an_app_that_has_shut_down_is_noticed() -> None:
    """A thread that outlives the app's event loop gets an error, not a wait without end."""
    loop = asyncio.new_event_loop()
    emitter = BlockingEmitter(EventEmitter(MemoryProducer()), loop)
    with pytest.raises(NotStartedError, match="not running"):
        emitter.emit(Anywhere())
    loop.close()
    with pytest.raises(NotStartedError, match="not running"):
        emitter.emit(Anywhere())


def test_a_loop_that_ends_during_an_emit_is_noticed() -> None:
    """The app is stopped while a thread waits for a confirmation."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    begun = threading.Event()

    class Begun(Stuck):
        timeout = 30

        async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
            begun.set()
            await asyncio.Event().wait()

    emitter = BlockingEmitter(EventEmitter(Begun()), loop)
    with ThreadPoolExecutor(1) as pool:
        emitting = pool.submit(emitter.emit, Anywhere())
        begun.wait()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        with pytest.raises((NotStartedError, ProducerTimeout)):
            emitting.result(5)
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
    loop.close()


@pytest.mark.parametrize("patch", ["gevent", "eventlet"])
def test_patched_threads_are_refused(patch: str) -> None:
    """Under gevent the loop's thread would be a greenlet: every later error would be a riddle."""
    fake_eventlet = """
        import types
        sys.modules["eventlet"] = types.ModuleType("eventlet")
        sys.modules["eventlet.patcher"] = patcher = types.ModuleType("eventlet.patcher")
        patcher.is_monkey_patched = lambda name: name == "thread"
    """  # eventlet itself does not run beside this Python's ssl; what we ask of it is one function.
    code = {"gevent": "import gevent.monkey; gevent.monkey.patch_all()", "eventlet": textwrap.dedent(fake_eventlet)}
    done = script(
        code[patch]
        + textwrap.dedent("""
            from dispytch_integrations.errors import ConfigurationError
            try:
                connect_blocking("memory://").start()
            except ConfigurationError as exc:
                print(exc)
        """)
    )
    assert f"threads are patched by {patch}" in done.stdout, done.stderr
    assert "gthread" in done.stdout


# -- forks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["sys.exit(0)", "os._exit(0)"])
def test_a_forked_child_connects_anew_and_leaves_the_parents_sockets_alone(
    redis_url: str, client: redis.Redis, unique: str, ends: str
) -> None:
    """Preloading servers and Celery fork after the import; parent and child both go on emitting."""
    done = script(
        f"""
        with connect_blocking(url) as emitter:
            emitter.emit(Ordered(stream=stream, number=0))
            pid = os.fork()
            if pid == 0:
                emitter.emit(Ordered(stream=stream, number=1))
                emitter.emit_many([Ordered(stream=stream, number=2)] * 3)
                assert sum(thread.name == "dispytch loop" for thread in threading.enumerate()) == 1
                {ends}
            for _ in range(200):
                emitter.emit(Ordered(stream=stream, number=5))
            _, status = os.waitpid(pid, 0)
            for _ in range(10):
                emitter.emit(Ordered(stream=stream, number=6))
            print("status", status)
        """,
        redis_url,
        unique,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "status 0\n"
    assert "Error" not in done.stderr, done.stderr
    assert length(client, unique) == 215


def test_a_child_that_never_emits_does_no_harm_when_it_ends(redis_url: str, client: redis.Redis, unique: str) -> None:
    """Objects that die with the child must not take the parent's sockets out of the parent's epoll."""
    done = script(
        """
        import gc
        brokers = connect_blocking(url, timeout=3)
        brokers.start()
        brokers.emitter.emit(Ordered(stream=stream))
        pid = os.fork()
        if pid == 0:
            del brokers
            gc.collect()
            sys.exit(0)
        os.waitpid(pid, 0)
        for _ in range(10):
            brokers.emitter.emit(Ordered(stream=stream))
        """,
        redis_url,
        unique,
    )
    assert done.returncode == 0, done.stderr
    assert length(client, unique) == 11


def test_children_of_multiprocessing_emit(redis_url: str, client: redis.Redis, unique: str) -> None:
    """A pool of workers that inherits a module's emitter works, whoever opened it."""
    done = script(
        """
        import multiprocessing
        brokers = connect_blocking(url)

        def work(number):
            brokers.emitter.emit(Ordered(stream=stream, number=number))
            return os.getpid()

        brokers.start()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            pids = set(pool.map(work, range(60), chunksize=5))
        assert os.getpid() not in pids
        brokers.emitter.emit(Ordered(stream=stream))
        """,
        redis_url,
        unique,
    )
    assert done.returncode == 0, done.stderr
    assert length(client, unique) == 61


def test_a_fork_while_others_emit_does_not_hang_the_child(redis_url: str, unique: str) -> None:
    """Locks that another thread held at the fork stay locked in the child."""
    done = script(
        """
        import signal
        brokers = connect_blocking(url)
        brokers.start()
        end = threading.Event()

        def emit():
            while not end.is_set():
                with brokers as emitter:
                    emitter.emit(Ordered(stream=stream))

        threads = [threading.Thread(target=emit) for _ in range(4)]
        for thread in threads:
            thread.start()
        children = []
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                signal.alarm(15)
                brokers.emitter.emit(Ordered(stream=stream))
                os._exit(0)
            children.append(pid)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
        end.set()
        for thread in threads:
            thread.join()
        print(statuses)
        """,
        redis_url,
        unique,
    )
    assert done.stdout == f"{[0] * 10}\n", done.stderr


def test_a_childs_first_emit_keeps_its_deadline_and_later_ones_recover(
    own_redis: Callable[..., Redis], unique: str
) -> None:
    """The broker is down when a worker is forked: its emits fail in time, and work once the broker is back."""
    broker = own_redis()
    code = """
        brokers = connect_blocking(url, timeout=0.5, startup_timeout=0.8)
        brokers.start()
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(ready, 1)
            started = time.monotonic()
            try:
                brokers.emitter.emit(Ordered(stream=stream))
            except ConnectionError as exc:
                print("failed", time.monotonic() - started < 2, flush=True)
            sys.stdin.readline()
            end = time.monotonic() + 20
            while time.monotonic() < end:
                try:
                    brokers.emitter.emit(Ordered(stream=stream))
                    print("sent", flush=True)
                    break
                except Exception as exc:
                    last = exc
                    time.sleep(0.1)
            else:
                print(repr(last), flush=True)
            os._exit(0)
        print("forked", flush=True)
        sys.stdin.readline()
        os.write(go, b"x")
        os.waitpid(pid, 0)
        os._exit(0)
    """
    with subprocess.Popen(
        command(code, broker.url, unique),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        broker.kill()
        process.stdin.write("down\n")
        process.stdin.flush()
        assert process.stdout.readline() == "failed True\n"
        broker.start()
        process.stdin.write("up\n")
        process.stdin.flush()
        assert process.stdout.readline() == "sent\n"


def test_an_apps_emitter_is_refused_in_a_forked_child(loop: asyncio.AbstractEventLoop) -> None:
    """The app's loop does not run there: an error that says so, not a wait without end."""
    emitter = BlockingEmitter(EventEmitter(MemoryProducer()), loop)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            emitter.emit(Anywhere())
        except WrongProcessError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


# -- the end of the process ----------------------------------------------------------------------------------------


def test_what_is_in_flight_at_exit_is_delivered(redis_url: str, client: redis.Redis, unique: str) -> None:
    """A script that ends without closing loses nothing that a daemon thread had handed over, and ends silently."""
    done = script(
        """
        brokers = connect_blocking(url)
        brokers.start()
        begun = threading.Event()

        def emit():
            begun.set()
            brokers.emitter.emit_many([Ordered(stream=stream, number=number) for number in range(3000)])

        threading.Thread(target=emit, daemon=True).start()
        begun.wait()
        while not brokers.brokers["default"].in_flight:
            pass
        """,
        redis_url,
        unique,
    )
    assert done.returncode == 0, done.stderr
    assert length(client, unique) == 3000
    assert done.stderr == ""


def test_an_open_connection_is_closed_silently_at_exit(redis_url: str, unique: str) -> None:
    """No "task was destroyed", no "unclosed connection" at the end of a script."""
    done = script(
        """
        brokers = connect_blocking(url)
        brokers.start()
        import atexit
        @atexit.register
        def last():
            brokers.emitter.emit(Ordered(stream=stream))
            print("sent at exit")
        brokers.emitter.emit(Ordered(stream=stream))
        """,
        redis_url,
        unique,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "sent at exit\n", "")


def test_what_is_abandoned_at_exit_is_logged_with_its_number(own_redis: Callable[..., Redis], unique: str) -> None:
    """The exit waits `shutdown_timeout` and no longer; what was not confirmed by then is told."""
    broker = own_redis()
    with subprocess.Popen(
        command(
            """
            brokers = connect_blocking(url, timeout=60, shutdown_timeout=0.3)
            brokers.start()
            print("started", flush=True)
            sys.stdin.readline()

            def emit():
                brokers.emitter.emit_many([Ordered(stream=stream)] * 7)

            threading.Thread(target=emit, daemon=True).start()
            while not brokers.brokers["default"].in_flight:
                pass
            """,
            broker.url,
            unique,
        ),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        broker.pause()
        started = time.monotonic()
        _, errors = process.communicate("go\n", timeout=30)
        assert time.monotonic() - started < 10
    assert process.returncode == 0
    assert "7 events abandoned" in errors


def test_ctrl_c_ends_a_wait_at_once(own_redis: Callable[..., Redis], unique: str) -> None:
    """The broker hangs and the user presses Ctrl-C: the script ends, not after the timeout."""
    broker = own_redis()
    with subprocess.Popen(
        command(
            """
            with connect_blocking(url, timeout=60, shutdown_timeout=0.5) as emitter:
                print("started", flush=True)
                sys.stdin.readline()
                print("emitting", flush=True)
                emitter.emit(Ordered(stream=stream))
            """,
            broker.url,
            unique,
        ),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        broker.pause()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "emitting\n"
        time.sleep(0.3)  # It may not wait yet; an early signal ends it as well.
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - started < 8
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


def test_nothing_of_an_emit_is_left_behind(redis_url: str, unique: str) -> None:
    """A worker that runs for weeks does not grow: neither calls nor errors are kept."""
    import gc

    with connect_blocking(redis_url) as emitter:
        events: Sequence[Ordered] = [Ordered(stream=unique) for _ in range(200)]

        def round_() -> int:
            for event in events:
                emitter.emit(event)
            gc.collect()
            return len(gc.get_objects())

        round_()
        after = before = round_()
        for _ in range(3):
            after = round_()
        # One object per emit would be 600; a loop keeps some cancelled timers for a while.
        assert after - before < 400
