"""The app with a database, put together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.starlette import get_emitter
from example_projects.fastapi_orders.events import TOPICS
from example_projects.fastapi_orders.routers import live
from example_projects.fastapi_orders.settings import Settings
from example_projects.fastapi_orders.transports import options_for
from example_projects.fastapi_orders.with_outbox import routes
from example_projects.fastapi_orders.with_outbox.database import Database
from example_projects.shop_demo.live.follow import live_feed
from example_projects.shop_demo.live.outbox import RelaySwitch, outbox_on_page

__all__ = ["create_app_with_outbox"]


def create_app_with_outbox(settings: Settings) -> FastAPI:
    """The app of `create_app`, where `settings.outbox` is set."""
    database = Database(settings.database_url)

    @asynccontextmanager
    async def page(app: FastAPI) -> AsyncGenerator[None, None]:
        url, producer = settings.broker_url or "", get_emitter(app).producer
        [relay] = database.outbox.relays
        app.state.relay = RelaySwitch(relay)
        async with live_feed(url, TOPICS, producer, history=settings.history) as app.state.feed:
            async with outbox_on_page(app.state.feed, database.outbox.store(), app.state.relay):
                yield

    # Embedded: this process relays what it stores, woken by each commit.
    events = emitter_lifespan(
        settings.broker_url, outbox=database.outbox, lifespan=page, source="/shop", **options_for(settings.transport)
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any], None]:
        async with database.opened(), events(app) as state:
            yield state

    app = FastAPI(title="Orders", lifespan=lifespan)
    app.state.shop = live.SHOP_WITH_OUTBOX
    app.include_router(live.router)
    app.include_router(live.outbox_router)
    app.include_router(routes.router)
    return app
