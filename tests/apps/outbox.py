"""The app with an outbox that real servers serve in test_outbox_apps; places come from the environment."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from dispytch_integrations.fastapi import EmitterDep, emitter_lifespan
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit, session_dependency
from dispytch_integrations.starlette import EmitterMiddleware
from tests.apps.orders import OrderPlaced, url

engine = create_async_engine(os.environ["TEST_DATABASE_URL"])
Session = async_sessionmaker(engine)
outbox = SQLAlchemyOutbox(engine, relay="external" if os.environ.get("TEST_RELAY") == "external" else "embedded")
bind(Session, outbox)

SessionDep = Annotated[AsyncSession, Depends(session_dependency(Session), scope="function")]


@asynccontextmanager
async def closing(app: object) -> AsyncGenerator[None]:
    yield
    await engine.dispose()


def served(**options: Any) -> FastAPI:
    app = FastAPI(**options)

    @app.post("/commit/{number}")
    async def place(number: int, session: SessionDep) -> None:
        await session.execute(text("insert into placed (number) values (:number)"), {"number": number})
        emit_on_commit(session, OrderPlaced(number=number))

    return app


app = served(lifespan=emitter_lifespan(url, outbox=outbox))


@app.post("/direct/{number}")
async def emit_directly(number: int, emitter: EmitterDep) -> None:
    await emitter.emit(OrderPlaced(number=number))


wrapped = EmitterMiddleware(served(lifespan=closing), url, outbox=outbox)
