"""The page that shows events as they come back from the broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from example_projects.fastapi_orders.dependencies import FeedDep
from example_projects.shop_demo.live.feed import BrokerState
from example_projects.shop_demo.live.page import Kind, Link, Shop, Step, page_of

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_EMIT = Step("Emitter", "await emit()")
_SHOP = Shop(
    kinds=[
        Kind(name="placed", topic="orders.placed", made_in=Step("Route", "POST /orders"), sent_with=_EMIT),
        Kind(name="cancelled", topic="orders.cancelled", made_in=Step("Route", "POST …/cancellation"), sent_with=_EMIT),
    ],
    links=[Link("API", "docs")],
)


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page: one file, nothing else is loaded."""
    return HTMLResponse(page_of(_SHOP), headers={"Cache-Control": "no-cache"})


@router.get("/live", response_class=EventSourceResponse)
async def live(feed: FeedDep, last_event_id: Annotated[str | None, Header()] = None) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `broker` says whether the broker is heard, every other one is a message from it."""
    async for item in feed.listen(after=last_event_id):
        if isinstance(item, BrokerState):
            yield ServerSentEvent(event="broker", data=item, retry=1000)
        else:
            yield ServerSentEvent(id=item.number, data=item)
