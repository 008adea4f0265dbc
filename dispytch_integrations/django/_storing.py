"""Which database's outbox an event is stored in, and how."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from django.apps import apps
from django.db import DEFAULT_DB_ALIAS, OperationalError, ProgrammingError, router, transaction
from django.db import connections as databases
from django.db.backends.base.base import BaseDatabaseWrapper

from dispytch_integrations._blocking_way import Prepared
from dispytch_integrations._overriding import overriding
from dispytch_integrations.django._after_commit import (
    AfterCommit,
    Waiting,
    call_after,
    is_of_testcase,
    register,
    transaction_meant,
    transaction_of_write,
)
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import SettingsError, TransactionError
from dispytch_integrations.django.outbox.conf import LABEL, OutboxSettings
from dispytch_integrations.django.outbox.store import OnDjango
from dispytch_integrations.outbox._sql import EVENTS, Insert
from dispytch_integrations.outbox.record import Record, record_of

__all__ = ["Stored", "store_after_write", "store_on_commit"]


def store_on_commit(prepared: Sequence[Prepared], using: str | None, require_transaction: bool | None) -> None:
    """Store messages in the transaction that `emit_on_commit` means; where none is open, in autocommit.

    Raises TransactionError, SettingsError, and for what cannot be stored RouteError, HeaderError, SerializationError.
    """
    connection, settings = transaction_meant(using, require_transaction), _settings()
    if using is None and (connection is None or all(is_of_testcase(block) for block in connection.atomic_blocks)):
        connection = databases[_own_database(settings)]
    _store(prepared, connection if connection is not None else databases[using or DEFAULT_DB_ALIAS], settings)


def store_after_write(prepared: Sequence[Prepared], database: str) -> None:
    """Store messages on the connection on which a write was made. Raises as `store_on_commit`."""
    connection = transaction_of_write(database)
    _store(prepared, connection if connection is not None else databases[database], _settings())


class Stored(Waiting):
    """In tests: messages in the outbox, which are taken out of it and sent once their transaction is committed."""

    waits = "stored"

    def __init__(self, prepared: Sequence[Prepared], connection: BaseDatabaseWrapper) -> None:
        super().__init__(prepared, connection if connection.in_atomic_block else None)
        self._database = connection

    def __call__(self) -> None:
        """The transaction is committed: do what a relay does, on the connection that sees the rows."""
        from dispytch_integrations.django._testing_outbox import taken_out

        self.done = True
        taken = taken_out(self._database, self.prepared, _settings().options.codec)
        self.send(taken, direct=False)


class _Wake(AfterCommit):
    def __call__(self) -> None:
        connections.committed()


_wake = _Wake()


def _settings() -> OutboxSettings:
    settings = connections.outbox()
    if settings is None:  # Taken out of INSTALLED_APPS since.
        raise SettingsError("the outbox is not in INSTALLED_APPS any more")
    return settings


def _own_database(settings: OutboxSettings) -> str:
    """Where an event is stored that belongs to no transaction."""
    routed = router.db_for_write(apps.get_model(LABEL, "OutboxEvent"))
    for alias in (routed, DEFAULT_DB_ALIAS):
        if alias in settings.databases:
            return alias
    return settings.databases[0]


def _store(prepared: Sequence[Prepared], connection: BaseDatabaseWrapper, settings: OutboxSettings) -> None:
    if connection.alias not in settings.databases:
        raise _no_outbox(connection.alias, settings)
    codec = settings.options.codec
    records = [record_of(message, codec) for _, message in prepared]
    try:
        _insert(connection, records, settings.options.notify)
    except (ProgrammingError, OperationalError) as exc:
        if EVENTS not in str(exc):
            raise
        option = "" if connection.alias == DEFAULT_DB_ALIAS else f" --database {connection.alias}"
        raise SettingsError(
            f"the event could not be stored in the outbox of database {connection.alias!r}: {exc}; is its table there? "
            f"Run manage.py migrate{option}"
        ) from exc
    for outlet, message in prepared:
        outlet.held(message)
    if overriding.observers:
        register(Stored(prepared, connection))
    elif settings.embedded and connections.override is None:
        _wake_after(connection)


def _insert(connection: BaseDatabaseWrapper, records: Sequence[Record], notify: bool) -> None:
    statements, on = _insert_into(connection.vendor, notify)(records), OnDjango(connection)
    if len(statements) == 1:
        [(sql, parameters)] = statements
        on.run(sql, parameters)
        return
    # All or none of them; in an atomic block they are a part of that.
    with transaction.atomic(using=connection.alias, savepoint=False):
        for sql, parameters in statements:
            on.run(sql, parameters)


@lru_cache(maxsize=8)
def _insert_into(vendor: str, notify: bool) -> Insert:
    return Insert(vendor, notify=notify)


def _wake_after(connection: BaseDatabaseWrapper) -> None:
    """Wake the relay of this process once the transaction is committed; once is enough for all of a transaction."""
    if not connection.in_atomic_block:
        _wake()
        return
    callbacks = connection.run_on_commit
    # One that is dropped with no other savepoint than this one would be.
    if callbacks and callbacks[0][1] is _wake and callbacks[0][0] <= set(connection.savepoint_ids):
        return
    call_after(connection, _wake)


def _no_outbox(alias: str, settings: OutboxSettings) -> TransactionError:
    there = " and ".join(repr(each) for each in settings.databases)
    return TransactionError(
        f"database {alias!r} has no outbox (DISPYTCH_OUTBOX['DATABASES']: {there}), so the event cannot be committed "
        f"with what is written there: add {alias!r} to DATABASES and run manage.py migrate --database {alias}, or give "
        f"outbox=False to send it after the commit without one"
    )
