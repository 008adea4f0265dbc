"""An emitter for FastAPI's routes.

    from dispytch_integrations.fastapi import EmitterDep, emitter_lifespan

    app = FastAPI(lifespan=emitter_lifespan("kafka://localhost:9092"))

    @app.post("/orders")
    async def place_order(order: Order, emitter: EmitterDep) -> None:
        await emitter.emit(OrderPlaced(order_id=order.id))

In a `def` route, which FastAPI runs in a thread, ask for a BlockingEmitterDep: `emitter.emit(event)` without await.
In a test, `app.dependency_overrides[get_emitter] = lambda: EventEmitter(producer)` replaces both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from logging import getLogger
from typing import Annotated

from dispytch_integrations._asyncapi_classes import Events
from dispytch_integrations._find_emitter import of_scope
from dispytch_integrations._missing import is_missing
from dispytch_integrations.blocking import BlockingEmitter
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import MissingExtraError

try:
    from fastapi import APIRouter, Depends, params
    from starlette.requests import HTTPConnection
except ModuleNotFoundError as exc:
    if not is_missing(exc, "fastapi", "starlette"):
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.fastapi", extra="fastapi") from exc

from dispytch_integrations import starlette
from dispytch_integrations._blocking_double import blocking_over
from dispytch_integrations._catalog_routes import catalog_endpoints
from dispytch_integrations._catalog_serving import Catalog
from dispytch_integrations._health_routes import endpoints
from dispytch_integrations.health import HealthCheck, ReadyOn
from dispytch_integrations.starlette import emitter_lifespan

__all__ = [
    "BlockingEmitterDep",
    "EmitterDep",
    "blocking_emitter_dependency",
    "catalog_router",
    "emitter_dependency",
    "emitter_lifespan",
    "get_blocking_emitter",
    "get_emitter",
    "health_router",
]


# Dependencies are `async def`: FastAPI runs a sync one in its thread pool, which costs twenty times as much.


class _GetEmitter:
    """A dependency that `dependency_overrides` finds under the name of starlette's `get_emitter`, too.

    That one is no coroutine function, and who has both modules on a page takes either: the override would count for
    nothing, and nobody would say so.
    """

    __globals__ = globals()
    """Where FastAPI looks annotations up."""

    async def __call__(self, connection: HTTPConnection) -> EventEmitter:
        return of_scope(connection.scope, "emitter")

    def __eq__(self, other: object) -> bool:
        return other is self or other is starlette.get_emitter

    def __hash__(self) -> int:
        return hash(starlette.get_emitter)


get_emitter = _GetEmitter()
"""The dependency behind EmitterDep, and the key for `app.dependency_overrides`.

Raises NotStartedError when the app has no emitter, with the likely causes and what to write.
"""

EmitterDep = Annotated[EventEmitter, Depends(get_emitter)]
"""The app's emitter, for `async def` routes, WebSockets and dependencies."""


async def get_blocking_emitter(emitter: EmitterDep) -> BlockingEmitter:
    """The dependency behind BlockingEmitterDep; rests on `get_emitter`, so that overriding that one is enough."""
    return blocking_over(emitter, asyncio.get_running_loop())


BlockingEmitterDep = Annotated[BlockingEmitter, Depends(get_blocking_emitter)]
"""The same emitter for `def` routes: `emitter.emit(event)` blocks the route's thread until the broker has confirmed.

In an `async def` route it refuses: it would wait for the very loop it blocks.
"""


@cache
def emitter_dependency(name: str) -> Callable[[HTTPConnection], Awaitable[EventEmitter]]:
    """The dependency for an emitter of another name.

        AlertsDep = Annotated[EventEmitter, Depends(emitter_dependency("alerts"))]

    It is the same function each time, so that `app.dependency_overrides[emitter_dependency("alerts")]` finds it;
    for "emitter" it is `get_emitter`.
    """
    if name == "emitter":
        return get_emitter

    async def get_named_emitter(connection: HTTPConnection) -> EventEmitter:
        return of_scope(connection.scope, name)

    return get_named_emitter


@cache
def blocking_emitter_dependency(name: str) -> Callable[..., Awaitable[BlockingEmitter]]:
    """The dependency for an emitter of another name in a `def` route; overriding `emitter_dependency(name)` counts."""
    if name == "emitter":
        return get_blocking_emitter

    # Annotated cannot be used here: FastAPI reads annotations by name, and knows no name of this function.
    async def get_named_blocking_emitter(
        emitter: EventEmitter = Depends(emitter_dependency(name)),  # noqa: B008
    ) -> BlockingEmitter:
        return blocking_over(emitter, asyncio.get_running_loop())

    return get_named_blocking_emitter


def health_router(
    path: str = "/health",
    *,
    ready_on: ReadyOn = "started",
    timeout: float = 1.0,
    outbox: bool = False,
    max_age: float | None = None,
    details: bool = True,
    include_in_schema: bool = False,
) -> APIRouter:
    """A router for load balancers and people: `path`/live and `path`/ready, about all emitters of the app.

        app.include_router(health_router())

    The options are those of `dispytch_integrations.starlette.health_routes`. `include_in_schema`: show both in the
    app's OpenAPI document.

    Raises ConfigurationError for options that are none.
    """
    check = HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age)
    router = APIRouter(tags=["health"])
    for part, endpoint in endpoints(check, details=details).items():
        for method in ("GET", "HEAD"):
            router.add_api_route(
                f"{path}/{part}",
                endpoint,
                methods=[method],
                response_model=None,
                include_in_schema=include_in_schema and method == "GET",
                name=f"health_{part}",
            )
    return router


def catalog_router(
    path: str = "/events",
    *,
    events: Events = None,
    title: str | None = None,
    version: str | None = None,
    description: str | None = None,
    enabled: bool | None = None,
    dependencies: Sequence[params.Depends] = (),
    include_in_schema: bool = False,
) -> APIRouter:
    """A router for people and tools: the event catalogue's page at `path`, `path`/asyncapi.json, `path`/asyncapi.yaml.

        app.include_router(catalog_router("/events", events="shop.events", dependencies=[Depends(admin)]))

    `dependencies`: who may see it, as for any router. `enabled`: None: where the app has `debug=True`, or the
    environment has DISPYTCH_CATALOG=1; else it answers 404. `include_in_schema`: show it in the app's OpenAPI document.
    The others: see `dispytch_integrations.starlette.catalog_routes`.

    Raises ConfigurationError for options that are none.
    """
    catalog = Catalog(
        "catalog_router",
        getLogger("dispytch_integrations.fastapi"),
        events=events,
        title=title,
        version=version,
        description=description,
        enabled=enabled,
    )
    router = APIRouter(tags=["events"], dependencies=list(dependencies))
    for where, endpoint in catalog_endpoints(path, catalog).items():
        for method in ("GET", "HEAD"):
            router.add_api_route(
                where,
                endpoint,
                methods=[method],
                response_model=None,
                include_in_schema=include_in_schema and method == "GET",
                name="catalog",
            )
    return router
