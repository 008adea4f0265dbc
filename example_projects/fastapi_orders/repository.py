"""Orders, kept in memory: where your app has its database."""

from __future__ import annotations

from itertools import count

from example_projects.fastapi_orders.schemas import CATALOGUE, NewOrder, Order

__all__ = ["OrderRepository"]


class OrderRepository:
    """All orders by number, the newest last."""

    def __init__(self) -> None:
        self._orders: dict[int, Order] = {}
        self._numbers = count(1001)

    def add(self, new: NewOrder) -> Order:
        """Keep an order under a number of its own."""
        order = Order(id=next(self._numbers), total=CATALOGUE[new.product] * new.quantity, **new.model_dump())
        self._orders[order.id] = order
        return order

    def save(self, order: Order) -> None:
        """Keep a changed order."""
        self._orders[order.id] = order

    def remove(self, order: Order) -> None:
        """Forget an order; harmless when it is unknown."""
        self._orders.pop(order.id, None)

    def get(self, order_id: int) -> Order | None:
        """The order of this number, or None."""
        return self._orders.get(order_id)

    def newest(self, limit: int) -> list[Order]:
        """The last `limit` orders, the newest first."""
        return list(reversed(self._orders.values()))[:limit]
