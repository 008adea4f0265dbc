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

from dispytch_integrations.brokers import connect
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.events import EventBase, event_id

__all__ = ["EventBase", "EventEmitter", "connect", "event_id"]
__version__ = "0.1.0.dev0"
