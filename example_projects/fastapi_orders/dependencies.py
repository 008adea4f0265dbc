"""What routes ask for. All are `async def`: FastAPI sends others through a thread, at twenty times the cost."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from dispytch_integrations.fastapi import EmitterDep
from example_projects.fastapi_orders.repository import OrderRepository
from example_projects.fastapi_orders.services import OrderService
from example_projects.shop_demo.live.feed import Feed

__all__ = ["FeedDep", "OrderServiceDep", "OrdersDep", "get_feed", "get_order_service", "get_orders"]


async def get_orders(request: Request) -> OrderRepository:
    """The app's orders."""
    orders: OrderRepository = request.app.state.orders
    return orders


OrdersDep = Annotated[OrderRepository, Depends(get_orders)]


async def get_order_service(orders: OrdersDep, emitter: EmitterDep) -> OrderService:
    """The service, given the emitter that the lifespan in `app.py` has connected."""
    return OrderService(orders, emitter)


OrderServiceDep = Annotated[OrderService, Depends(get_order_service)]


async def get_feed(request: Request) -> Feed:
    """What has come back from the broker."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
