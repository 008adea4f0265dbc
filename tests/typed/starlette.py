# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Starlette and other ASGI apps: the lifespan, the middleware, `get_emitter`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import assert_type

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from dispytch_integrations import EventEmitter, connect
from dispytch_integrations.starlette import EmitterMiddleware, emitter_lifespan, get_emitter
from tests.typed.orders import OrderPlaced


@asynccontextmanager
async def own(app: Starlette) -> AsyncGenerator[dict[str, object]]:
    assert_type(get_emitter(app), EventEmitter)
    yield {}


async def page(request: Request, websocket: WebSocket) -> None:
    emitter = get_emitter(request)
    assert_type(emitter, EventEmitter)
    assert_type(get_emitter(websocket, "alerts"), EventEmitter)
    assert_type(get_emitter(request.scope), EventEmitter)
    await emitter.emit(OrderPlaced(tenant="acme", order_id=1))
    get_emitter("emitter")  # type: ignore[arg-type]


def apps(inner: ASGIApp) -> None:
    app = Starlette(lifespan=emitter_lifespan("kafka://localhost:9092", lifespan=own))
    Starlette(lifespan=emitter_lifespan(connect()))
    Starlette(middleware=[Middleware(EmitterMiddleware, "kafka://localhost:9092", name="alerts")])
    app.add_middleware(EmitterMiddleware, config="kafka://localhost:9092", acks="all")
    wrapped: ASGIApp = EmitterMiddleware(inner, "kafka://localhost:9092")
    assert_type(get_emitter(wrapped), EventEmitter)

    EmitterMiddleware("kafka://localhost:9092")  # type: ignore[arg-type]
    app.add_middleware(EmitterMiddleware, name=1)  # type: ignore[arg-type]
    Starlette(lifespan=emitter_lifespan(lifespan=42))  # type: ignore[arg-type]


async def as_app(middleware: EmitterMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
    await middleware(scope, receive, send)
