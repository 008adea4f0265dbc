"""What a Starlette app, and any ASGI app, can rely on."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.errors import ConfigurationError, NotStartedError, StartupError
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.starlette import EmitterMiddleware, UserLifespan, emitter_lifespan, get_emitter
from tests.apps.asgi import Server, import_without
from tests.support.brokers import free_port
from tests.support.proxy import TCPProxy

MEMORY = "memory://"


class OrderPlaced(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    number: int


async def place(request: Request) -> Response:
    await get_emitter(request).emit(OrderPlaced(number=request.path_params.get("number", 1)))
    return PlainTextResponse("placed")


def orders(**keywords: Any) -> Starlette:
    return Starlette(routes=[Route("/{number:int}", place), Route("/", place)], **keywords)


def sent(emitter: EventEmitter) -> list[bytes | None]:
    producer = emitter.producer
    assert isinstance(producer, MemoryProducer)
    return [message.payload for message in producer.sent]


async def is_closed(emitter: EventEmitter) -> bool:
    try:
        await emitter.emit(OrderPlaced(number=0))
    except NotStartedError:
        return True
    return False


# -- emitter_lifespan ----------------------------------------------------------------------------------------------


def test_request_state_app_and_function_give_the_same_emitter() -> None:
    """Whoever migrates code may take the emitter from wherever it is at hand."""

    async def compare(request: Request) -> Response:
        emitter = get_emitter(request)
        await emitter.emit(OrderPlaced(number=1))
        found = [request.state.emitter, get_emitter(request.app), get_emitter(request.scope)]
        return JSONResponse([each is emitter for each in found])

    app = Starlette(routes=[Route("/", compare)], lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as client:
        assert client.get("/").json() == [True, True, True]
        emitter = get_emitter(app)
    assert sent(emitter) == [b'{"number":1}']


async def test_the_emitter_is_closed_when_the_app_has_shut_down() -> None:
    """An emit after the shutdown must not vanish."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    async with Server(app) as server:
        await server.get()
        emitter = get_emitter(app)
    assert await is_closed(emitter)
    with pytest.raises(NotStartedError, match="is over"):
        get_emitter(app)


async def test_the_users_lifespan_runs_inside_and_may_emit_at_both_ends() -> None:
    """ "Started" and "stopped" events are what lifespans are used for."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        await get_emitter(app).emit(OrderPlaced(number=1))
        yield {"database": "db"}
        await get_emitter(app).emit(OrderPlaced(number=2))

    app = Starlette(lifespan=emitter_lifespan(MEMORY, lifespan=mine))
    async with Server(app) as server:
        assert server.state is not None
        emitter = get_emitter(app)
        assert server.state == {"emitter": emitter, "database": "db"}
    assert sent(emitter) == [b'{"number":1}', b'{"number":2}']
    assert await is_closed(emitter)


@asynccontextmanager
async def context_lifespan(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
    yield {"mine": 1}


async def generator_lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    yield {"mine": 1}


def sync_generator_lifespan(app: Starlette) -> Iterator[dict[str, Any]]:
    yield {"mine": 1}


class Lifespan:
    @asynccontextmanager
    async def run(self, app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        yield {"mine": 1}


@pytest.mark.parametrize(
    "lifespan",
    [context_lifespan, generator_lifespan, sync_generator_lifespan, Lifespan().run],
    ids=["context manager", "async generator", "generator", "method"],
)
async def test_a_lifespan_that_starlette_takes_is_taken(lifespan: UserLifespan) -> None:
    """Adding the emitter must not make anybody rewrite the lifespan they have."""
    async with Server(Starlette(lifespan=emitter_lifespan(MEMORY, lifespan=lifespan))) as server:
        assert server.state is not None
        assert server.state["mine"] == 1


async def never_yields(app: Starlette) -> None: ...


@pytest.mark.parametrize(
    ("lifespan", "told"),
    [
        (context_lifespan(Starlette()), "do not call it: lifespan=my_lifespan"),
        (never_yields, "never yields"),
        ({"url": MEMORY}, "lifespan= is a dict"),
    ],
    ids=["called", "coroutine function", "dict"],
)
def test_what_is_no_lifespan_is_refused_at_the_call(lifespan: Any, told: str) -> None:
    """Found at import, where the mistake is, and not in a server's traceback."""
    with pytest.raises(ConfigurationError, match=told):
        emitter_lifespan(MEMORY, lifespan=lifespan)


@pytest.mark.parametrize(
    ("lifespan", "told"),
    [
        (lambda app: {"mine": 1}, "asynccontextmanager"),
        (asynccontextmanager(lambda app: _yielding([1])), "yields a list"),
        (asynccontextmanager(lambda app: _yielding({"emitter": 1})), "which is the emitter's name"),
    ],
    ids=["returns a dict", "yields a list", "yields the emitter's name"],
)
async def test_a_lifespan_that_gives_what_cannot_be_merged_fails_the_startup(lifespan: Any, told: str) -> None:
    """State that is silently lost or overwritten is found in production."""
    server = Server(Starlette(lifespan=emitter_lifespan(MEMORY, lifespan=lifespan)))
    assert await server.start() == "lifespan.startup.failed"
    assert told in server.answers[0]["message"]


async def _yielding(state: Any) -> AsyncGenerator[Any, None]:
    yield state


async def test_a_lifespan_may_pass_the_same_emitter_on() -> None:
    """Who yields the very emitter has no clash to solve."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        yield {"emitter": get_emitter(app)}

    async with Server(Starlette(lifespan=emitter_lifespan(MEMORY, lifespan=mine))):
        pass


async def test_the_url_is_read_at_start_and_not_at_import() -> None:
    """Settings are often not there yet when the module with `app` is imported, and tests change them."""
    urls: list[str] = []

    def url() -> str:
        urls.append(MEMORY)
        return MEMORY

    app = orders(lifespan=emitter_lifespan(url))
    assert urls == []
    async with Server(app):
        assert urls == [MEMORY]


async def test_several_emitters_have_several_names() -> None:
    """One app may well talk to two clusters under separate settings."""
    app = orders(lifespan=emitter_lifespan(MEMORY, lifespan=emitter_lifespan(MEMORY, name="alerts")))
    async with Server(app) as server:
        assert server.state is not None
        assert set(server.state) == {"emitter", "alerts"}
        assert get_emitter(app, "alerts") is server.state["alerts"]
        assert get_emitter(app, "alerts") is not get_emitter(app)


async def test_two_emitters_of_one_name_fail_the_startup() -> None:
    """One of the two would silently take the events of the other."""
    server = Server(orders(lifespan=emitter_lifespan(MEMORY, lifespan=emitter_lifespan(MEMORY))))
    assert await server.start() == "lifespan.startup.failed"
    assert "two emitters called 'emitter'" in server.answers[0]["message"]


async def test_one_lifespan_object_for_two_apps_is_opened_once_and_closed_with_the_second() -> None:
    """An app that is stopped must not take the connections of the other one."""
    lifespan = emitter_lifespan(MEMORY)
    first, second = orders(lifespan=lifespan), orders(lifespan=lifespan)
    async with Server(first):
        async with Server(second):
            emitter = get_emitter(second)
            assert emitter is get_emitter(first)
        await emitter.emit(OrderPlaced(number=1))
    assert await is_closed(emitter)


def test_an_app_with_two_test_clients_at_a_time_has_an_emitter_on_each_loop() -> None:
    """Two clients with cookies of their own are common in tests; each runs the app on an event loop of its own."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as one:
        with TestClient(app) as other:
            assert one.get("/").text == other.get("/").text == "placed"
        assert one.get("/").text == "placed"
    with TestClient(app) as again:
        assert again.get("/").text == "placed"


async def test_brokers_made_by_connect_are_taken_as_they_are() -> None:
    """Who starts the same brokers elsewhere too, in a worker, shares the connections."""
    brokers = connect(MEMORY)
    app = orders(lifespan=emitter_lifespan(brokers))
    async with brokers as emitter:
        async with Server(app):
            assert get_emitter(app) is emitter
        await emitter.emit(OrderPlaced(number=1))


def test_keywords_cannot_change_brokers_that_are_made() -> None:
    """A timeout that is silently ignored is found in an outage."""
    with pytest.raises(ConfigurationError, match=r"timeout=, acks= cannot change .* connect\(..., timeout=...\)"):
        emitter_lifespan(connect(MEMORY), timeout=1.0, acks="all")


@pytest.mark.parametrize("function", [emitter_lifespan, EmitterMiddleware])
def test_the_keywords_and_their_defaults_are_those_of_connect(function: Callable[..., Any]) -> None:
    """The same word means the same everywhere."""
    own = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in ("app", "config", "lifespan", "name")
    }
    connects = {key: value for key, value in inspect.signature(connect).parameters.items() if key != "config"}
    assert own == connects


# -- in requests ---------------------------------------------------------------------------------------------------


def test_websockets_background_tasks_and_streams_emit() -> None:
    """Events are emitted wherever an app's code runs, also when the response is long gone."""

    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        await get_emitter(socket).emit(OrderPlaced(number=1))
        await socket.close()

    async def later(request: Request) -> Response:
        task = BackgroundTask(request.state.emitter.emit, OrderPlaced(number=2))
        return PlainTextResponse("later", background=task)

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            for number in (3, 4):
                await request.state.emitter.emit(OrderPlaced(number=number))
                yield str(number)

        return StreamingResponse(parts())

    routes = [WebSocketRoute("/ws", websocket), Route("/later", later), Route("/stream", stream)]
    app = Starlette(routes=routes, lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as client:
        with client.websocket_connect("/ws") as socket:
            assert socket.receive()["type"] == "websocket.close"
        client.get("/later")
        assert client.get("/stream").text == "34"
        emitter = get_emitter(app)
    assert sent(emitter) == [f'{{"number":{number}}}'.encode() for number in (1, 2, 3, 4)]


def test_mounted_apps_use_the_emitter_of_the_outermost() -> None:
    """The fix that the error names has to work."""
    app = Starlette(routes=[Mount("/shop", orders())], lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as client:
        assert client.get("/shop/").text == "placed"


def test_a_hand_written_lifespan_works_the_same() -> None:
    """Ours is a convenience and no condition."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        async with connect(MEMORY) as emitter:
            yield {"emitter": emitter}

    with TestClient(orders(lifespan=mine)) as client:
        assert client.get("/").text == "placed"


def test_an_emitter_kept_in_app_state_is_found() -> None:
    """The other idiom for sharing things in Starlette."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[None, None]:
        async with connect(MEMORY) as app.state.emitter:
            yield

    app = orders(lifespan=mine)
    with TestClient(app) as client:
        assert client.get("/").text == "placed"
        assert get_emitter(app) is app.state.emitter


async def test_a_lifespan_run_by_a_test_around_asgi_transport_is_found() -> None:
    """httpx's ASGITransport runs no lifespan; the fix that the error names has to work."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/")).text == "placed"


async def test_a_client_that_leaves_in_the_middle_of_an_emit_harms_nobody(redis_url: str, unique: str) -> None:
    """The request is cancelled; the next one emits, and the shutdown waits for nothing that is gone."""

    class Placed(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique)

    async def stream(request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            await request.state.emitter.emit(Placed())
            yield "placed"

        return StreamingResponse(parts())

    host, _, port = redis_url.removeprefix("redis://").partition("/")[0].rpartition(":")
    async with TCPProxy(host, int(port)) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        app = Starlette(routes=[Route("/", stream)], lifespan=emitter_lifespan(url, shutdown_timeout=30))
        async with Server(app) as server:
            await proxy.stall()

            async def gone() -> Message:
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None: ...

            await asyncio.wait_for(app(server.scope(), gone, send), timeout=3)
            await proxy.resume()
            assert (await server.get())[-2]["body"] == b"placed"
            started = time.monotonic()
        assert time.monotonic() - started < 5


# -- what is missing is told ---------------------------------------------------------------------------------------


def failing(client: TestClient, path: str = "/") -> str:
    with pytest.raises(NotStartedError) as caught:
        client.get(path)
    return str(caught.value)


def test_without_a_lifespan_the_error_says_what_to_write() -> None:
    """The first thing a new user forgets."""
    with TestClient(orders()) as client:
        told = failing(client)
    assert "lifespan=emitter_lifespan('kafka://localhost:9092')" in told
    assert "mounted" not in told


def test_a_test_client_without_with_is_named() -> None:
    """The most frequent mistake in tests; nothing else may distract from it."""
    told = failing(TestClient(orders(lifespan=emitter_lifespan(MEMORY))))
    assert "`with TestClient(app) as client:`" in told
    assert "the app opens none" not in told


async def test_asgi_transport_is_named() -> None:
    """It runs no lifespan, and nothing about it says so."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(NotStartedError, match=r"httpx\.ASGITransport.*\n?.*asgi_client\(app\) as client:`"):
            await client.get("/")


def test_a_lifespan_on_a_mounted_app_is_named() -> None:
    """Starlette never runs it."""
    app = Starlette(routes=[Mount("/shop", orders(lifespan=emitter_lifespan(MEMORY)))])
    with TestClient(app) as client:
        assert "mounted at '/shop'" in failing(client, "/shop/")


def test_another_name_is_answered_with_the_names_there_are() -> None:
    """A typo is seen at a glance."""
    with TestClient(orders(lifespan=emitter_lifespan(MEMORY, name="alerts"))) as client:
        told = failing(client)
    assert "the app has 'alerts'" in told
    assert "TestClient" not in told


def test_a_hand_written_lifespan_that_yields_no_emitter_is_named() -> None:
    """It ran, and the emitter stayed inside."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        async with connect(MEMORY):
            yield {"database": "secret"}

    with TestClient(orders(lifespan=mine)) as client:
        told = failing(client)
    assert "has yielded 'database' and no emitter" in told
    assert "secret" not in told


def test_a_lifespan_that_yields_what_connect_returns_is_named() -> None:
    """Without `async with` nothing is connected."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        yield {"emitter": connect(MEMORY)}

    with TestClient(orders(lifespan=mine)) as client:
        assert "async with connect(...) as emitter: yield {'emitter': emitter}" in failing(client)


async def test_a_server_without_lifespan_is_named() -> None:
    """`uvicorn --lifespan off` gives requests an empty state, and the app's own lifespan is fine."""
    with pytest.raises(NotStartedError, match="--lifespan off"):
        await Server(orders(lifespan=emitter_lifespan(MEMORY))).get()


# -- a broker that is down -----------------------------------------------------------------------------------------


async def test_a_broker_that_is_down_fails_the_startup_with_a_readable_message() -> None:
    """The operator sees the broker and its address at the end of the log, no secret, and no hundred lines above."""
    address = f"127.0.0.1:{free_port()}"
    lifespan = emitter_lifespan(f"redis://user:hunter2@{address}", startup_timeout=0.2)
    server = Server(orders(lifespan=lifespan))
    assert await server.start() == "lifespan.startup.failed"
    told: str = server.answers[0]["message"]
    assert address in told.splitlines()[-1]
    assert "StartupError" in told.splitlines()[-1]
    assert "hunter2" not in told
    assert len(told.splitlines()) < 30


async def test_the_middleware_tells_the_message_alone() -> None:
    """Nobody reads a traceback to learn that a broker is down."""
    address = f"127.0.0.1:{free_port()}"
    server = Server(EmitterMiddleware(silent, f"redis://user:hunter2@{address}", startup_timeout=0.2))
    tasks = asyncio.all_tasks()
    assert await server.start() == "lifespan.startup.failed"
    told: str = server.answers[0]["message"]
    assert told.count("\n") == 0
    assert told.startswith("not connected")
    assert address in told
    assert "hunter2" not in told
    assert server.task is not None
    await server.task
    assert isinstance(server.error, StartupError), "TestClient goes on unless the app raises"
    assert asyncio.all_tasks() == tasks


# -- EmitterMiddleware ---------------------------------------------------------------------------------------------


async def emits(scope: Scope, receive: Receive, send: Send) -> None:
    """A raw ASGI app without lifespan, which raises on it, as Django's handler does."""
    if scope["type"] not in ("http", "websocket"):
        raise ValueError(f"cannot handle {scope['type']}")
    await get_emitter(scope).emit(OrderPlaced(number=7))


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Returns on whatever it does not know."""


async def careless(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers everything as if it were a request."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize("app", [emits, silent, careless])
async def test_the_middleware_answers_the_lifespan_for_an_app_that_has_none(app: Any) -> None:
    """Without an answer uvicorn would serve with nothing started."""
    wrapped = EmitterMiddleware(app, MEMORY)
    server = Server(wrapped)
    assert await server.start() == "lifespan.startup.complete"
    emitter = get_emitter(wrapped)
    await server.get()
    assert await server.stop() == "lifespan.shutdown.complete"
    assert server.error is None
    assert await is_closed(emitter)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_the_middleware_reaches_requests_and_websockets(kind: str, state: bool) -> None:
    """Also under a server that has no lifespan state."""
    wrapped = EmitterMiddleware(emits, MEMORY)
    async with Server(wrapped, state=state) as server:
        await server.get(kind=kind)
        assert sent(get_emitter(wrapped)) == [b'{"number":7}']


async def test_without_a_lifespan_the_middlewares_emitter_refuses() -> None:
    """An event is not swallowed because the server runs no lifespan."""
    with pytest.raises(NotStartedError, match="never opened"):
        await Server(EmitterMiddleware(emits, MEMORY)).get()


@pytest.mark.parametrize("inside", [True, False], ids=["add_middleware", "wrapped"])
async def test_the_middleware_goes_around_the_lifespan_of_a_starlette_app(inside: bool) -> None:
    """The app's own startup and shutdown may emit, and its state stays its own."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        await get_emitter(app).emit(OrderPlaced(number=1))
        yield {"database": "db"}
        await get_emitter(app).emit(OrderPlaced(number=3))

    app = Starlette(routes=[Route("/{number:int}", place)], lifespan=mine)
    if inside:
        app.add_middleware(EmitterMiddleware, config=MEMORY)
    served = app if inside else EmitterMiddleware(app, MEMORY)
    async with Server(served) as server:
        assert server.state is not None
        assert server.state["database"] == "db"
        assert (await server.get("/2"))[0]["status"] == 200
        emitter = get_emitter(app)
        assert get_emitter(served) is emitter
    assert sent(emitter) == [b'{"number":1}', b'{"number":2}', b'{"number":3}']
    assert await is_closed(emitter)


async def test_the_middleware_takes_the_app_by_keyword() -> None:
    """Older versions of FastAPI and Starlette give it so; a type checker need not know."""
    make: Any = EmitterMiddleware
    async with Server(make(app=emits, config=MEMORY)) as server:
        await server.get()


def test_the_middleware_works_under_test_client() -> None:
    """With `with`; without, the error says so."""
    app = EmitterMiddleware(orders(), MEMORY)
    with TestClient(app) as client:
        assert client.get("/").text == "placed"
    with pytest.raises(NotStartedError, match="`with TestClient"):
        TestClient(app).get("/")


def test_test_client_does_not_enter_when_a_broker_is_down() -> None:
    """A test against nothing must not pass."""
    url = f"redis://127.0.0.1:{free_port()}"
    with pytest.raises(StartupError):
        with TestClient(EmitterMiddleware(orders(), url, startup_timeout=0.2)):
            pass


class Log:
    """A raw app that follows a script for its lifespan, and the emitter it saw."""

    def __init__(self, script: Callable[[Receive, Send], Awaitable[None]]) -> None:
        self._script = script
        self.emitter: EventEmitter | None = None
        self.closed: dict[str, bool] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.emitter = get_emitter(scope)
            await self._script(receive, send)


async def run_with_log(script: Callable[[Receive, Send], Awaitable[None]]) -> tuple[Server, Log, list[bool]]:
    """Start the script's app under the middleware; `closed`: was the emitter closed at each answer to the server?"""
    log = Log(script)
    closed: list[bool] = []

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            assert log.emitter is not None
            closed.append(await is_closed(log.emitter))
            await send(message)

        await EmitterMiddleware(log, MEMORY)(scope, receive, noting)

    server = Server(watched)
    await server.start()
    return server, log, closed


async def test_a_startup_that_fails_is_passed_on_after_the_brokers_are_closed() -> None:
    """The server may end the process at that very message."""

    async def script(receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    server, _, closed = await run_with_log(script)
    assert server.answers == [{"type": "lifespan.startup.failed", "message": "no database"}]
    assert closed == [True]


async def test_a_startup_that_raises_is_a_startup_that_failed() -> None:
    """Left to the server it would mean "lifespan unsupported", and the app would serve without having started."""

    async def script(receive: Receive, send: Send) -> None:
        await receive()
        raise KeyError("DATABASE_URL")

    server, _, closed = await run_with_log(script)
    assert server.answers == [{"type": "lifespan.startup.failed", "message": "KeyError: 'DATABASE_URL'"}]
    assert closed == [True]


async def test_the_end_of_the_shutdown_is_told_after_the_brokers_are_closed() -> None:
    """A server that has the answer may end the process before the last events are flushed."""

    async def script(receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    server, _, closed = await run_with_log(script)
    assert await server.stop() == "lifespan.shutdown.complete"
    assert closed == [False, True]


async def test_a_shutdown_that_fails_is_passed_on_after_the_brokers_are_closed() -> None:
    """What the app's shutdown emitted is flushed even then."""

    async def script(receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        raise RuntimeError("cannot close")

    server, _, closed = await run_with_log(script)
    assert await server.stop() == "lifespan.shutdown.failed"
    assert server.answers[-1]["message"] == "RuntimeError: cannot close"
    assert str(server.error) == "cannot close"
    assert closed == [False, True]


@pytest.mark.parametrize("raises", [True, False])
async def test_an_app_whose_lifespan_ends_early_keeps_its_emitter(raises: bool) -> None:
    """Requests go on being served until the server says otherwise."""

    async def script(receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if raises:
            raise RuntimeError("a background task of the app failed")

    server, log, closed = await run_with_log(script)
    assert log.emitter is not None
    assert not await is_closed(log.emitter)
    assert await server.stop() == ("lifespan.shutdown.failed" if raises else "lifespan.shutdown.complete")
    assert closed == [False, True]


async def test_a_server_that_cancels_the_lifespan_closes_the_brokers() -> None:
    """gunicorn's own worker does, and others on a second Ctrl-C."""
    app = EmitterMiddleware(orders(), MEMORY)
    server = Server(app)
    await server.start()
    emitter = get_emitter(app)
    assert server.task is not None
    server.task.cancel()
    await asyncio.wait({server.task})
    assert await is_closed(emitter)


async def test_an_app_that_yields_the_middlewares_name_fails_the_startup() -> None:
    """Otherwise its own object would be overwritten in every request."""

    @asynccontextmanager
    async def mine(app: Starlette) -> AsyncGenerator[dict[str, Any], None]:
        yield {"emitter": "mine"}

    server = Server(EmitterMiddleware(orders(lifespan=mine), MEMORY))
    assert await server.start() == "lifespan.startup.failed"
    assert "EmitterMiddleware(..., name='events')" in server.answers[0]["message"]


async def test_middlewares_of_two_names_nest() -> None:
    """As lifespans do."""
    app = orders()
    async with Server(EmitterMiddleware(EmitterMiddleware(app, MEMORY), MEMORY, name="alerts")) as server:
        assert server.state is not None
        assert set(server.state) == {"emitter", "alerts"}
        assert get_emitter(app, "alerts") is server.state["alerts"]


async def test_a_router_that_is_the_app_works() -> None:
    """Starlette's router calls its lifespan with no app at all."""
    async with Server(Router(routes=[Route("/", place)], lifespan=emitter_lifespan(MEMORY))) as server:
        assert (await server.get())[0]["status"] == 200


# -- import --------------------------------------------------------------------------------------------------------


def test_without_starlette_the_import_names_the_command() -> None:
    """Told where the module is used, not by a stranger's traceback."""
    told = import_without("starlette", "dispytch_integrations.starlette")
    assert told.endswith("starlette needs starlette: pip install 'dispytch-integrations[starlette]'")


def test_a_lifespan_that_was_not_called_is_told() -> None:
    """`lifespan=emitter_lifespan` without parentheses is given the app in place of a URL."""
    with pytest.raises(ConfigurationError, match=r"lifespan=emitter_lifespan\('kafka"):
        with TestClient(orders(lifespan=emitter_lifespan)):
            pass
