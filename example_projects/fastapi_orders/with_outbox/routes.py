"""The HTTP API over the database. Each route has a session that is committed before it is answered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, status
from sqlalchemy.ext.asyncio import AsyncSession

from dispytch_integrations.sqlalchemy import session_dependency
from example_projects.fastapi_orders.schemas import Cancellation, NewOrder, Order
from example_projects.fastapi_orders.services import AlreadyCancelledError, OrderNotFoundError
from example_projects.fastapi_orders.with_outbox import services
from example_projects.fastapi_orders.with_outbox.database import Session

__all__ = ["router"]

router = APIRouter(prefix="/orders", tags=["orders"])


# Committed when the route has returned, rolled back, events and all, when it has raised. With scope="function" that
# comes before the answer: else a client could be told "201 Created" of an order that the database then refuses.
SessionDep = Annotated[AsyncSession, Depends(session_dependency(Session), scope="function")]


@router.post("", status_code=status.HTTP_201_CREATED)
async def place_order(new: NewOrder, session: SessionDep) -> Order:
    """Place an order; answered once the order and its event are committed."""
    return await services.place(session, new)


@router.get("")
async def list_orders(session: SessionDep, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[Order]:
    """The newest orders first."""
    return await services.newest(session, limit)


@router.get("/{order_id}")
async def get_order(order_id: int, session: SessionDep) -> Order:
    """One order."""
    try:
        return await services.find(session, order_id)
    except OrderNotFoundError:
        raise _missing(order_id) from None


@router.post("/{order_id}/cancellation", tags=["cancellations"])
async def cancel_order(order_id: int, session: SessionDep, cancellation: Cancellation | None = None) -> Order:
    """Cancel an order; answered once this and its event are committed."""
    try:
        return await services.cancel(session, order_id, (cancellation or Cancellation()).reason)
    except OrderNotFoundError:
        raise _missing(order_id) from None
    except AlreadyCancelledError:
        raise HTTPException(status.HTTP_409_CONFLICT, f"Order {order_id} is cancelled already.") from None


def _missing(order_id: int) -> HTTPException:
    return HTTPException(status.HTTP_404_NOT_FOUND, f"There is no order {order_id}.")
