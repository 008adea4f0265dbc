"""What the shop does. Here events are emitted: next to the change that they tell of, in its transaction."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dispytch_integrations.sqlalchemy import emit_on_commit
from example_projects.fastapi_orders.events import OrderCancelled, OrderPlaced
from example_projects.fastapi_orders.schemas import CATALOGUE, NewOrder, Order, Status
from example_projects.fastapi_orders.services import AlreadyCancelledError, OrderNotFoundError
from example_projects.fastapi_orders.with_outbox.tables import OrderRow

__all__ = ["cancel", "find", "newest", "place"]


async def place(session: AsyncSession, new: NewOrder) -> Order:
    """Take an order. No broker is asked: what the session commits is told, what it rolls back never was."""
    row = OrderRow(total=CATALOGUE[new.product] * new.quantity, **new.model_dump())
    session.add(row)
    await session.flush()  # The database gives it its number.
    emit_on_commit(
        session,
        OrderPlaced(
            order_id=row.id, customer=row.customer, product=row.product, quantity=row.quantity, total=row.total
        ),
    )
    return _shown(row)


async def cancel(session: AsyncSession, order_id: int, reason: str) -> Order:
    """Cancel an order. Raises OrderNotFoundError, AlreadyCancelledError."""
    # One statement: of two that cancel it at once, one finds it cancelled.
    wanted = update(OrderRow).where(OrderRow.id == order_id, OrderRow.status != Status.CANCELLED)
    cancelled = (await session.scalars(wanted.values(status=Status.CANCELLED).returning(OrderRow))).one_or_none()
    if cancelled is None:
        await find(session, order_id)
        raise AlreadyCancelledError
    emit_on_commit(session, OrderCancelled(order_id=order_id, reason=reason))
    return _shown(cancelled)


async def find(session: AsyncSession, order_id: int) -> Order:
    """The order of this number. Raises OrderNotFoundError."""
    row = await session.get(OrderRow, order_id)
    if row is None:
        raise OrderNotFoundError
    return _shown(row)


async def newest(session: AsyncSession, limit: int) -> list[Order]:
    """The last `limit` orders, the newest first."""
    return [_shown(row) for row in await session.scalars(select(OrderRow).order_by(OrderRow.id.desc()).limit(limit))]


def _shown(row: OrderRow) -> Order:
    return Order.model_validate(row, from_attributes=True)
