"""What a FastAPI app can rely on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any
from unittest.mock import AsyncMock, call

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.blocking import BlockingEmitter
from dispytch_integrations.errors import NotStartedError, WrongLoopError
from dispytch_integrations.fastapi import (
    BlockingEmitterDep,
    EmitterDep,
    blocking_emitter_dependency,
    emitter_dependency,
    emitter_lifespan,
    get_blocking_emitter,
    get_emitter,
)
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.starlette import EmitterMiddleware
from dispytch_integrations.starlette import get_emitter as emitter_of
from tests.apps.asgi import Server, import_without

MEMORY = "memory://"

AlertsDep = Annotated[EventEmitter, Depends(emitter_dependency("alerts"))]
BlockingAlertsDep = Annotated[BlockingEmitter, Depends(blocking_emitter_dependency("alerts"))]


class OrderPlaced(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    number: int


router = APIRouter()


@router.get("/async/{number}")
async def place(number: int, emitter: EmitterDep) -> None:
    await emitter.emit(OrderPlaced(number=number))


@router.get("/sync/{number}")
def place_in_thread(number: int, emitter: BlockingEmitterDep) -> None:
    emitter.emit(OrderPlaced(number=number))
    emitter.emit_many([OrderPlaced(number=number + 1)])


@router.get("/blocked")
async def block(emitter: BlockingEmitterDep) -> None:
    emitter.emit(OrderPlaced(number=0))


@router.get("/alert")
async def alert(emitter: AlertsDep) -> None:
    await emitter.emit(OrderPlaced(number=1))


@router.get("/alert-sync")
def alert_in_thread(emitter: BlockingAlertsDep) -> None:
    emitter.emit(OrderPlaced(number=2))


def orders(**keywords: Any) -> FastAPI:
    app = FastAPI(**keywords)
    app.include_router(router)
    return app


def sent(emitter: EventEmitter) -> list[int]:
    producer = emitter.producer
    assert isinstance(producer, MemoryProducer)
    return [OrderPlaced.model_validate_json(message.payload or b"").number for message in producer.sent]


# -- dependencies --------------------------------------------------------------------------------------------------


def test_async_and_sync_routes_emit_over_the_same_connections() -> None:
    """The five lines that everybody starts with, and their twin for `def` routes."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as client:
        assert client.get("/async/1").status_code == 200
        assert client.get("/sync/2").status_code == 200
        emitter = emitter_of(app)
    assert sent(emitter) == [1, 2, 3]


def test_a_blocking_emitter_in_an_async_route_refuses_and_says_what_to_write() -> None:
    """It would wait for the loop that it blocks: the app would hang, and the event never go out."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    with TestClient(app) as client, pytest.raises(WrongLoopError, match="EmitterDep"):
        client.get("/blocked")


def test_named_emitters_have_dependencies_of_their_own() -> None:
    """Two clusters, two names, in `async def` and `def` routes."""
    app = orders(lifespan=emitter_lifespan(MEMORY, name="alerts", lifespan=emitter_lifespan(MEMORY)))
    with TestClient(app) as client:
        client.get("/alert")
        client.get("/alert-sync")
        alerts, emitter = emitter_of(app, "alerts"), emitter_of(app)
    assert (sent(alerts), sent(emitter)) == ([1, 2], [])


@pytest.mark.parametrize(
    ("dependency", "path", "numbers"),
    [
        (get_emitter, "/async/1", [1]),
        (get_emitter, "/sync/2", [2, 3]),
        # Starlette's function of the same name, which a page may import beside ours.
        (emitter_of, "/async/1", [1]),
        (emitter_of, "/sync/2", [2, 3]),
        (emitter_dependency("alerts"), "/alert", [1]),
        (emitter_dependency("alerts"), "/alert-sync", [2]),
    ],
)
def test_an_overridden_dependency_needs_no_broker_and_no_lifespan(
    dependency: Any, path: str, numbers: list[int]
) -> None:
    """FastAPI's own way to test a route; one override serves the async and the blocking emitter."""
    app = orders()
    emitter = EventEmitter(MemoryProducer())
    app.dependency_overrides[dependency] = lambda: emitter
    assert TestClient(app).get(path).status_code == 200
    assert sent(emitter) == numbers


class Fake:
    """An emitter of somebody's tests."""

    def __init__(self) -> None:
        self.seen: list[EventBase] = []

    async def emit(self, event: EventBase) -> None:
        self.seen.append(event)

    def emit_many(self, events: Iterable[EventBase]) -> None:
        raise RuntimeError(f"as told, with {len(list(events))}")


def test_routes_run_over_a_mock_or_a_fake() -> None:
    """An emitter is an object that one can swap out: in `def` routes, too, its own methods are called."""
    app = orders()
    mock, fake = AsyncMock(spec=EventEmitter), Fake()
    app.dependency_overrides[get_emitter] = lambda: mock
    client = TestClient(app)
    assert (client.get("/async/1").status_code, client.get("/sync/2").status_code) == (200, 200)
    assert mock.emit.await_args_list == [call(OrderPlaced(number=1)), call(OrderPlaced(number=2))]
    mock.emit_many.assert_awaited_once_with([OrderPlaced(number=3)])
    app.dependency_overrides[get_emitter] = lambda: fake
    with pytest.raises(RuntimeError, match="as told, with 1"):
        client.get("/sync/4")
    assert fake.seen == [OrderPlaced(number=4)]


def test_the_dependency_of_a_name_is_one_function() -> None:
    """Otherwise an override would be for a function that no route uses."""
    assert emitter_dependency("alerts") is emitter_dependency("alerts")
    assert emitter_dependency("emitter") is get_emitter
    assert blocking_emitter_dependency("emitter") is get_blocking_emitter


def test_the_emitter_is_no_parameter_of_the_api() -> None:
    """Clients must not see it in the documentation."""
    described = orders().openapi()["paths"]
    assert [parameter["name"] for parameter in described["/async/{number}"]["get"]["parameters"]] == ["number"]
    assert "parameters" not in described["/alert-sync"]["get"]


def test_websockets_background_tasks_streams_and_deep_dependencies_emit() -> None:
    """Events are emitted wherever an app's code runs, also when the response is long gone."""
    app = FastAPI(lifespan=emitter_lifespan(MEMORY))

    @app.websocket("/ws")
    async def websocket(socket: WebSocket, emitter: EmitterDep) -> None:
        await socket.accept()
        await emitter.emit(OrderPlaced(number=1))
        await socket.close()

    @app.get("/later")
    async def later(tasks: BackgroundTasks, emitter: EmitterDep) -> None:
        tasks.add_task(emitter.emit, OrderPlaced(number=2))

    @app.get("/later-sync")
    def later_in_thread(tasks: BackgroundTasks, emitter: BlockingEmitterDep) -> None:
        tasks.add_task(emitter.emit, OrderPlaced(number=3))

    @app.get("/stream")
    async def stream(emitter: EmitterDep) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            await emitter.emit(OrderPlaced(number=4))
            yield "4"

        return StreamingResponse(parts())

    @app.get("/deep")
    async def deep(service: Annotated[Service, Depends()]) -> None:
        await service.place(5)

    @app.get("/audited", dependencies=[Depends(audit)])
    async def audited() -> None: ...

    with TestClient(app) as client:
        with client.websocket_connect("/ws") as socket:
            assert socket.receive()["type"] == "websocket.close"
        for path in ("/later", "/later-sync", "/stream", "/deep", "/audited"):
            assert client.get(path).status_code == 200
        emitter = emitter_of(app)
    assert sent(emitter) == [1, 2, 3, 4, 5, 6]


class Service:
    def __init__(self, emitter: EmitterDep) -> None:
        self._emitter = emitter

    async def place(self, number: int) -> None:
        await self._emitter.emit(OrderPlaced(number=number))


async def audit(emitter: EmitterDep) -> AsyncGenerator[None, None]:
    yield
    await emitter.emit(OrderPlaced(number=6))


# -- lifespans -----------------------------------------------------------------------------------------------------


def test_a_routers_lifespan_is_merged_into_the_apps() -> None:
    """A module may bring its router and the emitter that it needs."""
    alerts = APIRouter(lifespan=emitter_lifespan(MEMORY, name="alerts"))
    alerts.add_api_route("/alert", alert)
    app = FastAPI(lifespan=emitter_lifespan(MEMORY))
    app.include_router(router)
    app.include_router(alerts)
    with TestClient(app) as client:
        assert client.get("/async/1").status_code == 200
        assert client.get("/alert").status_code == 200
        assert sent(emitter_of(app, "alerts")) == [1]


def test_a_router_included_twice_opens_its_emitter_once() -> None:
    """FastAPI enters its lifespan twice, and leaves it twice."""
    opened: list[str] = []

    def url() -> str:
        opened.append(MEMORY)
        return MEMORY

    twice = APIRouter(lifespan=emitter_lifespan(url))
    twice.add_api_route("/async/{number}", place)
    app = FastAPI()
    app.include_router(twice, prefix="/v1")
    app.include_router(twice, prefix="/v2")
    with TestClient(app) as client:
        client.get("/v1/async/1")
        client.get("/v2/async/2")
        emitter = emitter_of(app)
    assert sent(emitter) == [1, 2]
    assert opened == [MEMORY]


async def test_an_app_and_its_router_with_emitters_of_one_name_fail_the_startup() -> None:
    """FastAPI's merge would drop one of the two without a word."""
    app = FastAPI(lifespan=emitter_lifespan(MEMORY))
    app.include_router(APIRouter(lifespan=emitter_lifespan(MEMORY)))
    server = Server(app)
    assert await server.start() == "lifespan.startup.failed"
    assert "two emitters called 'emitter'" in server.answers[0]["message"]


def test_hand_written_lifespans_and_middleware_work_the_same() -> None:
    """The dependency does not care who has opened the emitter."""

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncGenerator[dict[str, EventEmitter], None]:
        async with connect(MEMORY) as emitter:
            yield {"emitter": emitter}

    with TestClient(orders(lifespan=mine)) as client:
        assert client.get("/async/1").status_code == client.get("/sync/1").status_code == 200
    app = orders()
    app.add_middleware(EmitterMiddleware, config=MEMORY)
    with TestClient(app) as client:
        assert client.get("/async/1").status_code == client.get("/sync/1").status_code == 200


def test_mounted_apps_use_the_emitter_of_the_outermost() -> None:
    """The fix that the error names has to work."""
    app = FastAPI(lifespan=emitter_lifespan(MEMORY))
    app.mount("/shop", orders())
    with TestClient(app) as client:
        assert client.get("/shop/async/1").status_code == client.get("/shop/sync/1").status_code == 200


async def test_asgi_transport_around_the_apps_lifespan_context_works() -> None:
    """As the error says for async tests, which cannot use TestClient."""
    app = orders(lifespan=emitter_lifespan(MEMORY))
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/async/1")).status_code == 200
            assert (await client.get("/sync/1")).status_code == 200


# -- what is missing is told ---------------------------------------------------------------------------------------


def failing(client: TestClient, path: str) -> str:
    with pytest.raises(NotStartedError) as caught:
        client.get(path)
    return str(caught.value)


@pytest.mark.parametrize("path", ["/async/1", "/sync/1"])
def test_a_missing_lifespan_is_told_at_the_injection(path: str) -> None:
    """Before the route has done half of its work."""
    with TestClient(orders()) as client:
        assert "write FastAPI(lifespan=emitter_lifespan('kafka://localhost:9092'))" in failing(client, path)


def test_a_test_client_without_with_is_named_though_routers_hide_the_lifespan() -> None:
    """`include_router` wraps the app's lifespan, so that nobody can see what it was."""
    assert "`with TestClient(app) as client:`" in failing(
        TestClient(orders(lifespan=emitter_lifespan(MEMORY))), "/alert"
    )


def test_a_lifespan_on_a_mounted_app_is_named() -> None:
    """FastAPI never runs it."""
    app = FastAPI()
    app.mount("/shop", orders(lifespan=emitter_lifespan(MEMORY)))
    with TestClient(app) as client:
        assert "mounted at '/shop'" in failing(client, "/shop/async/1")


def test_ignored_startup_functions_are_named() -> None:
    """FastAPI drops them without a word as soon as there is a lifespan."""

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncGenerator[None, None]:
        yield

    async def open_emitter() -> None:
        raise AssertionError("never called")

    app = FastAPI(lifespan=mine, on_startup=[open_emitter])
    app.add_api_route("/", alert)
    with TestClient(app) as client:
        assert "on_startup functions are ignored" in failing(client, "/")


def test_another_name_is_answered_with_the_names_there_are() -> None:
    """A typo is seen at a glance."""
    with TestClient(orders(lifespan=emitter_lifespan(MEMORY, name="alert"))) as client:
        assert "the app has 'alert'" in failing(client, "/alert")


@pytest.mark.parametrize("package", ["fastapi", "starlette"])
def test_without_fastapi_the_import_names_the_command(package: str) -> None:
    """Told where the module is used, not by a stranger's traceback."""
    told = import_without(package, "dispytch_integrations.fastapi")
    assert told.endswith("dispytch_integrations.fastapi needs fastapi: pip install 'dispytch-integrations[fastapi]'")
