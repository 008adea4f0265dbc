"""The database: its engine, its sessions, and the outbox in it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind
from example_projects.fastapi_orders.with_outbox.tables import Base

__all__ = ["Database", "Session"]

Session = async_sessionmaker(expire_on_commit=False)
"""The app's sessions; of which database, `Database` says."""


class Database:
    """What an app has one of. `url`: "sqlite:///file.db" or "postgresql://user:password@host:5432/name"."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.outbox = SQLAlchemyOutbox(self.engine)
        Session.configure(bind=self.engine)
        # What is emitted in one of these sessions is stored by its commit.
        bind(Session, self.outbox)

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None, None]:
        """Outside of the emitter's lifespan: its relay looks for the tables, and is the last to use a connection."""
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)  # In your app: `alembic upgrade head`.
        try:
            yield
        finally:
            await self.engine.dispose()


def _engine(url: str) -> AsyncEngine:
    """An engine with the asynchronous driver of that database."""
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    read = make_url(url)
    engine = create_async_engine(read.set(drivername=drivers.get(read.drivername, read.drivername)))
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _together)
    return engine


def _together(connection: Any, record: object) -> None:
    """Routes and relay use the file at the same time: readers go on, and writers wait for each other."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=20000")
    cursor.close()
