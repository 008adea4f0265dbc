"""Django's signals become events, and ours become rows."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db.models.signals import post_save
from django.dispatch import receiver

from dispytch_integrations import EventBase
from dispytch_integrations.django import emits
from dispytch_integrations.django.signals import event_failed
from dispytch_integrations.message import Message
from example_projects.django_orders.orders.events import OrderCancelled
from example_projects.django_orders.orders.models import Cancellation, FailedEvent

__all__ = ["keep_failed", "order_cancelled"]


@emits(post_save, sender=Cancellation)
def order_cancelled(instance: Cancellation, created: bool, **kwargs: Any) -> OrderCancelled | None:
    """Whoever cancels, by the API or in the admin: it is told after the commit."""
    return OrderCancelled(order_id=instance.order.pk, reason=instance.reason) if created else None


@receiver(event_failed)
def keep_failed(event: EventBase | None, message: Message, error: Exception, after_commit: bool, **kwargs: Any) -> None:
    """Nobody waits for what is sent after a commit: keep what failed, so that somebody can look in the admin.

    An outbox keeps it itself, and tries again: see `OutboxEvent` in the admin.
    """
    if after_commit and not settings.OUTBOX:  # What `emit` has raised, its caller knows.
        body = (message.payload or b"").decode(errors="replace")
        FailedEvent.objects.create(event_id=message.id, type=message.type, body=body, error=str(error))
