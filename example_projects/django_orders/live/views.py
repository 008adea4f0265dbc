"""The page, and the stream of events that it shows."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from example_projects.django_orders.live.shop import SHOP
from example_projects.shop_demo.live.feed import Feed
from example_projects.shop_demo.live.outbox import Switch
from example_projects.shop_demo.live.page import page_of, server_sent

__all__ = ["page", "relay", "stream"]


def page(request: HttpRequest) -> HttpResponse:
    """The page: one file, nothing else is loaded."""
    return HttpResponse(page_of(SHOP), headers={"Cache-Control": "no-cache"})


async def stream(request: HttpRequest) -> HttpResponseBase:
    """Server-sent events: `broker` and `outbox` say how those are doing, every other one is a message."""
    feed: Feed | None = _state(request).get("feed")
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


@csrf_exempt  # Nobody is logged in here; in a shop of yours this is for whoever runs the servers.
async def relay(request: HttpRequest) -> HttpResponse:
    """`POST {"on": false}` stops the outbox's relay, true starts it again."""
    switch: Switch | None = _state(request).get("relay")
    if request.method != "POST" or switch is None:
        return JsonResponse(
            {"detail": "No relay goes with this server: start and stop manage.py dispytch relay."}, status=404
        )
    await switch.turn(json.loads(request.body)["on"])
    return HttpResponse(status=204)


def _state(request: HttpRequest) -> dict[str, Any]:
    """What `LivePage` has put beside the requests."""
    scope: dict[str, Any] = getattr(request, "scope", {})
    state: dict[str, Any] = scope.get("state", {})
    return state


async def _messages(feed: Feed, after: str | None) -> AsyncGenerator[bytes, None]:
    async with aclosing(feed.listen(after)) as items:
        async for item in items:
            yield server_sent(item)
