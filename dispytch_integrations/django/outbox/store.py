"""The outbox's store in a database of Django: a connection of its own, on a thread of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar, cast

from django.db import connections as databases
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist

from dispytch_integrations._templates import nearest
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._sql import EVENTS, LEASES, Connection, SQLStore
from dispytch_integrations.outbox._sql_store import OutboxInSQL
from dispytch_integrations.outbox.threads import OneThread, listen_blocking, no_listener, shut_down

__all__ = ["DjangoStore", "OnDjango", "missing_tables"]

_T = TypeVar("_T")

_PARAMETER = re.compile(r"(?<![:\w]):([a-z_][a-z_0-9]*)")
_SHORT = 4000
"""Characters of a text that is kept: longer ones have lists of ids in them, and differ each time."""


class OnDjango:
    """Runs the outbox's SQL on a connection of Django."""

    __slots__ = ("connection",)

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.connection = connection

    def query(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows of a SELECT."""
        text, names = _translated(sql)
        with self.connection.cursor() as cursor:
            cursor.execute(text, [parameters[name] for name in names])
            return cast("Sequence[Sequence[Any]]", cursor.fetchall())

    def run(self, sql: str, parameters: Mapping[str, Any]) -> int:
        """How many rows were touched."""
        text, names = _translated(sql)
        with self.connection.cursor() as cursor:
            cursor.execute(text, [parameters[name] for name in names])
            return int(cursor.rowcount)


def _translated(sql: str) -> tuple[str, Sequence[str]]:
    """The text with Django's placeholders, and the names of their values.

    In their order, and not by name: SQLite's backend cannot log many named ones.
    """
    return _kept(sql) if len(sql) < _SHORT else _translate(sql)


def _translate(sql: str) -> tuple[str, Sequence[str]]:
    names: list[str] = []

    def place(match: re.Match[str]) -> str:
        names.append(match[1])
        return "%s"

    return _PARAMETER.sub(place, sql.replace("%", "%%")), names


_kept = lru_cache(maxsize=256)(_translate)


def missing_tables(connection: BaseDatabaseWrapper) -> list[str]:
    """Which of the outbox's tables a database does not have."""
    with connection.cursor() as cursor:
        there = set(connection.introspection.table_names(cursor))
    return [table for table in (EVENTS, LEASES) if table not in there]


class DjangoStore(OutboxInSQL):
    """An OutboxStore in a database of Django; keeps a thread, and a connection that nobody else uses, until `close`.

    `alias`: of the database. Raises SettingsError for one that does not exist or cannot hold an outbox.
    """

    def __init__(self, alias: str = "default") -> None:
        try:
            self._settings = databases[alias].settings_dict
            super().__init__(SQLStore(databases[alias].vendor))
        except ConnectionDoesNotExist:
            raise SettingsError(
                [f"there is no database {alias!r}{nearest(alias, list(databases))}; DATABASES has {_listed(databases)}"]
            ) from None
        except ConfigurationError as exc:
            raise SettingsError([f"database {alias!r}: {problem}" for problem in exc.problems]) from exc
        self.alias = alias
        """The database's alias."""
        self._vendor = databases[alias].vendor
        # Of the thread: one that was left behind in a dead connection keeps it, the next one has its own.
        self._kept = threading.local()
        self._driver: Any = None
        """The driver's connection that the thread works on. Kept, so that a forked child does not close it."""
        self._thread = OneThread(f"dispytch outbox {alias}", self._close, lambda: shut_down(self._driver))

    @property
    def address(self) -> str:
        """The database for logs, without secrets."""
        host, port, name = (self._settings.get(key) or "" for key in ("HOST", "PORT", "NAME"))
        return f"{self._vendor}://{host}{f':{port}' if port else ''}/{str(name).removeprefix('/')} ({self.alias!r})"

    async def open(self) -> None:
        """As OutboxStore.open. Raises SettingsError when the tables are missing or the database is a replica."""
        await self._thread.run(lambda: self._run(self._check))

    async def close(self) -> None:
        """Close the connection, and end the thread."""
        await self._thread.run(self._close)
        self._thread.end()

    async def on_connection(self, function: Callable[[Connection], _T]) -> _T:
        """Call the function on the store's connection, in its thread."""
        return await self._thread.run(lambda: self._run(lambda connection: function(OnDjango(connection))))

    async def listen(self, wake: Callable[[], None]) -> None:
        """As OutboxStore.listen, with psycopg 3."""
        thread, stopped = OneThread(f"dispytch outbox {self.alias} listens"), threading.Event()
        try:
            await thread.wait(lambda: self._listen(wake, stopped))
        finally:
            stopped.set()
            thread.end()

    # -- in the thread -------------------------------------------------------------------------------------------

    def _run(self, function: Callable[[BaseDatabaseWrapper], _T]) -> _T:
        connection: BaseDatabaseWrapper | None = getattr(self._kept, "connection", None)
        if connection is None:
            connection = self._kept.connection = self._connected()
            self._driver = connection.connection
        try:
            return function(connection)
        except BaseException:
            # It is not known what state it is in; the next call has a new one.
            self._close()
            raise

    def _connected(self) -> BaseDatabaseWrapper:
        """A connection of this thread that commits each statement, outside of Django's own handling of them."""
        connection = databases[self.alias].copy()
        # It is kept: of a pool's few connections one would be gone for good.
        connection.settings_dict["OPTIONS"].pop("pool", None)
        try:
            connection.connect()
            connection.set_autocommit(True)
        except BaseException:
            connection.close()  # It may have been made, and not have answered what comes first.
            raise
        return connection

    def _close(self) -> None:
        connection: BaseDatabaseWrapper | None = getattr(self._kept, "connection", None)
        self._kept.connection = None
        if connection is not None:
            with suppress(Exception):  # The database is gone, and so is the connection.
                connection.close()

    def _check(self, connection: BaseDatabaseWrapper) -> None:
        missing = missing_tables(connection)
        if missing:
            memory = connection.vendor == "sqlite" and ":memory:" in str(connection.settings_dict["NAME"])
            raise SettingsError(
                [
                    f"database {self.alias!r} is SQLite in memory, where each connection has a database of its own, "
                    f"and a relay needs one; give it a file"
                    if memory
                    else f"the outbox's tables are missing in database {self.alias!r} ({' and '.join(missing)}): run "
                    f"manage.py migrate{'' if self.alias == 'default' else f' --database {self.alias}'}"
                ]
            )
        try:
            self.sql.check_writable(OnDjango(connection))
        except ConfigurationError as exc:
            raise SettingsError([f"database {self.alias!r}: {problem}" for problem in exc.problems]) from exc

    def _listen(self, wake: Callable[[], None], stopped: threading.Event) -> None:
        connection = self._connected()
        try:
            driver: Any = connection.connection
            if not callable(getattr(driver, "notifies", None)):
                raise no_listener(type(driver).__module__.partition(".")[0])
            listen_blocking(driver, wake, stopped)
        finally:
            with suppress(Exception):
                connection.close()


def _listed(aliases: Any) -> str:
    return ", ".join(repr(alias) for alias in aliases)
