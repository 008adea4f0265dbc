# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Events, and the emitter that sends them."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, assert_type
from uuid import UUID

from pydantic import BaseModel

from dispytch_integrations import EventBase, EventEmitter, event_id
from dispytch_integrations.errors import DispytchError, MissingExtraError, ProducerTimeout
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.producer import Producer
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from tests.typed.orders import OrderPlaced


class NoEvent(BaseModel):
    order_id: int


async def emitting(emitter: EventEmitter, event: OrderPlaced) -> None:
    sending: Coroutine[Any, Any, None] = emitter.emit(event)
    await sending
    await emitter.emit(event, headers={"tenant": "acme", "priority": 3, "trace": UUID(int=1)})
    sending = emitter.emit_many([event, event])
    await sending
    await emitter.emit_many(event for _ in range(3))
    assert_type(event_id(event), str)
    assert_type(event.order_id, int)

    await emitter.emit(NoEvent(order_id=1))  # type: ignore[arg-type]
    await emitter.emit({"order_id": 1})  # type: ignore[arg-type]
    await emitter.emit(OrderPlaced)  # type: ignore[arg-type]
    await emitter.emit([event])  # type: ignore[arg-type]
    await emitter.emit_many(event)  # type: ignore[arg-type]
    await emitter.emit_many([NoEvent(order_id=1)])  # type: ignore[list-item]
    await emitter.emit(event, {"a": "b"})  # type: ignore[call-arg]


async def looking(emitter: EventEmitter) -> None:
    assert_type(await emitter.ping(timeout=1.0), dict[str, DispytchError | None])
    assert_type(emitter.producers, Mapping[str, Producer])


def building(producer: Producer) -> None:
    assert_type(EventEmitter(producer), EventEmitter)
    assert_type(EventEmitter(producer, timeout=None), EventEmitter)
    EventEmitter("kafka://localhost")  # type: ignore[arg-type]


async def timeouts(emitter: EventEmitter) -> None:
    @emitter.on_timeout
    def later(event: EventBase) -> None: ...

    @emitter.on_timeout
    async def later_or_never(event: EventBase) -> None: ...

    # A decorator leaves what it decorates as it was.
    later(OrderPlaced(tenant="acme", order_id=1))
    await later_or_never(OrderPlaced(tenant="acme", order_id=1))

    @emitter.on_timeout  # type: ignore[type-var]
    def wrong(event: EventBase, error: Exception) -> None: ...


def declaring() -> None:
    KafkaEventRoute(topic="orders")
    RabbitMQEventRoute(exchange="orders", routing_key="order.{order_id}")
    RedisEventRoute(channel="orders")
    RedisStreamEventRoute(stream="orders")
    KafkaEventRoute(topic=1)  # type: ignore[arg-type]
    KafkaEventRoute(queue="orders")  # type: ignore[call-arg]
    OrderPlaced(tenant="acme")  # type: ignore[call-arg]

    class Misrouted(EventBase):
        __route__ = "orders"  # type: ignore[assignment]

    assert_type(Misrouted(), Misrouted)


def catching(error: MissingExtraError, late: ProducerTimeout) -> None:
    """What the tree of errors promises to an `except`."""
    as_import_error: ImportError = error
    as_timeout_error: TimeoutError = late
    assert_type(error.extra, str)
    assert_type(error.problems, list[str])
    print(as_import_error, as_timeout_error)
