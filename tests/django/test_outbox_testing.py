"""Tests of a project with the outbox: the same helpers, and the same answers, as without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.management import call_command
from django.db import transaction
from django.test import TestCase, TransactionTestCase, override_settings
from pytest_django import DjangoCaptureOnCommitCallbacks

from dispytch_integrations.django import aemit_on_commit, emit, emit_on_commit
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.lifecycle import flush_events
from dispytch_integrations.django.outbox import conf
from dispytch_integrations.django.signals import event_emitted
from dispytch_integrations.django.testing import (
    EmittedEvents,
    EmittedEventsMixin,
    override_brokers,
    relay_outbox,
)
from dispytch_integrations.errors import NotStartedError, RouteError, WrongLoopError
from dispytch_integrations.message import Message
from tests.django.project.shop.events import OrderCancelled, OrderPlaced
from tests.support.brokers import free_port

pytestmark = pytest.mark.xdist_group("outbox testing")

APPS = [*(app for app in settings.INSTALLED_APPS if app != conf.APP), conf.APP]


class Reversed:
    """A codec whose payloads only itself can read."""

    def encode(self, payload: bytes) -> bytes:
        return payload[::-1]

    def decode(self, stored: bytes) -> bytes:
        return stored[::-1]


@pytest.fixture(scope="module", autouse=True)
def installed(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """The outbox, relayed elsewhere, and brokers that nobody may reach."""
    with override_settings(
        INSTALLED_APPS=APPS,
        DISPYTCH={"default": {"URL": f"redis://127.0.0.1:{free_port()}"}},
        DISPYTCH_OUTBOX={"DATABASES": ["default"], "CODEC": f"{__name__}.Reversed"},
    ):
        with django_db_blocker.unblock():
            call_command("migrate", conf.LABEL, verbosity=0)
        yield


def stored() -> list[int]:
    """The numbers of the events in the table, as this connection sees it."""
    from dispytch_integrations.django.outbox.models import OutboxEvent

    rows = OutboxEvent.objects.order_by("pk").values_list("payload", flat=True)
    return [json.loads(bytes(payload)[::-1])["number"] for payload in rows]


class Undone(Exception):
    pass


# -- emitted_events --------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_pending_until_the_commit_and_emitted_after_it(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """A test that was written without the outbox says the same with it; meanwhile the event is really in the table."""
    with django_capture_on_commit_callbacks(execute=True):
        with transaction.atomic():
            emit_on_commit([OrderPlaced(number=1), OrderPlaced(number=2)], headers={"tenant": "acme"})
        with suppress(Undone), transaction.atomic():
            emit_on_commit(OrderPlaced(number=3))
            raise Undone
        assert emitted_events.pending == [OrderPlaced(number=1), OrderPlaced(number=2)]
        assert emitted_events.rolled_back == [OrderPlaced(number=3)]
        assert emitted_events.emitted == []
        assert stored() == [1, 2]
    assert emitted_events.emitted == [OrderPlaced(number=1), OrderPlaced(number=2)]
    assert emitted_events.pending == []
    assert stored() == []
    first = emitted_events.messages[0]
    assert (first.headers["tenant"], first.payload) == ("acme", b'{"number":1}')
    emitted_events.assert_rolled_back(OrderPlaced, number=3)


class InATestCase(EmittedEventsMixin, TestCase):
    """Django's own, whose transaction is rolled back at the end."""

    def test_one(self) -> None:
        """A TestCase commits nothing: without captureOnCommitCallbacks an event is pending."""
        emit_on_commit(OrderPlaced(number=1))
        self.emitted_events.assert_pending(OrderPlaced, number=1)
        with self.captureOnCommitCallbacks(execute=True):
            emit_on_commit(OrderPlaced(number=2))
        self.emitted_events.assert_emitted(OrderPlaced, number=2)
        assert stored() == [1]

    def test_two(self) -> None:
        """Nothing of it is there in the next test."""
        assert (stored(), list(self.emitted_events), self.emitted_events.pending) == ([], [], [])

    def test_queries_are_counted_as_in_production(self) -> None:
        """assertNumQueries counts the INSERT, and not what stands in for the relay."""
        with self.assertNumQueries(1), self.captureOnCommitCallbacks(execute=True):
            emit_on_commit([OrderPlaced(number=1), OrderPlaced(number=2)])
        assert len(self.emitted_events) == 2

    def test_relay_outbox_needs_no_commit(self) -> None:
        """The rows of the test's own transaction are relayed over its own connection; events are known by their id."""
        emit_on_commit([OrderPlaced(number=number) for number in range(3)])
        assert relay_outbox() == 3
        assert (relay_outbox(), stored()) == (0, [])
        assert self.emitted_events.emitted == [OrderPlaced(number=number) for number in range(3)]
        assert self.emitted_events.pending == []
        self.emitted_events.assert_emitted(OrderPlaced, number=2)

    async def test_async(self) -> None:
        """Async tests have the same, from the thread that has their transaction."""
        await aemit_on_commit(OrderPlaced(number=1))
        with pytest.raises(WrongLoopError, match="sync_to_async"):
            relay_outbox()
        assert await sync_to_async(relay_outbox)() == 1
        self.emitted_events.assert_emitted(OrderPlaced, number=1)


class InATransactionTestCase(EmittedEventsMixin, TransactionTestCase):
    """With commits that are real."""

    def test_a_commit_is_enough(self) -> None:
        """What is committed was emitted, in the order of the commits; what is not is not."""
        with transaction.atomic():
            emit_on_commit(OrderPlaced(number=1))
            assert (list(self.emitted_events), stored()) == ([], [1])
        emit_on_commit(OrderPlaced(number=2))
        with suppress(Undone), transaction.atomic():
            emit_on_commit(OrderCancelled(number=3))
            raise Undone
        assert list(self.emitted_events) == [OrderPlaced(number=1), OrderPlaced(number=2)]
        self.emitted_events.assert_not_emitted(OrderCancelled)
        assert stored() == []

    def test_the_same_event_twice_is_emitted_once(self) -> None:
        """As its id is stored once."""
        event = OrderPlaced(number=1)
        with transaction.atomic():
            emit_on_commit(event)
            emit_on_commit(event)
        assert list(self.emitted_events) == [event]

    def test_what_the_outbox_cannot_store_fails_here_too(self) -> None:
        """Else it would be found in production."""
        with pytest.raises(RouteError, match="its headers take more"), transaction.atomic():
            emit_on_commit(OrderPlaced(number=1), headers={"x": "y" * 70_000})
        assert list(self.emitted_events) == []

    def test_direct_emits_are_refused_as_in_production(self) -> None:
        """A view that would fail there must fail in its test."""
        with pytest.raises(NotStartedError, match="DIRECT_EMITS"):
            emit(OrderPlaced(number=1))
        with override_settings(DISPYTCH_OUTBOX={"DATABASES": ["default"], "DIRECT_EMITS": True}):
            emit(OrderPlaced(number=2))
        assert list(self.emitted_events) == [OrderPlaced(number=2)]


# -- without emitted_events ------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_relay_outbox_is_a_real_relay() -> None:
    """Memory brokers for the whole run, and a test that wants to see what a relay makes of the table."""
    told: list[Message] = []

    def heard(message: Message, **arguments: Any) -> None:
        told.append(message)

    event_emitted.connect(heard, sender=OrderPlaced)
    try:
        with override_brokers("memory"):
            emit_on_commit(OrderPlaced(number=1))
            assert stored() == [1]
            assert relay_outbox("default") == 1
            assert flush_events(10)
            assert stored() == []
    finally:
        event_emitted.disconnect(heard, sender=OrderPlaced)
    assert [message.payload for message in told] == [b'{"number":1}']


@pytest.mark.django_db(transaction=True)
def test_no_relay_runs_behind_a_test() -> None:
    """EMBEDDED would delete rows of a test on another connection, and lock its tables."""
    with (
        override_settings(DISPYTCH_OUTBOX={"DATABASES": ["default"], "EMBEDDED": True, "CODEC": Reversed()}),
        override_brokers("memory"),
    ):
        emit_on_commit(OrderPlaced(number=1))
        emit(OrderPlaced(number=2))
        assert connections.session is not None
        assert connections.session.outbox is None
        assert stored() == [1]
        assert relay_outbox() == 1


@pytest.mark.django_db(databases=["default", "archive"])
def test_relay_outbox_says_what_is_missing() -> None:
    """One line of advice each: the app, the tables, the database."""
    with override_brokers("memory"):
        with pytest.raises(SettingsError, match="there is no database 'nowhere'"):
            relay_outbox("nowhere")
        with pytest.raises(SettingsError, match=r"manage\.py migrate --database archive"):
            relay_outbox("archive")
    with (
        override_settings(INSTALLED_APPS=APPS[:-1], DISPYTCH_OUTBOX=None),
        pytest.raises(SettingsError, match="there is no outbox to relay"),
    ):
        relay_outbox()
