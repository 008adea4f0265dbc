"""What the shop does. Here events are emitted: next to the change that they tell of, in its transaction."""

from __future__ import annotations

from django.db import transaction

from dispytch_integrations.django import emit_on_commit
from example_projects.django_orders.orders.events import OrderPlaced
from example_projects.django_orders.orders.models import PRICES, Order, Product
from example_projects.django_orders.orders.tasks import pack

__all__ = ["place"]


@transaction.atomic
def place(order: Order) -> Order:
    """Take a new order. Rolled back, also by who called us, it was never told."""
    order.total = PRICES[Product(order.product)] * order.quantity
    order.save()
    emit_on_commit(
        OrderPlaced(
            order_id=order.pk,
            customer=order.customer,
            product=order.product,
            quantity=order.quantity,
            total=order.total,
        )
    )
    # Robust: the order is committed when Celery is asked, and must not fail for a queue that is away.
    transaction.on_commit(lambda: pack.delay(order.pk), robust=True)
    return order
