# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""FastAPI: the lifespan and the dependencies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection

from dispytch_integrations import EventEmitter, connect
from dispytch_integrations.blocking import BlockingEmitter
from dispytch_integrations.fastapi import (
    BlockingEmitterDep,
    EmitterDep,
    blocking_emitter_dependency,
    emitter_dependency,
    emitter_lifespan,
    get_emitter,
)
from dispytch_integrations.memory import MemoryProducer
from tests.typed.orders import OrderPlaced

AlertsDep = Annotated[EventEmitter, Depends(emitter_dependency("alerts"))]


@asynccontextmanager
async def own(app: FastAPI) -> AsyncGenerator[dict[str, int]]:
    yield {"answer": 42}


async def bare(app: FastAPI) -> AsyncGenerator[None]:
    yield


FastAPI(lifespan=emitter_lifespan("kafka://localhost:9092", acks="all"))
FastAPI(lifespan=emitter_lifespan(connect("kafka://localhost:9092"), name="events"))
FastAPI(lifespan=emitter_lifespan(lifespan=own))
app = FastAPI(lifespan=emitter_lifespan(lifespan=bare))
FastAPI(lifespan=emitter_lifespan)  # type: ignore[arg-type]
FastAPI(lifespan=emitter_lifespan(9092))  # type: ignore[arg-type]
emitter_lifespan("kafka://kafka", own)  # type: ignore[call-arg]


@app.post("/orders")
async def place_order(emitter: EmitterDep, alerts: AlertsDep) -> None:
    assert_type(emitter, EventEmitter)
    assert_type(alerts, EventEmitter)
    await emitter.emit(OrderPlaced(tenant="acme", order_id=1))
    await emitter.emit("order 1")  # type: ignore[arg-type]


@app.post("/orders/blocking")
def place_order_blocking(emitter: BlockingEmitterDep) -> None:
    assert_type(emitter, BlockingEmitter)
    emitter.emit(OrderPlaced(tenant="acme", order_id=1))


async def dependencies(connection: HTTPConnection) -> None:
    assert_type(await get_emitter(connection), EventEmitter)
    assert_type(await blocking_emitter_dependency("alerts")(), BlockingEmitter)
    assert_type(await emitter_dependency("alerts")(connection), EventEmitter)
    by_name: Callable[[HTTPConnection], Awaitable[EventEmitter]] = emitter_dependency("alerts")
    app.dependency_overrides[by_name] = lambda: EventEmitter(MemoryProducer())
