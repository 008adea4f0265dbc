"""SQLModel and FastAPI: an order and its event in one transaction; the event goes out after the commit.

DISPYTCH_URL=redis://localhost:6379 uvicorn example_projects.recipes.sqlmodel_app:app
curl -X POST localhost:8000/orders/1

The database is the file orders.db, or DATABASE_URL.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from dispytch_integrations import EventBase, connect
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import bind, emit_on_commit, session_dependency


class OrderPlaced(EventBase):
    """What is told when an order is placed."""

    __route__ = RedisStreamEventRoute(stream="orders")
    order_id: int


class Order(SQLModel, table=True):
    """A row."""

    id: int | None = Field(default=None, primary_key=True)


engine = create_async_engine(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///orders.db"))
Session = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
brokers = connect()
bind(Session, brokers)
SessionDep = Annotated[AsyncSession, Depends(session_dependency(Session), scope="function")]


@asynccontextmanager
async def database(app: FastAPI) -> AsyncGenerator[None, None]:
    """Inside the emitter's lifespan: what the last commit has left is still sent after this has ended."""
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=emitter_lifespan(brokers, lifespan=database))


@app.post("/orders/{order_id}", status_code=201)
async def place_order(order_id: int, session: SessionDep) -> None:
    """Committed when it has returned, before the response."""
    session.add(Order(id=order_id))
    emit_on_commit(session, OrderPlaced(order_id=order_id))
