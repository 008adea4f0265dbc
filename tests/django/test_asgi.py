"""ASGI: brokers open before the first request and flushed after the last; the middleware in both kinds of stacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
from asgiref.sync import iscoroutinefunction as awaited  # pyright: ignore[reportDeprecated]  # Django's mark
from asgiref.sync import sync_to_async
from channels.consumer import AsyncConsumer  # type: ignore[import-untyped]
from channels.routing import ProtocolTypeRouter  # type: ignore[import-untyped]
from django.core.asgi import get_asgi_application as django_application
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory
from django.utils.decorators import sync_only_middleware
from pytest_django import Settings
from redis.asyncio import Redis

from dispytch_integrations import EventBase
from dispytch_integrations.django import Emitter, _asgi_warning, aemit, aemit_on_commit, emit, get_emitter
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.asgi import EmitterApplication, get_asgi_application
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.middleware import EmitterMiddleware
from dispytch_integrations.django.signals import broker_started, broker_stopped
from dispytch_integrations.errors import NotStartedError, StartupError
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.django.brokers import broker_at, sent
from tests.django.project.shop.events import OrderPlaced
from tests.support.brokers import free_port
from tests.support.proxy import TCPProxy

EMITTER_MIDDLEWARE = "dispytch_integrations.django.middleware.EmitterMiddleware"


class Connection:
    """One call of an ASGI application, as a server makes it."""

    def __init__(self, application: Any, scope: dict[str, Any]) -> None:
        self._questions: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answers: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] = asyncio.create_task(application(scope, self._questions.get, self._send))
        self._task.add_done_callback(lambda task: self._news.set())

    async def _send(self, message: dict[str, Any]) -> None:
        self._answers.append(message)
        self._news.set()

    async def ask(self, kind: str) -> dict[str, Any]:
        """Send a message, and wait for the answer; raises what the application raises instead."""
        self._news.clear()
        self._questions.put_nowait({"type": kind})
        await asyncio.wait_for(self._news.wait(), 20)
        if not self._answers:
            self._task.result()
        return self._answers.pop()

    async def ended(self) -> None:
        """Wait for the application's end; raises what it raised."""
        await asyncio.wait_for(self._task, 20)

    def close(self) -> None:
        """Leave."""
        self._task.cancel()


class Server(Connection):
    """The lifespan as a server speaks it."""

    def __init__(self, application: Any) -> None:
        super().__init__(application, {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}})

    async def startup(self) -> dict[str, Any]:
        return await self.ask("lifespan.startup")

    async def shutdown(self) -> dict[str, Any]:
        return await self.ask("lifespan.shutdown")


@asynccontextmanager
async def serving(application: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A server that runs the lifespan, and a client of it."""
    server = Server(application)
    assert await server.startup() == {"type": "lifespan.startup.complete"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://shop") as client:
        yield client
    assert await server.shutdown() == {"type": "lifespan.shutdown.complete"}
    await server.ended()


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[TCPProxy]:
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        yield proxy
        await proxy.resume()
        await asyncio.to_thread(connections.reset)


# -- the lifespan ----------------------------------------------------------------------------------------------------


async def test_startup_opens_and_shutdown_closes() -> None:
    """The first request does not wait for a connection, and none is left behind."""
    told: list[tuple[str, str]] = []

    def started(alias: str, **arguments: Any) -> None:
        told.append(("started", alias))

    def stopped(alias: str, **arguments: Any) -> None:
        told.append(("stopped", alias))

    broker_started.connect(started)
    broker_stopped.connect(stopped)
    application = get_asgi_application()
    assert connections.session is None, "importing asgi.py opens nothing"
    async with serving(application) as client:
        session = connections.session
        assert session is not None
        assert session.brokers.brokers["default"].state == "up"
        assert (await client.get("/aemit/1")).status_code == 201
        assert (await client.get("/emit/2")).status_code == 201
        assert [message.payload for message in sent()] == [b'{"number":1}', b'{"number":2}']
    assert connections.session is None
    assert session.brokers.brokers["default"].state == "stopped"
    assert told == [("started", "default"), ("stopped", "default")]
    broker_started.disconnect(started)
    broker_stopped.disconnect(stopped)


async def test_the_shutdown_waits_for_events_of_committed_transactions(
    proxy: TCPProxy, redis_url: str, unique: str
) -> None:
    """The server ends the process as soon as it has the answer: what was handed over must be confirmed by then."""

    class Late(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique)

        number: int

    with broker_at(f"redis://127.0.0.1:{proxy.port}/0", TIMEOUT=20, SHUTDOWN_TIMEOUT=20):
        server = Server(get_asgi_application())
        await server.startup()
        await proxy.stall()
        for number in range(10):
            await aemit_on_commit(Late(number=number))
        shutdown = asyncio.create_task(server.shutdown())
        done, _ = await asyncio.wait([shutdown], timeout=0.3)
        assert not done, "the broker has confirmed nothing yet"
        await proxy.resume()
        assert await shutdown == {"type": "lifespan.shutdown.complete"}
        async with Redis.from_url(redis_url) as redis:
            assert await redis.xlen(unique) == 10
            await redis.delete(unique)


async def test_after_the_shutdown_nothing_is_emitted() -> None:
    """An event that nobody would wait for is refused, with the reason."""
    async with serving(get_asgi_application()):
        pass
    with pytest.raises(NotStartedError, match="after the server's shutdown"):
        await aemit(OrderPlaced(number=1))
    with pytest.raises(NotStartedError, match="after the server's shutdown"):
        await sync_to_async(emit)(OrderPlaced(number=1))


async def test_an_application_may_be_started_again() -> None:
    """Tests do that, and servers that embed an application."""
    application = get_asgi_application()
    for number in range(2):
        async with serving(application) as client:
            assert (await client.get(f"/aemit/{number}")).status_code == 201
            assert len(sent()) == 1


async def test_two_applications_share_the_brokers() -> None:
    """Mounted twice in one process, the brokers live until both are down."""
    first, second = Server(get_asgi_application()), Server(get_asgi_application())
    await first.startup()
    session = connections.session
    await second.startup()
    assert connections.session is session
    await first.shutdown()
    await aemit(OrderPlaced(number=1))
    assert connections.session is session
    await second.shutdown()
    assert connections.session is None


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
async def test_a_broker_that_is_down_ends_the_server_with_a_message(scheme: str) -> None:
    """Under uvicorn an application that raises is served all the same, with nothing started: it has to be told."""
    address = f"127.0.0.1:{free_port()}"
    with broker_at(f"{scheme}://app:hunter2@{address}", STARTUP_TIMEOUT=0.2):
        server = Server(get_asgi_application())
        answer = await server.startup()
        with pytest.raises(StartupError) as raised:
            await server.ended()
    assert answer["type"] == "lifespan.startup.failed"
    assert f"broker 'default': {scheme}://{address}" in answer["message"]
    assert "not connected within startup_timeout=0.2 s" in answer["message"]
    assert "hunter2" not in f"{answer} {raised.value!r}"
    assert (raised.value.__cause__, raised.value.__suppress_context__) == (None, True), "no page of client libraries"


async def test_what_only_the_start_can_find_ends_the_server_too(settings: Settings) -> None:
    """A URL from a secret store is read then."""
    settings.DISPYTCH = {"default": {"URL": lambda: "kafak://h"}}
    server = Server(get_asgi_application())
    answer = await server.startup()
    assert answer["type"] == "lifespan.startup.failed"
    assert "nobody serves kafak" in answer["message"]
    with pytest.raises(SettingsError):
        await server.ended()


async def test_a_broker_that_is_not_required_does_not_hinder_the_start() -> None:
    """The shop sells while the broker of its statistics is down."""
    with broker_at(f"redis://127.0.0.1:{free_port()}/0", REQUIRED=False, STARTUP_TIMEOUT=0.2):
        async with serving(get_asgi_application()) as client:
            assert (await client.get("/process")).status_code == 200


async def test_all_else_is_djangos() -> None:
    """What Django does not know stays its own business."""
    application = get_asgi_application()
    assert isinstance(application, EmitterApplication)
    connection = Connection(application, {"type": "websocket"})
    with pytest.raises(ValueError, match="Django can only handle ASGI/HTTP connections, not websocket"):
        await connection.ask("websocket.connect")


# -- Channels --------------------------------------------------------------------------------------------------------


class Chat(AsyncConsumer):  # type: ignore[misc]  # channels carries no types
    """A consumer that emits."""

    async def websocket_connect(self, message: dict[str, Any]) -> None:
        await get_emitter().aemit(OrderPlaced(number=7))
        await self.send({"type": "websocket.accept"})


# Channels looks at the database connections of its thread, which other tests of this process may have opened.
@pytest.mark.django_db(transaction=True, databases=["default", "archive"])
async def test_with_channels_the_router_passes_the_lifespan_on(caplog: pytest.LogCaptureFixture) -> None:
    """The router of the documentation: lifespan and HTTP are ours, websockets are Channels'."""
    django = get_asgi_application()
    router = ProtocolTypeRouter({"http": django, "lifespan": django, "websocket": Chat.as_asgi()})
    async with serving(router) as client:
        assert connections.session is not None
        assert (await client.get("/aemit/1")).status_code == 201
        socket = Connection(router, {"type": "websocket", "path": "/"})
        assert await socket.ask("websocket.connect") == {"type": "websocket.accept"}
        assert [message.payload for message in sent()] == [b'{"number":1}', b'{"number":7}']
        socket.close()
    assert warnings(caplog) == []


async def test_with_channels_and_without_the_lifespan_it_warns(caplog: pytest.LogCaptureFixture) -> None:
    """A router that leaves the lifespan out works, late and without a flush: the warning names what to add."""
    router = ProtocolTypeRouter({"http": get_asgi_application()})
    with pytest.raises(ValueError, match="lifespan"):
        await Server(router).startup()
    await request(router, "/aemit/1")
    [warning] = warnings(caplog)
    assert '"lifespan"' in warning


# -- without our lifespan --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nobody_was_warned() -> Iterator[None]:
    """As in a process that has just started."""
    _asgi_warning.watch()
    yield
    _asgi_warning.watch()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "dispytch_integrations.django"]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


async def request(application: Any, path: str) -> int:
    """One request, as a server makes it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://shop") as client:
        return (await client.get(path)).status_code


async def test_the_first_request_without_our_lifespan_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """asgi.py with Django's own application works until the first deployment: the log says what will be lost."""
    application = django_application()
    assert await request(application, "/aemit/1") == 201
    [warning] = warnings(caplog)
    assert "from dispytch_integrations.django.asgi import get_asgi_application" in warning
    for number in range(2, 5):
        assert await request(application, f"/aemit/{number}") == 201
    assert len(warnings(caplog)) == 1
    assert len(sent()) == 4, "and the events are emitted"


async def test_with_our_lifespan_nobody_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    """A warning without a reason is the one that hides the next."""
    async with serving(get_asgi_application()) as client:
        assert (await client.get("/aemit/1")).status_code == 201
    assert warnings(caplog) == []


async def test_a_server_without_any_lifespan_is_warned_too(caplog: pytest.LogCaptureFixture) -> None:
    """daphne: our application alone does not help."""
    assert await request(get_asgi_application(), "/aemit/1") == 201
    assert len(warnings(caplog)) == 1


async def test_test_clients_are_not_warned(caplog: pytest.LogCaptureFixture) -> None:
    """They have no server, and need none."""
    assert (await AsyncClient().get("/aemit/1")).status_code == 201
    assert (await sync_to_async(Client().get)("/emit/2")).status_code == 201
    assert warnings(caplog) == []
    # And a server's first request after them is.
    assert await request(django_application(), "/aemit/3") == 201
    assert len(warnings(caplog)) == 1


# -- the middleware --------------------------------------------------------------------------------------------------


@sync_only_middleware
def sync_only(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """Somebody's middleware that makes Django adapt what is around it."""

    def middleware(request: HttpRequest) -> HttpResponse:
        return get_response(request)

    return middleware


SYNC_ONLY = f"{__name__}.sync_only"

every_stack = pytest.mark.parametrize(
    "middleware",
    [[EMITTER_MIDDLEWARE], [SYNC_ONLY, EMITTER_MIDDLEWARE], [EMITTER_MIDDLEWARE, SYNC_ONLY]],
    ids=["alone", "inside a sync one", "around a sync one"],
)


@every_stack
@pytest.mark.parametrize("path", ["/emit/1", "/aemit/1"], ids=["sync view", "async view"])
def test_requests_under_wsgi_have_an_emitter(middleware: list[str], path: str, settings: Settings) -> None:
    """Views of both kinds, in whatever order the middleware stands."""
    settings.MIDDLEWARE = middleware
    response = Client().get(path)
    assert response.status_code == 201
    assert isinstance(cast("Any", response.wsgi_request).emitter, Emitter)
    assert [message.payload for message in sent()] == [b'{"number":1}']


@every_stack
@pytest.mark.parametrize("path", ["/emit/1", "/aemit/1"], ids=["sync view", "async view"])
async def test_requests_under_asgi_have_an_emitter(middleware: list[str], path: str, settings: Settings) -> None:
    """The same under ASGI: a sync view runs in a thread there, an async one on the server's loop."""
    settings.MIDDLEWARE = middleware
    response = await AsyncClient().get(path)
    assert response.status_code == 201
    assert [message.payload for message in sent()] == [b'{"number":1}']


class Watching(EmitterMiddleware):
    """Says where it runs."""

    on_a_loop: list[bool] = []

    def __call__(self, request: HttpRequest) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.on_a_loop.append(False)
        else:
            self.on_a_loop.append(True)
        return super().__call__(request)


async def test_the_middleware_runs_where_the_server_does(settings: Settings) -> None:
    """Adapted by Django it would take a thread per request under ASGI, and an event loop per request under WSGI."""
    settings.MIDDLEWARE = [f"{__name__}.Watching"]
    Watching.on_a_loop.clear()
    await AsyncClient().get("/aemit/1")
    assert Watching.on_a_loop == [True]
    await sync_to_async(Client().get)("/emit/1")
    assert Watching.on_a_loop == [True, False]


def test_in_a_sync_stack_the_middleware_is_sync() -> None:
    """No event loop per request under WSGI."""
    middleware = EmitterMiddleware(lambda request: HttpResponse())
    assert not awaited(middleware)
    request = RequestFactory().get("/")
    assert isinstance(middleware(request), HttpResponse)
    assert isinstance(cast("Any", request).emitter, Emitter)


async def test_in_an_async_stack_the_middleware_is_async() -> None:
    """Django would else run it, and all that is inside it, in a thread."""

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    middleware = EmitterMiddleware(view)
    assert awaited(middleware)
    request = AsyncRequestFactory().get("/")
    assert isinstance(await cast("Awaitable[HttpResponse]", middleware(request)), HttpResponse)
    assert isinstance(cast("Any", request).emitter, Emitter)
