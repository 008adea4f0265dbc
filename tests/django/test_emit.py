"""Emitting from Django: sync and async code, views, threads, loops that come and go, brokers that do not answer."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from dispytch_integrations import EventBase
from dispytch_integrations.django import (
    Emitter,
    aemit,
    aemit_many,
    aemit_on_commit,
    emit,
    emit_many,
    emit_on_commit,
    get_emitter,
)
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.lifecycle import close_brokers, flush_events, open_brokers
from dispytch_integrations.django.signals import broker_started
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    HeaderError,
    NotStartedError,
    ProducerTimeout,
    RouteError,
    SerializationError,
    StartupError,
    UnroutableError,
    WrongLoopError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.serialization import JSONSerializer
from tests.django.brokers import broker_at, sent
from tests.support.arrivals import (
    SECONDS,
    Arrivals,
    KafkaArrivals,
    Placed,
    RabbitMQArrivals,
    RabbitMQPlaced,
    RedisArrivals,
)
from tests.support.brokers import Redis

# -- brokers -------------------------------------------------------------------------------------------------------


def numbers() -> list[int]:
    """The numbers of the events that the broker memory:// has got."""
    return [message.event.number for message in sent() if isinstance(message.event, Placed)]


@pytest.fixture(params=["redis", "kafka", "rabbitmq"])
def arrivals(request: pytest.FixtureRequest, unique: str) -> Iterator[Arrivals]:
    """A place on each kind of broker, which DISPYTCH names."""
    makers: dict[str, type[Arrivals]] = {"redis": RedisArrivals, "kafka": KafkaArrivals, "rabbitmq": RabbitMQArrivals}
    url = request.getfixturevalue(f"{request.param}_url")
    arrivals = makers[request.param](url, unique)
    with broker_at(url, TIMEOUT=20):
        yield arrivals
    arrivals.close()


@pytest.fixture
def place(redis_url: str, unique: str) -> Iterator[RedisArrivals]:
    """A stream of the shared Redis, which DISPYTCH names."""
    arrivals = RedisArrivals(redis_url, unique)
    with broker_at(redis_url, TIMEOUT=20):
        yield arrivals
    arrivals.close()


# -- views ---------------------------------------------------------------------------------------------------------


def sync_view(request: Any, place: str, number: int) -> HttpResponse:
    request.emitter.emit(arrivals_event(place, number))
    return HttpResponse(status=201)


async def async_view(request: Any, place: str, number: int) -> HttpResponse:
    await request.emitter.aemit(arrivals_event(place, number))
    return HttpResponse(status=201)


async def wrong_view(request: HttpRequest, place: str, number: int) -> HttpResponse:
    emit(arrivals_event(place, number))
    return HttpResponse(status=201)


made: dict[str, Arrivals] = {}
"""By place, what makes the events of the views."""


def arrivals_event(place: str, number: int) -> EventBase:
    return made[place].placed(number)


urlpatterns = [
    path("sync/<str:place>/<int:number>", sync_view),
    path("async/<str:place>/<int:number>", async_view),
    path("wrong/<str:place>/<int:number>", wrong_view),
]


# -- it arrives ----------------------------------------------------------------------------------------------------


def test_events_of_sync_code_arrive(arrivals: Arrivals) -> None:
    """emit and emit_many return when the broker has the events, whichever broker it is."""
    emit(arrivals.placed(0))
    get_emitter().emit(arrivals.placed(1))
    get_emitter("default").emit(arrivals.placed(2))
    emit_many(arrivals.placed(number) for number in range(3, 50))
    assert arrivals.numbers(50) == list(range(50))


async def test_events_of_async_code_arrive(arrivals: Arrivals) -> None:
    """aemit and aemit_many do the same, over the same connection."""
    await aemit(arrivals.placed(0))
    await get_emitter("default").aemit(arrivals.placed(1))
    await aemit_many([arrivals.placed(number) for number in range(2, 50)])
    assert await asyncio.to_thread(arrivals.numbers, 50) == list(range(50))


@override_settings(ROOT_URLCONF=__name__)
async def test_every_view_has_an_emitter_under_wsgi_and_asgi(arrivals: Arrivals) -> None:
    """Sync and async views work under either kind of server: Django puts threads and loops in between."""
    made[arrivals.place] = arrivals
    client, place = Client(), arrivals.place

    def wsgi() -> list[int]:
        return [client.post(f"/{kind}/{place}/{number}").status_code for number, kind in enumerate(("sync", "async"))]

    assert await asyncio.to_thread(wsgi) == [201, 201]
    answers = [await AsyncClient().post(f"/{kind}/{place}/{number}") for number, kind in ((2, "sync"), (3, "async"))]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert await asyncio.to_thread(arrivals.numbers, 4) == [0, 1, 2, 3]


def test_headers_of_the_caller_arrive(place: RedisArrivals) -> None:
    """Sync and async emits, one or many: tenants and trace contexts travel beside the body."""
    emit(place.placed(), headers={"tenant": "one"})
    emit_many([place.placed()], headers={"tenant": "two"})
    async_to_sync(aemit)(place.placed(), headers={"tenant": "three"})
    async_to_sync(aemit_many)([place.placed()], headers={"tenant": "four"})
    assert [headers["tenant"] for headers in place.headers()] == ["one", "two", "three", "four"]


def test_an_emitter_of_an_alias_sends_everything_there(place: RedisArrivals, unique: str) -> None:
    """The audit log gets a copy of what goes elsewhere by default."""
    with override_settings(DISPYTCH={"default": {"URL": "memory://"}, "audit": {"URL": place.url}}):
        audit = get_emitter("audit")
        assert connections.session is None, "it is opened at the first emit"
        audit.emit(place.placed(1))
        async_to_sync(audit.aemit)(place.placed(2))
        audit.emit_on_commit(place.placed(3))
        assert flush_events()
        emit(place.placed(4))
        assert numbers() == [4]
        assert audit.ping() == {"audit": None}
        with pytest.raises(RouteError, match=r"no broker 'adit' \(did you mean 'audit'"):
            get_emitter("adit").emit(place.placed(5))
    assert place.numbers(3) == [1, 2, 3]


def test_brokers_can_be_asked_whether_they_answer(place: RedisArrivals) -> None:
    """A health view knows every broker's state, without an exception."""
    emit(place.placed())
    assert get_emitter().ping() == {"default": None}
    assert async_to_sync(get_emitter().aping)() == {"default": None}


# -- the wrong place, the wrong thing ------------------------------------------------------------------------------


@broker_at("memory://")
async def test_sync_emits_in_a_running_loop_name_the_async_ones() -> None:
    """It would stop every request of an ASGI server; the error says what to write instead."""
    event = Placed(place="here")
    calls: dict[str, Callable[[], object]] = {
        "emit": lambda: emit(event),
        "emit_many": lambda: emit_many([event]),
        "emit_on_commit": lambda: emit_on_commit(event),
        "ping": get_emitter().ping,
    }
    for name, call in calls.items():
        with pytest.raises(WrongLoopError, match=rf"^{name}\(\) was called .* `await a{name}\("):
            call()
    await aemit(event)
    assert numbers() == [0], "nothing of the others was sent"


@override_settings(ROOT_URLCONF=__name__)
@broker_at("memory://")
async def test_an_async_view_that_emits_the_sync_way_fails_with_the_advice() -> None:
    """The developer finds it at the first request, under WSGI as well."""
    place = Arrivals.__new__(RedisArrivals)
    place.place = "here"
    made["here"] = place
    with pytest.raises(WrongLoopError, match="await aemit"):
        await AsyncClient().post("/wrong/here/1")
    with pytest.raises(WrongLoopError, match="await aemit"):
        await asyncio.to_thread(Client().post, "/wrong/here/1")


@broker_at("memory://")
async def test_sync_emits_work_in_the_threads_of_async_code() -> None:
    """sync_to_async and to_thread are how async views call sync code."""
    await sync_to_async(emit)(Placed(place="here", number=1))
    await asyncio.to_thread(emit, Placed(place="here", number=2))
    assert numbers() == [1, 2]


@broker_at("memory://")
def test_mistakes_are_raised_where_they_are_made() -> None:
    """What cannot be sent is refused at the call, by every way to emit; of many events none is sent."""

    class Homeless(EventBase):
        number: int = 0

    wrong: dict[type[Exception], tuple[Any, dict[str, Any] | None]] = {
        RouteError: (Placed(place="no name"), None),
        HeaderError: (Placed(place="here"), {"tenant": "a\nb"}),
    }
    for error, (event, headers) in wrong.items():
        with pytest.raises(error):
            emit(event, headers=headers)
        with pytest.raises(error):
            async_to_sync(aemit)(event, headers=headers)
        with pytest.raises(ExceptionGroup) as caught:
            emit_many([Placed(place="here"), event], headers=headers)
        assert caught.group_contains(error)
        with pytest.raises(ExceptionGroup) as caught:
            async_to_sync(aemit_many)([Placed(place="here"), event], headers=headers)
        assert caught.group_contains(error)
    for thing in (Homeless(), "an event", None, Placed):
        with pytest.raises(RouteError):
            emit(thing)  # type: ignore[arg-type]
        with pytest.raises(RouteError):
            async_to_sync(aemit)(thing)  # type: ignore[arg-type]
    emit_many([])
    async_to_sync(aemit_many)([])
    assert numbers() == []


def test_wrong_settings_are_told_by_the_first_emit() -> None:
    """Servers run no checks: the emit says the same, all of it, and goes well once it is mended."""
    with override_settings(DISPYTCH={"default": {"URL": "memory://", "TIMEOT": 1}, "audit": {}}):
        for call in (emit, async_to_sync(aemit), emit_on_commit):
            with pytest.raises(SettingsError) as caught:
                call(Placed(place="here"))
            assert len(caught.value.problems) == 2
            assert "TIMEOUT" in str(caught.value)
    with broker_at("memory://"):
        emit(Placed(place="here", number=1))
        assert numbers() == [1]


def test_each_event_of_many_has_its_own_outcome(rabbitmq_url: str, unique: str) -> None:
    """One that no queue takes does not keep the others from arriving, and the error names it."""
    arrivals = RabbitMQArrivals(rabbitmq_url, unique)
    nowhere = RabbitMQPlaced(place=f"{unique}nowhere", number=1)
    events = [arrivals.placed(0), nowhere, arrivals.placed(2)]
    with broker_at(rabbitmq_url, TIMEOUT=20):
        for call in (emit_many, async_to_sync(aemit_many)):
            with pytest.raises(ExceptionGroup) as caught:
                call(events)
            [error] = caught.value.exceptions
            assert isinstance(error, UnroutableError)
            assert f"{unique}nowhere" in error.__notes__[0]
    assert arrivals.numbers(4) == [0, 2, 0, 2]
    arrivals.close()


# -- hooks and serializers -----------------------------------------------------------------------------------------

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")


class Stamp(Hook):
    """Sets a header from the caller's context; refuses the number 13."""

    def before_send(self, message: Message) -> None:
        if message.event == Placed(place="here", number=13):
            raise LookupError("thirteen")
        message.headers["tenant"] = tenant.get()


class Fragile(JSONSerializer):
    """Cannot serialize the number 13, and gives no bytes for 14."""

    def serialize_event(self, event: EventBase, message: Message) -> bytes:
        number = getattr(event, "number", 0)
        if number == 13:
            raise LookupError("thirteen")
        return "text" if number == 14 else super().serialize_event(event, message)  # type: ignore[return-value]


@broker_at("memory://", HOOKS=["tests.django.test_emit.Stamp"])
async def test_hooks_run_in_the_callers_context() -> None:
    """Request ids live in context variables, of threads and of tasks."""
    tenant.set("async")
    await aemit(Placed(place="here"))
    await aemit_many([Placed(place="here")])
    await aemit_on_commit(Placed(place="here"))
    await asyncio.to_thread(flush_events)
    tenant.set("thread")
    await asyncio.to_thread(emit, Placed(place="here"))
    assert [message.headers["tenant"] for message in sent()] == ["async", "async", "async", "thread"]


@pytest.mark.parametrize(
    ("settings", "number", "error"),
    [
        ({"HOOKS": [Stamp()]}, 13, LookupError),
        ({"SERIALIZER": Fragile()}, 13, SerializationError),
        ({"SERIALIZER": Fragile()}, 14, SerializationError),
    ],
    ids=["a hook that raises", "a serializer that raises", "a serializer that gives no bytes"],
)
def test_what_fails_before_the_send_is_the_callers_error(
    settings: dict[str, Any], number: int, error: type[Exception]
) -> None:
    """Nobody believes that it went out, the next event does, and nothing waits for ever."""
    bad = Placed(place="here", number=number)
    with broker_at("memory://", **settings):
        for call in (emit, async_to_sync(aemit), emit_on_commit, async_to_sync(aemit_on_commit)):
            with pytest.raises(error):
                call(bad)
        emit_on_commit(Placed(place="here", number=1))
        assert flush_events()
        emit(Placed(place="here", number=2))
        assert numbers() == [1, 2]


# -- one start, one connection -------------------------------------------------------------------------------------


@pytest.fixture
def starts() -> Iterator[list[str]]:
    """The aliases of the brokers to which a connection was made."""
    started: list[str] = []

    def started_one(alias: str, **kwargs: Any) -> None:
        started.append(alias)

    broker_started.connect(started_one)
    yield started
    broker_started.disconnect(started_one)


def clients(broker: Redis) -> int:
    """How many connections a Redis has, that of who asks not counted."""
    import redis

    with redis.Redis.from_url(broker.url) as client:
        listed: Any = client.client_list()
    return len(listed) - 1


def test_parallel_first_uses_wait_for_one_start(
    own_redis: Callable[..., Redis], unique: str, starts: list[str]
) -> None:
    """A worker that has just been started gets its first requests all at once."""
    broker = own_redis()
    arrivals, together = RedisArrivals(broker.url, unique), threading.Barrier(24)

    def use(number: int) -> None:
        together.wait()
        if number % 3 == 0:
            emit(arrivals.placed(number))
        elif number % 3 == 1:
            emit_on_commit(arrivals.placed(number))
        else:
            asyncio.run(aemit(arrivals.placed(number)))

    with broker_at(broker.url, TIMEOUT=20):
        before = clients(broker)
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(use, range(24)))
        assert flush_events(20)
        assert sorted(arrivals.numbers(24)) == list(range(24))
        assert starts == ["default"]
        assert clients(broker) - before == 2, "one of ours, one of the reader"
        assert sum(thread.name == "dispytch loop" for thread in threading.enumerate()) == 1
    arrivals.close()


def test_event_loops_that_come_and_go_share_one_connection(
    own_redis: Callable[..., Redis], unique: str, starts: list[str]
) -> None:
    """async_to_sync makes a loop per call: a client of that loop would be connected each time, or break."""
    broker = own_redis()
    arrivals = RedisArrivals(broker.url, unique)
    with broker_at(broker.url, TIMEOUT=20):
        before = clients(broker)
        for number in range(0, 10, 2):
            async_to_sync(aemit)(arrivals.placed(number))
            asyncio.run(aemit(arrivals.placed(number + 1)))
        emit(arrivals.placed(10))
        assert arrivals.numbers(11) == list(range(11))
        assert flush_events(20)  # The signal is sent by a thread of its own.
        assert (starts, clients(broker) - before) == (["default"], 2)
    arrivals.close()


async def test_the_loop_goes_on_while_an_event_is_awaited(own_redis: Callable[..., Redis], unique: str) -> None:
    """Other requests of an ASGI server are served while the broker takes its time."""
    broker = await asyncio.to_thread(own_redis)
    with broker_at(broker.url, TIMEOUT=20):
        await aemit(Placed(place=unique))
        broker.pause()
        emitting = asyncio.create_task(aemit(Placed(place=unique)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not emitting.done()
        broker.resume()
        await emitting


# -- brokers that do not answer ------------------------------------------------------------------------------------


async def until(emits: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Emit until it goes well."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await emits()
            except BrokerUnavailableError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_first_use_with_the_broker_down_fails_in_time_and_works_when_it_is_up(
    own_redis: Callable[..., Redis], unique: str, kind: str
) -> None:
    """The web server came up before the broker: its requests fail within TIMEOUT, and later ones do not."""
    broker = await asyncio.to_thread(own_redis)
    broker.stop()
    emits: Callable[[], Coroutine[Any, Any, None]] = (
        (lambda: asyncio.to_thread(emit, Placed(place=unique)))
        if kind == "sync"
        else lambda: aemit(Placed(place=unique))
    )
    with broker_at(broker.url, TIMEOUT=0.3):
        async with asyncio.timeout(20):
            with pytest.raises(BrokerUnavailableError, match=str(broker.port)):
                await emits()
        await asyncio.to_thread(broker.start)
        await until(emits)


def test_opening_at_start_says_which_broker_is_down(own_redis: Callable[..., Redis], unique: str) -> None:
    """A server's hook that calls open_brokers() ends the worker with the address; when it is up, it opens."""
    broker = own_redis()
    broker.stop()
    with broker_at(broker.url, STARTUP_TIMEOUT=0.2):
        with pytest.raises(StartupError, match=str(broker.port)):
            open_brokers()
        broker.start()
        open_brokers()
        emit(Placed(place=unique))


def test_after_the_close_an_emit_says_so(place: RedisArrivals) -> None:
    """After the server's shutdown: an error at once, no connection that nobody would flush. Opened again, it works."""
    emit(place.placed(1))
    close_brokers()
    for call in (emit, async_to_sync(aemit)):
        with pytest.raises(NotStartedError, match=r"close_brokers\(\)"):
            call(place.placed(2))
    open_brokers()
    emit(place.placed(3))
    assert place.numbers(2) == [1, 3]


# -- timeouts ------------------------------------------------------------------------------------------------------

missed: list[tuple[str, int, bool]] = []
"""Calls of the callbacks below: which, the event's number, was it on the thread that emits?"""
emitting_thread = 0


def sync_missed(event: Placed) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()  # The ORM may be used.
    missed.append(("sync", event.number, threading.get_ident() == emitting_thread))


async def async_missed(event: Placed) -> None:
    await asyncio.sleep(0)
    missed.append(("async", event.number, threading.get_ident() == emitting_thread))


def failing_missed(event: Placed) -> None:
    raise LookupError("from the callback")


@pytest.fixture
def hanging(own_redis: Callable[..., Redis], unique: str) -> Iterator[Callable[..., None]]:
    """A function that sets DISPYTCH to a broker which hangs after the first event, with a short TIMEOUT."""
    global emitting_thread
    emitting_thread = threading.get_ident()
    missed.clear()
    broker = own_redis()
    entered: list[override_settings] = []

    def hang(**settings: Any) -> None:
        entered.append(broker_at(broker.url, TIMEOUT=0.2, SHUTDOWN_TIMEOUT=0.2, **settings))
        entered[0].enable()
        while True:
            try:
                emit(Placed(place=unique))
                break
            except ProducerTimeout:  # A busy machine; the broker works still.
                continue
        missed.clear()
        broker.pause()

    yield hang
    for each in entered:
        each.disable()


def test_a_timeout_is_raised(hanging: Callable[..., None], unique: str) -> None:
    """Every way to emit ends at TIMEOUT, and says that the event may have been delivered."""
    hanging()
    with pytest.raises(ProducerTimeout, match="may have been delivered"):
        emit(Placed(place=unique))
    for call in (emit_many, async_to_sync(aemit_many)):
        with pytest.raises(ExceptionGroup, match="2 of 2 events were not confirmed"):
            call([Placed(place=unique)] * 2)


@pytest.mark.parametrize("callback", ["sync_missed", "async_missed"])
@pytest.mark.parametrize("call", [emit, async_to_sync(aemit)], ids=["emit", "aemit"])
def test_on_timeout_is_called_with_the_event(
    hanging: Callable[..., None], unique: str, callback: str, call: Callable[[EventBase], None]
) -> None:
    """ON_TIMEOUT names a function, sync or async, for sync and async emits: a sync one may use the ORM in each."""
    hanging(ON_TIMEOUT=f"tests.django.test_emit.{callback}")
    call(Placed(place=unique, number=7))
    [(kind, number, _)] = missed
    assert (kind, number) == (callback.removesuffix("_missed"), 7)


def test_on_timeout_takes_its_callbacks_where_the_code_runs(hanging: Callable[..., None], unique: str) -> None:
    """What a plain callback writes belongs to the transaction of the thread that emits."""
    hanging(ON_TIMEOUT=sync_missed)
    emit_many([Placed(place=unique, number=1)])
    assert missed == [("sync", 1, True)]


def test_on_timeout_log_logs(hanging: Callable[..., None], unique: str, caplog: pytest.LogCaptureFixture) -> None:
    """A site that can do without its events goes on."""
    hanging(ON_TIMEOUT="log")
    emit(Placed(place=unique))
    assert "Placed was not confirmed in time" in caplog.text


def test_what_a_timeout_callback_raises_the_emit_raises(hanging: Callable[..., None], unique: str) -> None:
    """Its errors are not swallowed."""
    hanging(ON_TIMEOUT=failing_missed)
    with pytest.raises(LookupError, match="from the callback"):
        emit(Placed(place=unique))


async def test_an_emitter_may_have_a_callback_of_its_own(hanging: Callable[..., None], unique: str) -> None:
    """get_emitter(alias) is the caller's object; its callback comes before the setting's, and is nobody else's."""
    await asyncio.to_thread(hanging, ON_TIMEOUT="log")
    emitter = get_emitter("default")
    emitter.on_timeout(async_missed)
    await emitter.aemit(Placed(place=unique, number=1))
    assert missed == [("async", 1, True)]


# -- cancellation --------------------------------------------------------------------------------------------------


async def test_a_cancelled_aemit_ends_at_once_and_hurts_nobody(own_redis: Callable[..., Redis], unique: str) -> None:
    """The client hung up, Django cancels the view: nothing keeps waiting, and the connection goes on for others."""
    broker = await asyncio.to_thread(own_redis)
    arrivals = RedisArrivals(broker.url, unique)
    with broker_at(broker.url, TIMEOUT=20):
        await aemit(arrivals.placed(0))
        assert connections.session is not None
        default = connections.session.brokers.brokers["default"]
        broker.pause()
        emitting = [asyncio.create_task(aemit(arrivals.placed(number))) for number in (1, 2)]
        async with asyncio.timeout(20):
            while default.in_flight < 2:
                await asyncio.sleep(0.001)
            emitting[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await emitting[0]
        broker.resume()
        await emitting[1]
        await aemit(arrivals.placed(3))
        assert default.in_flight == 0
    arrived = await asyncio.to_thread(arrivals.numbers, 3)
    assert [number for number in arrived if number != 1] == [0, 2, 3], "what was cut off may have been delivered"
    arrivals.close()


async def test_a_first_use_that_is_cancelled_does_not_end_the_start_for_others(place: RedisArrivals) -> None:
    """Two requests wait for the start; one of them is cancelled."""
    first = asyncio.create_task(aemit(place.placed(1)))
    second = asyncio.create_task(aemit(place.placed(2)))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    await second
    assert 2 in await asyncio.to_thread(place.numbers, 1)


# -- nothing is kept -----------------------------------------------------------------------------------------------


def test_nothing_of_an_event_is_kept(place: RedisArrivals) -> None:
    """A worker that runs for weeks does not grow: events, contexts and errors go when they are done."""
    import gc

    def rounds() -> int:
        for _ in range(50):
            emit(place.placed())
            emit_on_commit(place.placed())
            with pytest.raises(RouteError):
                emit(Placed(place="no name"))
        async_to_sync(aemit_many)([place.placed()] * 50)
        assert flush_events(20)
        gc.collect()
        return len(gc.get_objects())

    rounds()
    before = rounds()
    # Threads of a pool may have been added, a dict resized; 200 events that were kept would be thousands of objects.
    assert min(rounds() for _ in range(3)) - before < 200


def test_settings_that_change_leave_nothing_behind(own_redis: Callable[..., Redis], unique: str) -> None:
    """A test run with thousands of override_settings ends with the threads and connections it began with."""
    broker = own_redis()  # Of others the connections could not be counted.
    place = RedisArrivals(broker.url, unique)
    with broker_at(broker.url):
        emit_on_commit(place.placed())
        flush_events(20)
        place.numbers(1)  # The reader has a connection, too.
        threads, before = ours(), clients(broker)
        for _ in range(20):
            with broker_at(broker.url, TIMEOUT=19):
                emit_on_commit(place.placed())
        emit_on_commit(place.placed())
        assert len(place.numbers(22)) == 22
        end = time.monotonic() + SECONDS
        while (ours() > threads or clients(broker) > before) and time.monotonic() < end:
            time.sleep(0.01)  # A thread ends a moment after it was told to.
        assert (ours(), clients(broker)) == (threads, before)
    place.close()


def ours() -> int:
    return sum(thread.name.startswith("dispytch") for thread in threading.enumerate())


def test_the_emitter_says_what_it_is() -> None:
    """Type checkers and readers find one class behind get_emitter, request.emitter and the functions."""
    assert isinstance(get_emitter(), Emitter)
    assert get_emitter() is get_emitter()
    assert get_emitter("default").alias == "default"
    assert logging.getLogger("dispytch_integrations.django").level == logging.NOTSET
