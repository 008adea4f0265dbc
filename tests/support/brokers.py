"""Real brokers for tests: those that are public, in `dispytch_integrations.testing.brokers`."""

from __future__ import annotations

from dispytch_integrations.testing.brokers import (
    AMQP_GREETING,
    REDIS_GREETING,
    Broker,
    BrokerMissing,
    RabbitMQ,
    Redis,
    Tansu,
    answers,
    free_port,
)

__all__ = [
    "AMQP_GREETING",
    "REDIS_GREETING",
    "Broker",
    "BrokerMissing",
    "RabbitMQ",
    "Redis",
    "Tansu",
    "answers",
    "free_port",
]
