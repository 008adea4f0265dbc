"""System checks of the outbox, for `manage.py check`, and with `--database ALIAS` for the tables themselves.

    dispytch.E008   DISPYTCH_OUTBOX is no dict, or has an unknown key
    dispytch.E009   a value of DISPYTCH_OUTBOX is wrong
    dispytch.E010   DISPYTCH_OUTBOX is set, and the app is not in INSTALLED_APPS
    dispytch.E011   a broker's TIMEOUT does not fit into the LEASE
    dispytch.E012   a database that cannot hold an outbox: another vendor, SQLite in memory
    dispytch.E013   a router keeps the tables out of a database that DATABASES names
    dispytch.W002   a broker's TIMEOUT leaves little of the LEASE
    dispytch.W003   with --database: the tables are missing, or the database does not answer
    dispytch.W004   with --database: events wait, and nobody relays

E008 to E010 are found with the settings, by `django/checks.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from django.apps import apps
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, router
from django.db import connections as databases
from django.db.backends.base.base import BaseDatabaseWrapper

from dispytch_integrations.django import checks as events_checks
from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.outbox.conf import LABEL, OutboxSettings, too_slow
from dispytch_integrations.django.outbox.embedded import tables_are_missing
from dispytch_integrations.django.outbox.store import OnDjango, missing_tables
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._sql import EVENTS, LEASES, SQLStore, require_vendor

__all__ = ["QUIET", "check_outbox", "check_tables", "register"]

QUIET = 300.0
"""Seconds without a heartbeat after which nobody is taken to relay."""


def register() -> None:
    """Register the checks with Django: those of events as well, in case that their app was forgotten."""
    events_checks.register()
    checks.register(check_outbox, events_checks.TAG)
    checks.register(check_tables, events_checks.TAG, checks.Tags.database)


def check_outbox(app_configs: Any = None, **arguments: Any) -> list[checks.CheckMessage]:
    """What is wrong with the outbox and its databases; opens no connection."""
    outbox = connections.outbox()
    if outbox is None:
        return []
    read = connections.settings()
    found: list[checks.CheckMessage] = []
    if not outbox.embedded:  # Else it is among the problems of the settings: this process could not relay.
        found += [_error(problem) for problem in too_slow(read.specs, outbox.options)]
    found += _tight(read, outbox)
    for alias in outbox.databases:
        found += _cannot_lease(alias)
        if outbox.named:
            found += _kept_out(alias)
    return found


def check_tables(
    app_configs: Any = None, databases: Sequence[str] | None = None, **arguments: Any
) -> list[checks.CheckMessage]:
    """Whether the tables are there, and are relayed: in the databases that Django may ask, with `--database`."""
    outbox = connections.outbox()
    if outbox is None or not databases:
        return []
    return [message for alias in outbox.databases if alias in databases for message in _tables(alias, outbox)]


def _error(problem: conf.Problem) -> checks.CheckMessage:
    return checks.Error(problem.message, hint=problem.hint, id=problem.id)


def _tight(read: conf.Read, outbox: OutboxSettings) -> Iterator[checks.CheckMessage]:
    lease = outbox.options.lease
    slow = {problem.message for problem in too_slow(read.specs, outbox.options)}
    for alias, spec in read.specs.items():
        timeout, where = spec.options.timeout, f"DISPYTCH[{alias!r}]['TIMEOUT']"
        if timeout is None or timeout <= lease / 2 or any(told.startswith(where) for told in slow):
            continue
        yield checks.Warning(
            f"{where} is {timeout:g} s, which leaves little of the outbox's LEASE of {lease:g} s: a slow database "
            f"stops the relay.",
            hint=f'Write "LEASE": {timeout * 2:g} in DISPYTCH_OUTBOX, or a shorter TIMEOUT.',
            id="dispytch.W002",
        )


def _cannot_lease(alias: str) -> Iterator[checks.CheckMessage]:
    try:
        connection = databases[alias]
        require_vendor(connection.vendor)
    except ImproperlyConfigured:
        return  # Its driver is missing: Django says so itself.
    except ConfigurationError as exc:
        yield checks.Error(
            f"Database {alias!r}: {exc}.",
            hint="Name those that can in DISPYTCH_OUTBOX['DATABASES'].",
            id="dispytch.E012",
        )
        return
    name = str(connection.settings_dict["NAME"])
    in_memory = connection.vendor == "sqlite" and (":memory:" in name or "mode=memory" in name)
    # Django's own, for tests, is shared by the connections of a process.
    if in_memory and not name.startswith("file:memorydb_"):
        yield checks.Error(
            f"Database {alias!r} is SQLite in memory, where each connection has a database of its own: no relay would "
            f"find what is stored.",
            hint="Give it a file.",
            id="dispytch.E012",
        )


def _kept_out(alias: str) -> Iterator[checks.CheckMessage]:
    allow = cast("Callable[..., bool]", router.allow_migrate)
    model = apps.get_model(LABEL, "OutboxEvent")
    try:
        allowed = allow(alias, LABEL, model_name="outboxevent", model=model)
    except Exception as exc:  # The project's own code.
        told, allowed = (
            f"A router could not say whether the outbox's tables go there: {type(exc).__name__}: {exc}.",
            False,
        )
    else:
        told = f"DISPYTCH_OUTBOX['DATABASES'] names {alias!r}, and DATABASE_ROUTERS keep the outbox's tables out of it."
    if not allowed:
        yield checks.Error(
            told,
            hint=f"Let allow_migrate({alias!r}, {LABEL!r}) return True, or take {alias!r} out of DATABASES.",
            id="dispytch.E013",
        )


def _tables(alias: str, outbox: OutboxSettings) -> Iterator[checks.CheckMessage]:
    connection = databases[alias]
    try:
        missing = missing_tables(connection)
        quiet = None if missing or outbox.embedded else _quiet(connection)
    except (DatabaseError, ConfigurationError) as exc:
        yield checks.Warning(f"The outbox in database {alias!r} could not be looked at: {exc}", id="dispytch.W003")
        return
    # `migrate` looks first: it is about to make them.
    if missing and sys.argv[1:2] != ["migrate"]:
        told, _, command = tables_are_missing(alias, missing).partition(": run ")
        yield checks.Warning(f"{told[:1].upper()}{told[1:]}.", hint=f"Run {command}.", id="dispytch.W003")
    if quiet is not None:
        yield checks.Warning(
            f"Events wait in the outbox of database {alias!r}, and {quiet}.",
            hint="Start manage.py dispytch relay, or write DISPYTCH_OUTBOX = {'EMBEDDED': True}.",
            id="dispytch.W004",
        )


def _quiet(connection: BaseDatabaseWrapper) -> str | None:
    """What is said when something waits and no relay is about; None: all is well."""
    on = OnDjango(connection)
    if not on.query(f"select id from {EVENTS} where state = 0 order by id limit 1", {}):  # noqa: S608
        return None
    now = SQLStore(connection.vendor)._now
    [(heartbeat, now_ms)] = on.query(f"select max(heartbeat_ms), {now} from {LEASES}", {})  # noqa: S608
    if heartbeat is None:
        return "no relay has ever run"
    seconds = (int(now_ms) - int(heartbeat)) / 1000
    return f"the last relay was seen {seconds / 60:.0f} minutes ago" if seconds > QUIET else None
