"""emit_on_commit and aemit_on_commit: what goes out, when, in which order, and what becomes of the request.

On SQLite, in this process; `test_databases` repeats the core on PostgreSQL and MariaDB.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, connection, transaction
from django.db import connections as databases
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, TestCase, override_settings
from django.urls import path
from pydantic import BaseModel

from dispytch_integrations import EventBase, event_id
from dispytch_integrations._blocking_handoff import Handoff, LeftMessage
from dispytch_integrations._outlet import Outlet
from dispytch_integrations.django import aemit_on_commit, emit_on_commit, get_emitter
from dispytch_integrations.django._connections import Session, connections
from dispytch_integrations.django.errors import TransactionError
from dispytch_integrations.django.lifecycle import close_brokers, flush_events
from dispytch_integrations.django.signals import event_emitted, event_failed
from dispytch_integrations.django.testing import EmittedEventsMixin
from dispytch_integrations.errors import BrokerUnavailableError, HeaderError, NotStartedError, RouteError
from dispytch_integrations.message import Message
from dispytch_integrations.producer import BackendConfig, EventRoute, Producer
from tests.django.brokers import broker_at, pending, sent
from tests.django.project.shop.models import ArchivedOrder, Order
from tests.support.arrivals import SECONDS, Arrivals, KafkaArrivals, Placed, RabbitMQArrivals, RedisArrivals
from tests.support.brokers import Redis

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "archive"])


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No broker, unless a test names one."""
    with broker_at("memory://"):
        yield


def placed(number: int = 0) -> Placed:
    return Placed(place="here", number=number)


def numbers() -> list[int]:
    """The numbers of the events that the broker memory:// has got, in their order."""
    return [message.event.number for message in sent() if isinstance(message.event, Placed)]


@pytest.fixture
def failures() -> Iterator[list[tuple[int, Exception]]]:
    """What event_failed has told: the event's number, the error."""
    told: list[tuple[int, Exception]] = []

    def failed(event: Placed, error: Exception, after_commit: bool, **kwargs: Any) -> None:
        assert after_commit
        told.append((event.number, error))

    event_failed.connect(failed)
    yield told
    event_failed.disconnect(failed)


class Rollback(Exception):
    """Ends an atomic block."""


@contextmanager
def rolled_back(**arguments: Any) -> Generator[None, None, None]:
    """An atomic block that ends with an error, which is caught."""
    try:
        with transaction.atomic(**arguments):
            yield
            raise Rollback
    except Rollback:
        pass


# -- commit and rollback -------------------------------------------------------------------------------------------


def test_events_go_out_after_the_commit_in_their_order() -> None:
    """Nobody hears of an order that may still be rolled back, and nobody hears "cancelled" before "placed"."""
    with transaction.atomic():
        for number in range(50):
            emit_on_commit(placed(number))
        assert numbers() == []
    assert numbers() == list(range(50))


def test_in_memory_they_are_there_when_the_commit_returns() -> None:
    """A test that commits and looks needs no waiting, and cannot fail now and then; receivers have run, too."""
    producer: Any = get_emitter().producers["default"]
    told: list[int] = []

    def tell(event: Placed, **kwargs: Any) -> None:
        told.append(event.number)

    event_emitted.connect(tell)
    try:
        for number in range(0, 100, 2):
            with transaction.atomic():
                emit_on_commit(placed(number))
                assert len(producer.sent) == number
            assert len(producer.sent) == len(told) == number + 1
            emit_on_commit(placed(number + 1))
            assert len(producer.sent) == len(told) == number + 2
    finally:
        event_emitted.disconnect(tell)
    assert told == list(range(100))


@pytest.mark.parametrize("kind", ["redis", "kafka", "rabbitmq"])
def test_they_arrive_in_their_order_at_a_broker_that_is_connected_by_them(
    request: pytest.FixtureRequest, unique: str, kind: str
) -> None:
    """The first transaction of a process is no exception: its events wait for the connection, and keep their order."""
    makers: dict[str, type[Arrivals]] = {"redis": RedisArrivals, "kafka": KafkaArrivals, "rabbitmq": RabbitMQArrivals}
    arrivals = makers[kind](request.getfixturevalue(f"{kind}_url"), unique)
    with broker_at(arrivals.url, TIMEOUT=20):
        with transaction.atomic():
            emit_on_commit(arrivals.placed(number) for number in range(100))
        for number in range(100, 200):
            with transaction.atomic():
                emit_on_commit(arrivals.placed(number))
        assert flush_events(20)
        assert arrivals.numbers(200) == list(range(200))
    arrivals.close()


def test_a_rollback_sends_nothing() -> None:
    """The order does not exist."""
    with rolled_back():
        emit_on_commit(placed())
    with transaction.atomic():
        emit_on_commit(placed())
        transaction.set_rollback(True)
    assert numbers() == []


def test_a_failed_commit_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constraint that is checked at the commit, a connection that is lost there."""

    def failing() -> None:
        raise DatabaseError("at the commit")

    monkeypatch.setattr(connection, "_commit", failing)
    with pytest.raises(DatabaseError), transaction.atomic():
        emit_on_commit(placed())
    assert numbers() == []


def test_savepoints_take_back_what_was_emitted_inside() -> None:
    """A part of the work failed and was caught: its events did not happen, those around it did."""
    with transaction.atomic():
        emit_on_commit(placed(1))
        with rolled_back():
            emit_on_commit(placed(2))
            with transaction.atomic():
                emit_on_commit(placed(3))
        with transaction.atomic():
            emit_on_commit(placed(4))
            with rolled_back():
                emit_on_commit(placed(5))
        emit_on_commit(placed(6))
        assert numbers() == []
    assert numbers() == [1, 4, 6]


def test_an_inner_block_without_savepoint_belongs_to_the_outer_one() -> None:
    """atomic(savepoint=False) rolls back all, and durable=True is an outermost block."""
    with transaction.atomic(durable=True):
        with transaction.atomic(savepoint=False):
            emit_on_commit(placed(1))
        emit_on_commit(placed(2))
    assert numbers() == [1, 2]
    with rolled_back():
        emit_on_commit(placed(3))
        with transaction.atomic(savepoint=False):
            emit_on_commit(placed(4))
    with transaction.atomic():
        with rolled_back(savepoint=False):
            emit_on_commit(placed(5))
        emit_on_commit(placed(6))
    assert numbers() == [1, 2]


def test_without_a_transaction_it_goes_out_at_once() -> None:
    """In autocommit mode each query is committed when it returns."""
    Order.objects.create(customer="one")
    emit_on_commit(placed(1))
    assert numbers() == [1]
    emit_on_commit(placed(2), using="default")
    assert numbers() == [1, 2]


def test_what_is_committed_can_be_read_by_who_gets_the_event() -> None:
    """The consumer asks the web site for the order that it was told of."""
    seen: list[int] = []

    def look(**kwargs: Any) -> None:
        seen.append(Order.objects.count())  # On a thread, and a connection, of its own.

    event_emitted.connect(look)
    try:
        with transaction.atomic():
            Order.objects.create(customer="one")
            emit_on_commit(placed())
        assert flush_events(20)
    finally:
        event_emitted.disconnect(look)
    assert seen == [1]


# -- a transaction is required -------------------------------------------------------------------------------------


def test_a_transaction_can_be_required() -> None:
    """Who forgot the atomic block learns it in the first test, not by an order that was announced and never placed."""
    with pytest.raises(TransactionError, match="no transaction is open, and one is required"):
        emit_on_commit(placed(1), require_transaction=True)
    with override_settings(DISPYTCH_REQUIRE_TRANSACTION=True):
        with pytest.raises(TransactionError, match=r"emit inside `with transaction.atomic\(\):`"):
            emit_on_commit(placed(2))
        with pytest.raises(TransactionManagementError, match="on database 'archive'"):
            emit_on_commit(placed(3), using="archive")
        emit_on_commit(placed(4), require_transaction=False)
        with transaction.atomic():
            emit_on_commit(placed(5))
    assert numbers() == [4, 5]


def test_a_database_that_is_committed_by_hand_is_refused() -> None:
    """With autocommit off Django tells nobody of a commit: the event would go out before it, whatever becomes of it."""
    transaction.set_autocommit(False)
    try:
        Order.objects.create(customer="one")
        for using in (None, "default"):
            with pytest.raises(TransactionError, match="'default' is committed by hand"):
                emit_on_commit(placed(1), using=using)
        emit_on_commit(placed(2), using="archive")
        with transaction.atomic():
            emit_on_commit(placed(3))
        transaction.rollback()
        with transaction.atomic():
            emit_on_commit(placed(4))
        assert numbers() == [2]
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert numbers() == [2, 4]


# -- which database ------------------------------------------------------------------------------------------------


def test_the_one_database_with_a_transaction_is_meant() -> None:
    """A project with one transaction at a time never writes using=, whichever database it is on."""
    with rolled_back(using="archive"):
        emit_on_commit(placed(1))
    with transaction.atomic(using="archive"):
        emit_on_commit(placed(2))
        assert numbers() == []
    assert numbers() == [2]


def test_several_open_transactions_must_be_told_apart() -> None:
    """To guess would be to announce what the other database rolls back."""
    with transaction.atomic(), rolled_back(using="archive"):
        with pytest.raises(TransactionError, match=r"on the databases 'default' and 'archive'.*using='default'"):
            emit_on_commit(placed(1))
        emit_on_commit(placed(2), using="default")
        emit_on_commit(placed(3), using="archive")
    assert numbers() == [2]


def test_a_named_database_without_a_transaction_beside_one_with_is_an_error() -> None:
    """It would go out at once, in the middle of the other's transaction: surely a mistake."""
    with transaction.atomic():
        with pytest.raises(TransactionError, match="on database 'archive', but on 'default'"):
            emit_on_commit(placed(1), using="archive")
    assert numbers() == []


def test_a_transaction_of_another_thread_is_not_meant() -> None:
    """Connections belong to threads: a worker beside does not make this one's events wait."""
    with transaction.atomic():
        thread = threading.Thread(target=emit_on_commit, args=(placed(1),))
        thread.start()
        thread.join()
        assert numbers() == [1]


def test_a_brokers_alias_in_the_place_of_a_databases_is_explained() -> None:
    """using= is a database, as everywhere in Django; who means a broker reads how it is chosen."""
    with override_settings(DISPYTCH={"default": "memory://", "audit": "memory://"}):
        with pytest.raises(TransactionError) as caught:
            emit_on_commit(placed(), using="audit")
    assert "there is no database 'audit' (using= is a database's alias: 'default', 'archive')" in str(caught.value)
    assert "get_emitter('audit')" in str(caught.value)


def test_a_router_decides_by_the_models_that_are_written() -> None:
    """ArchivedOrder lives in "archive": the transaction there is the one that counts."""
    using = ArchivedOrder.objects.create(customer="before")._state.db
    assert using == "archive"
    with rolled_back(using=using):
        ArchivedOrder.objects.create(customer="one")
        emit_on_commit(placed(1))
    with transaction.atomic(using=using):
        ArchivedOrder.objects.create(customer="two")
        emit_on_commit(placed(2))
    assert numbers() == [2]
    assert ArchivedOrder.objects.count() == 2


# -- what is given, and returned -----------------------------------------------------------------------------------


def test_the_id_is_returned() -> None:
    """A response may name the event that it caused; a list gives the ids of its members."""
    event = placed(1)
    with transaction.atomic():
        assert emit_on_commit(event) == event_id(event)
        events = [placed(2), placed(3)]
        assert emit_on_commit(events) == [event_id(each) for each in events]
        assert emit_on_commit(placed(number) for number in (4, 5)) != []
        assert emit_on_commit((placed(6),)) != []
    assert numbers() == [1, 2, 3, 4, 5, 6]
    assert [message.id for message in sent()][:3] == [event_id(each) for each in (event, *events)]


def test_nothing_is_no_mistake() -> None:
    """An empty list asks for no transaction, opens nothing and returns no ids."""
    with override_settings(DISPYTCH_REQUIRE_TRANSACTION=True):
        assert emit_on_commit([]) == []
        assert emit_on_commit(event for event in list[EventBase]()) == []


def test_the_message_is_made_at_the_call() -> None:
    """What happens to the event between call and commit does not change what was announced."""
    event, headers = placed(1), {"tenant": "acme"}
    with transaction.atomic():
        emit_on_commit(event, headers=headers)
        event.number = 2
        headers["tenant"] = "other"
    [message] = sent()
    assert message.payload == b'{"number":1}'
    assert message.headers["tenant"] == "acme"


def test_mistakes_are_raised_at_the_call() -> None:
    """In the middle of the transaction, where it can be rolled back; of a list nothing is sent."""
    with transaction.atomic():
        with pytest.raises(RouteError):
            emit_on_commit(Placed(place="no name"))
        with pytest.raises(ExceptionGroup) as caught:
            emit_on_commit([placed(1), Placed(place="no name")])
        assert caught.group_contains(RouteError)
        with pytest.raises(HeaderError):
            emit_on_commit(placed(2), headers={"tenant": "a\nb"})
    assert numbers() == []


class NoEvent(BaseModel):
    number: int = 0


async def coroutine_function() -> EventBase:
    return placed()


async def async_generator() -> Any:
    yield placed()


@pytest.mark.parametrize(
    "thing",
    [None, "an event", b"an event", 1, {"number": 1}, Placed, NoEvent(), ["an event"], [None], coroutine_function,
     async_generator()],
    ids=lambda thing: re.sub(" at 0x.*", "", repr(thing)),
)  # fmt: skip
def test_what_is_no_event_is_refused(thing: Any) -> None:
    """By name, at the call, with or without a transaction."""
    for call in (emit_on_commit, async_to_sync(aemit_on_commit)):
        with pytest.raises((RouteError, ExceptionGroup)) as caught:
            call(thing)
        error = caught.value.exceptions[0] if isinstance(caught.value, ExceptionGroup) else caught.value
        assert isinstance(error, RouteError)
        assert "is not an event" in str(error)
    assert numbers() == []


# -- callbacks of others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LookupError, SystemExit], ids=["an error", "an exit"])
def test_callbacks_of_others_that_fail_take_no_event_away(error: type[BaseException]) -> None:
    """Django drops what is registered behind a callback that raises: the commit stands, the events must go out."""

    def failing() -> None:
        raise error

    @transaction.atomic
    def work() -> None:
        emit_on_commit(placed(1))
        transaction.on_commit(failing)
        emit_on_commit(placed(2))
        with transaction.atomic():
            transaction.on_commit(failing)
            emit_on_commit([placed(3), placed(4)])

    with pytest.raises(error):
        work()
    assert numbers() == [1, 2, 3, 4]


def test_callbacks_of_others_keep_their_order_and_their_savepoints() -> None:
    """Ours stand before them; among themselves nothing changes."""
    called: list[int] = []
    with transaction.atomic():
        transaction.on_commit(lambda: called.append(1))
        emit_on_commit(placed(1))
        with rolled_back():
            transaction.on_commit(lambda: called.append(2))
            emit_on_commit(placed(2))
        transaction.on_commit(lambda: called.append(3))
        emit_on_commit(placed(3))
        transaction.on_commit(lambda: called.append(4))
    assert called == [1, 3, 4]
    assert numbers() == [1, 3]


def test_an_event_can_be_emitted_in_a_callback() -> None:
    """on_commit(lambda: emit_on_commit(...)) sends it at once: the transaction is over."""
    with transaction.atomic():
        transaction.on_commit(lambda: [emit_on_commit(placed(2)), None][1])
        emit_on_commit(placed(1))
    assert numbers() == [1, 2]


def test_thousands_of_events_and_callbacks_cost_no_square_of_their_number() -> None:
    """An import in one transaction, with a callback per row beside the event."""

    def seconds(rows: int) -> float:
        started = time.process_time()
        with transaction.atomic():
            for number in range(rows):
                transaction.on_commit(int)
                emit_on_commit(placed(number))
        return time.process_time() - started

    seconds(10)
    assert seconds(4000) < 20 * seconds(400) + 1
    assert len(numbers()) == 4410


# -- requests ------------------------------------------------------------------------------------------------------


def view(request: HttpRequest, number: int) -> HttpResponse:
    Order.objects.create(customer="one")
    emit_on_commit(placed(number))
    if "fail" in request.GET:
        raise LookupError("in the view")
    # Under ATOMIC_REQUESTS it is not committed yet.
    return HttpResponse(str(connection.in_atomic_block))


async def async_view(request: HttpRequest, number: int) -> HttpResponse:
    await sync_to_async(Order.objects.create)(customer="one")
    return HttpResponse(await aemit_on_commit(placed(number)))


async def async_atomic_view(request: HttpRequest, number: int) -> HttpResponse:
    @sync_to_async
    def place() -> None:
        with transaction.atomic():
            Order.objects.create(customer="one")
            async_to_sync(aemit_on_commit)(placed(number))
            emit_on_commit(placed(number + 1))
            assert number not in numbers()
            if "fail" in request.GET:
                raise LookupError("in the view")

    await place()
    return HttpResponse()


urlpatterns = [
    path("sync/<int:number>", view),
    path("async/<int:number>", async_view),
    path("atomic/<int:number>", async_atomic_view),
]
requests = override_settings(ROOT_URLCONF=__name__)


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)


@requests
def test_under_atomic_requests_an_event_waits_for_the_end_of_the_view(atomic_requests: None) -> None:
    """Each view is a transaction: a view that fails announces nothing."""
    assert Client().post("/sync/1").content == b"True"
    with pytest.raises(LookupError):
        Client().post("/sync/2?fail")
    assert numbers() == [1]
    assert Order.objects.count() == 1


@requests
async def test_under_asgi_too(atomic_requests: None) -> None:
    """Sync views run in a thread there, with the connection of that thread."""
    await AsyncClient().post("/sync/1")
    with pytest.raises(LookupError):
        await AsyncClient().post("/sync/2?fail")
    assert numbers() == [1]


@requests
async def test_async_views_emit_where_djangos_connections_live() -> None:
    """Their ORM calls run in one thread: the transaction that is open there is the one that is meant."""
    answer = await AsyncClient().post("/async/1")
    assert numbers() == [1]
    assert answer.content.decode() == sent()[0].id
    await AsyncClient().post("/atomic/2")
    with pytest.raises(LookupError):
        await AsyncClient().post("/atomic/4?fail")
    assert numbers() == [1, 2, 3]


async def test_the_async_twin_takes_and_returns_the_same() -> None:
    """Lists, generators, databases, headers, and the errors."""
    assert len(await aemit_on_commit([placed(1), placed(2)], headers={"tenant": "acme"})) == 2
    assert await aemit_on_commit([]) == []
    assert await aemit_on_commit(placed(3), using="archive", require_transaction=False)
    with pytest.raises(TransactionError):
        await aemit_on_commit(placed(4), require_transaction=True)
    with pytest.raises(TransactionError, match="no database 'audit'"):
        await aemit_on_commit(placed(5), using="audit")
    assert numbers() == [1, 2, 3]
    assert sent()[0].headers["tenant"] == "acme"


# -- brokers that are slow, hang or are down -----------------------------------------------------------------------


def test_a_slow_broker_does_not_block_the_response(own_redis: Callable[..., Redis], unique: str) -> None:
    """The request is answered when it is committed, whatever the broker does; the event arrives when it can."""
    broker = own_redis()
    arrivals = RedisArrivals(broker.url, unique)
    with broker_at(broker.url, TIMEOUT=20):
        emit_on_commit(arrivals.placed(1))
        assert flush_events(20)
        broker.pause()
        with transaction.atomic():
            emit_on_commit(arrivals.placed(2))
        assert pending() == 1
        assert not flush_events(0.01)
        broker.resume()
        assert arrivals.numbers(2) == [1, 2]
    arrivals.close()


@requests
def test_a_failure_after_the_commit_is_logged_and_told_and_no_error(
    own_redis: Callable[..., Redis],
    unique: str,
    failures: list[tuple[int, Exception]],
    caplog: pytest.LogCaptureFixture,
    atomic_requests: None,
) -> None:
    """The order is placed: the customer gets a 200, and the operator reads which event is missing."""
    broker = own_redis()
    broker.stop()
    with broker_at(broker.url, TIMEOUT=0.2):
        assert Client().post("/sync/7").status_code == 200
        assert flush_events(20)
    [(number, error)] = failures
    assert number == 7
    assert isinstance(error, BrokerUnavailableError)
    [record] = [record for record in caplog.records if "was not delivered after its transaction" in record.message]
    assert record.levelno == logging.ERROR
    assert (record.__dict__["event_type"], record.__dict__["broker"]) == ("tests.redis.placed", "default")
    assert record.__dict__["event_id"] in record.message
    assert Order.objects.count() == 1


def test_brokers_that_were_closed_between_call_and_commit(failures: list[tuple[int, Exception]]) -> None:
    """The server shuts down under a request: it succeeds, and its event is told as lost."""
    with transaction.atomic():
        emit_on_commit([placed(1), placed(2)])
        close_brokers()
    assert [(number, type(error)) for number, error in failures] == [(1, NotStartedError), (2, NotStartedError)]


def test_settings_that_are_wrong_at_the_commit(failures: list[tuple[int, Exception]]) -> None:
    """Nothing of ours may fail a committed request."""
    with transaction.atomic():
        emit_on_commit(placed(1))
        wrong = override_settings(DISPYTCH={})
        wrong.enable()
    wrong.disable()
    [(number, error)] = failures
    assert number == 1
    assert "DISPYTCH is empty" in str(error)


def test_settings_that_change_between_call_and_commit(redis_url: str, unique: str) -> None:
    """A test's override_settings around a part of the work: the event goes to the brokers of the commit."""
    arrivals = RedisArrivals(redis_url, unique)
    with ExitStack() as stack:
        with transaction.atomic():
            emit_on_commit(arrivals.placed(1))
            stack.enter_context(broker_at(redis_url, TIMEOUT=20))
        assert arrivals.numbers(1) == [1]
        with transaction.atomic():
            emit_on_commit(arrivals.placed(2))
            stack.enter_context(override_settings(DISPYTCH={"default": "memory://", "other": redis_url}))
        assert numbers() == [2]
    arrivals.close()


def test_an_alias_that_is_gone_at_the_commit_is_told(failures: list[tuple[int, Exception]]) -> None:
    """Not sent elsewhere, and not forgotten."""
    with override_settings(DISPYTCH={"default": "memory://", "audit": "memory://"}):
        with transaction.atomic():
            get_emitter("audit").emit_on_commit(placed(1))
            gone = broker_at("memory://")
            gone.enable()
        assert numbers() == []
        gone.disable()
    [(number, error)] = failures
    assert number == 1
    assert isinstance(error, NotStartedError)


def test_brokers_that_are_exchanged_in_the_moment_of_the_hand_over(
    monkeypatch: pytest.MonkeyPatch, failures: list[tuple[int, Exception]]
) -> None:
    """Another thread changes the settings between two steps of the commit: the event goes to the new brokers."""
    reach = connections.reach

    def reach_what_is_closed_then(**arguments: bool) -> Session:
        session = reach(**arguments)
        monkeypatch.undo()
        connections.reset()
        return session

    with transaction.atomic():
        emit_on_commit([placed(1), placed(2)])
        monkeypatch.setattr(connections, "reach", reach_what_is_closed_then)
    assert numbers() == [1, 2]
    assert failures == []


def test_closing_races_with_commits_and_nothing_is_lost(redis_url: str, unique: str) -> None:
    """Settings change again and again while threads commit: each event finds the brokers of before or of after."""
    arrivals, stop = RedisArrivals(redis_url, unique), threading.Event()
    counts = [0] * 4

    def work(thread: int) -> None:
        while not stop.is_set():
            emit_on_commit(arrivals.placed(thread))
            counts[thread] += 1
            stop.wait(0.002)

    with broker_at(redis_url, TIMEOUT=20, SHUTDOWN_TIMEOUT=20):
        workers = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for each in workers:
            each.start()
        for _ in range(100):
            connections.reset()
            time.sleep(0.002)
        stop.set()
        for each in workers:
            each.join()
        assert flush_events(20)
    arrived = arrivals.numbers(sum(counts))
    assert [arrived.count(thread) for thread in range(4)] == counts
    arrivals.close()


# -- a bound on what waits -----------------------------------------------------------------------------------------


def test_max_pending_bounds_what_waits_for_a_broker(own_redis: Callable[..., Redis], unique: str) -> None:
    """A broker that hangs does not fill the memory: one more waits for room, and goes on when there is some."""
    broker = own_redis()
    arrivals = RedisArrivals(broker.url, unique)
    with broker_at(broker.url, TIMEOUT=20, MAX_PENDING=3):
        emit_on_commit(arrivals.placed(0))
        assert flush_events(20)
        broker.pause()
        emitted = threading.Semaphore(0)

        def emits() -> None:
            for number in range(1, 9):
                emit_on_commit(arrivals.placed(number))
                emitted.release()

        thread = threading.Thread(target=emits)
        thread.start()
        for _ in range(3):
            assert emitted.acquire(timeout=SECONDS)
        assert not emitted.acquire(timeout=0.2)
        assert pending() == 3
        broker.resume()
        thread.join(SECONDS)
        assert arrivals.numbers(9) == list(range(9))
    arrivals.close()


def test_what_finds_no_room_in_time_is_told_as_failed(unique: str) -> None:
    """The commit is not held up for ever, and the event is not lost without a word."""

    class Stuck(Producer):
        async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
            await release.wait()
            return [None] * len(messages)

        async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
            raise NotImplementedError

    loop, release = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    outlet = Outlet(Stuck(), timeout=0.1)
    settled: list[tuple[Message, Exception | None]] = []
    handoff = Handoff(loop, lambda left, error: settled.append((left.message, error)), lambda alias: 2)
    messages = [outlet.compile(Placed)(placed(number), None) for number in range(4)]
    context = contextvars.copy_context()
    assert handoff.put([LeftMessage(outlet, message, context) for message in messages[:3]]) == 3
    [(message, error)] = settled
    assert message is messages[2]
    assert "2 messages wait for broker 'default' already" in str(error)
    loop.call_soon_threadsafe(release.set)
    assert handoff.flush(SECONDS)
    assert settled[1:] == [(messages[0], None), (messages[1], None)]
    handoff.close()
    assert handoff.put([LeftMessage(outlet, messages[3], context)]) == 0
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_system_that_refuses_threads_costs_the_event_of_then_alone(
    monkeypatch: pytest.MonkeyPatch, failures: list[tuple[int, Exception]]
) -> None:
    """The limit of the container is reached for a moment: that event is told as lost, and later ones go out."""
    connections.reach()
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("dispytch hand-off"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    emit_on_commit(placed(1))
    monkeypatch.undo()
    emit_on_commit([placed(2), placed(3)])
    assert numbers() == [2, 3]
    assert [number for number, _ in failures] == [1]


def test_many_threads_commit_at_once(redis_url: str, unique: str) -> None:
    """A threaded server under load: everything arrives, once, and in its order per transaction."""
    arrivals = RedisArrivals(redis_url, unique)

    def work(thread: int) -> None:
        for turn in range(20):
            emit_on_commit([arrivals.placed(thread * 1000 + turn * 10 + number) for number in range(5)])

    with broker_at(redis_url, TIMEOUT=20):
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert flush_events(20)
    arrived = arrivals.numbers(800)
    assert len(set(arrived)) == len(arrived) == 800
    for thread in range(8):
        own = [number for number in arrived if number // 1000 == thread]
        assert own == sorted(own)
    arrivals.close()


# -- in tests ------------------------------------------------------------------------------------------------------


class TestInATestCase(EmittedEventsMixin, TestCase):
    """A TestCase is one transaction that is never committed."""

    databases = {"default", "archive"}

    def test_what_raises_outside_of_a_test_raises_in_it(self) -> None:
        """The TestCase's own transactions do not hide that the code opens none, or another database's."""
        with pytest.raises(TransactionError, match="no transaction is open, and one is required"):
            emit_on_commit(placed(1), require_transaction=True)
        with override_settings(DISPYTCH_REQUIRE_TRANSACTION=True), pytest.raises(TransactionError):
            emit_on_commit(placed(2))
        with transaction.atomic(using="archive"):
            with pytest.raises(TransactionError, match="'default', but on 'archive'"):
                emit_on_commit(placed(3), using="default")
            emit_on_commit(placed(4), require_transaction=True)
            emit_on_commit(placed(5), using="archive")
        self.emitted_events.assert_pending(Placed, number=4)
        self.emitted_events.assert_pending(Placed, number=5)
        assert len(self.emitted_events.pending) == 2

    def test_what_waits_is_captured(self) -> None:
        """captureOnCommitCallbacks(execute=True) is Django's way to run what waits, and it is enough."""
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            transaction.on_commit(lambda: None)
            emit_on_commit(placed(1))
            emit_on_commit([placed(2), placed(3)])
            self.emitted_events.assert_pending(Placed, number=1)
        assert len(callbacks) == 3
        self.emitted_events.assert_emitted(Placed, number=3)
        assert [event.number for event in self.emitted_events if isinstance(event, Placed)] == [1, 2, 3]

    def test_what_waited_before_is_not_captured(self) -> None:
        """Only what the block has registered is run, as Django promises."""
        emit_on_commit(placed(1))
        transaction.on_commit(lambda: None)
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            emit_on_commit(placed(2))
        assert len(callbacks) == 1
        assert [event.number for event in self.emitted_events if isinstance(event, Placed)] == [2]

    def test_the_databases_of_the_test_case_are_not_several_transactions(self) -> None:
        """TestCase opens one on each: who writes no using= in production need not write it in tests."""
        with self.captureOnCommitCallbacks(execute=True):
            emit_on_commit(placed(1))
            with transaction.atomic():
                emit_on_commit(placed(2))
        with self.captureOnCommitCallbacks(using="archive", execute=True):
            with transaction.atomic(using="archive"):
                emit_on_commit(placed(3))
            emit_on_commit(placed(4), using="archive")
        assert [event.number for event in self.emitted_events if isinstance(event, Placed)] == [1, 2, 3, 4]

    def test_a_savepoint_that_is_rolled_back_is_seen(self) -> None:
        """Tests of error paths see that nothing was announced."""
        with self.captureOnCommitCallbacks(execute=True), rolled_back():
            emit_on_commit(placed(1))
        self.emitted_events.assert_not_emitted(Placed)
        self.emitted_events.assert_rolled_back(Placed, number=1)

    def test_two_transactions_of_the_code_itself_must_still_be_told_apart(self) -> None:
        """What fails in production fails in the test."""
        with transaction.atomic(), transaction.atomic(using="archive"), pytest.raises(TransactionError):
            emit_on_commit(placed(1))

    def test_the_async_twin_is_captured(self) -> None:
        """async_to_sync runs it in this thread, whose connection has the transaction."""
        with self.captureOnCommitCallbacks(execute=True):
            async_to_sync(aemit_on_commit)(placed(1))
        self.emitted_events.assert_emitted(Placed, number=1)


def test_no_connection_is_opened_to_see_that_there_is_no_transaction() -> None:
    """Emitting costs no query and no connection to a database that the request does not use."""
    done: list[bool] = []

    def work() -> None:
        emit_on_commit(placed(1))
        done.append(all(each.connection is None for each in databases.all(initialized_only=True)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    assert numbers() == [1]
