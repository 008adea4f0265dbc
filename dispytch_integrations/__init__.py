"""Typed events from a web app to Kafka, RabbitMQ or Redis, none lost.

    from dispytch_integrations import EventBase, connect
    from dispytch_integrations.kafka import KafkaEventRoute

    class OrderPlaced(EventBase):
        __route__ = KafkaEventRoute(topic="orders")
        order_id: int

    async with connect("kafka://localhost:9092") as emitter:
        await emitter.emit(OrderPlaced(order_id=1))

Routes and producers are in a module per transport (kafka, rabbitmq, redis, memory), what an app needs in a module
per framework (fastapi, starlette), all errors in `errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dispytch_integrations.brokers import connect
    from dispytch_integrations.emitter import EventEmitter
    from dispytch_integrations.events import EventBase, event_id

__all__ = ["EventBase", "EventEmitter", "connect", "event_id"]
__version__ = "0.1.0"

_HOMES = {"EventBase": "events", "EventEmitter": "emitter", "connect": "brokers", "event_id": "events"}


def __getattr__(name: str) -> object:
    # At first use: pydantic takes a quarter of a second, which `dispytch-integrations --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
