"""The event catalogue served by FastAPI and Starlette: who sees it, when, what is in it, and that it is made once."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser, requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from dispytch_integrations import EventBase, asyncapi, connect
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.fastapi import catalog_router, emitter_lifespan
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.starlette import catalog_routes
from tests.support.chromium import Tab
from tests.support.servers import ROOT, serving
from tests.test_catalog_page import browser, tab

__all__ = ["browser", "tab"]

SECRET = "hunter2-catalog"


class ServedOrder(EventBase):
    """A customer has paid."""

    __route__ = KafkaEventRoute(topic="served.orders")
    __event_type__ = "served.order"

    order_id: int = 1


class ServedVisit(EventBase):
    """Somebody looks."""

    __route__ = RedisStreamEventRoute(stream="served.visits")
    __event_type__ = "served.visit"

    seconds: float = 1.5


EVENTS: list[type[EventBase]] = [ServedOrder, ServedVisit]
PATHS = ("/events", "/events/asyncapi.json", "/events/asyncapi.yaml")

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
Make = Callable[..., Any]


def _with_events(options: dict[str, Any]) -> dict[str, Any]:
    return {"events": EVENTS, **options}


def _fastapi(lifespan: Lifespan | None = None, *, debug: bool = False, **options: Any) -> FastAPI:
    app = FastAPI(debug=debug, lifespan=lifespan)
    app.include_router(catalog_router("/events", **_with_events(options)))
    return app


def _starlette(lifespan: Lifespan | None = None, *, debug: bool = False, **options: Any) -> Starlette:
    return Starlette(debug, catalog_routes("/events", **_with_events(options)), lifespan=lifespan)


@pytest.fixture(params=[_fastapi, _starlette], ids=["fastapi", "starlette"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an app with the catalogue at /events."""
    monkeypatch.delenv("DISPYTCH_CATALOG", raising=False)
    made: Make = request.param
    return made


def _on_memory() -> Any:
    return emitter_lifespan({"default": "memory://kafka", "visits": "memory://redis"})


# -- what is answered ----------------------------------------------------------------------------------------------


def test_the_page_and_the_document_are_there(make: Make) -> None:
    """People open the one, generators of code fetch the other: three paths, one truth."""
    with TestClient(make(_on_memory(), debug=True, title="Shop", version="2.4.0")) as client:
        page, as_json, as_yaml = (client.get(path) for path in PATHS)
    assert [each.status_code for each in (page, as_json, as_yaml)] == [200, 200, 200]
    document = as_json.json()
    assert document["info"]["title"] == "Shop"
    assert document["info"]["version"] == "2.4.0"
    assert {message["name"] for message in document["components"]["messages"].values()} == {
        "served.order",
        "served.visit",
    }
    assert set(document["servers"]) == {"default", "visits"}
    assert yaml.safe_load(as_yaml.text) == document
    assert '<body data-served="true">' in page.text
    types = [each.headers["content-type"] for each in (page, as_json, as_yaml)]
    assert types == ["text/html; charset=utf-8", "application/json", "application/yaml"]


def test_browsers_are_told_to_ask_again_and_to_run_nothing_else(make: Make) -> None:
    """The page changes with the next deployment, is for those who may see it, and must not become somebody's tool."""
    with TestClient(make(_on_memory(), enabled=True)) as client:
        for path in PATHS:
            found = client.get(path)
            assert found.headers["cache-control"] == "private, no-cache"
            assert found.headers["x-content-type-options"] == "nosniff"
            known = client.get(path, headers={"If-None-Match": f'"other", W/{found.headers["etag"]}'})
            assert (known.status_code, known.content) == (304, b"")
            assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
            head = client.head(path)
            assert (head.status_code, head.headers["etag"]) == (200, found.headers["etag"])
            assert client.post(path).status_code == 405
        policy = client.get("/events").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'self'" in policy
    assert "unsafe" not in policy


def test_servers_are_those_of_the_apps_brokers_without_secrets(make: Make) -> None:
    """The page says where events go, and never with which password."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[dict[str, Any], None]:
        url = f"redis://shop:{SECRET}@127.0.0.1:1/0"
        async with connect({"default": {"url": url, "required": False}}) as emitter:
            yield {"emitter": emitter}

    with TestClient(make(lifespan, debug=True, events=[ServedVisit])) as client:
        answers = [client.get(path) for path in PATHS]
    assert answers[1].json()["servers"]["default"]["host"] == "127.0.0.1:1"
    assert [each.status_code for each in answers if SECRET in each.text or "shop:" in each.text] == []


def test_of_several_emitters_the_one_called_emitter_is_described(make: Make) -> None:
    """The others have their own names in the code, and would be guesses here."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[dict[str, Any], None]:
        async with connect("memory://redis") as alerts, connect("memory://kafka") as emitter:
            yield {"alerts": alerts, "emitter": emitter}

    with TestClient(make(lifespan, debug=True, events=[ServedOrder])) as client:
        assert client.get(PATHS[1]).json()["servers"]["default"]["x-dispytch-transport"] == "kafka"


def test_an_app_without_an_emitter_has_a_catalogue_without_servers(make: Make) -> None:
    """A service that only documents, or a test without a lifespan: the events are there all the same."""
    client = TestClient(make(debug=True))
    assert client.get("/events").status_code == 200
    document = client.get(PATHS[1]).json()
    assert not document.get("servers")
    assert len(document["components"]["messages"]) == 2


def test_it_is_made_once_for_all_threads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five hundred classes take a second: not per request, and not once for each of those who wait."""
    made: list[threading.Thread] = []
    describe = asyncapi.describe

    def counted(*arguments: Any, **options: Any) -> dict[str, Any]:
        made.append(threading.current_thread())
        return describe(*arguments, **options)

    monkeypatch.setattr(asyncapi, "describe", counted)
    with TestClient(make(_on_memory(), debug=True)) as client, ThreadPoolExecutor(8) as threads:
        assert made == []  # Nothing at start.
        answers = list(threads.map(lambda number: client.get(PATHS[number % 3]), range(24)))
        loops = [thread for thread in threading.enumerate() if "asyncio" in thread.name.lower()]
    assert {each.status_code for each in answers} == {200}
    assert len(made) == 1
    assert made[0] not in loops


def test_an_app_that_starts_again_describes_its_new_brokers(make: Make) -> None:
    """Two TestClients around one app, or a reload: yesterday's servers must not stay."""
    urls = iter(["memory://kafka", "memory://"])

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[dict[str, Any], None]:
        async with connect(next(urls)) as emitter:
            yield {"emitter": emitter}

    app = make(lifespan, debug=True, events=[ServedOrder])
    seen: list[str] = []
    for _ in range(2):
        with TestClient(app) as client:
            seen.append(client.get(PATHS[1]).json()["servers"]["default"]["x-dispytch-transport"])
    assert seen == ["kafka", "memory"]


def test_yaml_needs_no_library(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served must not depend on what else is installed in the container."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert TestClient(make(debug=True)).get(PATHS[2]).text.startswith("asyncapi: ")


# -- on and off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("debug", "enabled", "environment", "on"),
    [
        (True, None, None, True),
        (False, None, None, False),
        (False, None, "1", True),
        (False, None, "true", True),
        (True, None, "0", False),
        (False, True, None, True),
        (True, False, None, False),
        (False, False, "1", False),
        (False, True, "0", True),
        (False, None, "perhaps", False),
    ],
)
def test_it_is_off_in_production_unless_switched_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, debug: bool, enabled: bool | None, environment: str | None, on: bool
) -> None:
    """Names of topics and fields are nobody's business by accident: the code decides, the environment, or debug."""
    if environment is not None:
        monkeypatch.setenv("DISPYTCH_CATALOG", environment)
    client = TestClient(make(debug=debug, enabled=enabled))
    assert {client.get(path).status_code for path in PATHS} == {200 if on else 404}


def test_that_it_is_off_is_logged_once_with_what_to_write(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Who wonders about the 404 finds the answer in the log, and a scanner does not fill it."""
    client = TestClient(make())
    with caplog.at_level(logging.INFO, "dispytch_integrations"):
        assert caplog.records == []
        for _ in range(3):
            client.get("/events")
    [record] = [each for each in caplog.records if each.name.startswith("dispytch_integrations")]
    assert "not in debug mode" in record.getMessage()
    assert "enabled=True" in record.getMessage()
    assert "DISPYTCH_CATALOG=1" in record.getMessage()


def test_what_is_off_looks_like_what_is_not_there(make: Make) -> None:
    """A stranger learns nothing from the answer."""
    client = TestClient(make())
    off, missing = client.get("/events"), client.get("/nothing")
    assert (off.status_code, off.text) == (missing.status_code, missing.text)


@pytest.mark.parametrize("part", [catalog_router, catalog_routes], ids=["fastapi", "starlette"])
def test_mistakes_are_told_where_they_are_written(part: Callable[..., Any]) -> None:
    """A module that is misspelt is found when the app is made, and not by the first visitor."""
    with pytest.raises(ConfigurationError, match=r"shop_without_events.*there is no such module"):
        part("/events", events="shop_without_events.events")
    with pytest.raises(ConfigurationError, match="does not begin with a slash; write '/events'"):
        part("events")
    with pytest.raises(ConfigurationError, match="enabled='yes'"):
        part("/events", enabled="yes")


# -- who may see it ------------------------------------------------------------------------------------------------


def test_fastapis_dependencies_guard_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same login as for the app's other routes: page, JSON and YAML."""
    monkeypatch.delenv("DISPYTCH_CATALOG", raising=False)
    login = HTTPBasic()

    def admin(credentials: HTTPBasicCredentials = Depends(login)) -> None:  # noqa: B008
        if credentials.username != "admin":
            raise HTTPException(403)

    client = TestClient(_fastapi(enabled=True, dependencies=[Depends(admin)]))
    for path in PATHS:
        assert client.get(path).status_code == 401
        assert client.head(path).status_code == 401
        assert client.get(path, auth=("guest", "x")).status_code == 403
        assert client.get(path, auth=("admin", "x")).status_code == 200


class _ByHeader(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("x-user")
        return None if name is None else (AuthCredentials([name]), SimpleUser(name))


class _Admins:
    """Middleware around a group of routes."""

    def __init__(self, app: Any) -> None:
        @requires("admin")
        async def allowed(request: Any) -> Any:
            return None

        self.app, self._allowed = app, allowed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        await self._allowed(Request(scope))
        await self.app(scope, receive, send)


def test_starlettes_middleware_guards_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mount with middleware, as for any routes."""
    monkeypatch.delenv("DISPYTCH_CATALOG", raising=False)
    routes = catalog_routes("/events", events=EVENTS, enabled=True)
    inner = Mount("/internal", routes=routes, middleware=[Middleware(_Admins)])
    app = Starlette(routes=[inner], middleware=[Middleware(AuthenticationMiddleware, backend=_ByHeader())])
    client = TestClient(app)
    for path in PATHS:
        assert client.get(f"/internal{path}").status_code == 403
        assert client.get(f"/internal{path}", headers={"x-user": "guest"}).status_code == 403
        assert client.get(f"/internal{path}", headers={"x-user": "admin"}).status_code == 200


# -- where it is ---------------------------------------------------------------------------------------------------


def test_it_is_in_the_openapi_document_only_if_asked_for() -> None:
    """It is about the app, not a part of its API."""
    assert _fastapi(debug=True).openapi()["paths"] == {}
    assert set(_fastapi(debug=True, include_in_schema=True).openapi()["paths"]) == set(PATHS)


def test_any_path_will_do() -> None:
    """At the root of a host of its own, below a prefix, with a slash at the end."""
    root = TestClient(Starlette(True, [*catalog_routes("/", events=EVENTS), Route("/other", lambda request: None)]))
    assert [root.get(path).status_code for path in ("/", "/asyncapi.json")] == [200, 200]
    slash = TestClient(Starlette(True, catalog_routes("/deep/events/", events=EVENTS)))
    assert [slash.get(f"/deep{path}").status_code for path in PATHS] == [200, 200, 200]
    app = FastAPI(debug=True)
    app.include_router(catalog_router("/events", events=EVENTS), prefix="/internal")
    assert [TestClient(app).get(f"/internal{path}").status_code for path in PATHS] == [200, 200, 200]


@pytest.fixture
def served_app(tmp_path: Path) -> Path:
    """A folder with an app, for a server."""
    (tmp_path / "catalog_shop.py").write_text(
        "from fastapi import FastAPI\n"
        "from dispytch_integrations.fastapi import catalog_router, emitter_lifespan\n"
        "from tests.test_catalog_serving import EVENTS\n"
        "app = FastAPI(lifespan=emitter_lifespan('memory://'), root_path='/proxied')\n"
        "app.include_router(catalog_router('/events', events=EVENTS), prefix='/internal')\n"
    )
    return tmp_path


@pytest.mark.timeout(120)
async def test_a_server_serves_it_to_a_browser(tab: Tab, served_app: Path) -> None:
    """Headers, policy and links together, as a browser takes them from uvicorn."""
    command = [sys.executable, "-m", "uvicorn", "catalog_shop:app", "--host", "127.0.0.1", "--port", "{port}"]
    environment = {"PYTHONPATH": f"{ROOT}:{served_app}", "DISPYTCH_CATALOG": "1"}
    async with serving(command, served_app, environment) as server:
        base = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=base, timeout=20) as client:
            await server.wait_for_output("running on")
            head = await client.head("/internal/events")
            assert (head.status_code, head.content) == (200, b"")
            await asyncio.to_thread(tab.open, f"{base}/internal/events#served.visit")
            assert await asyncio.to_thread(tab.text, "#name") == "ServedVisit"
            hrefs = "[...document.querySelectorAll('#tools a')].map((each) => each.href)"
            links = await asyncio.to_thread(tab.js, hrefs)
            assert links == [f"{base}/internal/events/asyncapi.json", f"{base}/internal/events/asyncapi.yaml"]
            for link in links:
                assert (await client.get(link)).status_code == 200
        assert tab.errors == []
