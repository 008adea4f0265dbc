"""The page that shows events as they come back from the broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Body, Header, Request, status
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from example_projects.fastapi_orders.dependencies import FeedDep
from example_projects.shop_demo.live.feed import BrokerState, OutboxState
from example_projects.shop_demo.live.outbox import Switch
from example_projects.shop_demo.live.page import Kind, Link, Shop, Step, page_of

__all__ = ["SHOP", "SHOP_WITH_OUTBOX", "outbox_router", "router"]

router = APIRouter(include_in_schema=False)
outbox_router = APIRouter(include_in_schema=False)


def _shop(sent_with: Step, *, outbox: bool) -> Shop:
    placed = Kind(name="placed", topic="orders.placed", made_in=Step("Route", "POST /orders"), sent_with=sent_with)
    cancelled = Kind(
        name="cancelled", topic="orders.cancelled", made_in=Step("Route", "POST …/cancellation"), sent_with=sent_with
    )
    return Shop(kinds=[placed, cancelled], links=[Link("API", "docs")], outbox=outbox)


SHOP = _shop(Step("Emitter", "await emit()"), outbox=False)
"""What the page has to know."""
SHOP_WITH_OUTBOX = _shop(Step("Outbox", "emit_on_commit()"), outbox=True)


@router.get("/", response_class=HTMLResponse)
async def page(request: Request) -> HTMLResponse:
    """The page: one file, nothing else is loaded."""
    return HTMLResponse(page_of(request.app.state.shop), headers={"Cache-Control": "no-cache"})


@router.get("/live", response_class=EventSourceResponse)
async def live(feed: FeedDep, last_event_id: Annotated[str | None, Header()] = None) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `broker` and `outbox` say how those are doing, every other one is a message."""
    async for item in feed.listen(after=last_event_id):
        if isinstance(item, BrokerState):
            yield ServerSentEvent(event="broker", data=item, retry=1000)
        elif isinstance(item, OutboxState):
            yield ServerSentEvent(event="outbox", data=item)
        else:
            yield ServerSentEvent(id=item.number, data=item)


@outbox_router.post("/outbox/relay", status_code=status.HTTP_204_NO_CONTENT)
async def switch_relay(request: Request, on: Annotated[bool, Body(embed=True)]) -> None:
    """Stop the relay, or start it again. In a shop of yours this is for whoever runs the servers."""
    switch: Switch = request.app.state.relay
    await switch.turn(on)
