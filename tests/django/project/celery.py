"""A Celery worker's app; CELERY_BROKER is its Redis, and its keys there begin with TEST_NAME."""

from __future__ import annotations

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django.project.settings")

from celery import Celery
from django.db import transaction

from dispytch_integrations.django import emit_on_commit

app = Celery("shop", broker=os.environ.get("CELERY_BROKER"))
app.conf.broker_transport_options = {"global_keyprefix": os.environ.get("TEST_NAME", "")}
app.conf.broker_connection_retry_on_startup = False


@app.task(name="place")
def place(number: int) -> None:
    from tests.django.project.shop.events import OrderPlaced
    from tests.django.project.shop.models import Order

    with transaction.atomic():
        Order.objects.create(customer=f"customer {number}")
        emit_on_commit(OrderPlaced(number=number))
