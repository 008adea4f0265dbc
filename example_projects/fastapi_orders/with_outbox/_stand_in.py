"""Stands in for dispytch_integrations.sqlalchemy until it is there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event as hooks
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from dispytch_integrations import EventBase
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_store import outbox_tables

__all__ = ["SQLAlchemyOutbox", "bind", "emit_on_commit", "outbox_tables"]


class _Session(Session):
    pass


def bind(sessions: async_sessionmaker[Any], outbox: SQLAlchemyOutbox) -> None:
    class Bound(_Session):
        pass

    sessions.configure(sync_session_class=Bound, info={"outbox": outbox})

    @hooks.listens_for(Bound, "before_commit")
    def store(session: Session) -> None:
        records = session.info.pop("records", [])
        if records:
            outbox.insert(session.connection(), records)

    @hooks.listens_for(Bound, "after_commit")
    def wake(session: Session) -> None:
        outbox.committed()


def emit_on_commit(session: AsyncSession, event: EventBase) -> None:
    outbox: SQLAlchemyOutbox = session.info["outbox"]
    session.info.setdefault("records", []).append(outbox.record_of(outbox.emitter.prepare(event)[1]))
