"""The app that real servers serve in test_servers; the broker's URL and the stream come from the environment."""

from __future__ import annotations

import os
from typing import Any

from fastapi import BackgroundTasks, FastAPI

from dispytch_integrations import EventBase
from dispytch_integrations.events import EventRoute
from dispytch_integrations.fastapi import BlockingEmitterDep, EmitterDep, emitter_lifespan, health_router
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.starlette import EmitterMiddleware, get_emitter

STREAM = os.environ.get("TEST_STREAM", "orders")


def route() -> EventRoute:
    if url().startswith("kafka://"):
        from dispytch_integrations.kafka import KafkaEventRoute

        return KafkaEventRoute(topic=STREAM)
    return RedisStreamEventRoute(stream=STREAM)


def url() -> str:
    return os.environ.get("TEST_BROKER", "memory://")


class OrderPlaced(EventBase):
    __route__ = route()

    number: int


app = FastAPI(lifespan=emitter_lifespan(url, startup_timeout=float(os.environ.get("TEST_STARTUP_TIMEOUT", "10"))))

app.include_router(health_router())
app.include_router(health_router("/strict", ready_on="broker", timeout=0.5))


@app.post("/awaited/{number}")
async def place(number: int, emitter: EmitterDep) -> None:
    await emitter.emit(OrderPlaced(number=number))


@app.post("/threaded/{number}")
def place_in_thread(number: int, emitter: BlockingEmitterDep) -> None:
    emitter.emit(OrderPlaced(number=number))


@app.post("/later/{number}")
async def place_later(number: int, emitter: EmitterDep, tasks: BackgroundTasks) -> None:
    tasks.add_task(emitter.emit, OrderPlaced(number=number))


async def _raw(scope: Any, receive: Any, send: Any) -> None:
    """An app without lifespan, as Django's: it raises."""
    if scope["type"] != "http":
        raise ValueError(f"cannot handle {scope['type']}")
    await get_emitter(scope).emit(OrderPlaced(number=int(scope["path"].rpartition("/")[2])))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"0"})


raw = EmitterMiddleware(_raw, url, startup_timeout=float(os.environ.get("TEST_STARTUP_TIMEOUT", "10")))
