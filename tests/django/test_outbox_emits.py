"""emit_on_commit with the outbox: stored in the transaction that made it true, and relayed from there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.db import connections as databases
from django.db import transaction
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django.db.models.signals import post_save
from django.test.utils import CaptureQueriesContext, override_settings

from dispytch_integrations.django import aemit_on_commit, emit, emit_on_commit, emits, suppress_emits
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import SettingsError, TransactionError
from dispytch_integrations.django.lifecycle import close_brokers, open_brokers
from dispytch_integrations.django.outbox import checks as outbox_checks
from dispytch_integrations.django.outbox import conf
from dispytch_integrations.django.signals import event_emitted
from dispytch_integrations.django.testing import capture_events, relay_outbox
from dispytch_integrations.errors import NotStartedError, RouteError
from dispytch_integrations.outbox import relay
from dispytch_integrations.outbox.options import RelayOptions
from tests.django.project.shop.events import OrderPlaced
from tests.django.project.shop.models import Order, Tag
from tests.django.test_outbox_commands import APPS, in_django
from tests.support.outboxes import Database, temporary_database


class Undone(Exception):
    pass


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path, django_db_blocker: Any) -> Iterator[Database]:
    """The database "orders", which has the outbox; "default" has none."""
    with temporary_database(request.param, tmp_path) as database:
        databases.settings["orders"] = databases.configure_settings(
            {"default": in_django(database), "orders": in_django(database)}
        )["orders"]
        try:
            with project(), django_db_blocker.unblock():
                yield database
        finally:
            connections.reset()
            databases["orders"].close()
            del databases["orders"]
            del databases.settings["orders"]


def project(url: str = "memory://", **outbox: Any) -> override_settings:
    """Settings with the outbox in "orders"."""
    return override_settings(
        INSTALLED_APPS=APPS,
        DISPYTCH={"default": {"URL": url, "TIMEOUT": 1}},
        DISPYTCH_OUTBOX={"DATABASES": ["orders"], "LEASE": 2, **outbox},
    )


def stored(database: Database) -> list[int]:
    """The numbers of the events that are committed."""
    rows = database.all("select payload from dispytch_outbox_event order by id")
    return [json.loads(bytes(payload))["number"] for (payload,) in rows]


# -- in the transaction ----------------------------------------------------------------------------------------------


def test_it_is_stored_at_the_call_and_committed_with_the_work(database: Database) -> None:
    """One INSERT over the connection of the transaction, which others see when that is committed."""
    with CaptureQueriesContext(databases["orders"]) as asked, transaction.atomic(using="orders"):
        id_ = emit_on_commit(OrderPlaced(number=1))
        ids = emit_on_commit([OrderPlaced(number=2), OrderPlaced(number=3)])
        inserts = [query for query in asked if "insert into dispytch_outbox_event" in query["sql"].lower()]
        assert len(inserts) == 2
        assert stored(database) == []
    assert stored(database) == [1, 2, 3]
    assert [row[0] for row in database.all("select event_id from dispytch_outbox_event order by id")] == [id_, *ids]


def test_rolled_back_it_is_gone(database: Database) -> None:
    """The world must not be told of what never happened, a savepoint's work included."""
    with suppress(Undone), transaction.atomic(using="orders"):
        emit_on_commit(OrderPlaced(number=1))
        raise Undone
    with transaction.atomic(using="orders"):
        emit_on_commit(OrderPlaced(number=2))
        with suppress(Undone), transaction.atomic(using="orders"):
            emit_on_commit(OrderPlaced(number=3))
            raise Undone
    assert stored(database) == [2]


def test_the_same_event_is_stored_once(database: Database) -> None:
    """A retried block that keeps its event object announces it once."""
    event = OrderPlaced(number=1)
    with transaction.atomic(using="orders"):
        assert emit_on_commit(event) == emit_on_commit(event)
    assert stored(database) == [1]


def test_without_a_transaction_it_is_stored_at_once(database: Database) -> None:
    """Durable, in the database that has the outbox; who wants a transaction says so."""
    emit_on_commit(OrderPlaced(number=1))
    assert stored(database) == [1]
    with pytest.raises(TransactionError, match="one is required"):
        emit_on_commit(OrderPlaced(number=2), require_transaction=True)
    assert stored(database) == [1]


def test_async_code_stores_as_well(database: Database) -> None:
    """Async views are not a way around the outbox."""
    async_to_sync(aemit_on_commit)(OrderPlaced(number=1))
    assert stored(database) == [1]


def test_a_transaction_elsewhere_is_refused(database: Database) -> None:
    """An event in one database and its work in another are two transactions: told at the call, with what to write."""
    databases.settings["elsewhere"] = {**databases.settings["orders"]}
    try:
        with transaction.atomic(using="elsewhere"), pytest.raises(TransactionError, match=r"DATABASES.*outbox=False"):
            emit_on_commit(OrderPlaced(number=1))
    finally:
        databases["elsewhere"].close()
        del databases["elsewhere"]
        del databases.settings["elsewhere"]


def test_what_cannot_be_sent_is_refused_at_the_call(database: Database) -> None:
    """Inside the transaction, where it can be rolled back, and not in the relay."""

    class Placed(OrderPlaced):
        __event_type__ = "x" * 300

    with transaction.atomic(using="orders"), pytest.raises(RouteError, match="__event_type__ has 300 characters"):
        emit_on_commit(Placed(number=1))
    assert stored(database) == []


def test_a_missing_table_says_migrate(database: Database) -> None:
    """Forgotten in a deployment: the first event says what to run."""
    database.run("drop table dispytch_outbox_event")
    with pytest.raises(SettingsError, match=r"manage.py migrate --database orders"), transaction.atomic(using="orders"):
        emit_on_commit(OrderPlaced(number=1))


def test_one_call_may_go_without_the_outbox(database: Database) -> None:
    """outbox=False sends after the commit, in this process."""
    with project(DIRECT_EMITS=True), capture_events() as events:
        with transaction.atomic(using="orders"):
            emit_on_commit(OrderPlaced(number=1), outbox=False)
            assert events.emitted == []
        assert stored(database) == []
        events.assert_emitted(OrderPlaced, number=1)


def test_held_back_it_is_not_stored(database: Database) -> None:
    """suppress_emits means all of them."""
    with suppress_emits() as held:
        emit_on_commit(OrderPlaced(number=1))
    assert (held.count, stored(database)) == (1, [])


def test_signals_store_where_the_write_went(database: Database) -> None:
    """@emits is emit_on_commit: its events are as durable."""
    with databases["orders"].schema_editor() as editor:
        for model in (Tag, Order):
            editor.create_model(model)

    @emits(post_save, sender=Order)
    def saved(instance: Order, **kwargs: Any) -> OrderPlaced:
        return OrderPlaced(number=instance.pk)

    try:
        with suppress(Undone), transaction.atomic(using="orders"):
            Order(customer="ann").save(using="orders")
            raise Undone
        order = Order(customer="bob")
        order.save(using="orders")
    finally:
        post_save.disconnect(sender=Order, dispatch_uid=None, receiver=saved)
    assert stored(database) == [order.pk]


# -- who relays --------------------------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Generator[tuple[str, list[Any]]]:
    """A broker's address that notes who connects, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        met: list[Any] = []

        def accept() -> None:
            while True:
                try:
                    met.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}", met
        server.shutdown(socket.SHUT_RDWR)
        for connection, _ in met:
            connection.close()


def test_where_another_process_relays_no_broker_is_connected(database: Database) -> None:
    """A hundred web workers cost the broker no connection; a direct emit says what to write."""
    with nobody() as (url, met), project(url):
        open_brokers()
        try:
            emit_on_commit(OrderPlaced(number=1))
            with pytest.raises(NotStartedError, match=r"write emit_on_commit.*DIRECT_EMITS"):
                emit(OrderPlaced(number=2))
        finally:
            close_brokers()
        assert met == []
    assert stored(database) == [1]


def test_direct_emits_may_be_allowed(database: Database) -> None:
    """Who wants both says so, and connects at the first one."""
    with project(DIRECT_EMITS=True):
        emit(OrderPlaced(number=1))
        assert connections.session is not None


def test_an_embedded_relay_is_woken_by_the_commit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events leave at once, and not when the relay looks next; what became of them is told by signals."""
    told: list[tuple[object, Any, Any]] = []
    emitted = threading.Event()

    def heard(sender: object, event: Any, message: Any, **given: Any) -> None:
        told.append((sender, event, message))
        emitted.set()

    monkeypatch.setattr(relay, "_FIRST_POLL", 30.0)
    event_emitted.connect(heard)
    try:
        with project(EMBEDDED=True, POLL_INTERVAL=30):
            open_brokers()
            try:
                # It has looked, and found nothing.
                assert connections.session is not None
                assert connections.session.outbox is not None
                counts = connections.session.outbox.relays["orders"].counts
                end = time.monotonic() + 10
                while not counts.fetches and time.monotonic() < end:
                    time.sleep(0.01)
                with transaction.atomic(using="orders"):
                    id_ = emit_on_commit(OrderPlaced(number=1))
                    assert not emitted.wait(0.3)
                started = time.monotonic()
                assert emitted.wait(10)
                assert time.monotonic() - started < 2.0
            finally:
                close_brokers()
    finally:
        event_emitted.disconnect(heard)
    [(sender, event, message)] = told
    assert (sender, event, message.id) == (OrderPlaced, None, id_)
    assert stored(database) == []


def test_tests_relay_over_their_own_connection(database: Database) -> None:
    """Inside a transaction that is never committed, as a TestCase's: the rows are seen, sent, and gone."""
    with capture_events() as events, suppress(Undone), transaction.atomic(using="orders"):
        emit_on_commit([OrderPlaced(number=1), OrderPlaced(number=2)])
        assert [event.number for event in events.pending if isinstance(event, OrderPlaced)] == [1, 2]
        assert relay_outbox() == 2
        assert relay_outbox() == 0
        raise Undone
    assert stored(database) == []


# -- system checks -----------------------------------------------------------------------------------------------------


class KeepsOut:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return False if app_label == conf.LABEL else None


def found(**arguments: Any) -> list[str | None]:
    messages = [*outbox_checks.check_outbox(), *outbox_checks.check_tables(**arguments)]
    return [message.id for message in messages]


def test_a_sound_outbox_has_no_complaints(database: Database) -> None:
    """A check that cries wolf is silenced by everybody."""
    assert found(databases=["default", "orders"]) == []


def test_checks_find_a_missing_table(database: Database) -> None:
    """Before the first request, and not by it; without --database nothing is asked."""
    database.run("drop table dispytch_outbox_event")
    assert found() == []
    assert found(databases=["default"]) == []
    [message] = outbox_checks.check_tables(databases=["orders"])
    assert (message.id, message.hint) == ("dispytch.W003", "Run manage.py migrate --database orders.")


def test_checks_find_that_nobody_relays(database: Database) -> None:
    """Events that wait for a relay that was never deployed are noticed by no user."""
    emit_on_commit(OrderPlaced(number=1))
    [message] = outbox_checks.check_tables(databases=["orders"])
    assert (message.id, message.msg) == (
        "dispytch.W004",
        "Events wait in the outbox of database 'orders', and no relay has ever run.",
    )
    assert relay_outbox() == 1
    emit_on_commit(OrderPlaced(number=2))
    assert found(databases=["orders"]) == []
    database.run("update dispytch_outbox_shard set heartbeat_ms = heartbeat_ms - 600000")
    [message] = outbox_checks.check_tables(databases=["orders"])
    assert "the last relay was seen 10 minutes ago" in message.msg


def test_checks_find_a_database_that_cannot_have_one(database: Database) -> None:
    """A router that keeps the tables out, a database in memory: found at the start."""
    with override_settings(DATABASE_ROUTERS=[KeepsOut()]):
        assert found() == ["dispytch.E013"]
    settings, vendor = databases["orders"].settings_dict, databases["orders"].vendor
    name, settings["NAME"] = settings["NAME"], ":memory:"
    try:
        assert found() == (["dispytch.E012"] if vendor == "sqlite" else [])
    finally:
        settings["NAME"] = name


def test_checks_find_a_timeout_beyond_the_lease(database: Database) -> None:
    """Such a relay could never send; one that barely fits is warned of."""
    with override_settings(DISPYTCH={"default": {"URL": "memory://", "TIMEOUT": 5}}):
        assert found() == ["dispytch.E011"]
    with override_settings(DISPYTCH={"default": {"URL": "memory://", "TIMEOUT": 1.2}}):
        assert found() == ["dispytch.W002"]


def test_the_defaults_are_the_relays_own() -> None:
    """Two lists of defaults would drift apart."""
    with override_settings(DISPYTCH_OUTBOX={}):
        assert conf.read().options == RelayOptions()


def test_models_and_migrations_agree() -> None:
    """A project's makemigrations must not want to write into our package."""
    with project():
        loader = MigrationLoader(None)
        detector = MigrationAutodetector(loader.project_state(), ProjectState.from_apps(apps))
        assert conf.LABEL not in detector.changes(loader.graph)
