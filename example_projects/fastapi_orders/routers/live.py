"""The page that shows events as they come back from the broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from example_projects.fastapi_orders.dependencies import FeedDep
from example_projects.fastapi_orders.live.feed import BrokerState

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parent.parent / "live" / "page.html"


@router.get("/")
async def page() -> FileResponse:
    """The page: one file, nothing else is loaded."""
    return FileResponse(_PAGE, headers={"Cache-Control": "no-cache"})


@router.get("/live", response_class=EventSourceResponse)
async def live(feed: FeedDep, last_event_id: Annotated[str | None, Header()] = None) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `broker` says whether the broker is heard, every other one is a message from it."""
    async for item in feed.listen(after=last_event_id):
        if isinstance(item, BrokerState):
            yield ServerSentEvent(event="broker", data=item, retry=1000)
        else:
            yield ServerSentEvent(id=item.number, data=item)
