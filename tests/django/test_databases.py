"""After the commit on PostgreSQL and MariaDB: real isolation, real savepoints, connections that break, threads.

Each database has a process of its own, whose Django project is on it: there a test with `on_each_database` is run.
TEST_POSTGRESQL_HOST and TEST_MARIADB_HOST name other servers than those of this machine (_PORT, _USER, _PASSWORD, too).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db import connections as databases
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from dispytch_integrations.django import aemit_on_commit, emit_on_commit
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import TransactionError
from dispytch_integrations.django.lifecycle import flush_events
from dispytch_integrations.django.signals import event_emitted
from tests.django.brokers import sent
from tests.support.arrivals import SECONDS, Placed
from tests.support.servers import ROOT

# -- a process for each database -----------------------------------------------------------------------------------

_PORTS = {"postgresql": 5432, "mariadb": 3306}
_tests: dict[str, Callable[[], None]] = {}


class Database:
    """A process whose project is on one database. `run` runs a test of this module there."""

    def __init__(self, kind: str) -> None:
        given = {
            name: os.environ.get(f"TEST_{kind.upper()}_{name}", "") for name in ("HOST", "PORT", "USER", "PASSWORD")
        }
        host, port = given["HOST"] or "127.0.0.1", given["PORT"] or str(_PORTS[kind])
        if not _listens(host, int(port)):
            _unavailable(f"no {kind} at {host}:{port}; TEST_{kind.upper()}_HOST names another")
        environment = {f"TEST_DATABASE_{name}": value for name, value in given.items() if value}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.django import test_databases; test_databases.serve()"],
            cwd=ROOT,
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": str(ROOT),
                "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
                "TEST_DATABASE": kind,
                "TEST_DATABASE_PREFIX": f"t{secrets.token_hex(6)}",
                "TEST_BROKER": "memory://",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("")  # Its databases are made.

    def run(self, name: str) -> None:
        error = self._ask(name)
        if error:
            pytest.fail(error, pytrace=False)

    def _ask(self, name: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return str(json.loads(answer)) if answer else f"the process ended with {self._process.wait()}"

    def close(self) -> None:
        """End the process, which drops its databases."""
        self._process.communicate(timeout=30)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _unavailable(reason: str) -> NoReturn:
    # As for brokers: in CI a skip would be a hole that nobody sees.
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason} (CI=true: nothing is skipped)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.xdist_group(f"database {kind}")) for kind in _PORTS],
)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = Database(request.param)
    yield database
    database.close()


def on_each_database(test: Callable[[], None]) -> Callable[[Database], None]:
    """Run a test in the process of each database."""
    _tests[test.__name__] = test

    # Not functools.wraps: pytest would look for the fixtures of the wrapped one.
    def run(database: Database) -> None:
        database.run(test.__name__)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def serve() -> None:
    """In the process: make the databases, run the tests that are named on standard input, drop the databases."""
    import django
    from django.test.utils import setup_databases, setup_test_environment, teardown_databases

    answers, sys.stdout = sys.stdout, sys.stderr  # What is printed must not be taken for an answer.
    django.setup()  # pyright: ignore[reportAttributeAccessIssue]  # It takes tests/django for Django.
    setup_test_environment()
    for each in databases.all():
        each.settings_dict["TEST"]["MIGRATE"] = False  # Tables are made without: a third of the time.
    made = setup_databases(verbosity=0, interactive=False)
    try:
        for line in sys.stdin:
            print(json.dumps(_outcome(line.strip())), file=answers, flush=True)
    finally:
        connections.reset()
        teardown_databases(made, verbosity=0)


def _outcome(name: str) -> str:
    from tests.django.project.shop.models import ArchivedOrder, Order

    try:
        if name:
            _tests[name]()
    except BaseException:
        return traceback.format_exc()
    finally:
        connections.reset()
        databases.close_all()
        for model in (Order, ArchivedOrder):
            model.objects.all().delete()
    return ""


# -- what the tests have in common ---------------------------------------------------------------------------------


def placed(number: int = 0) -> Placed:
    return Placed(place="here", number=number)


def numbers() -> list[int]:
    return [message.event.number for message in sent() if isinstance(message.event, Placed)]


def order(number: int) -> None:
    """Place an order, and tell of it."""
    from tests.django.project.shop.models import Order

    Order.objects.create(customer=str(number))
    emit_on_commit(placed(number))


def customers() -> list[int]:
    """The numbers of the orders that are in the database."""
    from tests.django.project.shop.models import Order

    return sorted(int(customer) for customer in Order.objects.values_list("customer", flat=True))


class Rollback(Exception):
    """Ends an atomic block."""


@contextmanager
def rolled_back(**arguments: Any) -> Generator[None, None, None]:
    try:
        with transaction.atomic(**arguments):
            yield
            raise Rollback
    except Rollback:
        pass


@contextmanager
def failing(error: type[Exception]) -> Generator[None, None, None]:
    """An atomic block that ends with an error of the block, or of its commit."""
    with pytest.raises(error), transaction.atomic():
        yield


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Run `work` with database connections of its own, which are closed."""

    def closing() -> Any:
        try:
            return work()
        finally:
            databases.close_all()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(closing).result()


# -- commit and rollback -------------------------------------------------------------------------------------------


@on_each_database
def test_events_go_out_when_others_can_see_what_they_tell() -> None:
    """The consumer that asks for the order finds it: another connection sees the row by then, and not before."""
    seen: list[int] = []

    def look(**kwargs: Any) -> None:
        seen.append(len(customers()))

    event_emitted.connect(look)
    try:
        with transaction.atomic():
            for number in range(20):
                order(number)
            assert in_a_thread(customers) == []
            assert numbers() == []
        assert numbers() == list(range(20))
    finally:
        event_emitted.disconnect(look)
    assert seen == [20] * 20


@on_each_database
def test_a_rollback_sends_nothing() -> None:
    """By an exception, by set_rollback, by a statement that fails."""
    with rolled_back():
        order(1)
    with transaction.atomic():
        order(2)
        transaction.set_rollback(True)
    with failing(IntegrityError):
        order(3)
        duplicate()
    assert (customers(), numbers()) == ([], [])


@on_each_database
def test_savepoints_take_back_what_was_emitted_inside() -> None:
    """An IntegrityError that is caught around an inner block is everyday code; the outer block goes on."""
    with transaction.atomic():
        order(1)
        try:
            with transaction.atomic():
                order(2)
                duplicate()
        except IntegrityError:
            order(3)
        with transaction.atomic():
            order(4)
            with rolled_back():
                order(5)
                with transaction.atomic():
                    order(6)
        assert numbers() == []
    assert customers() == numbers() == [1, 3, 4]


def duplicate() -> None:
    """A statement that fails."""
    from tests.django.project.shop.models import Order

    first = Order.objects.create(customer="1000")
    Order.objects.bulk_create([Order(pk=first.pk, customer="1001")])


@on_each_database
def test_nested_and_durable_blocks_are_one_transaction() -> None:
    """What the innermost emits waits for the outermost; a durable block cannot be an inner one."""
    with transaction.atomic(durable=True):
        with transaction.atomic(savepoint=False):
            order(1)
        try:
            with transaction.atomic(durable=True):
                order(2)
        except RuntimeError:
            pass
        order(3)
        assert numbers() == []
    with rolled_back(), transaction.atomic(savepoint=False):
        order(4)
    assert customers() == numbers() == [1, 3]


@on_each_database
def test_a_commit_that_fails_sends_nothing() -> None:
    """Foreign keys are checked at the commit (PostgreSQL) or at the statement (MariaDB)."""
    from tests.django.project.shop.models import Order

    with failing(IntegrityError):
        order(1)
        Order.tags.through.objects.create(order_id=Order.objects.get().pk, tag_id=10**6)
    assert (customers(), numbers()) == ([], [])


@on_each_database
def test_a_connection_that_breaks_in_the_transaction_sends_nothing() -> None:
    """The database restarts under a request: nothing is committed, and nothing is announced. The next one goes well."""

    def end(number: int) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(%s)" if connection.vendor == "postgresql" else "KILL %s", [number]
            )

    @transaction.atomic
    def work() -> None:
        order(1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()" if connection.vendor == "postgresql" else "SELECT connection_id()")
            [number] = cursor.fetchone()
        in_a_thread(lambda: end(number))

    with pytest.raises(OperationalError):
        work()
    connection.close()
    with transaction.atomic():
        order(2)
    assert customers() == numbers() == [2]


@on_each_database
def test_a_failing_callback_takes_no_event_away() -> None:
    """Django drops the callbacks behind one that raises; the orders are committed."""

    def broken() -> None:
        raise LookupError

    with failing(LookupError):
        transaction.on_commit(broken)
        order(1)
        order(2)
    assert customers() == numbers() == [1, 2]


@on_each_database
def test_a_transaction_that_is_committed_by_hand_is_refused() -> None:
    """With autocommit off the event would go out before the commit, or without one."""
    transaction.set_autocommit(False)
    try:
        customers()
        with pytest.raises(TransactionError, match="committed by hand"):
            emit_on_commit(placed(1))
        with transaction.atomic():
            order(2)
        assert numbers() == []
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert customers() == numbers() == [2]


# -- two databases -------------------------------------------------------------------------------------------------


@on_each_database
def test_two_databases_with_a_router() -> None:
    """The transaction of the database that is written counts; with both open, it must be named."""
    from tests.django.project.shop.models import ArchivedOrder

    with transaction.atomic(using="archive"):
        assert ArchivedOrder.objects.create(customer="1")._state.db == "archive"
        emit_on_commit(placed(1))
        assert numbers() == []
    with rolled_back(using="archive"):
        ArchivedOrder.objects.create(customer="2")
        emit_on_commit(placed(2))
    assert numbers() == [1]
    with transaction.atomic(), rolled_back(using="archive"):
        with pytest.raises(TransactionError, match="'default' and 'archive'"):
            emit_on_commit(placed(3))
        emit_on_commit(placed(4), using="default")
        emit_on_commit(placed(5), using="archive")
    assert numbers() == [1, 4]
    assert ArchivedOrder.objects.count() == 1


# -- requests and threads ------------------------------------------------------------------------------------------


def view(request: HttpRequest, number: int) -> HttpResponse:
    order(number)
    if number % 2:
        raise LookupError("in the view")
    return HttpResponse()


async def async_view(request: HttpRequest, number: int) -> HttpResponse:
    await sync_to_async(transaction.atomic(order))(number)
    return HttpResponse(await aemit_on_commit(placed(number + 1)))


urlpatterns = [path("sync/<int:number>", view), path("async/<int:number>", async_view)]


@on_each_database
def test_atomic_requests() -> None:
    """A view that fails announces nothing, under WSGI and ASGI."""
    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        with override_settings(ROOT_URLCONF=__name__):
            client = Client(raise_request_exception=False)
            assert [client.post(f"/sync/{number}").status_code for number in (0, 1, 2)] == [200, 500, 200]

            async def request(number: int) -> int:
                return (await AsyncClient(raise_request_exception=False).post(f"/sync/{number}")).status_code

            assert [async_to_sync(request)(number) for number in (3, 4)] == [500, 200]
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    assert customers() == numbers() == [0, 2, 4]


@on_each_database
def test_async_views() -> None:
    """The async twin finds the connection of Django's thread, in which no transaction is left open."""
    with override_settings(ROOT_URLCONF=__name__):

        async def request() -> None:
            assert (await AsyncClient().post("/async/10")).status_code == 200

        async_to_sync(request)()
    assert numbers() == [10, 11]


@on_each_database
def test_many_threads_commit_and_roll_back_at_once() -> None:
    """What has arrived is what is in the table, whatever the threads of a server do beside each other."""

    def work(thread: int) -> None:
        try:
            for turn in range(10):
                number = thread * 100 + turn * 2
                with transaction.atomic():
                    order(number)
                    with rolled_back():
                        order(number + 1)
                with rolled_back():
                    order(number)
        finally:
            databases.close_all()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    arrived = numbers()
    assert len(arrived) == 120
    assert sorted(arrived) == customers()
    for thread in range(12):
        own = [number for number in arrived if number // 100 == thread]
        assert own == sorted(own)


@on_each_database
def test_receivers_leave_no_connection_open() -> None:
    """A process that emits keeps no second connection to the database: pools and max_connections are small."""
    names: set[str] = set()

    def look(**kwargs: Any) -> None:
        customers()
        names.add(threading.current_thread().name)

    customers()
    before = open_connections()
    event_emitted.connect(look)
    try:
        for number in range(1, 12):
            order(number)
        assert flush_events(SECONDS)
        end = time.monotonic() + SECONDS
        while (now := open_connections()) > before and time.monotonic() < end:
            time.sleep(0.02)  # The server notices a moment later.
    finally:
        event_emitted.disconnect(look)
    assert names == {"dispytch signals"}
    assert now <= before == 1, (before, now)


def open_connections() -> int:
    """How many connections there are to our database, this one among them."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        else:
            cursor.execute("SELECT count(*) FROM information_schema.processlist WHERE db = database()")
        [count] = cursor.fetchone()
    return int(count)
