# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""SQLAlchemy and SQLModel: `bind`, `emit_on_commit`, the outbox, and the dependency that gives a session."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from typing import assert_type

import sqlmodel
import sqlmodel.ext.asyncio.session
from sqlalchemy import Connection, Engine, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dispytch_integrations import connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit, outbox_tables, session_dependency
from tests.typed.orders import OrderPlaced


class OwnSession(AsyncSession):
    pass


def binding(engine: Engine, async_engine: AsyncEngine) -> None:
    factory = sessionmaker(engine)
    async_factory = async_sessionmaker(async_engine)
    brokers = connect("kafka://localhost:9092")
    bind(factory, connect_blocking("kafka://localhost:9092"))
    bind(async_factory, brokers, wait=True)
    bind(scoped_session(factory), brokers.emitter)
    bind(async_scoped_session(async_factory, scopefunc=lambda: 1), SQLAlchemyOutbox(async_engine))
    bind(sqlmodel.Session, SQLAlchemyOutbox(engine, relay="external", schema="shop"))

    bind(engine, brokers)  # type: ignore[arg-type]
    bind(brokers, factory)  # type: ignore[arg-type]
    bind(factory, "kafka://localhost:9092")  # type: ignore[arg-type]
    bind(factory, brokers, True)  # type: ignore[call-arg]


def emitting(session: Session, connection: Connection, event: OrderPlaced, outbox: SQLAlchemyOutbox) -> None:
    assert_type(emit_on_commit(session, event), str)
    assert_type(emit_on_commit(session, [event, event], headers={"tenant": "acme"}), list[str])
    assert_type(emit_on_commit(session, (event for _ in range(3))), list[str])
    assert_type(emit_on_commit(connection, event, outbox=outbox), str)
    emit_on_commit(session, event, outbox=False)
    emit_on_commit(session, event, emitter=connect())

    emit_on_commit(event)  # type: ignore[call-overload]
    emit_on_commit(event, session)  # type: ignore[call-overload]
    emit_on_commit(session, "order 1")  # type: ignore[arg-type]
    emit_on_commit(session, event, outbox=True)  # type: ignore[call-overload]


async def emitting_async(
    session: AsyncSession,
    models: sqlmodel.ext.asyncio.session.AsyncSession,
    connection: AsyncConnection,
    event: OrderPlaced,
) -> None:
    # Not awaited: it waits for the commit, and nothing else.
    assert_type(emit_on_commit(session, event), str)
    assert_type(emit_on_commit(models, [event]), list[str])
    assert_type(emit_on_commit(connection, event), str)
    await emit_on_commit(session, event)  # type: ignore[misc]


def dependencies(factory: sessionmaker[Session], own: async_sessionmaker[OwnSession]) -> None:
    assert_type(session_dependency(factory), Callable[[], Generator[Session, None, None]])
    assert_type(session_dependency(own), Callable[[], AsyncGenerator[OwnSession, None]])
    session_dependency(OwnSession)  # type: ignore[call-overload]


def tables() -> None:
    assert_type(outbox_tables(MetaData(), schema="shop"), tuple[Table, Table])
    assert_type(outbox_tables(sqlmodel.SQLModel.metadata), tuple[Table, Table])
