"""Celery's app: `celery -A example_projects.django_orders.shop worker`.

The worker connects to the brokers of DISPYTCH at its first event, in the child that sends it, and flushes at its end.
"""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_projects.django_orders.shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
