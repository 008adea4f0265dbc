"""The project. Celery's app is imported with it, so that `@shared_task` finds it."""

from __future__ import annotations

from example_projects.django_orders.shop.celery import app as celery_app

__all__ = ["celery_app"]
