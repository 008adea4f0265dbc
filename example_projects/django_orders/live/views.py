"""The page, and the stream of events that it shows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from example_projects.django_orders.live.shop import SHOP
from example_projects.shop_demo.live.feed import Feed
from example_projects.shop_demo.live.page import page_of, server_sent

__all__ = ["page", "stream"]


def page(request: HttpRequest) -> HttpResponse:
    """The page: one file, nothing else is loaded."""
    return HttpResponse(page_of(SHOP), headers={"Cache-Control": "no-cache"})


async def stream(request: HttpRequest) -> HttpResponseBase:
    """Server-sent events: `broker` says whether the broker is heard, every other one is a message from it."""
    scope: dict[str, Any] = getattr(request, "scope", {})
    feed: Feed | None = scope.get("state", {}).get("feed")
    if feed is None:
        detail = (
            "Orders are taken here, but their events are not shown: that needs an ASGI server with a lifespan. "
            "Start uvicorn example_projects.django_orders.shop.asgi:application"
        )
        return JsonResponse({"detail": detail}, status=503)
    return StreamingHttpResponse(
        _messages(feed, request.headers.get("Last-Event-ID")),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _messages(feed: Feed, after: str | None) -> AsyncGenerator[bytes, None]:
    async with aclosing(feed.listen(after)) as items:
        async for item in items:
            yield server_sent(item)
