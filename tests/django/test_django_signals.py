"""event_emitted, event_failed, broker_started, broker_stopped: what receivers get, where they run, what they may do."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.dispatch import Signal
from django.test import override_settings

from dispytch_integrations import EventBase
from dispytch_integrations.django import (
    aemit,
    aemit_many,
    aemit_on_commit,
    emit,
    emit_many,
    emit_on_commit,
    get_emitter,
)
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.lifecycle import close_brokers, flush_events, open_brokers
from dispytch_integrations.django.signals import broker_started, broker_stopped, event_emitted, event_failed
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    NotStartedError,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)
from dispytch_integrations.memory import MemoryBackend
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisBackend
from tests.django.brokers import broker_at, pending, sent
from tests.django.project.shop.models import Failure, Order
from tests.support.arrivals import Placed, RabbitMQPlaced
from tests.support.brokers import Redis

pytestmark = pytest.mark.django_db(transaction=True)

ways = pytest.mark.parametrize(
    "way",
    [emit, lambda event: emit_many([event]), async_to_sync(aemit), lambda event: async_to_sync(aemit_many)([event])],
    ids=["emit", "emit_many", "aemit", "aemit_many"],
)
Way = Callable[[EventBase], None]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No broker, unless a test names one."""
    with broker_at("memory://"):
        yield


@contextmanager
def receiving(signal: Signal, receiver: Callable[..., Any], sender: Any = None) -> Generator[None, None, None]:
    signal.connect(receiver, sender=sender, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver, sender=sender)


class Told(list[dict[str, Any]]):
    """A receiver that keeps the arguments it got, with the name of the thread."""

    def __call__(self, **arguments: Any) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()  # Else the ORM refuses.
        self.append({**arguments, "thread": threading.current_thread().name})


def placed(number: int = 0) -> Placed:
    return Placed(place="here", number=number)


# -- arguments -----------------------------------------------------------------------------------------------------


@ways
def test_event_emitted_tells_what_went_where(way: Way) -> None:
    """An audit log writes down the id, the destination and the broker of each event."""
    event = placed(1)
    with receiving(event_emitted, told := Told()):
        way(event)
    [arguments] = told
    assert arguments["sender"] is Placed
    assert arguments["event"] is event
    assert arguments["message"] is sent()[0]
    assert (arguments["message"].destination, arguments["alias"]) == ("here", "default")
    assert arguments["after_commit"] is False
    assert arguments["signal"] is event_emitted


@ways
def test_event_failed_tells_the_error_and_then_it_is_raised(way: Way, rabbitmq_url: str, unique: str) -> None:
    """Whoever counts failures sees those that the view handles, too."""
    event = RabbitMQPlaced(place=unique)
    with broker_at(rabbitmq_url, TIMEOUT=20), receiving(event_failed, told := Told()):
        with pytest.raises((UnroutableError, ExceptionGroup)):
            way(event)
    [arguments] = told
    assert (arguments["sender"], arguments["event"], arguments["alias"]) == (RabbitMQPlaced, event, "default")
    assert isinstance(arguments["error"], UnroutableError)
    assert isinstance(arguments["message"], Message)
    assert arguments["after_commit"] is False


def test_each_of_many_events_is_told() -> None:
    """Also by an emitter of one alias: the alias is the one they went to."""
    with override_settings(DISPYTCH={"default": "memory://", "audit": "memory://"}):
        with receiving(event_emitted, told := Told()):
            get_emitter("audit").emit_many(placed(number) for number in range(3))
    assert [(arguments["event"].number, arguments["alias"]) for arguments in told] == [
        (number, "audit") for number in range(3)
    ]


def test_after_a_commit_it_is_said_so() -> None:
    """Receivers can tell what was confirmed before a view returned from what came later."""
    event = placed(1)
    with receiving(event_emitted, told := Told()):
        with transaction.atomic():
            emit_on_commit(event)
        assert flush_events(20)
    [arguments] = told
    assert (arguments["sender"], arguments["event"], arguments["alias"]) == (Placed, event, "default")
    assert arguments["after_commit"] is True


def test_a_receiver_may_be_of_one_event_class() -> None:
    """sender= is the event's class, as it is a model's elsewhere."""

    class Other(Placed):
        __event_type__ = "tests.redis.other"

    with receiving(event_emitted, told := Told(), sender=Other):
        for event in (placed(1), Other(place="here", number=2)):
            emit(event)
            emit_on_commit(event)
        assert flush_events(20)
    assert [arguments["sender"] for arguments in told] == [Other, Other]


def test_what_is_rolled_back_or_refused_at_the_call_is_not_told() -> None:
    """Nothing was sent, and nothing failed that the caller does not see."""
    with receiving(event_emitted, emitted := Told()), receiving(event_failed, failed := Told()):
        with transaction.atomic():
            emit_on_commit(placed())
            transaction.set_rollback(True)
        with pytest.raises(Exception, match="no name"):
            emit(Placed(place="no name"))
        assert flush_events(20)
    assert (emitted, failed) == ([], [])


@pytest.mark.parametrize("way", [emit, async_to_sync(aemit)], ids=["emit", "aemit"])
def test_a_timeout_that_raises_nothing_is_told_all_the_same(
    own_redis: Callable[..., Redis], unique: str, way: Way
) -> None:
    """ON_TIMEOUT="log" keeps the view going; event_failed says which event, and that it may have been delivered."""
    broker = own_redis()
    with broker_at(broker.url, TIMEOUT=0.3, SHUTDOWN_TIMEOUT=0.2, ON_TIMEOUT="log"):
        open_brokers()
        broker.pause()
        with receiving(event_failed, told := Told()):
            way(Placed(place=unique))
        broker.resume()
    [arguments] = told
    assert isinstance(arguments["error"], ProducerTimeout)
    assert isinstance(arguments["error"], UnconfirmedError)


# -- where they run ------------------------------------------------------------------------------------------------


def test_receivers_run_where_the_event_is_emitted() -> None:
    """In the thread of the view, in its transaction: what they write is rolled back with it."""

    def keep(event: Placed, **kwargs: Any) -> None:
        Order.objects.create(customer=f"customer {event.number}")

    with receiving(event_emitted, keep), receiving(event_emitted, told := Told()):
        with transaction.atomic():
            emit(placed(1))
            assert Order.objects.count() == 1
            transaction.set_rollback(True)
    assert Order.objects.count() == 0
    assert [arguments["thread"] for arguments in told] == [threading.current_thread().name]


async def test_receivers_of_async_emits_may_use_the_orm() -> None:
    """They run in the thread where Django's connections live, not on the event loop."""

    def keep(event: Placed, **kwargs: Any) -> None:
        Order.objects.create(customer=f"customer {event.number}")

    with receiving(event_emitted, keep), receiving(event_emitted, told := Told()):
        await aemit(placed(1))
        await aemit_many([placed(2), placed(3)])
        assert await Order.objects.acount() == 3
    names = {arguments["thread"] for arguments in told}
    assert names.isdisjoint({"dispytch loop", threading.current_thread().name})


def test_receivers_after_a_commit_run_on_a_thread_of_their_own() -> None:
    """The request goes on meanwhile, and so do the brokers: a slow receiver holds up neither."""
    go = threading.Event()

    def slow(**kwargs: Any) -> None:
        assert go.wait(20)
        Failure.objects.create(event_type="none", error="none")

    with receiving(event_emitted, slow), receiving(event_emitted, told := Told()):
        with transaction.atomic():
            emit_on_commit(placed(1))
        assert connections.session is not None
        assert connections.session.handoff.flush(20), "the broker has it, whatever the receiver does"
        assert told == []
        go.set()
        assert flush_events(20)
    assert [arguments["thread"] for arguments in told] == ["dispytch signals"]
    assert Failure.objects.count() == 1


def test_no_receiver_ever_runs_on_the_loop_thread(own_redis: Callable[..., Redis], unique: str) -> None:
    """A receiver that blocks there would stop every event of the process; the ORM refuses there."""
    broker = own_redis()
    told = Told()
    with (
        receiving(event_emitted, told),
        receiving(event_failed, told),
        receiving(broker_started, told),
        receiving(broker_stopped, told),
        broker_at(broker.url, TIMEOUT=0.5),
    ):
        open_brokers()
        for way in (emit, async_to_sync(aemit), emit_on_commit, async_to_sync(aemit_on_commit)):
            way(Placed(place=unique))
        assert flush_events(20)
        broker.kill()
        for way in (emit, async_to_sync(aemit)):
            with pytest.raises((BrokerUnavailableError, UnconfirmedError)):
                way(Placed(place=unique))
        emit_on_commit(Placed(place=unique))
        close_brokers()
    kinds = {arguments["signal"] for arguments in told}
    assert kinds == {event_emitted, event_failed, broker_started, broker_stopped}
    assert "dispytch loop" not in {arguments["thread"] for arguments in told}


def test_a_failure_after_a_commit_can_be_written_down(own_redis: Callable[..., Redis], unique: str) -> None:
    """The example of the documentation: a row per event that did not go out, to be emitted again by hand."""
    broker = own_redis()
    broker.stop()

    def keep(sender: type[EventBase], event: EventBase, error: Exception, **kwargs: Any) -> None:
        Failure.objects.create(event_type=sender.__name__, error=type(error).__name__)

    with broker_at(broker.url, TIMEOUT=0.2), receiving(event_failed, keep):
        with transaction.atomic():
            emit_on_commit([Placed(place=unique), Placed(place=unique)])
        assert flush_events(20)
    assert list(Failure.objects.values_list("event_type", "error")) == [("Placed", "BrokerUnavailableError")] * 2


# -- receivers that raise ------------------------------------------------------------------------------------------


def broken(**kwargs: Any) -> None:
    raise LookupError("in the receiver")


@ways
def test_a_receiver_that_raises_harms_nobody(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """The event is confirmed: the view succeeds, the next receiver is called, and the error is logged."""
    with receiving(event_emitted, broken), receiving(event_emitted, told := Told()):
        way(placed(1))
    assert len(told) == 1
    assert "in the receiver" in caplog.text


def test_a_receiver_that_raises_does_not_hide_the_error(rabbitmq_url: str, unique: str) -> None:
    """The view gets the error of its event, not that of some receiver."""
    with broker_at(rabbitmq_url, TIMEOUT=20), receiving(event_failed, broken):
        with pytest.raises(UnroutableError):
            emit(RabbitMQPlaced(place=unique))


def leave(event: Placed, **kwargs: Any) -> None:
    if event.number == 1:
        sys.exit("in the receiver")


def cancelled(event: Placed, **kwargs: Any) -> None:
    if event.number == 1:
        raise asyncio.CancelledError


@pytest.mark.parametrize("receiver", [broken, leave, cancelled])
def test_a_receiver_that_raises_after_a_commit_takes_nothing_from_later_ones(
    receiver: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """SystemExit and cancellations would end the thread, and with it every later signal and log, without a word."""
    with receiving(event_emitted, told := Told()), receiving(event_emitted, receiver):
        emit_on_commit(placed(1))
        assert flush_events(20)
        emit_on_commit(placed(2))
        assert flush_events(20)
    assert [arguments["event"].number for arguments in told] == [1, 2]
    assert receiver is cancelled or "in the receiver" in caplog.text


# -- async receivers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [emit, async_to_sync(aemit), emit_on_commit], ids=["emit", "aemit", "emit_on_commit"])
def test_receivers_may_be_coroutine_functions(way: Way) -> None:
    """On whatever loop Django gives them, never on the one of the connections; the ORM's async methods work."""
    told: list[tuple[int, str]] = []

    async def keep(event: Placed, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        await Order.objects.acreate(customer="one")
        told.append((event.number, threading.current_thread().name))

    with receiving(event_emitted, keep):
        way(placed(1))
        assert flush_events(20)
    [(number, thread)] = told
    assert number == 1
    assert thread != "dispytch loop"
    assert Order.objects.count() == 1


async def test_async_receivers_of_async_emits_run_on_the_callers_loop() -> None:
    """They may use what belongs to that loop: a websocket, a lock."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def keep(**kwargs: Any) -> None:
        loops.append(asyncio.get_running_loop())

    with receiving(event_emitted, keep):
        await aemit(placed())
    assert loops == [asyncio.get_running_loop()]


# -- context variables ---------------------------------------------------------------------------------------------

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


def test_receivers_see_the_context_of_who_emitted() -> None:
    """Logs of a receiver carry the request's id, whatever thread it runs on; nothing leaks into other requests."""
    seen: list[tuple[int, str]] = []

    def look(event: Placed, **kwargs: Any) -> None:
        seen.append((event.number, request_id.get()))
        request_id.set("changed")

    def request(number: int) -> None:
        request_id.set(f"request {number}")
        with transaction.atomic():
            emit_on_commit([placed(number), placed(number + 1)])
            request_id.set("later")
        emit_on_commit(placed(number + 2))
        assert flush_events(20)
        assert request_id.get() == "later"

    with receiving(event_emitted, look):
        for number in (10, 20):
            contextvars.copy_context().run(request, number)
        emit_on_commit(placed(30))
        assert flush_events(20)
    assert seen[0] == (10, "request 10")
    assert seen[2] == (12, "later")
    assert seen[3] == (20, "request 20")
    assert seen[6] == (30, "none")


async def test_receivers_see_the_context_of_a_task() -> None:
    """Async views, too: sync and async receivers."""
    seen: list[str] = []

    async def asynchronous(**kwargs: Any) -> None:
        seen.append(request_id.get())

    def synchronous(**kwargs: Any) -> None:
        seen.append(request_id.get())

    request_id.set("task")
    with receiving(event_emitted, asynchronous), receiving(event_emitted, synchronous):
        await aemit(placed())
        await aemit_on_commit(placed())
        assert await asyncio.to_thread(flush_events, 20)
    assert seen == ["task"] * 4


# -- brokers -------------------------------------------------------------------------------------------------------


def test_brokers_tell_that_they_start_and_stop() -> None:
    """A dashboard shows which process is connected to what."""
    with receiving(broker_started, started := Told()), receiving(broker_stopped, stopped := Told()):
        emit(placed())
        assert flush_events(20)
        assert stopped == []
        close_brokers()
    [begun], [ended] = started, stopped
    for arguments in (begun, ended):
        assert (arguments["sender"], arguments["alias"]) == (MemoryBackend, "default")
        assert arguments["address"] == "memory://"
        assert arguments["thread"] == "dispytch signals"
    assert ended["abandoned"] == 0


def test_addresses_are_told_without_secrets(own_redis: Callable[..., Redis], unique: str) -> None:
    """What a receiver logs holds no password."""
    broker = own_redis(password="s3cr3t")
    with receiving(broker_started, told := Told()), broker_at(broker.url):
        emit(Placed(place=unique))
        assert flush_events(20)
    [arguments] = told
    assert arguments["sender"] is RedisBackend
    assert str(broker.port) in arguments["address"]
    assert "s3cr3t" not in repr(arguments)


def test_a_start_is_told_once_whatever_outages_follow(own_redis: Callable[..., Redis], unique: str) -> None:
    """broker_started is the process's start, not a reconnect."""
    broker = own_redis()
    with receiving(broker_started, started := Told()), receiving(broker_stopped, stopped := Told()):
        with broker_at(broker.url, TIMEOUT=1):
            emit(Placed(place=unique))
            broker.kill()
            with pytest.raises((BrokerUnavailableError, UnconfirmedError)):
                emit(Placed(place=unique))
            broker.start()
            assert connections.session is not None
            default = connections.session.brokers.brokers["default"]
            end = threading.Event()
            for _ in range(400):
                if default.state == "up":
                    break
                end.wait(0.05)
            emit(Placed(place=unique))
            assert flush_events(20)
    assert (len(started), len(stopped)) == (1, 1)


def test_a_broker_that_never_started_is_not_told_to_have_stopped(own_redis: Callable[..., Redis], unique: str) -> None:
    """Each broker_stopped has its broker_started."""
    broker = own_redis()
    broker.stop()
    with receiving(broker_started, started := Told()), receiving(broker_stopped, stopped := Told()):
        with broker_at(broker.url, TIMEOUT=0.2), pytest.raises(BrokerUnavailableError):
            emit(Placed(place=unique))
    assert (started, stopped) == ([], [])


def test_what_the_stop_abandons_is_told(own_redis: Callable[..., Redis], unique: str) -> None:
    """The number of events that were in flight when SHUTDOWN_TIMEOUT was over; each is told as failed, too."""
    broker = own_redis()
    with receiving(broker_stopped, stopped := Told()), receiving(event_failed, failed := Told()):
        with broker_at(broker.url, TIMEOUT=60, SHUTDOWN_TIMEOUT=0.3):
            open_brokers()
            broker.pause()
            emit_on_commit([Placed(place=unique, number=number) for number in range(7)])
            assert pending() == 7
            close_brokers()
            assert pending() == 0
    [arguments] = stopped
    assert arguments["abandoned"] == 7
    assert [arguments["event"].number for arguments in failed] == list(range(7))


# -- receivers that emit, flush and close --------------------------------------------------------------------------


def test_receivers_may_emit() -> None:
    """A failure that is announced itself, a second event that follows the first."""

    def follow(event: Placed, **kwargs: Any) -> None:
        if event.number == 1:
            emit(placed(2))
            emit_on_commit(placed(3))

    with receiving(event_emitted, follow):
        emit(placed(1))
        assert sorted(message.event.number for message in sent() if isinstance(message.event, Placed)) == [1, 2, 3]
        emit_on_commit(placed(1))
        assert flush_events(20)
        assert flush_events(20)
        assert len(sent()) == 6


def test_receivers_that_emit_at_the_close_do_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The close waits for receivers, and they must not wait for the close."""
    monkeypatch.setattr("dispytch_integrations.django._connections._RECEIVERS_SECONDS", 600.0)
    errors: list[Exception] = []

    def last(**kwargs: Any) -> None:
        try:
            emit(placed())
        except Exception as exc:
            errors.append(exc)

    with receiving(broker_stopped, last):
        emit(placed())
        close_brokers()
    assert [type(error) for error in errors] == [NotStartedError]


def test_a_receiver_that_flushes_does_not_wait_for_itself() -> None:
    """On the thread of the receivers, flush_events() says at once that not all is done."""
    flushed: list[bool] = []

    def flush(**kwargs: Any) -> None:
        flushed.append(flush_events(20))

    with receiving(event_emitted, flush):
        emit_on_commit(placed())
        assert flush_events(10), "the receiver would take 20 s"
    assert flushed == [False]
