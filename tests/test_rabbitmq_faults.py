"""RabbitMQ when things go wrong: cut and silent connections, restarts, alarms, channels that somebody else closes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractQueue
from aiormq.connection import TCPTransportFactory
from yarl import URL

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    MessageTooLargeError,
    NotStartedError,
    PermanentFailure,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)
from dispytch_integrations.rabbitmq import RabbitMQBackend, RabbitMQEventConfig, RabbitMQEventRoute, RabbitMQOptions
from tests.support.brokers import RabbitMQ
from tests.support.proxy import TCPProxy

# Releases of RabbitMQ differ in where they look.
_SIZE_LIMIT = "application:set_env(rabbit, max_message_size, {0}), persistent_term:put(max_message_size, {0})."


def _class(exchange: str, config: RabbitMQEventConfig | None = None) -> Any:
    class Counted(EventBase):
        __route__ = RabbitMQEventRoute(exchange=exchange, routing_key="k")
        __backend_config__ = config

        number: int
        filling: str = ""

    return Counted


@pytest.fixture
async def channel(rabbitmq_url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of the raw client, straight to the broker."""
    connection = await aio_pika.connect(rabbitmq_url)
    async with connection:
        yield await connection.channel()


async def _queue(channel: AbstractChannel, exchange: str) -> AbstractQueue:
    await channel.declare_exchange(exchange, "topic", auto_delete=True)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "#")
    return queue


async def _numbers(queue: AbstractQueue) -> list[int]:
    """What is in the queue now."""
    numbers: list[int] = []
    while (message := await queue.get(fail=False, no_ack=True)) is not None:
        numbers.append(json.loads(message.body)["number"])
    return numbers


@pytest.fixture
async def proxy(rabbitmq_url: str) -> AsyncIterator[TCPProxy]:
    """A proxy in front of the shared broker."""
    [(host, port)] = BrokerURL.parse(rabbitmq_url).hosts
    async with TCPProxy(host, port or 5672) as proxy:
        yield proxy


def _backend(port: int, **options: Any) -> RabbitMQBackend:
    return RabbitMQBackend(BrokerURL.parse(f"amqp://127.0.0.1:{port}"), RabbitMQOptions(**options), {})


@pytest.fixture
async def backend(proxy: TCPProxy) -> AsyncIterator[RabbitMQBackend]:
    """A started backend whose connection goes through the proxy."""
    backend = _backend(proxy.port)
    await backend.start()
    yield backend
    try:
        async with asyncio.timeout(1):
            await backend.stop()
    except TimeoutError:
        pass


# -- channels that the broker closes -------------------------------------------------------------------------------


async def test_missing_exchange_harms_nobody_else(rabbitmq_url: str, channel: AbstractChannel, unique: str) -> None:
    """One typing error in a route closes the raw client's channel, and with it the events of 37 of 50 others."""
    queue = await _queue(channel, unique)
    good, bad = _class(unique), _class(f"{unique}-missing")
    async with connect(rabbitmq_url) as emitter:
        emits = [emitter.emit(good(number=number)) for number in range(50)]
        emits[25:25] = [emitter.emit(bad(number=-1)) for _ in range(5)]
        outcomes = await asyncio.gather(*emits, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None)] * 25 + [UnroutableError] * 5 + [type(None)] * 25
        assert f"'{unique}-missing'" in str(outcomes[25])
        assert await _numbers(queue) == list(range(50))

        missing = await _queue(channel, f"{unique}-missing")
        await emitter.emit(bad(number=1))  # Created meanwhile: not remembered as missing.
        assert await _numbers(missing) == [1]


async def test_exchange_deleted_after_its_check_harms_nobody_else(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """Somebody deletes an exchange while the app runs: its events fail, all others arrive."""
    queue = await _queue(channel, unique)
    doomed = await channel.declare_exchange(f"{unique}-doomed", "topic")
    await queue.bind(doomed, "#")
    good, bad = _class(unique), _class(f"{unique}-doomed")
    async with connect(rabbitmq_url) as emitter:
        await emitter.emit(bad(number=-1))
        await emitter.emit(good(number=-2))
        await doomed.delete()
        emits = [emitter.emit((bad if number % 10 == 5 else good)(number=number)) for number in range(100)]
        outcomes = await asyncio.gather(*emits, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert type(outcome) is (UnroutableError if number % 10 == 5 else type(None)), (number, outcome)
    assert {number for number in range(100) if number % 10 != 5} <= set(await _numbers(queue))


async def test_refused_message_is_told_from_those_around_it(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """The broker closes the channel without saying because of which message; only the guilty one may fail."""
    queue = await _queue(channel, unique)
    good, bad = _class(unique), _class(unique, RabbitMQEventConfig(user_id="somebody-else"))
    async with connect(rabbitmq_url) as emitter:
        emits = [emitter.emit((bad if number in (30, 77) else good)(number=number)) for number in range(100)]
        outcomes = await asyncio.gather(*emits, return_exceptions=True)
    failed = {number: outcome for number, outcome in enumerate(outcomes) if outcome is not None}
    assert set(failed) == {30, 77}
    assert all(type(error) is PermanentFailure and "user_id" in str(error) for error in failed.values())
    assert set(await _numbers(queue)) == set(range(100)) - {30, 77}


async def test_event_too_large_fails_alone(own_rabbitmq: Callable[[], RabbitMQ], unique: str) -> None:
    """One huge event must not take down those that are on the way with it."""
    broker = await asyncio.to_thread(own_rabbitmq)
    await asyncio.to_thread(broker.ctl, "eval", _SIZE_LIMIT.format(100_000))
    try:
        async with connect(broker.url) as emitter, await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            queue = await _queue(channel, unique)
            event = _class(unique)
            emits = [emitter.emit(event(number=n, filling="x" * (200_000 if n == 20 else 10))) for n in range(40)]
            outcomes = await asyncio.gather(*emits, return_exceptions=True)
            assert isinstance(outcomes.pop(20), MessageTooLargeError)
            assert outcomes == [None] * 39
            assert set(await _numbers(queue)) == set(range(40)) - {20}
    finally:
        await asyncio.to_thread(broker.ctl, "eval", _SIZE_LIMIT.format(134_217_728))


async def test_headers_too_large_for_a_frame_fail_alone(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """Headers travel in one frame; sent all the same, they would close the connection for everybody."""
    queue = await _queue(channel, unique)
    event = _class(unique)
    async with connect(rabbitmq_url) as emitter:
        with pytest.raises(MessageTooLargeError, match="frame_max"):
            await emitter.emit(event(number=0), headers={"big": "x" * 200_000})
        await emitter.emit(event(number=1, filling="x" * 300_000))  # Bodies take as many frames as they need.
    assert await _numbers(queue) == [1]


# -- connections that break ----------------------------------------------------------------------------------------


async def test_connection_cut_under_load_loses_nothing(
    proxy: TCPProxy, backend: RabbitMQBackend, channel: AbstractChannel, unique: str
) -> None:
    """What was in flight at the cut is sent again: each event that was reported as confirmed is in the queue."""
    queue = await _queue(channel, unique)
    event, emitter = _class(unique), EventEmitter(backend.producer)

    async def load(worker: int) -> list[int]:
        confirmed: list[int] = []
        for step in range(40):
            await emitter.emit(event(number=worker * 1000 + step))
            confirmed.append(worker * 1000 + step)
        return confirmed

    workers = [asyncio.create_task(load(worker)) for worker in range(25)]
    for _ in range(3):
        await asyncio.sleep(0.05)
        await proxy.cut()
    confirmed = {number for numbers in await asyncio.gather(*workers) for number in numbers}
    assert len(confirmed) == 1000
    assert confirmed <= set(await _numbers(queue))
    assert proxy.accepted > 1, "the connection was never cut"


async def test_emit_during_a_reconnect_waits(
    proxy: TCPProxy, backend: RabbitMQBackend, channel: AbstractChannel, unique: str
) -> None:
    """A broker that is away for a moment costs a moment, not an error."""
    queue = await _queue(channel, unique)
    event, emitter = _class(unique), EventEmitter(backend.producer)
    await proxy.refuse()
    emit = asyncio.create_task(emitter.emit(event(number=1)))
    known = asyncio.create_task(emitter.emit(event(number=2)))
    await asyncio.sleep(0.3)
    assert not emit.done()
    await proxy.resume()
    await asyncio.gather(emit, known)
    assert sorted(await _numbers(queue)) == [1, 2]


async def test_emit_without_connection_fails_at_its_deadline_and_says_that_nothing_was_sent(
    proxy: TCPProxy, backend: RabbitMQBackend, channel: AbstractChannel, unique: str
) -> None:
    """Who knows that nothing was sent may send it elsewhere without fearing a duplicate."""
    await _queue(channel, unique)
    event = _class(unique)
    [message] = [EventEmitter(backend.producer).prepare(event(number=1))[1]]
    await proxy.refuse()
    started = asyncio.get_running_loop().time()
    [outcome] = await backend.producer.deliver([message], timeout=0.4)
    assert isinstance(outcome, BrokerUnavailableError), outcome
    assert "was not sent within 0.4 s" in str(outcome)
    assert asyncio.get_running_loop().time() - started < 1.5


@pytest.mark.parametrize("what", ["password", "transport"])
async def test_reconnect_survives_whatever_an_attempt_raises(
    proxy: TCPProxy, channel: AbstractChannel, unique: str, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """A vault that is away during a reconnect, or a bug in a user's transport, must not end it for ever."""
    queue = await _queue(channel, unique)
    failures: list[str] = []
    failing = ""

    def password() -> str:
        if failing == "password":
            failures.append(failing)
            raise KeyError("the vault is sealed")
        return "guest"

    class Transport(TCPTransportFactory):
        async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            if failing == "transport":
                failures.append(failing)
                raise ZeroDivisionError("a bug")
            return await super().create(url, **kwargs)

    options = RabbitMQOptions(password=password, reconnect_interval=0.02)
    url = BrokerURL.parse(f"amqp://127.0.0.1:{proxy.port}")
    backend = RabbitMQBackend(url, options, {"transport_factory": Transport()})
    await backend.start()
    failing = what
    await proxy.cut()
    async with asyncio.timeout(5):
        while len(failures) < 3:
            await asyncio.sleep(0.01)
    failing = ""
    await EventEmitter(backend.producer).emit(_class(unique)(number=1))
    await backend.stop()
    assert await _numbers(queue) == [1]
    warnings = [record.getMessage() for record in caplog.records if "trying again until" in record.getMessage()]
    assert len(warnings) == 1, warnings


async def test_half_open_connection_is_dropped_by_a_ping(
    proxy: TCPProxy, backend: RabbitMQBackend, channel: AbstractChannel, unique: str
) -> None:
    """A dead peer that says nothing hangs the raw client for three minutes; in-flight events go over the next one."""
    queue = await _queue(channel, unique)
    event, emitter = _class(unique), EventEmitter(backend.producer)
    await emitter.emit(event(number=0))
    await proxy.stall()
    message = emitter.prepare(event(number=1))[1]
    [outcome] = await backend.producer.deliver([message], timeout=0.3)
    assert isinstance(outcome, ProducerTimeout)
    assert "may have been delivered" in str(outcome)

    waiting = asyncio.create_task(emitter.emit(event(number=2)))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.8):
            await backend.ping()
    async with asyncio.timeout(3):
        while proxy.accepted < 2:  # Nobody but the ping has ended the first connection.
            await asyncio.sleep(0.01)
    await proxy.cut()  # What was stalled must not arrive later: only a new connection can deliver.
    await proxy.resume()
    await waiting
    await backend.ping()
    assert 2 in await _numbers(queue)


async def test_ping_cut_short_does_not_drop_a_good_connection(proxy: TCPProxy, backend: RabbitMQBackend) -> None:
    """A health check whose client goes away must not cost the app its connection."""
    for _ in range(5):
        ping = asyncio.create_task(backend.ping())
        await asyncio.sleep(0)
        ping.cancel()
        await asyncio.gather(ping, return_exceptions=True)
    await backend.ping()
    assert proxy.accepted == 1


async def _persist(attempt: Callable[[], Awaitable[object]]) -> None:
    """Try again while the broker is known to be down, as a user would."""
    while True:
        try:
            await attempt()
        except BrokerUnavailableError:
            await asyncio.sleep(0.1)
        else:
            return


async def test_restart_of_the_broker_is_survived(own_rabbitmq: Callable[[], RabbitMQ], unique: str) -> None:
    """After a restart the exchanges are declared again and events flow, without anybody touching the app."""
    broker = await asyncio.to_thread(own_rabbitmq)
    event = _class(unique)
    async with connect(broker.url, exchanges={unique: {"type": "topic", "durable": False}}, timeout=3.0) as emitter:
        async with await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            durable = await channel.declare_queue(unique, durable=True)
            await durable.bind(unique, "#")
            await emitter.emit(event(number=1))
        await asyncio.to_thread(broker.stop)
        with pytest.raises(DeliveryError):
            await emitter.emit(event(number=2))
        await asyncio.to_thread(broker.start)
        await _persist(emitter.ping)
        async with await aio_pika.connect(broker.url) as connection:
            channel = await connection.channel()
            durable = await channel.declare_queue(unique, durable=True)
            await durable.bind(unique, "#")  # Its exchange is there again.
            await _persist(lambda: emitter.emit(event(number=3)))
            numbers = await _numbers(durable)
            await durable.delete(if_unused=False, if_empty=False)
    assert numbers[0] == 1, "a persistent event did not survive the restart"
    assert numbers[-1] == 3


async def test_alarm_is_named_in_the_timeout(own_rabbitmq: Callable[[], RabbitMQ], unique: str) -> None:
    """A broker that is short of memory takes nothing and says nothing: the operator must be told why."""
    broker = await asyncio.to_thread(own_rabbitmq)
    event = _class(unique)
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        queue = await _queue(channel, unique)
        backend = _backend(broker.port)
        await backend.start()
        emitter = EventEmitter(backend.producer)
        await emitter.emit(event(number=1))
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0")
        [outcome] = await backend.producer.deliver([emitter.prepare(event(number=2))[1]], timeout=2.0)
        assert isinstance(outcome, ProducerTimeout)
        assert "alarm" in str(outcome)
        with pytest.raises(BrokerUnavailableError, match="alarm"):
            await backend.ping()
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.4")
        await emitter.emit(event(number=3))
        await backend.ping()
        assert (await _numbers(queue))[-1] == 3
        await backend.stop()


# -- limits, cancellation, shutdown --------------------------------------------------------------------------------


async def test_max_in_flight_bounds_what_is_unconfirmed(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """A broker that is slow to confirm must not fill the process's memory, nor lose the order of a batch."""
    queue = await _queue(channel, unique)
    event = _class(unique)
    backend = RabbitMQBackend(BrokerURL.parse(rabbitmq_url), RabbitMQOptions(max_in_flight=7), {})
    await backend.start()
    link: Any = backend._producer.link
    seen: list[int] = []
    publish = link._channel.publish

    def counted(each: Any) -> None:
        publish(each)
        seen.append(len(link._channel.unconfirmed))

    link._channel.publish = counted
    emitter = EventEmitter(backend.producer)
    await emitter.emit_many([event(number=number) for number in range(300)])
    await backend.stop()
    assert max(seen) == 7
    assert await _numbers(queue) == list(range(300))


async def test_cancelled_emit_leaves_the_others_alone(rabbitmq_url: str, channel: AbstractChannel, unique: str) -> None:
    """A request that is aborted takes its own event with it, not its neighbours'."""
    queue = await _queue(channel, unique)
    event = _class(unique)
    async with connect(rabbitmq_url, max_in_flight=5) as emitter:
        await emitter.emit(event(number=-1))
        emits = [asyncio.create_task(emitter.emit(event(number=number))) for number in range(60)]
        await asyncio.sleep(0)
        for emit in emits[::3]:
            emit.cancel()
        outcomes = await asyncio.gather(*emits, return_exceptions=True)
    assert [outcome for number, outcome in enumerate(outcomes) if number % 3] == [None] * 40
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::3])
    assert {number for number in range(60) if number % 3} <= set(await _numbers(queue))


async def test_stop_that_is_cut_off_reports_what_is_open(
    proxy: TCPProxy, channel: AbstractChannel, unique: str
) -> None:
    """At the end of the grace period every waiting emit learns its fate, and no task stays behind."""
    await _queue(channel, unique)
    event = _class(unique)
    backend = _backend(proxy.port, max_in_flight=1)
    before = asyncio.all_tasks()
    await backend.start()
    emitter = EventEmitter(backend.producer)
    await emitter.emit(event(number=0))
    await proxy.stall()
    emits = [asyncio.create_task(emitter.emit(event(number=number))) for number in range(2)]
    await asyncio.sleep(0.05)
    stop = asyncio.create_task(backend.stop())
    await asyncio.sleep(0.05)
    with pytest.raises(NotStartedError):
        await emitter.emit(event(number=9))
    stop.cancel()
    await asyncio.gather(stop, return_exceptions=True)
    sent, unsent = await asyncio.gather(*emits, return_exceptions=True)
    assert isinstance(sent, UnconfirmedError)
    assert isinstance(unsent, BrokerUnavailableError)
    await proxy.refuse()
    await asyncio.sleep(0.05)
    assert {task for task in asyncio.all_tasks() - before if "dispytch" in task.get_name()} == set()


async def test_faults_leave_no_noise(
    proxy: TCPProxy, backend: RabbitMQBackend, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """ "Task exception was never retrieved" in a log sends people hunting for a bug that is not there."""
    caplog.set_level(logging.WARNING)
    noise: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    emitter = EventEmitter(backend.producer)
    with pytest.raises(UnroutableError):
        await emitter.emit(_class(unique)(number=1))
    await proxy.cut()
    await backend.ping()
    await backend.stop()
    gc.collect()
    await asyncio.sleep(0.05)
    assert noise == []
    assert "never retrieved" not in caplog.text
    assert "lost the connection to amqp://127.0.0.1" in caplog.text
