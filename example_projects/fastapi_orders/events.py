"""What the shop tells the world. An event says what happened, and by its route where that is told."""

from __future__ import annotations

from decimal import Decimal

from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from example_projects.fastapi_orders.transports import portable

__all__ = ["TOPICS", "OrderCancelled", "OrderEvent", "OrderPlaced"]


class OrderEvent(EventBase):
    """What all events about an order share: those of one order arrive in their order, on each topic."""

    __ordering_key__ = "{order_id}"

    order_id: int


class OrderPlaced(OrderEvent):
    """Somebody wants something. Packing and billing wait for it."""

    # With one broker you write:  __route__ = KafkaEventRoute(topic="orders.placed")
    __route__ = portable(KafkaEventRoute(topic="orders.placed"))
    __event_type__ = "com.example.order.placed"

    customer: str
    product: str
    quantity: int
    total: Decimal


class OrderCancelled(OrderEvent):
    """Changed their mind."""

    __route__ = portable(KafkaEventRoute(topic="orders.cancelled"))
    __event_type__ = "com.example.order.cancelled"

    reason: str


TOPICS = ("orders.placed", "orders.cancelled")
"""What the live page listens to."""
