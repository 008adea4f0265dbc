"""What differs between the brokers. Your app has one broker: write its route on the event and forget this module."""

from __future__ import annotations

from typing import Any

from dispytch_integrations.events import EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from example_projects.fastapi_orders.settings import Settings
from example_projects.shop_demo.transports import EXCHANGE, route_for

__all__ = ["options_for", "portable"]


def portable(route: KafkaEventRoute) -> EventRoute:
    """The route itself, or what it is on the broker that DISPYTCH_URL names.

    Routes belong to the class and are parsed once: so the choice is made once, at import.
    """
    return route_for(Settings.from_environment().transport, route)


def options_for(transport: str) -> dict[str, Any]:
    """What this broker is to be told beside its URL: RabbitMQ declares the exchange at start."""
    return {"exchanges": {EXCHANGE: "topic"}} if transport == "rabbitmq" else {}
