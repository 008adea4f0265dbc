"""What users test with: collected events, brokers on memory, and failures that say what was there instead."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from django.test import Client, SimpleTestCase, TestCase, TransactionTestCase, override_settings
from pytest_django import DjangoCaptureOnCommitCallbacks, Settings

from dispytch_integrations import EventBase
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.django import aemit, emit, emit_many, emit_on_commit, get_emitter, suppress_emits
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.testing import (
    EmittedEvents,
    EmittedEventsMixin,
    override_brokers,
)
from dispytch_integrations.django.testing import (
    capture_events as collecting,
)
from dispytch_integrations.errors import RouteError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.django.project.shop.events import OrderCancelled, OrderPlaced
from tests.django.project.shop.models import ArchivedOrder, Order
from tests.support.brokers import free_port

ROOT = Path(__file__).parents[2]


class ToKafka(EventBase):
    __route__ = KafkaEventRoute(topic="orders")

    number: int = 0


class ToRedis(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    number: int = 0


def failure(assertion: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as caught:
        assertion()
    return str(caught.value)


def emit_and_roll_back(event: EventBase) -> None:
    with suppress(ZeroDivisionError), transaction.atomic():
        emit_on_commit(event)
        raise ZeroDivisionError


# -- the fixture -----------------------------------------------------------------------------------------------------


def test_the_fixture_collects_what_is_emitted(emitted_events: EmittedEvents) -> None:
    """A test asks what was emitted, and needs no broker and no thread of its own."""
    emit(OrderPlaced(number=1), headers={"tenant": "acme"})
    emit_many([OrderPlaced(number=2), OrderCancelled(number=2)])
    assert emitted_events.emitted == [OrderPlaced(number=1), OrderPlaced(number=2), OrderCancelled(number=2)]
    assert list(emitted_events) == emitted_events.emitted
    assert (len(emitted_events), emitted_events[0], emitted_events[1:]) == (
        3,
        OrderPlaced(number=1),
        [OrderPlaced(number=2), OrderCancelled(number=2)],
    )
    message = emitted_events.messages[0]
    assert (message.destination, message.headers["tenant"], message.payload) == ("shop-orders", "acme", b'{"number":1}')


def test_each_test_begins_without_events(emitted_events: EmittedEvents) -> None:
    """What another test has emitted is not this one's."""
    assert len(emitted_events) == 0
    emit(OrderPlaced(number=1))
    assert len(emitted_events) == 1


def test_no_broker_is_needed_whatever_the_settings_say(settings: Settings, emitted_events: EmittedEvents) -> None:
    """Settings of a project name real brokers; its tests run on a laptop in the train."""
    settings.DISPYTCH = {
        "default": {"URL": f"kafka://127.0.0.1:{free_port()}", "TOPICS": ["orders"], "OPTIONS": {"acks": "all"}},
        "redis": f"redis://127.0.0.1:{free_port()}/0",
    }
    emit(ToKafka(number=1))
    emit(ToRedis(number=2))
    emit(ToKafka(number=3))
    assert [message.broker for message in emitted_events.messages] == ["default", "redis", "default"]
    assert emitted_events.emitted == [ToKafka(number=1), ToRedis(number=2), ToKafka(number=3)], "in their order"


def test_no_client_library_is_needed(
    settings: Settings, emitted_events: EmittedEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image in which the tests run may lack the extra."""
    monkeypatch.setitem(sys.modules, "aiokafka", None)
    settings.DISPYTCH = {"default": "kafka://h"}
    emit(ToKafka(number=1))
    emitted_events.assert_emitted(ToKafka, number=1)


async def test_what_async_code_emits_is_collected(emitted_events: EmittedEvents) -> None:
    """An async test sees the same."""
    await aemit(OrderPlaced(number=1))
    await asyncio.gather(*(aemit(OrderPlaced(number=number)) for number in range(2, 5)))
    assert sorted(event.number for event in cast("list[OrderPlaced]", emitted_events.emitted)) == [1, 2, 3, 4]


def test_what_threads_and_requests_emit_is_collected(emitted_events: EmittedEvents) -> None:
    """The code under test chooses where it runs."""
    thread = threading.Thread(target=emit, args=(OrderPlaced(number=1),))
    thread.start()
    thread.join()
    assert Client().get("/emit/2").status_code == 201
    assert Client().get("/aemit/3").status_code == 201
    assert emitted_events.emitted == [OrderPlaced(number=number) for number in (1, 2, 3)]


def test_suppressed_events_are_not_collected(emitted_events: EmittedEvents) -> None:
    """They are not emitted."""
    with suppress_emits():
        emit(OrderPlaced(number=1))
        emit_on_commit(OrderPlaced(number=2))
    assert (emitted_events.emitted, emitted_events.pending, emitted_events.rolled_back) == ([], [], [])


def test_an_event_without_a_transaction_is_emitted_at_once(emitted_events: EmittedEvents) -> None:
    """No sleep is needed: the collection waits for what was handed over."""
    for number in range(50):
        emit_on_commit(OrderPlaced(number=number))
    assert emitted_events.emitted == [OrderPlaced(number=number) for number in range(50)]
    assert emitted_events.pending == []


@pytest.mark.django_db
def test_pending_until_the_commit(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """In a test that is rolled back at its end nothing is committed, unless it asks for it."""
    emit_on_commit(OrderPlaced(number=1))
    assert emitted_events.assert_pending(OrderPlaced, number=1) == OrderPlaced(number=1)
    with django_capture_on_commit_callbacks(execute=True):
        emit_on_commit([OrderPlaced(number=2), OrderPlaced(number=3)])
        emitted_events.assert_pending(OrderPlaced, number=2)
        assert emitted_events.emitted == []
    assert emitted_events.emitted == [OrderPlaced(number=2), OrderPlaced(number=3)]
    assert emitted_events.pending == [OrderPlaced(number=1)]
    assert emitted_events.rolled_back == []


@pytest.mark.django_db(transaction=True)
def test_with_real_transactions_the_commit_emits(emitted_events: EmittedEvents) -> None:
    """As in production."""
    with transaction.atomic():
        Order.objects.create(customer="c")
        emit_on_commit(OrderPlaced(number=1))
        assert emitted_events.pending == [OrderPlaced(number=1)]
        emitted_events.assert_pending(OrderPlaced)
    assert emitted_events.emitted == [OrderPlaced(number=1)]
    assert (emitted_events.pending, emitted_events.rolled_back) == ([], [])


@pytest.mark.django_db
def test_rolled_back_savepoints_are_seen(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """That an event does not go out when its part failed is worth a test."""
    with django_capture_on_commit_callbacks(execute=True):
        emit_on_commit(OrderPlaced(number=1))
        emit_and_roll_back(OrderPlaced(number=2))
        emitted_events.assert_rolled_back(OrderPlaced, number=2)
        emitted_events.assert_not_emitted(OrderPlaced, number=2)
    assert emitted_events.emitted == [OrderPlaced(number=1)]
    assert emitted_events.rolled_back == [OrderPlaced(number=2)]


@pytest.mark.django_db(transaction=True)
def test_rolled_back_transactions_are_seen(emitted_events: EmittedEvents) -> None:
    """Of another thread's connection, too, as a request has one under a live server."""

    def fail() -> None:
        Order.objects.count()  # Opens the connection.
        emit_and_roll_back(OrderPlaced(number=1))

    fail()
    assert emitted_events.rolled_back == [OrderPlaced(number=1)]
    emitted_events.clear()

    def fail_in_thread() -> None:
        fail()
        connection.connection.close()  # Django's own close() leaves a database in memory open.

    thread = threading.Thread(target=fail_in_thread)
    thread.start()
    thread.join()
    assert emitted_events.rolled_back == [OrderPlaced(number=1)]
    assert (emitted_events.emitted, emitted_events.pending) == ([], [])


@pytest.mark.django_db
def test_clear_forgets_what_is_over_and_keeps_what_is_pending(
    emitted_events: EmittedEvents, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """A test that sets up by the code under test clears, and then looks at what it is about."""
    with django_capture_on_commit_callbacks(execute=True):
        emit(OrderPlaced(number=1))
        emit_on_commit(OrderPlaced(number=2))
        emit_and_roll_back(OrderPlaced(number=3))
        emitted_events.clear()
        assert (emitted_events.emitted, emitted_events.rolled_back) == ([], [])
        assert emitted_events.pending == [OrderPlaced(number=2)]
    assert emitted_events.emitted == [OrderPlaced(number=2)]


def test_events_of_a_test_that_changes_the_settings_are_collected(
    settings: Settings, emitted_events: EmittedEvents
) -> None:
    """Brokers are made anew meanwhile; the collection goes on."""
    emit(OrderPlaced(number=1))
    settings.DISPYTCH = {"default": "redis://h", "other": "kafka://h"}
    emit(OrderPlaced(number=2))
    emit(ToKafka(number=3))
    assert len(emitted_events) == 3


# -- failures --------------------------------------------------------------------------------------------------------


def test_the_failure_says_what_was_emitted_instead(emitted_events: EmittedEvents) -> None:
    """Whoever reads the output of CI sees which value was wrong, without running the test again."""
    emit(OrderPlaced(number=1))
    emit(OrderCancelled(number=2, reason="late"))
    assert failure(lambda: emitted_events.assert_emitted(OrderCancelled, number=2, reason="early")) == (
        "OrderCancelled(number=2, reason='early') was not emitted.\n"
        "Emitted were:\n"
        "  OrderPlaced(number=1)\n"
        "  OrderCancelled(number=2, reason='late')    <- reason is 'late', not 'early'"
    )


def test_the_failure_says_that_nothing_was_emitted(emitted_events: EmittedEvents) -> None:
    """An empty list would leave the reader to guess."""
    assert failure(lambda: emitted_events.assert_emitted(OrderPlaced)) == (
        "OrderPlaced() was not emitted.\nNothing was emitted, and nothing waits for a commit."
    )


@pytest.mark.django_db
def test_the_failure_says_that_the_event_waits_for_its_commit(emitted_events: EmittedEvents) -> None:
    """The mistake that everybody makes in a TestCase, with the line that mends it."""
    emit_on_commit(OrderPlaced(number=1))
    emit_and_roll_back(OrderPlaced(number=2))
    told = failure(lambda: emitted_events.assert_emitted(OrderPlaced, number=1))
    assert "Pending were (not committed; in a TestCase emit inside" in told
    assert "with self.captureOnCommitCallbacks(execute=True):" in told
    assert "Rolled back were:\n  OrderPlaced(number=2)    <- number is 2, not 1" in told


@pytest.mark.django_db
def test_the_failure_says_that_an_event_was_emitted_that_should_not_be(emitted_events: EmittedEvents) -> None:
    """Pending counts: the commit would emit it."""
    emit(OrderPlaced(number=1))
    emit_on_commit(OrderPlaced(number=2))
    emitted_events.assert_not_emitted(OrderCancelled)
    emitted_events.assert_not_emitted(OrderPlaced, number=3)
    assert failure(lambda: emitted_events.assert_not_emitted(OrderPlaced, number=1)) == (
        "OrderPlaced(number=1) was emitted:\n  OrderPlaced(number=1)"
    )
    assert failure(lambda: emitted_events.assert_not_emitted(OrderPlaced, number=2)) == (
        "OrderPlaced(number=2) was pending:\n  OrderPlaced(number=2)"
    )


def test_a_field_that_does_not_exist_is_a_mistake_of_the_test(emitted_events: EmittedEvents) -> None:
    """assert_not_emitted with a typo would pass for ever."""
    for assertion in (
        emitted_events.assert_emitted,
        emitted_events.assert_pending,
        emitted_events.assert_rolled_back,
        emitted_events.assert_not_emitted,
    ):
        with pytest.raises(TypeError, match=r"OrderPlaced has no field 'nummer' \(did you mean 'number'\?\)"):
            assertion(OrderPlaced, nummer=1)


def test_an_event_of_a_base_class_is_found(emitted_events: EmittedEvents) -> None:
    """`assert_not_emitted(EventBase)` says that nothing at all was."""
    emitted_events.assert_not_emitted(EventBase)
    emit(OrderPlaced(number=1))
    assert emitted_events.assert_emitted(EventBase) == OrderPlaced(number=1)
    assert "1 pending" not in repr(emitted_events)
    assert repr(emitted_events) == "<EmittedEvents [OrderPlaced(number=1)], 0 pending>"


# -- TestCase --------------------------------------------------------------------------------------------------------


class TestInATestCase(EmittedEventsMixin, TestCase):
    """The mixin with Django's TestCase: `self.emitted_events`, and captureOnCommitCallbacks commits."""

    databases = "__all__"

    def test_events_are_collected(self) -> None:
        """A test of a view looks like this."""
        assert len(self.emitted_events) == 0, "new for each test"
        with self.captureOnCommitCallbacks(execute=True):
            response = self.client.get("/commit/1")
        assert response.status_code == 201
        self.emitted_events.assert_emitted(OrderPlaced, number=1)
        assert self.emitted_events.messages[0].id == response.content.decode()

    def test_and_again(self) -> None:
        """What the other test emitted is gone."""
        self.test_events_are_collected()

    def test_without_a_commit_they_are_pending(self) -> None:
        """TestCase rolls back."""
        self.client.get("/commit/1")
        self.emitted_events.assert_pending(OrderPlaced, number=1)
        self.emitted_events.assert_not_emitted(OrderCancelled)

    def test_events_of_another_database_are_collected(self) -> None:
        """captureOnCommitCallbacks is told the database, as always."""
        with self.captureOnCommitCallbacks(using="archive", execute=True), transaction.atomic(using="archive"):
            ArchivedOrder.objects.create(customer="c")
            emit_on_commit(OrderPlaced(number=2))
        self.emitted_events.assert_emitted(OrderPlaced, number=2)

    async def test_async_tests_are_collected_too(self) -> None:
        """Django runs them in a loop of their own."""
        await aemit(OrderPlaced(number=3))
        await self.async_client.get("/acommit/4")
        self.emitted_events.assert_emitted(OrderPlaced, number=3)
        await sync_to_async(self.emitted_events.assert_pending)(OrderPlaced, number=4)


class TestInATransactionTestCase(EmittedEventsMixin, TransactionTestCase):
    """The mixin with TransactionTestCase, in which commits are real."""

    def test_events_are_collected_after_the_commit(self) -> None:
        """Nothing has to be captured."""
        self.client.get("/commit/1")
        self.emitted_events.assert_emitted(OrderPlaced, number=1)

    def test_rolled_back_events_are_not_emitted(self) -> None:
        """As in production."""
        emit_and_roll_back(OrderPlaced(number=1))
        self.emitted_events.assert_rolled_back(OrderPlaced, number=1)
        self.emitted_events.assert_not_emitted(OrderPlaced)


class TestInASimpleTestCase(EmittedEventsMixin, SimpleTestCase):
    """The mixin where no database is used."""

    def test_events_are_collected(self) -> None:
        """`emit` needs no database."""
        emit(OrderPlaced(number=1))
        self.emitted_events.assert_emitted(OrderPlaced, number=1)


# -- brokers on memory -----------------------------------------------------------------------------------------------


def memory(alias: str = "default") -> MemoryProducer:
    producer = get_emitter().producers[alias]
    assert isinstance(producer, MemoryProducer)
    return producer


@pytest.fixture
def _unreachable(settings: Settings) -> None:
    """Settings as in production."""
    settings.DISPYTCH = {
        "default": {"URL": f"kafka://127.0.0.1:{free_port()}", "TIMEOUT": 0.2, "SOURCE": "/shop", "PREFIX": "live."},
        "redis": f"redis://127.0.0.1:{free_port()}/0?timeout=0.2",
    }


@pytest.mark.usefixtures("_unreachable")
def test_brokers_are_on_memory_inside_the_block_and_the_projects_own_outside() -> None:
    """For code that is tested without looking at its events."""
    with override_brokers("memory"):
        emit(ToKafka(number=1))
        emit(ToRedis(number=2))
        assert [message.destination for message in memory().sent] == ["live.orders"], "options are kept"
        assert memory().sent[0].headers["ce_source"] == "/shop"
        assert len(memory("redis").sent) == 1
    with pytest.raises(ConnectionError):
        emit(ToKafka(number=3))


@pytest.mark.usefixtures("_unreachable")
def test_inside_a_run_on_memory_the_projects_own_brokers_may_be_used() -> None:
    """A whole run on memory is the advice, and one integration test must be able to leave it."""
    with override_brokers("memory"):
        with override_brokers(None), pytest.raises(ConnectionError):
            emit(ToKafka(number=1))
        emit(ToKafka(number=2))
        assert len(memory().sent) == 1


@pytest.mark.usefixtures("_unreachable")
def test_a_route_of_the_wrong_transport_is_refused_in_memory_too() -> None:
    """A test that passes where production raises is worse than none."""
    with override_brokers("memory"), override_settings(DISPYTCH={"default": "kafka://h"}):
        with pytest.raises(RouteError):
            emit(ToRedis())
        with pytest.raises(RouteError):
            get_emitter("default").emit(ToRedis())


@pytest.mark.parametrize(
    ("url", "taken", "refused"),
    [
        ("memory://", [ToKafka, ToRedis], []),
        ("memory://redis", [ToRedis], [ToKafka]),
        ("rediss://h", [ToRedis], [ToKafka]),
        (BrokerURL.parse("kafka://h"), [ToKafka], [ToRedis]),
        (lambda: "kafka://h", [ToKafka, ToRedis], []),
    ],
    ids=["memory", "memory of one transport", "rediss", "BrokerURL", "function"],
)
def test_memory_takes_what_the_projects_broker_takes(
    url: Any, taken: list[type[EventBase]], refused: list[type[EventBase]], settings: Settings
) -> None:
    """A project that is on memory already keeps its URL; only what a function gives is not known."""
    settings.DISPYTCH = {"default": {"URL": url}}
    with override_brokers("memory"):
        for cls in taken:
            emit(cls())
        for cls in refused:
            with pytest.raises(RouteError):
                emit(cls())
        assert len(memory().sent) == len(taken)


@override_brokers("memory")
def emit_in_memory() -> int:
    emit(ToKafka())
    return len(memory().sent)


@override_brokers("memory")
async def aemit_in_memory() -> int:
    await asyncio.sleep(0)
    await aemit(ToKafka())
    return len((await sync_to_async(memory)()).sent)


@pytest.mark.usefixtures("_unreachable")
def test_it_decorates_functions() -> None:
    """As override_settings does; each call has brokers of its own."""
    assert (emit_in_memory(), emit_in_memory()) == (1, 1)


@pytest.mark.usefixtures("_unreachable")
async def test_it_decorates_coroutine_functions() -> None:
    """The block must last until the coroutine has ended, not until it is made."""
    assert await aemit_in_memory() == 1
    with pytest.raises(ConnectionError):
        await aemit(ToKafka())


def test_it_refuses_what_it_cannot_do() -> None:
    """A class would be decorated without effect; other kinds of brokers do not exist."""
    with pytest.raises(TypeError, match=r"not the class Tests; .* enter it in setUp: self.enterContext\(override_brok"):

        @override_brokers("memory")
        class Tests:
            pass

    with pytest.raises(ValueError, match="write one of 'memory'"):
        override_brokers(cast("Any", "memori"))


@pytest.mark.usefixtures("_unreachable")
def test_blocks_may_be_nested() -> None:
    """A session-wide override, and one test that collects, or overrides again."""
    whole_run = override_brokers("memory")
    with whole_run:
        with whole_run, override_brokers("memory"):
            emit(ToKafka())
        with collecting() as events:
            emit(ToKafka(number=1))
        events.assert_emitted(ToKafka, number=1)
        emit(ToKafka(number=2))
        assert len(memory().sent) == 1
        assert len(events) == 1, "collected inside the block only"
    with pytest.raises(ConnectionError):
        emit(ToKafka())


def test_hooks_and_serializers_of_the_project_stay(settings: Settings, emitted_events: EmittedEvents) -> None:
    """They change what is sent, so they are under test."""

    class Tenant(Hook):
        def before_send(self, message: Message) -> None:
            message.headers["tenant"] = "acme"

    settings.DISPYTCH = {"default": {"URL": "redis://h", "HOOKS": [Tenant()], "CLOUDEVENTS": False}}
    emit(OrderPlaced(number=1))
    [message] = emitted_events.messages
    assert message.headers == {"tenant": "acme"}


def test_nothing_is_left_open(emitted_events: EmittedEvents) -> None:
    """A run of thousands of tests keeps no thousand brokers."""
    emit(OrderPlaced(number=1))
    block: AbstractContextManager[Any]
    for block in (collecting(), override_brokers("memory")):
        with block:
            emit(OrderPlaced(number=2))
            session = connections.session
        assert session is not None
        assert session.brokers.brokers["default"].state == "stopped"
        assert connections.session is None


# -- as processes ----------------------------------------------------------------------------------------------------

RUNNER_SETTINGS = """
from tests.django.project.settings import *

DISPYTCH = {"default": {"URL": "kafka://127.0.0.1:1", "TIMEOUT": 0.2}, "shop": "redis://127.0.0.1:1"}
TEST_RUNNER = "dispytch_integrations.django.testing.MemoryBrokersRunner"
"""
RUNNER_TESTS = """
from django.test import SimpleTestCase, TestCase
from dispytch_integrations import EventBase
from dispytch_integrations.django import emit, get_emitter
from dispytch_integrations.django.testing import EmittedEventsMixin
from dispytch_integrations.kafka import KafkaEventRoute

class ToKafka(EventBase):
    __route__ = KafkaEventRoute(topic="orders")

class First(SimpleTestCase):
    def test_emit(self):
        emit(ToKafka())
        assert type(get_emitter().producers["default"]).__mro__[1].__name__ == "MemoryProducer"

class Second(EmittedEventsMixin, TestCase):
    def test_emit(self):
        emit(ToKafka())
        self.emitted_events.assert_emitted(ToKafka)

class Third(First):
    pass
"""
MANAGE_PY = """
import multiprocessing, sys
from django.core.management import execute_from_command_line
if __name__ == "__main__":
    method = sys.argv.pop(1)
    multiprocessing.set_start_method(method)
    execute_from_command_line(["manage.py", *sys.argv[1:]])
"""


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TEST_FOLDER": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [("fork", []), ("spawn", ["--parallel", "2"])],
    ids=["one process", "spawned processes, as on macOS"],
)
def test_manage_py_test_runs_on_memory(method: str, options: list[str], tmp_path: Path) -> None:
    """TEST_RUNNER in the settings, and no test of the project reaches for a broker; in parallel runs, too."""
    (tmp_path / "runner_settings.py").write_text(RUNNER_SETTINGS)
    (tmp_path / "manage.py").write_text(MANAGE_PY)
    (tmp_path / "test_orders.py").write_text(RUNNER_TESTS)
    done = run(["manage.py", method, "test", *options], tmp_path, DJANGO_SETTINGS_MODULE="runner_settings")
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr


PYTEST_TESTS = """
import pytest
from dispytch_integrations.django import emit
from tests.django.project.shop.events import OrderPlaced

@pytest.mark.parametrize("number", range(20))
def test_own_events_only(emitted_events, number):
    emit(OrderPlaced(number=number))
    assert emitted_events.emitted == [OrderPlaced(number=number)]
"""


def test_tests_in_several_processes_do_not_see_each_others_events(tmp_path: Path) -> None:
    """pytest-xdist runs them at the same time, over the same settings."""
    (tmp_path / "test_orders.py").write_text(PYTEST_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nDJANGO_SETTINGS_MODULE = tests.django.project.settings\n")
    plugins = ["xdist", "pytest_django.plugin", "dispytch_integrations._pytest_plugin", "no:cacheprovider"]
    done = run(
        ["-m", "pytest", "-q", "-n", "2", *(f"-p{plugin}" for plugin in plugins)],
        tmp_path,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert "20 passed" in done.stdout, done.stdout + done.stderr


def test_the_fixture_is_found_and_needs_no_django(tmp_path: Path) -> None:
    """Nothing has to be written into conftest.py; where nobody uses Django it costs nothing, and asks for nothing."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_orders.py").write_text(
        textwrap.dedent("""
            import sys
            def test_nothing_is_loaded():
                assert not [name for name in sys.modules if name.partition(".")[0] == "django"]
            def test_events(emitted_events):
                assert len(emitted_events) == 0
                assert not [name for name in sys.modules if name.partition(".")[0] == "django"]
        """)
    )
    done = run(
        ["-m", "pytest", "-q", *(f"-pno:{plugin}" for plugin in ("cacheprovider", "django", "hypothesispytest"))],
        tmp_path,
        DJANGO_SETTINGS_MODULE="",
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


# -- with a real broker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_broker", [None, "redis"])
def test_the_same_test_in_memory_and_with_a_broker(with_broker: str | None, emitted_events: EmittedEvents) -> None:
    """Django's brokers are put on a real one as well."""
    with override_settings(DISPYTCH={"default": "redis://nowhere.invalid:1", "kafka": "kafka://nowhere.invalid:1"}):
        emit_many([ToRedis(number=1), ToKafka(number=2)])
        session = connections.session
        assert session is not None
        transports = [broker.backend.transport for broker in session.brokers.brokers.values()]
        assert transports == [with_broker or "memory", "memory"]
    # Of two brokers, each in its own order.
    assert {type(event) for event in emitted_events} == {ToRedis, ToKafka}
