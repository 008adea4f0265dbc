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
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Annotated

from dispytch_integrations._find_emitter import of_scope
from dispytch_integrations.blocking import BlockingEmitter
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import MissingExtraError

try:
    from fastapi import Depends
    from starlette.requests import HTTPConnection
except ModuleNotFoundError as exc:
    if exc.name not in ("fastapi", "starlette"):
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.fastapi", extra="fastapi") from exc

from dispytch_integrations.starlette import emitter_lifespan

__all__ = [
    "BlockingEmitterDep",
    "EmitterDep",
    "blocking_emitter_dependency",
    "emitter_dependency",
    "emitter_lifespan",
    "get_blocking_emitter",
    "get_emitter",
]


# Dependencies are `async def`: FastAPI runs a sync one in its thread pool, which costs twenty times as much.


async def get_emitter(connection: HTTPConnection) -> EventEmitter:
    """The dependency behind EmitterDep, and the key for `app.dependency_overrides`.

    Raises NotStartedError when the app has no emitter, with the likely causes and what to write.
    """
    return of_scope(connection.scope, "emitter")


EmitterDep = Annotated[EventEmitter, Depends(get_emitter)]
"""The app's emitter, for `async def` routes, WebSockets and dependencies."""


async def get_blocking_emitter(emitter: EmitterDep) -> BlockingEmitter:
    """The dependency behind BlockingEmitterDep; rests on `get_emitter`, so that overriding that one is enough."""
    return BlockingEmitter(emitter, asyncio.get_running_loop())


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
        return BlockingEmitter(emitter, asyncio.get_running_loop())

    return get_named_blocking_emitter
