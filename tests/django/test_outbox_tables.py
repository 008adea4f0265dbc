"""Django's migration and SQLAlchemy's `outbox_tables` make the same tables: one relay, one SQL, for both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections as databases
from django.db import transaction
from django.test.utils import override_settings
from sqlalchemy import inspect
from sqlalchemy.types import BLOB, CHAR, VARCHAR, BigInteger, Integer, LargeBinary, SmallInteger, String, Text

from dispytch_integrations.django import emit_on_commit
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.outbox import conf
from dispytch_integrations.django.outbox.store import OnDjango
from dispytch_integrations.django.testing import relay_outbox
from dispytch_integrations.outbox._sql import EVENTS, LEASES
from tests.django.project.shop.events import OrderPlaced
from tests.django.test_outbox_commands import APPS
from tests.support.outboxes import Database, temporary_database

ALIAS = "tables"
ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql"}


@pytest.fixture(params=list(ENGINES))
def migrated(request: pytest.FixtureRequest, tmp_path: Path, django_db_blocker: Any) -> Iterator[Database]:
    """A database whose tables are made by `migrate`."""
    if request.param == "mysql":
        import pymysql  # type: ignore[import-untyped]

        pymysql.install_as_MySQLdb()
    with temporary_database(request.param, tmp_path) as database:
        for table in (EVENTS, LEASES):
            database.run(f"drop table {table}")
        url = database.url("x")
        settings: dict[str, Any] = {"ENGINE": f"django.db.backends.{ENGINES[request.param]}", "NAME": url.database}
        if request.param != "sqlite":
            settings |= {"USER": url.username, "PASSWORD": url.password or "", "HOST": url.host, "PORT": str(url.port)}
        databases.settings[ALIAS] = databases.configure_settings({"default": settings, ALIAS: settings})[ALIAS]
        try:
            with (
                override_settings(
                    INSTALLED_APPS=APPS,
                    DATABASE_ROUTERS=[],
                    DISPYTCH={"default": {"URL": "memory://"}},
                    DISPYTCH_OUTBOX={"DATABASES": [ALIAS]},
                ),
                django_db_blocker.unblock(),
            ):
                call_command("migrate", conf.LABEL, database=ALIAS, verbosity=0)
                yield database
        finally:
            connections.reset()
            databases[ALIAS].close()
            del databases[ALIAS]
            del databases.settings[ALIAS]


def kind_of(type_: Any) -> str:
    """What matters of a column's type."""
    if isinstance(type_, (LargeBinary, BLOB)):
        return "bytes"
    if isinstance(type_, (VARCHAR, CHAR)):
        return f"text of {type_.length}"
    if isinstance(type_, (Text, String)):
        return "text"
    for kind in (SmallInteger, BigInteger, Integer):
        if isinstance(type_, kind):
            return kind.__name__
    return repr(type_)


def described(database: Database, table: str) -> dict[str, Any]:
    """The columns of a table and its indexes, by what matters."""
    seen = inspect(database.engine)
    columns = {column["name"]: (kind_of(column["type"]), column["nullable"]) for column in seen.get_columns(table)}
    if database.kind == "sqlite":
        # Whole numbers have one size there; a key is never NULL, whatever it says.
        columns = {
            name: (
                "Integer" if kind in ("SmallInteger", "BigInteger") else kind,
                nullable and name not in ("id", "shard"),
            )
            for name, (kind, nullable) in columns.items()
        }
    unique: set[tuple[Any, ...]] = {tuple(each["column_names"]) for each in seen.get_unique_constraints(table)}
    plain: set[tuple[Any, ...]] = set()
    for index in seen.get_indexes(table):
        (unique if index["unique"] else plain).add(tuple(index["column_names"]))
    return {
        "columns": columns,
        "key": seen.get_pk_constraint(table)["constrained_columns"],
        "unique": unique,
        "indexes": plain,
    }


@pytest.mark.parametrize("table", [EVENTS, LEASES])
def test_the_tables_are_the_same(migrated: Database, table: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A relay of the command line serves a Django project's table, and a project may go from one to the other."""
    with temporary_database(migrated.kind, tmp_path_factory.mktemp("other")) as other:
        theirs = described(other, table)
    ours = described(migrated, table)
    assert ours == theirs
    assert len(ours["columns"]) == {EVENTS: 19, LEASES: 6}[table]
    if table == EVENTS:
        assert (ours["unique"], ours["indexes"]) == ({("event_id",)}, {("state", "id")})


def test_ids_are_never_given_twice(migrated: Database) -> None:
    """A relay deletes by id what it has read: a new row must not have the number of one that is gone."""
    for number in (1, 2):
        emit_on_commit(OrderPlaced(number=number))
        [(id_,)] = migrated.all(f"select id from {EVENTS}")
        assert id_ == number
        migrated.run(f"delete from {EVENTS}")


def test_an_event_goes_through_the_migrated_tables(migrated: Database) -> None:
    """Stored with its transaction, once per id, gone with a savepoint, relayed: the way of a web process."""
    event = OrderPlaced(number=2)
    with transaction.atomic(using=ALIAS):
        emit_on_commit([OrderPlaced(number=1), event])
        emit_on_commit(event)
        with transaction.atomic(using=ALIAS):
            emit_on_commit(OrderPlaced(number=3))
            transaction.set_rollback(True, using=ALIAS)
        assert migrated.count() == 0
    stored = migrated.all(f"select payload, state, attempts from {EVENTS} order by id")
    assert [(json.loads(bytes(row[0]))["number"], *row[1:]) for row in stored] == [(1, 0, 0), (2, 0, 0)]
    assert relay_outbox() == 2
    assert migrated.count() == 0
    assert connections.session is not None
    sent = connections.session.brokers.producers["default"].sent  # type: ignore[attr-defined]
    assert [json.loads(message.payload)["number"] for message in sent] == [1, 2]


def test_a_long_list_is_stored_as_a_whole(migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one INSERT takes; without a transaction of the caller's all of them or none."""
    events = [OrderPlaced(number=number) for number in range(1200)]
    ids = emit_on_commit(events)
    assert [row[0] for row in migrated.all(f"select event_id from {EVENTS} order by id")] == ids
    migrated.run(f"delete from {EVENTS}")
    run, calls = OnDjango.run, 0

    def fails_at_last(on: OnDjango, sql: str, parameters: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise LookupError
        return run(on, sql, parameters)

    monkeypatch.setattr(OnDjango, "run", fails_at_last)
    with pytest.raises(LookupError):
        emit_on_commit(events)
    assert migrated.count() == 0


def test_models_and_migrations_agree(migrated: Database) -> None:
    """Else `makemigrations` of a project would write into our package."""
    call_command("makemigrations", conf.LABEL, check=True, dry_run=True, verbosity=0)
