"""What differs between the brokers. Your app has one broker: write its route on the event and forget this module."""

from __future__ import annotations

from typing import Any

from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from example_projects.fastapi_orders.settings import Settings

__all__ = ["EXCHANGE", "options_for", "portable", "route_for"]

EXCHANGE = "shop"
"""The RabbitMQ exchange, of type topic; what is a topic on Kafka is a routing key there."""


def portable(route: KafkaEventRoute) -> EventRoute:
    """The route itself, or what it is on the broker that DISPYTCH_URL names.

    Routes belong to the class and are parsed once: so the choice is made once, at import.
    """
    return route_for(Settings.from_environment().transport, route)


def route_for(transport: str, route: KafkaEventRoute) -> EventRoute:
    """A Kafka topic is a stream on Redis, and a routing key on RabbitMQ; `memory://` takes every route."""
    match transport:
        case "redis":
            return RedisStreamEventRoute(stream=route.topic, maxlen=10_000)
        case "rabbitmq":
            return RabbitMQEventRoute(exchange=EXCHANGE, routing_key=route.topic)
        case _:
            return route


def options_for(transport: str) -> dict[str, Any]:
    """What this broker is to be told beside its URL: RabbitMQ declares the exchange at start."""
    return {"exchanges": {EXCHANGE: "topic"}} if transport == "rabbitmq" else {}
