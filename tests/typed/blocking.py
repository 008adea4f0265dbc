# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""`connect_blocking`, for synchronous code: the same names without `await`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import assert_type

from dispytch_integrations import EventBase
from dispytch_integrations.blocking import BlockingBrokers, BlockingEmitter, connect_blocking
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.producer import Producer
from tests.typed.orders import OrderPlaced


def connecting() -> None:
    brokers = connect_blocking("kafka://localhost:9092", acks="all", timeout=None)
    assert_type(brokers, BlockingBrokers)
    with brokers as emitter:
        assert_type(emitter, BlockingEmitter)
    brokers.start()
    assert_type(brokers.emitter, BlockingEmitter)
    brokers.stop()

    connect_blocking(9092)  # type: ignore[arg-type]
    connect_blocking("kafka://kafka", on_timeout="ignore")  # type: ignore[arg-type]


async def not_in_async_code(emitter: BlockingEmitter, event: OrderPlaced) -> None:
    async with connect_blocking("kafka://kafka"):  # type: ignore[attr-defined]
        pass
    await emitter.emit(event)  # type: ignore[func-returns-value, misc]


def emitting(emitter: BlockingEmitter, event: OrderPlaced) -> None:
    emitter.emit(event, headers={"tenant": "acme"})
    emitter.emit_many([event, event])
    returns_nothing: Callable[[EventBase], None] = emitter.emit
    returns_nothing(event)
    assert_type(emitter.ping(timeout=1.0), dict[str, DispytchError | None])
    assert_type(emitter.producers, Mapping[str, Producer])

    emitter.emit({"order_id": 1})  # type: ignore[arg-type]
    emitter.emit_many(event)  # type: ignore[arg-type]

    @emitter.on_timeout
    def later(event: EventBase) -> None: ...

    later(event)
