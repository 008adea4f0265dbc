"""What the shop tells the world. An event says what happened, and by its route where that is told.

The app `dispytch_integrations.django` imports this module: `manage.py dispytch events` lists what is here, and
`manage.py check` says whether a broker of DISPYTCH takes it.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from django.conf import settings

from dispytch_integrations import EventBase
from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from example_projects.shop_demo.transports import route_for, transport_of

__all__ = ["OrderCancelled", "OrderEvent", "OrderPacked", "OrderPlaced"]


def _route(topic: str) -> EventRoute:
    """Your project has one kind of broker, and writes `__route__ = KafkaEventRoute(topic="orders.placed")` instead."""
    return route_for(transport_of(settings.DISPYTCH["default"]["URL"]), KafkaEventRoute(topic=topic))


class OrderEvent(EventBase):
    """What all events about an order share: those of one order arrive in their order, on each topic."""

    __ordering_key__ = "{order_id}"

    order_id: int


class OrderPlaced(OrderEvent):
    """Somebody wants something. Billing waits for it."""

    __route__ = _route("orders.placed")
    __event_type__ = "com.example.order.placed"

    customer: str
    product: str
    quantity: int
    total: Decimal


class OrderPacked(OrderEvent):
    """It is on its way."""

    __route__ = _route("orders.packed")
    __event_type__ = "com.example.order.packed"

    packed_at: datetime


class OrderCancelled(OrderEvent):
    """Changed their mind."""

    __route__ = _route("orders.cancelled")
    __event_type__ = "com.example.order.cancelled"

    reason: str
