"""Cancel orders."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, status

from example_projects.fastapi_orders.dependencies import OrderServiceDep
from example_projects.fastapi_orders.schemas import Cancellation, Order
from example_projects.fastapi_orders.services import AlreadyCancelledError, OrderNotFoundError

__all__ = ["router"]

router = APIRouter(prefix="/orders/{order_id}/cancellation", tags=["cancellations"])


@router.post("")
async def cancel_order(order_id: int, service: OrderServiceDep, cancellation: Cancellation | None = None) -> Order:
    """Cancel an order; answered once the broker has confirmed its event."""
    reason = (cancellation or Cancellation()).reason
    try:
        return await service.cancel(order_id, reason)
    except OrderNotFoundError:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no order {order_id}.") from None
    except AlreadyCancelledError:
        raise HTTPException(status.HTTP_409_CONFLICT, f"Order {order_id} is cancelled already.") from None
