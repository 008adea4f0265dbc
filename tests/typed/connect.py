# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""`connect`, what it takes, and what runs beside it: hooks, serializers, the memory transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.serialization import JSONSerializer, MessagePackSerializer, Serializer
from tests.typed.orders import OrderPlaced


async def connecting() -> None:
    brokers = connect("kafka://localhost:9092", acks="all", client={"linger_ms": 5})
    assert_type(brokers, Brokers)
    async with brokers as emitter:
        assert_type(emitter, EventEmitter)
    await brokers.start()
    assert_type(brokers.emitter, EventEmitter)
    assert_type(brokers.started, bool)
    assert_type(brokers.emitter_to("alerts"), EventEmitter)
    assert_type(await brokers.ping(timeout=1), dict[str, DispytchError | None])
    await brokers.stop()


def settings(secret: str) -> None:
    assert_type(connect(), Brokers)
    connect(lambda: f"amqp://app:{secret}@rabbitmq")
    connect({"default": {"url": "kafka://kafka"}, "alerts": {"url": "redis://redis", "timeout": 1.0}})
    connect("kafka://kafka", timeout=None, required=False, cloudevents="orders", source="/shop", prefix="test-")
    connect("kafka://kafka", hooks=[Tenant()], serializer=MessagePackSerializer())
    connect("kafka://kafka", on_timeout="log")
    connect("kafka://kafka", on_timeout=keep)
    connect("kafka://kafka", on_timeout=keep_async)

    connect(9092)  # type: ignore[arg-type]
    connect("kafka://kafka", on_timeout="ignore")  # type: ignore[arg-type]
    connect("kafka://kafka", timeout="5")  # type: ignore[arg-type]
    connect("kafka://kafka", hooks=[Tenant])  # type: ignore[list-item]
    connect("kafka://kafka", serializer=JSONSerializer)  # type: ignore[arg-type]
    connect("kafka://kafka", outbox="sqlite://")  # type: ignore[arg-type]
    with connect("kafka://kafka"):  # type: ignore[attr-defined]
        pass


def keep(event: EventBase) -> None: ...


async def keep_async(event: EventBase) -> None: ...


class Tenant(Hook):
    def before_send(self, message: Message) -> None:
        message.headers["tenant"] = "acme"
        assert_type(message.id, str)
        assert_type(message.event, EventBase | None)


class Compact(Serializer):
    content_type = "application/x-compact"

    def serialize(self, payload: dict[str, Any]) -> bytes:
        return repr(payload).encode()


class Text(Serializer):
    def serialize(self, payload: dict[str, Any]) -> str:  # type: ignore[override]
        return repr(payload)


async def memory() -> None:
    producer = MemoryProducer()
    await EventEmitter(producer).emit(OrderPlaced(tenant="acme", order_id=1))
    assert_type(producer.sent, list[Message])
    assert_type(producer.sent[0].headers, dict[str, Any])
    with producer.subscribe("orders.acme", limit=10) as messages:
        async for message in messages:
            assert_type(message, Message)


def looking(brokers: Brokers) -> None:
    assert_type(list(brokers.brokers), list[str])
    aliases: Mapping[str, object] = brokers.producers
    print(aliases)
