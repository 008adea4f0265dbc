"""The app, put together.

DISPYTCH_URL=kafka://localhost:9092 uvicorn example_projects.fastapi_orders.app:create_app --factory
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from fastapi import FastAPI, Request, status
from fastapi.responses import JSONResponse

from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import DeliveryError, UnconfirmedError
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.starlette import get_emitter
from example_projects.fastapi_orders.events import TOPICS
from example_projects.fastapi_orders.live.consumers import (
    Consumer,
    from_kafka,
    from_memory,
    from_rabbitmq,
    from_redis,
)
from example_projects.fastapi_orders.live.feed import BrokerState, Feed
from example_projects.fastapi_orders.live.follow import closed_before_shutdown, following
from example_projects.fastapi_orders.repository import OrderRepository
from example_projects.fastapi_orders.routers import cancellations, live, orders
from example_projects.fastapi_orders.settings import Settings
from example_projects.fastapi_orders.transports import options_for

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app; without `settings` they are read from the environment."""
    settings = settings or Settings.from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        # Inside the emitter's lifespan: the broker is connected.
        app.state.feed = feed = Feed(_state(settings), settings.history)
        async with following(feed, _consumer(app, settings)):
            with closed_before_shutdown(feed):
                yield

    app = FastAPI(
        title="Orders",
        lifespan=emitter_lifespan(
            settings.broker_url, lifespan=lifespan, source="/shop", **options_for(settings.transport)
        ),
    )
    app.state.orders = OrderRepository()
    app.include_router(live.router)
    app.include_router(orders.router)
    app.include_router(cancellations.router)
    app.add_exception_handler(DeliveryError, _not_confirmed)
    return app


async def _not_confirmed(request: Request, exc: Exception) -> JSONResponse:
    """One place says what a broker's trouble means for clients; the routes know nothing of it."""
    detail = "The order was not taken: nobody could be told of it. Try again in a moment."
    if isinstance(exc, UnconfirmedError):
        detail = "The order is kept, but the broker has not confirmed in time that others know of it."
    return JSONResponse({"detail": detail}, status.HTTP_503_SERVICE_UNAVAILABLE, headers={"Retry-After": "1"})


def _state(settings: Settings) -> BrokerState:
    # str() of a BrokerURL leaves out user, password and options.
    address = str(BrokerURL.parse(settings.broker_url or ""))
    return BrokerState(transport=settings.transport, address=address, connected=False)


def _consumer(app: FastAPI, settings: Settings) -> Consumer:
    url = settings.broker_url or ""
    match settings.transport:
        case "kafka":
            return partial(from_kafka, url, TOPICS)
        case "rabbitmq":
            return partial(from_rabbitmq, url, TOPICS)
        case "redis":
            return partial(from_redis, url, TOPICS)
        case _:
            return partial(from_memory, cast("MemoryProducer", get_emitter(app).producer), TOPICS)
