"""An httpx client for an ASGI app whose lifespan runs, as under a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from dispytch_integrations._lifespan import ASGIApp, Receive, Scope, Send
from dispytch_integrations._missing import is_missing
from dispytch_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType

    import httpx

__all__ = ["asgi_client"]


@asynccontextmanager
async def asgi_client(
    app: ASGIApp, *, base_url: str = "http://testserver", **options: Any
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client for an app that is started and stopped around it; its requests see the lifespan's state.

        async with asgi_client(app) as client:
            await client.post("/orders/17")

    httpx's ASGITransport alone runs no lifespan, so that no emitter would be there. The app runs on this event loop.
    `base_url` and `options`: those of `httpx.AsyncClient`.

    Raises ConfigurationError where httpx is not installed; what the app's start raises, or RuntimeError with its
    message.
    """
    httpx: Any = _httpx()
    async with (
        _running(app) as served,
        httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url=base_url, **options) as client,
    ):
        yield client


def _httpx() -> ModuleType:
    try:
        import httpx
    except ModuleNotFoundError as exc:
        if not is_missing(exc, "httpx"):
            raise  # present, but one of its own imports is missing
        raise ConfigurationError(
            "asgi_client gives a client of httpx, which is not installed: pip install httpx"
        ) from exc
    return httpx


@asynccontextmanager
async def _running(app: ASGIApp) -> AsyncGenerator[ASGIApp, None]:
    """The app with its lifespan's state in each scope, between its startup and its shutdown."""
    state: dict[str, Any] = {}
    to_app: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()

    async def live() -> None:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
        await app(scope, to_app.get, from_app.put)

    async def ask(kind: str) -> None:
        await to_app.put({"type": kind})
        answer = asyncio.ensure_future(from_app.get())
        await asyncio.wait({living, answer}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            told = answer.result()
            if told["type"].endswith(".failed"):
                await asyncio.wait({living}, timeout=1.0)
                if living.done() and not living.cancelled() and (error := living.exception()) is not None:
                    raise error
                raise RuntimeError(f"the app's {kind.rpartition('.')[2]} failed: {told.get('message', '')}")
        else:
            answer.cancel()
            error = living.exception()
            if error is not None and kind == "lifespan.shutdown":
                raise error
            # An app without a lifespan raises, or returns: a server goes on without one.

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    living = asyncio.create_task(live(), name="lifespan")
    try:
        await ask("lifespan.startup")
        yield served
        if not living.done():
            await ask("lifespan.shutdown")
    finally:
        living.cancel()
        await asyncio.wait({living})
