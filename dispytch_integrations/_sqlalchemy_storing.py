"""Over which connection a session's events are stored in the outbox, and what is said when that fails."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import OperationalError, ProgrammingError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, async_session
from sqlalchemy.orm import Session, SessionTransaction

from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_store import address_of
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.record import Record

__all__ = ["connection_of", "is_autocommit", "store"]

_NAMES = {"mariadb": "mysql"}
_PORTS = {"postgresql": 5432, "mysql": 3306}
_LOCAL = ("localhost", "127.0.0.1", "::1")


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
            said = str(exc.orig).partition("\n")[0]
            raise ConfigurationError(
                f"{_told(len(records))} not be stored in the outbox of {address_of(connection.engine)}: {said}; is its "
                f"table there? Write outbox_tables(metadata) beside your tables and create them (metadata.create_all, "
                f"or an Alembic revision)"
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
            # By the session, which makes its savepoints when they are first needed: a row belongs to the innermost.
            return session.connection(bind_arguments={"bind": best})
        elsewhere = " and ".join(sorted({address_of(connection.engine) for connection in used}))
        raise ConfigurationError(
            f"the session has worked in {elsewhere}, and the outbox is in {address_of(engine)}: neither would be "
            f"committed with the other; make SQLAlchemyOutbox with the engine that the work goes to, or give "
            f"outbox=False to send after the commit"
        )
    bind: Any = session.bind
    if bind is not None and _likeness(bind.engine, engine):
        return session.connection(bind_arguments={"bind": bind})
    if engine.dialect.is_async == (async_session(session) is not None):
        return session.connection(bind_arguments={"bind": engine})
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
    """2: the same pool; 1: the same database, by its address; 0: another, or not known."""
    if one.pool is other.pool:
        return 2
    place = _place(one)
    return int(place is not None and place == _place(other))


def _place(engine: Engine) -> tuple[str, str, str, str] | None:
    """Kind, host, port and name of a database; None: only its own pool is known to reach it.

    An alias of a host is another host: a row in a database that nobody relays would never be sent.
    """
    url = engine.url
    name = engine.dialect.name
    kind = _NAMES.get(name, name)
    if kind == "sqlite":
        path = url.database or ""
        if path in ("", ":memory:") or "mode=memory" in path or path.startswith("file::memory:"):
            return None
        return kind, "", "", os.path.realpath(path.removeprefix("file:").partition("?")[0])
    if not url.database:  # A `creator`, or a service's name, says where it is.
        return None
    return kind, _host(url), str(url.query.get("port") or url.port or _PORTS.get(kind, "")), url.database


def _host(url: URL) -> str:
    host = url.query.get("host") or url.query.get("unix_socket") or url.host
    if not host or (isinstance(host, str) and (host in _LOCAL or host.startswith("/"))):
        return "localhost"
    return str(host)
