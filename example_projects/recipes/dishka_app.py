"""dishka: a provider that opens the brokers, and gives the emitter to FastAPI's routes and to your services.

DISPYTCH_URL=redis://localhost:6379 uvicorn example_projects.recipes.dishka_app:app
curl -X POST localhost:8000/orders/1
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from dishka import (
    AsyncContainer,
    Provider,
    Scope,
    make_async_container,
    provide,  # pyright: ignore[reportUnknownVariableType]
)
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.redis import RedisStreamEventRoute


class OrderPlaced(EventBase):
    """What is told when an order is placed."""

    __route__ = RedisStreamEventRoute(stream="orders")
    order_id: int


class OrderService:
    """What an app is made of; it knows neither FastAPI nor dishka."""

    def __init__(self, emitter: EventEmitter) -> None:
        self._emitter = emitter

    async def place(self, order_id: int) -> None:
        """Place an order, and tell of it. Returns once the broker has the event."""
        await self._emitter.emit(OrderPlaced(order_id=order_id))


class EventsProvider(Provider):
    """One emitter for the app, not one per request."""

    scope = Scope.APP

    @provide
    async def emitter(self) -> AsyncIterator[EventEmitter]:
        """Open until the container is closed."""
        async with connect() as emitter:
            yield emitter


class ShopProvider(Provider):
    """A service for each request."""

    scope = Scope.REQUEST
    orders = provide(OrderService)


router = APIRouter(route_class=DishkaRoute)


@router.post("/orders/{order_id}", status_code=201)
async def place_order(order_id: int, orders: FromDishka[OrderService]) -> None:
    """Answered once the broker has the event."""
    await orders.place(order_id)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Connect before the first request; otherwise the first one would, and would be the one to fail."""
    container: AsyncContainer = app.state.dishka_container
    try:
        await container.get(EventEmitter)
        yield
    finally:
        await container.close()


app = FastAPI(lifespan=lifespan)
app.include_router(router)
setup_dishka(make_async_container(EventsProvider(), ShopProvider()), app)
