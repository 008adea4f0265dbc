"""How PostgreSQL reads a backlog: in the order of one index, whatever it knows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from dispytch_integrations._sqlalchemy_store import OnSQLAlchemy
from dispytch_integrations.outbox import _sql
from dispytch_integrations.outbox._sql import SQLStore
from dispytch_integrations.outbox.record import FORMAT, SHARDS
from dispytch_integrations.outbox.store import Query
from tests.support.outboxes import Database, record, temporary_database

_QUERY = Query(shards=range(SHARDS), brokers=["default"], format=FORMAT, limit=2000, not_ids=[1, 2])


class Explaining(OnSQLAlchemy):
    """Notes how a query would be run, and runs none."""

    plan = ""

    def query(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        self.plan = "\n".join(row[0] for row in super().query(f"explain {sql}", parameters))
        return []


@pytest.fixture
def database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        database.insert([record(number, f"customer-{number % 100}") for number in range(6000)])
        yield database


def _known_rows(database: Database) -> float:
    [(rows,)] = database.all("select reltuples from pg_class where relname = 'dispytch_outbox_event'")
    return float(rows)


def test_a_backlog_in_a_new_table_is_counted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst before autovacuum's first look: PostgreSQL thinks of a few rows, and sorted all of them per batch."""
    monkeypatch.setattr(_sql, "_SLOW", 0.0)
    store = SQLStore("postgresql")
    with database.engine.connect() as connection:
        assert _known_rows(database) == -1
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        assert len(store.fetch(OnSQLAlchemy(connection), _QUERY).records) == _QUERY.limit
        assert _known_rows(database) == 6000
        on = Explaining(connection)
        store.fetch(on, _QUERY)
        assert "Sort" not in on.plan
        # Once in a while only: a database that is slow for another reason is not burdened more.
        database.run("delete from dispytch_outbox_event where id > 4000")
        assert len(store.fetch(OnSQLAlchemy(connection), _QUERY).records) == _QUERY.limit
        assert _known_rows(database) == 6000


def test_rows_that_are_kept_are_not_read_again(database: Database) -> None:
    """With keep_sent the sent rows come first by id: a plan along the primary key would read all of them each time."""
    database.run("analyze dispytch_outbox_event")
    database.run("update dispytch_outbox_event set state = 1 where id < 4000")
    with database.engine.connect() as connection:
        on = Explaining(connection)
        SQLStore("postgresql").fetch(on, _QUERY)
    assert "dispytch_outbox_event_state" in on.plan
    assert "Sort" not in on.plan
