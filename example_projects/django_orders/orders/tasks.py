"""What the shop does later, in a Celery worker."""

from __future__ import annotations

from celery import shared_task
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from dispytch_integrations.django import emit, emit_on_commit
from dispytch_integrations.errors import DeliveryError
from example_projects.django_orders.orders.events import OrderPacked
from example_projects.django_orders.orders.models import Order

__all__ = ["pack"]


@shared_task(autoretry_for=(DeliveryError,), retry_backoff=True, max_retries=5)
def pack(order_id: int) -> None:
    """Pack an order that is still wanted, and tell it.

    A task can wait, and be tried again: so `emit`, which returns when the broker has confirmed and raises if it has
    not, instead of `emit_on_commit`. Tried again after a timeout, the event may go out twice; what is packed stays so.
    With an outbox there is nothing to wait for, and the event belongs behind what that still holds of this order.
    """
    with transaction.atomic():
        Order.objects.filter(pk=order_id, packed_at=None, cancellation=None).update(packed_at=timezone.now())
        order = Order.objects.exclude(packed_at=None).filter(pk=order_id).first()
        if order is None:
            return
        packed = OrderPacked(order_id=order.pk, packed_at=order.packed_at)
        if settings.OUTBOX:
            emit_on_commit(packed)
            return
    emit(packed)
