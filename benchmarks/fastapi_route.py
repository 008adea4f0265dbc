"""What an injected emitter costs a FastAPI route, and a raw app under EmitterMiddleware, when nothing is emitted."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI

from benchmarks.harness import Row, interleaved
from dispytch_integrations.fastapi import BlockingEmitterDep, EmitterDep, emitter_lifespan
from dispytch_integrations.starlette import EmitterMiddleware

__all__ = ["run"]

REQUESTS = 300
ROUNDS = 15

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


async def run() -> list[Row]:
    """Requests without a network: the app is called as a server calls it."""
    app = FastAPI(lifespan=emitter_lifespan("memory://"))

    @app.get("/without")
    async def without() -> None: ...

    @app.get("/with")
    async def with_emitter(emitter: EmitterDep) -> None: ...

    @app.get("/blocking")
    async def with_blocking_emitter(emitter: BlockingEmitterDep) -> None: ...

    async def raw(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise ValueError("no lifespan")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    wrapped = EmitterMiddleware(raw, "memory://")
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(app.router.lifespan_context(app))
        await _start(wrapped, stack)
        times = await interleaved(
            {
                "without": lambda: _requests(app, "/without", state),
                "with": lambda: _requests(app, "/with", state),
                "blocking": lambda: _requests(app, "/blocking", state),
                "raw": lambda: _requests(raw, "/", {}),
                "wrapped": lambda: _requests(wrapped, "/", {}),
            },
            rounds=ROUNDS,
        )
    base = statistics.median(times["without"]) / REQUESTS * 1e6
    return [
        Row(
            what="FastAPI: EmitterDep in a route, per request",
            measured=_extra(times, "with", "without"),
            unit="us",
            reach="<= 40",
            note=f"the route without it takes {base:.0f} us",
        ),
        Row(what="FastAPI: BlockingEmitterDep, per request", measured=_extra(times, "blocking", "without"), unit="us"),
        Row(what="ASGI: EmitterMiddleware, per request", measured=_extra(times, "wrapped", "raw"), unit="us"),
    ]


def _extra(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """Microseconds more per request: the median over rounds, each compared with its neighbour."""
    extra = (own - base for own, base in zip(times[name], times[baseline], strict=True))
    return statistics.median(extra) / REQUESTS * 1e6


async def _requests(app: App, path: str, state: Any) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None: ...

    for _ in range(REQUESTS):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1000),
            "server": ("127.0.0.1", 8000),
            "state": dict(state),
        }
        await app(scope, receive, send)


async def _start(app: App, stack: AsyncExitStack) -> None:
    """Run the app's lifespan until the stack is closed."""
    started, leaving = asyncio.Event(), asyncio.Event()
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, Any]:
        kind = next(messages)
        if kind == "lifespan.shutdown":
            await leaving.wait()
        return {"type": kind}

    async def send(message: Any) -> None:
        started.set()

    task = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, receive, send))
    stack.push_async_callback(asyncio.wait_for, task, 10)
    stack.callback(leaving.set)
    await started.wait()
