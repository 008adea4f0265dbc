"""Celery without Django: each child of the prefork pool connects by itself, and closes at its end.

DISPYTCH_URL=redis://localhost:6379 celery --app example_projects.recipes.celery_app worker --pool prefork
python -c 'from example_projects.recipes.celery_app import place_order; place_order.delay(1)'

Celery's own broker is redis://localhost:6379/0, or CELERY_BROKER_URL.
"""

from __future__ import annotations

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from dispytch_integrations import EventBase
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import BrokerUnavailableError
from dispytch_integrations.redis import RedisStreamEventRoute


class OrderPlaced(EventBase):
    """What is told when an order is placed."""

    __route__ = RedisStreamEventRoute(stream="orders")
    order_id: int


celery = Celery("shop", broker="redis://localhost:6379/0")
# Celery kills a child that takes more than four seconds to start: it must not wait for a broker that is down.
brokers = connect_blocking(required=False)


@worker_process_init.connect
def connect_worker(**kwargs: object) -> None:
    """In each child, after the fork."""
    brokers.start()


@worker_process_shutdown.connect
def disconnect_worker(**kwargs: object) -> None:
    """A child of Celery ends without exit functions."""
    brokers.stop()


# Nothing was sent when the broker cannot be reached: such a task is safe to run again.
@celery.task(autoretry_for=(BrokerUnavailableError,), retry_backoff=True, max_retries=10)
def place_order(order_id: int) -> None:
    """Succeeded once the broker has the event."""
    brokers.emitter.emit(OrderPlaced(order_id=order_id))
