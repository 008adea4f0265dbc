"""The app, put together.

DISPYTCH_URL=kafka://localhost:9092 uvicorn example_projects.fastapi_orders.app:create_app --factory
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, status
from fastapi.responses import JSONResponse

from dispytch_integrations.errors import DeliveryError, UnconfirmedError
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.starlette import get_emitter
from example_projects.fastapi_orders.events import TOPICS
from example_projects.fastapi_orders.repository import OrderRepository
from example_projects.fastapi_orders.routers import cancellations, live, orders
from example_projects.fastapi_orders.settings import Settings
from example_projects.fastapi_orders.transports import options_for
from example_projects.shop_demo.live.follow import live_feed

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app; without `settings` they are read from the environment."""
    settings = settings or Settings.from_environment()
    if settings.outbox:
        # Imported here: without a database nobody needs SQLAlchemy.
        from example_projects.fastapi_orders.with_outbox.app import create_app_with_outbox

        return create_app_with_outbox(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        # Inside the emitter's lifespan: the broker is connected.
        url, producer = settings.broker_url or "", get_emitter(app).producer
        async with live_feed(url, TOPICS, producer, history=settings.history) as app.state.feed:
            yield

    app = FastAPI(
        title="Orders",
        lifespan=emitter_lifespan(
            settings.broker_url, lifespan=lifespan, source="/shop", **options_for(settings.transport)
        ),
    )
    app.state.orders = OrderRepository()
    app.state.shop = live.SHOP
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
