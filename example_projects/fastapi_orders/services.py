"""What the shop does. Here, below the routes, events are emitted: next to the change that they tell of."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from dispytch_integrations import EventEmitter
from dispytch_integrations.errors import DeliveryError, UnconfirmedError
from example_projects.fastapi_orders.events import OrderCancelled, OrderPlaced
from example_projects.fastapi_orders.repository import OrderRepository
from example_projects.fastapi_orders.schemas import NewOrder, Order, Status

__all__ = ["AlreadyCancelledError", "OrderNotFoundError", "OrderService"]


class OrderNotFoundError(Exception):
    """There is no order of this number."""


class AlreadyCancelledError(Exception):
    """The order was cancelled before."""


class OrderService:
    """Places and cancels orders. Knows no HTTP and no broker: it is given the orders and the emitter."""

    def __init__(self, orders: OrderRepository, emitter: EventEmitter) -> None:
        self._orders = orders
        self._emitter = emitter

    async def place(self, new: NewOrder) -> Order:
        """Keep the order and tell the world. Raises DeliveryError when the broker did not confirm."""
        order = self._orders.add(new)
        with self._kept_unless_untold(order, before=None):
            await self._emitter.emit(
                OrderPlaced(
                    order_id=order.id,
                    customer=order.customer,
                    product=order.product,
                    quantity=order.quantity,
                    total=order.total,
                )
            )
        return order

    async def cancel(self, order_id: int, reason: str) -> Order:
        """Cancel the order and tell the world.

        Raises OrderNotFoundError, AlreadyCancelledError, DeliveryError when the broker did not confirm.
        """
        placed = self._orders.get(order_id)
        if placed is None:
            raise OrderNotFoundError
        if placed.status is Status.CANCELLED:
            raise AlreadyCancelledError
        cancelled = placed.model_copy(update={"status": Status.CANCELLED})
        self._orders.save(cancelled)
        with self._kept_unless_untold(cancelled, before=placed):
            await self._emitter.emit(OrderCancelled(order_id=order_id, reason=reason))
        return cancelled

    @contextmanager
    def _kept_unless_untold(self, order: Order, *, before: Order | None) -> Generator[None, None, None]:
        """Undo the change when its event certainly did not go out; a database would roll back."""
        try:
            yield
        except UnconfirmedError:
            raise  # A timeout is not a no: somebody may have heard of it already.
        except DeliveryError:
            if before is None:
                self._orders.remove(order)
            else:
                self._orders.save(before)
            raise
