"""Place orders and look at them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, status

from example_projects.fastapi_orders.dependencies import OrdersDep, OrderServiceDep
from example_projects.fastapi_orders.schemas import NewOrder, Order

__all__ = ["router"]

router = APIRouter(prefix="/orders", tags=["orders"])


@router.post("", status_code=status.HTTP_201_CREATED)
async def place_order(new: NewOrder, service: OrderServiceDep) -> Order:
    """Place an order; answered once the broker has confirmed its event."""
    return await service.place(new)


@router.get("")
async def list_orders(orders: OrdersDep, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[Order]:
    """The newest orders first."""
    return orders.newest(limit)


@router.get("/{order_id}")
async def get_order(order_id: int, orders: OrdersDep) -> Order:
    """One order."""
    order = orders.get(order_id)
    if order is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no order {order_id}.")
    return order
