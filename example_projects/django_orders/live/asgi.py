"""The live page's consumer lives as long as the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings

from dispytch_integrations.django import get_emitter
from example_projects.django_orders.live.outbox import outbox_of_shop
from example_projects.django_orders.live.shop import TOPICS
from example_projects.shop_demo.live.feed import Feed
from example_projects.shop_demo.live.follow import live_feed
from example_projects.shop_demo.transports import transport_of

__all__ = ["LivePage"]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class LivePage:
    """An ASGI application around another: opens the feed when that one has started, closes it before that one ends.

    Requests find the feed in their scope's "state". A consumer that does not reach its broker ends the server: a page
    that never hears anything must not look healthy.
    """

    def __init__(self, application: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] != "lifespan":
            await self._application(scope, receive, send)
            return
        async with AsyncExitStack() as stack:

            async def from_server() -> _Message:
                message = await receive()
                if message["type"] == "lifespan.shutdown":
                    await stack.aclose()
                return message

            async def to_server(message: _Message) -> None:
                if message["type"] == "lifespan.startup.complete":
                    try:
                        feed = scope["state"]["feed"] = await stack.enter_async_context(_feed())
                        if settings.OUTBOX:
                            scope["state"]["relay"] = await stack.enter_async_context(outbox_of_shop(feed))
                    except Exception as exc:
                        message = {
                            "type": "lifespan.startup.failed",
                            "message": f"the live page hears nothing: {exc!r}",
                        }
                await send(message)

            await self._application(scope, from_server, to_server)


@asynccontextmanager
async def _feed() -> AsyncGenerator[Feed, None]:
    url = settings.DISPYTCH["default"]["URL"]
    producer = None
    if transport_of(url) == "memory":
        # Sync, since it may have to connect; here the lifespan has done so.
        producer = (await sync_to_async(lambda: get_emitter().producers)())["default"]
    async with live_feed(url, TOPICS, producer) as feed:
        yield feed
