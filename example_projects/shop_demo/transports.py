"""What differs between the brokers. Your app has one broker: write its route on the event and forget this module."""

from __future__ import annotations

from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute

__all__ = ["EXCHANGE", "route_for", "transport_of"]

EXCHANGE = "shop"
"""The RabbitMQ exchange, of type topic; what is a topic on Kafka is a routing key there."""

_TRANSPORTS = {
    "amqp": "rabbitmq",
    "amqps": "rabbitmq",
    "rediss": "redis",
    "unix": "redis",
    "valkey": "redis",
    "valkeys": "redis",
}


def transport_of(url: str) -> str:
    """ "kafka", "rabbitmq", "redis" or "memory"; of a URL that belongs to none of them its scheme."""
    scheme = url.partition("://")[0].partition("+")[0].lower()
    return _TRANSPORTS.get(scheme, scheme)


def route_for(transport: str, route: KafkaEventRoute) -> EventRoute:
    """A Kafka topic is a stream on Redis, and a routing key on RabbitMQ; `memory://` takes every route."""
    match transport:
        case "redis":
            return RedisStreamEventRoute(stream=route.topic, maxlen=10_000)
        case "rabbitmq":
            return RabbitMQEventRoute(exchange=EXCHANGE, routing_key=route.topic)
        case _:
            return route
