"""What the shop tells; found by the app config, nobody imports it."""

from __future__ import annotations

import os

from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute

_NAME = os.environ.get("TEST_NAME", "shop-orders")
_SCHEME = os.environ.get("TEST_BROKER", "").partition("://")[0]


class OrderPlaced(EventBase):
    """To whatever broker the environment names."""

    __route__ = (
        KafkaEventRoute(topic=_NAME)
        if _SCHEME == "kafka"
        else RabbitMQEventRoute(exchange=_NAME, routing_key="placed")
        if _SCHEME in ("amqp", "rabbitmq")
        else RedisStreamEventRoute(stream=_NAME)
    )
    __event_type__ = "shop.order.placed"

    number: int


class OrderCancelled(EventBase):
    __route__ = OrderPlaced.__route__
    __event_type__ = "shop.order.cancelled"

    number: int
    reason: str = ""
