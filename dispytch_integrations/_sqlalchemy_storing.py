"""Over which connection a session's events are stored in the outbox, and what is said when that fails."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError, ProgrammingError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, async_session
from sqlalchemy.orm import Session, SessionTransaction

from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.record import Record

__all__ = ["connection_of", "is_autocommit", "store"]

_NAMES = {"mariadb": "mysql"}
_PORTS = {"postgresql": 5432, "mysql": 3306}


def store(outbox: SQLAlchemyOutbox, connection: Connection, records: Sequence[Record]) -> None:
    """Insert records over a connection. Raises what SQLAlchemy raises, without parameters: they hold payloads.

    Raises ConfigurationError when the table is missing, or must not be written to.
    """
    if is_autocommit(connection):
        raise ConfigurationError(
            "the connection commits each statement by itself (AUTOCOMMIT): an event in the outbox would be there "
            "before the work, or without it; use an engine with transactions"
        )
    try:
        outbox.insert(connection, records)
    except StatementError as exc:
        exc.hide_parameters = True
        if isinstance(exc, ProgrammingError) or (isinstance(exc, OperationalError) and "no such table" in str(exc)):
            raise ConfigurationError(
                f"{_told(len(records))} not be stored in the outbox of {connection.engine.url.render_as_string()}: "
                f"{exc.orig}; is its table there? Write outbox_tables(metadata) beside your tables and create them "
                f"(metadata.create_all, or an Alembic revision)"
            ) from exc
        exc.add_note(f"{_told(len(records))} not be stored in the outbox; the transaction was not committed")
        raise


def _told(count: int) -> str:
    return "1 event could" if count == 1 else f"{count} events could"


def is_autocommit(connection: Connection) -> bool:
    """Is each statement committed by itself?"""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return level == "AUTOCOMMIT"


def connection_of(session: Session, outbox: SQLAlchemyOutbox) -> Connection:
    """The connection of the session's transaction to the outbox's database.

    The one that was used, if there is one. Raises ConfigurationError when the session has worked elsewhere.
    """
    engine = outbox.engine.sync_engine if isinstance(outbox.engine, AsyncEngine) else outbox.engine
    root = session.get_transaction()
    used = list(_connections(root)) if root is not None else []
    if used:
        best = max(used, key=lambda connection: _likeness(connection.engine, engine))
        if _likeness(best.engine, engine):
            return best
        elsewhere = " and ".join(sorted({connection.engine.url.render_as_string() for connection in used}))
        raise ConfigurationError(
            f"the session has worked in {elsewhere}, and the outbox is in {engine.url.render_as_string()}: neither "
            f"would be committed with the other; make SQLAlchemyOutbox with the engine that the work goes to, or give "
            f"outbox=False to send after the commit"
        )
    bind: Any = session.bind
    likeness = _likeness(bind.engine, engine) if bind is not None else 0
    if likeness > 1 or (likeness and isinstance(bind, Connection)):
        return session.connection(bind_arguments={"bind": bind})
    if engine.dialect.is_async == (async_session(session) is not None):
        return session.connection(bind_arguments={"bind": engine})
    if likeness:
        return session.connection(bind_arguments={"bind": bind})
    kind = "an asynchronous" if engine.dialect.is_async else "a synchronous"
    raise ConfigurationError(
        f"the session has worked in no database yet, and the outbox has {kind} engine, which it cannot use; make "
        f"SQLAlchemyOutbox with the session's engine"
    )


def _connections(root: SessionTransaction) -> Iterable[Connection]:
    # `connections` is SQLAlchemy's from 2.1.7 on.
    given = getattr(root, "connections", None)
    if given is not None:
        return given  # type: ignore[no-any-return]
    return {entry[0] for entry in root._connections.values()}


def _likeness(one: Engine, other: Engine) -> int:
    """3: the same pool; 2: the same database; 1: one of that name, by another way (a pooler, a socket); 0: another."""
    if one.pool is other.pool:
        return 3
    place, other_place = _place(one), _place(other)
    if place is None or other_place is None:
        return 0
    if place == other_place:
        return 2
    return 1 if place[0] == other_place[0] != "sqlite" and place[-1] == other_place[-1] else 0


def _place(engine: Engine) -> tuple[str, str, int, str] | None:
    """Kind, host, port and name of a database; None: it is in memory, and only its own pool reaches it."""
    url = engine.url
    name = engine.dialect.name
    kind = _NAMES.get(name, name)
    if kind == "sqlite":
        path = url.database or ""
        if path in ("", ":memory:") or "mode=memory" in path or path.startswith("file::memory:"):
            return None
        return kind, "", 0, os.path.realpath(path.removeprefix("file:").partition("?")[0])
    host = "localhost" if url.host in (None, "", "127.0.0.1", "::1") else str(url.host)
    return kind, host, url.port or _PORTS.get(kind, 0), url.database or ""
