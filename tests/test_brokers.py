"""Managed brokers: start, stop, outages, routing, deadlines, and the places where an emitter must refuse."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import redis.asyncio

from dispytch_integrations import EventBase, EventEmitter, _broker, connect, settings
from dispytch_integrations._deadlines import Deadlines
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    NotStartedError,
    ProducerTimeout,
    RouteError,
    StartupError,
    UnconfirmedError,
    UnroutableError,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.producer import BackendConfig, EventRoute, Producer
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from tests.support.brokers import Redis
from tests.support.proxy import TCPProxy

SECRET = "s3cr3t-Pa55"


class Route(EventRoute):
    topic: str


class Event(EventBase):
    __route__ = Route(topic="orders")

    number: int = 0


class Streamed(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str


class Published(EventBase):
    __route__ = RedisEventRoute(channel="orders")


# -- a broker whose faults are ours --------------------------------------------------------------------------------


class Fault:
    """What a fake broker does; by default it works. Kept by host name: `fake://a`."""

    def __init__(self) -> None:
        self.starts = self.stops = self.pings = 0
        self.start: Callable[[], Awaitable[None]] = _at_once
        self.stop: Callable[[], Awaitable[None]] = _at_once
        self.ping: Callable[[], Awaitable[None]] = _at_once
        self.deliver: Callable[[Sequence[Message]], Awaitable[list[Exception | None]]] = _confirm
        self.delivered: list[Message] = []
        self.open = False


async def _at_once() -> None:
    return


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _confirm(messages: Sequence[Message]) -> list[Exception | None]:
    return [None] * len(messages)


def _failing(error: Exception, times: int | None = None) -> Callable[[], Awaitable[None]]:
    left = [times]

    async def fail() -> None:
        if left[0] is not None:
            if left[0] == 0:
                return
            left[0] -= 1
        raise error

    return fail


class FakeProducer(Producer):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        raise NotImplementedError

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        try:
            async with asyncio.timeout(timeout):
                outcomes = await self.fault.deliver(messages)
        except TimeoutError:
            return [ProducerTimeout(f"{message!r} was not confirmed within {timeout} s") for message in messages]
        self.fault.delivered += [message for message, error in zip(messages, outcomes, strict=True) if error is None]
        return outcomes


class FakeBackend(Backend):
    transport = "fake"
    faults: ClassVar[dict[str, Fault]] = {}

    def __init__(self, url: BrokerURL, options: BrokerOptions, client_options: Mapping[str, Any]) -> None:
        self._url = url
        self.fault = self.faults.setdefault(url.hosts[0][0], Fault())
        self.producer = FakeProducer(self.fault)

    async def start(self) -> None:
        self.fault.starts += 1
        await self.fault.start()
        self.fault.open = True

    async def stop(self) -> None:
        self.fault.stops += 1
        self.fault.open = False
        await self.fault.stop()

    async def ping(self) -> None:
        self.fault.pings += 1
        await self.fault.ping()

    @property
    def secrets(self) -> Sequence[str]:
        return [SECRET]

    @property
    def address(self) -> str:
        return str(self._url)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Fault]]:
    """A function from a host's name to what `fake://name` does."""
    monkeypatch.setitem(settings._SCHEMES, "fake", f"{__name__}:FakeBackend")  # pyright: ignore[reportPrivateUsage]
    FakeBackend.faults.clear()
    yield lambda name: FakeBackend.faults.setdefault(name, Fault())
    FakeBackend.faults.clear()


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a state that nothing announces."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# -- start ---------------------------------------------------------------------------------------------------------


async def test_all_brokers_start_in_parallel(faults: Callable[[str], Fault]) -> None:
    """Three brokers that need a second each need one second together."""
    barrier = asyncio.Barrier(3)

    async def together() -> None:
        await barrier.wait()

    for name in "abc":
        faults(name).start = together
    async with asyncio.timeout(5), connect({name: f"fake://{name}" for name in "abc"}):
        assert all(faults(name).open for name in "abc")
    assert not any(faults(name).open for name in "abc")


async def test_a_broker_that_is_late_is_tried_again(own_redis: Callable[..., Redis], unique: str) -> None:
    """Containers start in any order."""
    broker = own_redis()
    broker.stop()
    brokers = connect(broker.url, startup_timeout=20)
    starting = asyncio.create_task(brokers.start())
    await until(lambda: brokers.brokers and brokers.brokers["default"].last_error)
    await asyncio.to_thread(broker.start)
    await starting
    await brokers.emitter.emit(Streamed(stream=unique))
    await brokers.stop()


async def test_a_broker_that_stays_away_fails_the_start_in_time() -> None:
    """The app ends with the address and the reason, not with a hang."""
    started = time.monotonic()
    with pytest.raises(StartupError, match=r"(?s)startup_timeout=0\.3 s.*'default'.*127\.0\.0\.1:1") as caught:
        await connect(f"redis://:{SECRET}@127.0.0.1:1", startup_timeout=0.3).start()
    assert 0.05 < time.monotonic() - started < 5
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def test_a_start_that_hangs_fails_in_time(faults: Callable[[str], Fault]) -> None:
    """A half-open connection during the handshake is cut by the deadline."""
    faults("a").start = _for_ever
    with pytest.raises(StartupError, match=r"fake://a did not answer within"):
        await connect("fake://a", startup_timeout=0.1).start()


async def test_what_was_started_is_stopped_when_a_sibling_fails(faults: Callable[[str], Fault]) -> None:
    """A failed start leaves no connection behind, and names each broker that failed."""
    faults("bad").start = _failing(OSError(f"refused, password {SECRET}"))
    config = {"default": "fake://good", "bad": "fake://bad", "worse": "redis://127.0.0.1:1"}
    brokers = connect(config, startup_timeout=0.3)
    with pytest.raises(StartupError) as caught:
        await brokers.start()
    assert (faults("good").starts, faults("good").stops, faults("good").open) == (1, 1, False)
    assert faults("bad").starts >= 2
    assert "'bad'" in str(caught.value)
    assert "'worse'" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not brokers.started
    with pytest.raises(NotStartedError):
        await brokers.emitter.emit(Event())


async def test_what_trying_again_cannot_mend_is_not_tried_again(faults: Callable[[str], Fault]) -> None:
    """A wrong password is told at once, not after 30 seconds."""
    faults("a").start = _failing(ConfigurationError("wrong password"))
    with pytest.raises(ConfigurationError, match="wrong password"):
        await connect("fake://a").start()
    assert faults("a").starts == 1


async def test_a_wrong_password_is_told_at_once_without_it(own_redis: Callable[..., Redis]) -> None:
    """The most frequent mistake of all: no secret in the error, its cause, or the log."""
    broker = own_redis(password="right")
    url = broker.url.replace("right", SECRET)
    started = time.monotonic()
    with pytest.raises(ConfigurationError) as caught:
        await connect(url, startup_timeout=20).start()
    assert time.monotonic() - started < 10
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def test_a_start_that_failed_can_be_tried_again(faults: Callable[[str], Fault]) -> None:
    """A supervisor within the app may try once more."""
    faults("a").start = _failing(OSError("refused"), times=1)
    brokers = connect("fake://a", startup_timeout=0.05)
    with pytest.raises(StartupError):
        await brokers.start()
    async with brokers as emitter:
        await emitter.emit(Event())
    assert len(faults("a").delivered) == 1


async def test_start_and_stop_are_counted(faults: Callable[[str], Fault]) -> None:
    """A router included twice enters its lifespan twice: one connection, closed at the last exit."""
    brokers = connect("fake://a")
    async with brokers as one:
        async with brokers as two:
            assert one is two
        await one.emit(Event())
    assert (faults("a").starts, faults("a").stops) == (1, 1)
    await brokers.stop()
    assert faults("a").stops == 1


async def test_concurrent_starts_connect_once(faults: Callable[[str], Fault]) -> None:
    """Two lifespans that enter at once share the start, and both wait for it."""
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    faults("a").start = slow
    brokers = connect("fake://a")
    starts = [asyncio.create_task(brokers.start()) for _ in range(3)]
    await until(lambda: faults("a").starts)
    assert not any(task.done() for task in starts)
    go.set()
    await asyncio.gather(*starts)
    for _ in range(2):
        await brokers.stop()
    assert faults("a").open
    await brokers.stop()
    assert (faults("a").starts, faults("a").stops, faults("a").open) == (1, 1, False)


async def test_one_user_who_gives_up_does_not_end_the_start_for_others(faults: Callable[[str], Fault]) -> None:
    """A cancelled enter undoes its own part, and no more; the last one that gives up ends the start."""
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    faults("a").start = slow
    brokers = connect("fake://a")
    one, two = (asyncio.create_task(brokers.start()) for _ in range(2))
    await until(lambda: faults("a").starts)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    go.set()
    await two
    await brokers.stop()
    assert not faults("a").open
    go.clear()
    alone = asyncio.create_task(brokers.start())
    await until(lambda: faults("a").starts == 2)
    alone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await alone
    assert not brokers.started
    assert not [task for task in asyncio.all_tasks() if "dispytch" in task.get_name()]


async def test_a_stop_during_the_start_ends_it(faults: Callable[[str], Fault]) -> None:
    """SIGTERM while the broker is still waited for."""
    faults("a").start = _for_ever
    brokers = connect("fake://a")
    starting = asyncio.create_task(brokers.start())
    await until(lambda: faults("a").starts)
    async with asyncio.timeout(5):
        await brokers.stop()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert not brokers.started
    assert not [task for task in asyncio.all_tasks() if "dispytch" in task.get_name()]


async def test_an_optional_broker_connects_in_the_background(own_redis: Callable[..., Redis], unique: str) -> None:
    """The app starts without it, emits fail at once with the reason, and work when it is there."""
    broker = own_redis()
    broker.stop()
    async with connect(broker.url, required=False, timeout=5) as emitter:
        started = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=str(broker.port)):
            await emitter.emit(Streamed(stream=unique))
        with pytest.raises(BrokerUnavailableError, match=r"is down: \S+"):
            await emitter.emit(Streamed(stream=unique))
        assert time.monotonic() - started < 3
        await asyncio.to_thread(broker.start)
        await until(lambda: _state(emitter) == "up")
        await emitter.emit(Streamed(stream=unique))


def _state(emitter: EventEmitter) -> str:
    brokers: Any = emitter._outlets  # pyright: ignore[reportPrivateUsage]
    return str(brokers.brokers["default"].state)


async def test_an_optional_broker_with_wrong_settings_is_logged(
    faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """It will never work, and nobody waits for its start: the log says so."""
    faults("a").start = _failing(ConfigurationError("wrong password"))
    async with connect("fake://a", required=False) as emitter:
        with pytest.raises(BrokerUnavailableError, match="wrong password"):
            await emitter.emit(Event())
    assert "wrong password" in caplog.text


async def test_an_emit_during_the_start_waits_within_its_deadline(faults: Callable[[str], Fault]) -> None:
    """A request that comes in before an optional broker has answered once."""
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    faults("a").start = slow
    async with connect("fake://a", required=False, timeout=0.05) as emitter:
        with pytest.raises(BrokerUnavailableError, match="still being connected"):
            await emitter.emit(Event())
    go.clear()
    async with connect("fake://a", required=False) as emitter:
        emit = asyncio.create_task(emitter.emit(Event()))
        await until(lambda: faults("a").starts == 2)
        go.set()
        await emit
    assert len(faults("a").delivered) == 1


# -- stop ----------------------------------------------------------------------------------------------------------


async def test_the_stop_waits_for_what_is_in_flight_and_refuses_new(faults: Callable[[str], Fault]) -> None:
    """A rolling deployment loses no event that was accepted."""
    go, fault = asyncio.Event(), faults("a")

    async def slow(messages: Sequence[Message]) -> list[Exception | None]:
        await go.wait()
        return [None] * len(messages)

    fault.deliver = slow
    brokers = connect("fake://a")
    await brokers.start()
    broker = brokers.brokers["default"]
    emits = [asyncio.create_task(brokers.emitter.emit(Event())) for _ in range(3)]
    await until(lambda: broker.in_flight == 3)
    stopping = asyncio.create_task(brokers.stop())
    await until(lambda: broker.state == "stopping")
    with pytest.raises(NotStartedError, match="is closed"):
        await brokers.emitter.emit(Event())
    assert fault.stops == 0
    go.set()
    await stopping
    await asyncio.gather(*emits)
    assert len(fault.delivered) == 3


async def test_the_stop_ends_in_time_and_logs_the_number_of_abandoned_events(
    faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """The orchestrator kills what does not end; what was lost is told before."""

    async def never(messages: Sequence[Message]) -> list[Exception | None]:
        await _for_ever()
        return []

    faults("a").deliver = never
    faults("a").stop = _for_ever
    brokers = connect("fake://a", shutdown_timeout=0.1, timeout=30)
    await brokers.start()
    emits = [asyncio.create_task(brokers.emitter.emit_many([Event()] * 2)) for _ in range(3)]
    await until(lambda: brokers.brokers["default"].in_flight == 6)
    started = time.monotonic()
    await brokers.stop()
    assert time.monotonic() - started < 3
    assert "6 events abandoned" in caplog.text
    assert "did not close in time" in caplog.text
    for emit in emits:
        emit.cancel()
    await asyncio.gather(*emits, return_exceptions=True)


async def test_a_client_that_ignores_its_cancellation_does_not_hang_the_stop(faults: Callable[[str], Fault]) -> None:
    """Client libraries swallow cancellations; the process has to end all the same."""
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    faults("a").start = stubborn
    brokers = connect("fake://a", required=False, shutdown_timeout=0.1)
    await brokers.start()
    await until(lambda: faults("a").starts)
    async with asyncio.timeout(5):
        await brokers.stop()
    release.set()


async def test_an_error_at_the_stop_is_logged_without_secrets(
    faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """One broker that cannot be closed does not keep the others open, nor the app from ending."""
    faults("a").stop = _failing(OSError(f"broken {SECRET}"))
    async with connect({"a": "fake://a", "b": "fake://b"}):
        pass
    assert "did not close: broken ***" in caplog.text
    assert SECRET not in caplog.text
    assert not faults("b").open


# -- outages -------------------------------------------------------------------------------------------------------


async def test_while_a_broker_is_down_emits_fail_at_once_until_it_is_up_again(
    own_redis: Callable[..., Redis], unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage of a broker does not fill the app with requests that wait for timeouts."""
    caplog.set_level(logging.INFO, "dispytch_integrations")
    broker = own_redis(password=SECRET)
    async with TCPProxy("127.0.0.1", broker.port) as proxy:
        async with connect(f"redis://:{SECRET}@127.0.0.1:{proxy.port}/0", timeout=0.5) as emitter:
            await emitter.emit(Streamed(stream=unique))
            await proxy.stall()
            with pytest.raises(UnconfirmedError):
                await emitter.emit(Streamed(stream=unique))
            await until(lambda: _state(emitter) == "down")
            started = time.monotonic()
            for _ in range(20):
                with pytest.raises(BrokerUnavailableError, match=r"was not sent: .* is down: \S+"):
                    await emitter.emit(Streamed(stream=unique))
            with pytest.raises(ExceptionGroup, match="2 of 2"):
                await emitter.emit_many([Streamed(stream=unique)] * 2)
            assert time.monotonic() - started < 0.4
            await proxy.cut()
            await proxy.resume()
            await until(lambda: _state(emitter) == "up")
            await emitter.emit(Streamed(stream=unique))
    assert "is down" in caplog.text
    assert "is up again" in caplog.text
    assert SECRET not in caplog.text


async def test_a_slow_answer_is_no_outage(faults: Callable[[str], Fault]) -> None:
    """One timeout does not take the broker away from everybody: it is asked first, and it answers."""

    async def once(messages: Sequence[Message]) -> list[Exception | None]:
        faults("a").deliver = _confirm
        return [ProducerTimeout("late") for _ in messages]

    faults("a").deliver = once
    async with connect("fake://a") as emitter:
        with pytest.raises(ProducerTimeout):
            await emitter.emit(Event())
        await emitter.emit(Event())
        await until(lambda: faults("a").pings == 1)
        assert _state(emitter) == "up"


async def test_a_refused_message_is_no_outage(faults: Callable[[str], Fault]) -> None:
    """What nobody takes says nothing about the broker."""

    async def refuse(messages: Sequence[Message]) -> list[Exception | None]:
        return [UnroutableError("no queue") for _ in messages]

    faults("a").deliver = refuse
    async with connect("fake://a") as emitter:
        for _ in range(3):
            with pytest.raises(UnroutableError):
                await emitter.emit(Event())
    assert faults("a").pings == 0


async def test_the_last_error_is_scrubbed(faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture) -> None:
    """Clients put URLs into their errors; ours go to logs and health pages."""

    async def refuse(messages: Sequence[Message]) -> list[Exception | None]:
        return [BrokerUnavailableError("gone") for _ in messages]

    faults("a").deliver = refuse
    faults("a").ping = _failing(OSError(f"cannot reach fake://user:{SECRET}@a"))
    brokers = connect("fake://a")
    async with brokers as emitter:
        with pytest.raises(BrokerUnavailableError):
            await emitter.emit(Event())
        await until(lambda: brokers.brokers["default"].state == "down")
        with pytest.raises(BrokerUnavailableError, match=r"user:\*\*\*@a"):
            await emitter.emit(Event())
        answer = (await brokers.ping())["default"]
        assert "user:***@a" in str(answer)
    assert SECRET not in caplog.text


async def test_a_ping_tells_of_every_broker_and_ends_in_time(faults: Callable[[str], Fault]) -> None:
    """A health page answers while a broker hangs."""
    faults("b").ping = _for_ever
    brokers = connect({"a": "fake://a", "b": "fake://b"})
    with pytest.raises(NotStartedError):
        await brokers.ping()
    async with brokers:
        answers = await brokers.ping(timeout=0.05)
        assert answers["a"] is None
        assert isinstance(answers["b"], BrokerUnavailableError)
        assert "did not answer within 0.05 s" in str(answers["b"])
    assert isinstance((await brokers.ping())["a"], NotStartedError)


async def test_a_ping_during_the_start_waits_for_it(faults: Callable[[str], Fault]) -> None:
    """The first health check of a process connects: it is not told of an outage that is none."""
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    faults("a").start = slow
    brokers = connect("fake://a", required=False)
    async with brokers:
        assert "is still being connected to" in str((await brokers.ping(timeout=0.05))["default"])
        ping = asyncio.create_task(brokers.ping())
        await until(lambda: faults("a").starts == 1)
        go.set()
        assert await ping == {"default": None}


# -- where it must refuse ------------------------------------------------------------------------------------------


async def test_an_emitter_that_was_not_started_names_the_likely_causes() -> None:
    """The error that most users will meet first tells what to write."""
    with pytest.raises(NotStartedError, match=r"(?s)TestClient.*with TestClient\(app\).*sub-app.*async with connect"):
        await connect("memory://").emitter.emit(Event())


async def test_an_emit_after_the_end_is_refused_at_once() -> None:
    """redis-py would silently connect again, aiokafka would hang for ever."""
    brokers = connect("memory://")
    async with brokers as emitter:
        await emitter.emit(Event())
    for emit in (emitter.emit(Event()), emitter.emit_many([Event()])):
        with pytest.raises((NotStartedError, ExceptionGroup), match="is closed"):
            await emit
    async with brokers as emitter:
        await emitter.emit(Event())


def test_another_event_loop_is_refused() -> None:
    """A client bound to another loop would hang; the error names the bridge."""
    brokers = connect("memory://")

    async def elsewhere() -> None:
        with pytest.raises(WrongLoopError, match="BlockingEmitter"):
            await brokers.emitter.emit(Event())
        with pytest.raises(WrongLoopError):
            await brokers.start()
        assert isinstance((await brokers.ping())["default"], WrongLoopError)

    async def main() -> None:
        async with brokers as emitter:
            await asyncio.to_thread(asyncio.run, elsewhere())
            await emitter.emit(Event())

    asyncio.run(main())


def test_an_event_loop_that_is_gone_does_not_lock_the_brokers_up(redis_url: str, unique: str) -> None:
    """Test suites close loops without a stop; the next test starts the same app again."""
    brokers = connect(redis_url)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(brokers.start())
    loop.run_until_complete(brokers.start())
    loop.close()

    async def again() -> None:
        with pytest.raises(WrongLoopError):
            await brokers.emitter.emit(Streamed(stream=unique))
        async with brokers as emitter:
            await emitter.emit(Streamed(stream=unique))
        assert not brokers.started
        gc.collect()  # The old connection warns when it is collected, and only here is that looked for.

    with pytest.warns(ResourceWarning):
        asyncio.run(again())


def test_a_forked_child_is_refused_and_can_start_anew(redis_url: str, unique: str) -> None:
    """Parent and child on one socket would read each other's answers; the parent's connection lives on."""
    brokers = connect(redis_url)

    async def child() -> None:
        with pytest.raises(WrongProcessError, match=r"before a fork; .*connect\(\)"):
            await brokers.emitter.emit(Streamed(stream=unique))
        async with brokers as emitter:
            await emitter.emit(Streamed(stream=unique))
        gc.collect()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(brokers.start())
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            asyncio.run(child())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    for _ in range(3):
        loop.run_until_complete(brokers.emitter.emit(Streamed(stream=unique)))
    loop.run_until_complete(brokers.stop())
    loop.close()


# -- routing -------------------------------------------------------------------------------------------------------


async def test_an_event_finds_its_broker() -> None:
    """By __broker__, else the only one that takes its route, else "default", else an error with the candidates."""

    class Named(Event):
        __broker__ = "second"

    class Lost(Event):
        __broker__ = "thrid"

    config = {"default": "memory://", "second": "memory://", "bus": "memory://redis"}
    async with connect(config) as emitter:
        sent = {alias: producer.sent for alias, producer in emitter.producers.items()
                if isinstance(producer, MemoryProducer)}  # fmt: skip
        await emitter.emit(Event())
        await emitter.emit(Named())
        await emitter.emit(Published())
        assert {alias: len(messages) for alias, messages in sent.items()} == {"default": 2, "second": 1, "bus": 0}
        assert sent["second"][0].broker == "second"
        with pytest.raises(RouteError, match=r"'thrid'.*'default' and 'second' and 'bus'"):
            await emitter.emit(Lost())
        with pytest.raises(LookupError, match="3 producers"):
            _ = emitter.producer
    async with connect({"one": "memory://kafka", "bus": "memory://redis"}) as emitter:
        await emitter.emit(Published())
        with pytest.raises(RouteError, match="no broker takes"):
            await emitter.emit(Event())
    async with connect({"one": "memory://", "two": "memory://redis"}) as emitter:
        with pytest.raises(RouteError, match=r"'one' and 'two' would take; write __broker__ = 'one'"):
            await emitter.emit(Published())


async def test_a_broker_that_does_not_take_the_route_is_refused() -> None:
    """__broker__ names the wrong transport: told before anything is sent."""

    class Misplaced(Event):
        __broker__ = "bus"

    async with connect({"bus": "memory://redis"}) as emitter:
        with pytest.raises(RouteError, match="Route"):
            await emitter.emit(Misplaced())


async def test_emit_many_goes_to_several_brokers_and_tells_all_failures(faults: Callable[[str], Fault]) -> None:
    """One broker that fails does not hide what the other confirmed; each failure names its event."""

    class First(Event):
        __broker__ = "a"

    class Second(Event):
        __broker__ = "b"

    async def every_other(messages: Sequence[Message]) -> list[Exception | None]:
        return [UnroutableError("no queue") if index % 2 else None for index in range(len(messages))]

    faults("a").deliver = every_other
    async with connect({"a": "fake://a", "b": "fake://b"}) as emitter:
        with pytest.raises(ExceptionGroup, match=r"2 of 6 events") as caught:
            await emitter.emit_many([First(), Second(), First(), First(), First(), Second()])
    assert len(faults("b").delivered) == 2
    assert all("First" in error.__notes__[0] for error in caught.value.exceptions)


async def test_after_a_restart_events_go_to_the_new_broker(faults: Callable[[str], Fault]) -> None:
    """The plan of an event class is not kept across a start with other settings."""
    urls = iter(["fake://a", "fake://b"])
    brokers = connect(lambda: next(urls))
    for _ in range(2):
        async with brokers as emitter:
            await emitter.emit(Event())
    assert (len(faults("a").delivered), len(faults("b").delivered)) == (1, 1)


# -- timeouts and hooks --------------------------------------------------------------------------------------------


async def _late(messages: Sequence[Message]) -> list[Exception | None]:
    return [ProducerTimeout("late") for _ in messages]


async def test_a_managed_emit_raises_its_timeout(faults: Callable[[str], Fault]) -> None:
    """A timeout is not a no, and it is not silence either."""
    faults("a").deliver = _late
    async with connect("fake://a") as emitter:
        with pytest.raises(ProducerTimeout):
            await emitter.emit(Event())
        with pytest.raises(TimeoutError):
            await emitter.emit(Event())


async def test_on_timeout_may_log_or_call(faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can live with a lost event says so: per broker, by a function, or for the whole emitter."""
    faults("a").deliver = _late
    async with connect("fake://a", on_timeout="log") as emitter:
        await emitter.emit(Event())
        await emitter.emit_many([Event(), Event()])
    assert caplog.text.count("not confirmed in time") == 3
    called: list[object] = []

    async def later(event: Event) -> None:
        await asyncio.sleep(0)
        called.append(event.number)

    async with connect("fake://a", on_timeout=later) as emitter:
        await emitter.emit(Event(number=1))

        @emitter.on_timeout
        def mine(event: Event) -> None:
            called.append(-event.number)

        await emitter.emit(Event(number=2))
    assert called == [1, -2]
    assert callable(mine)


async def test_hooks_see_every_message_and_can_do_no_harm(
    faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics and tracing hang on them: order, outcome, also during an outage; a bug in one stays its own."""
    seen: list[str] = []

    class See(Hook):
        def before_send(self, message: Message) -> None:
            seen.append("before")

        def sent(self, message: Message) -> None:
            seen.append("sent")

        def failed(self, message: Message, error: Exception) -> None:
            seen.append(type(error).__name__)

    class Harm(Hook):
        def sent(self, message: Message) -> None:
            raise LookupError("a bug in a hook")

        def failed(self, message: Message, error: Exception) -> None:
            raise LookupError("a bug in a hook")

    class Veto(Hook):
        def before_send(self, message: Message) -> None:
            raise PermissionError("not today")

    brokers = connect("fake://a", hooks=[Harm(), See()])
    async with brokers as emitter:
        await emitter.emit(Event())
        assert seen == ["before", "sent"]
        assert "a bug in a hook" in caplog.text
        faults("a").deliver = _late
        faults("a").ping = _failing(OSError("gone"))
        with pytest.raises(ProducerTimeout):
            await emitter.emit(Event())
        await until(lambda: brokers.brokers["default"].state == "down")
        with pytest.raises(BrokerUnavailableError):
            await emitter.emit(Event())
        assert seen[2:] == ["before", "ProducerTimeout", "before", "BrokerUnavailableError"]
    faults("a").deliver = _confirm
    async with connect("fake://a", hooks=[Veto()]) as emitter:
        with pytest.raises(PermissionError):
            await emitter.emit(Event())
        assert len(faults("a").delivered) == 1


# -- deadlines -----------------------------------------------------------------------------------------------------


async def test_many_waits_end_in_time_with_one_timer() -> None:
    """Thousands of emits wait at once; each ends at its own deadline."""
    deadlines, ended = Deadlines(), list[float]()
    loop = asyncio.get_running_loop()

    async def wait(timeout: float) -> None:
        started = loop.time()
        with pytest.raises(TimeoutError), deadlines.limit(timeout):
            await _for_ever()
        ended.append(loop.time() - started - timeout)

    scheduled = len(loop._scheduled)  # type: ignore[attr-defined]
    waits = [asyncio.create_task(wait(0.05 if number % 2 else 0.1)) for number in range(2000)]
    await asyncio.sleep(0)
    assert len(loop._scheduled) - scheduled <= 3  # type: ignore[attr-defined]
    await asyncio.gather(*waits)
    assert len(ended) == 2000
    assert min(ended) > -0.002


async def test_a_cancellation_from_outside_is_not_swallowed() -> None:
    """A client that hangs up cancels its request: that is no timeout, even when both happen at once."""
    deadlines = Deadlines()

    async def wait(timeout: float) -> None:
        with deadlines.limit(timeout):
            await _for_ever()

    task = asyncio.create_task(wait(30))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    both = asyncio.create_task(wait(0.01))
    await asyncio.sleep(0)
    time.sleep(0.02)  # The deadline is over when the loop runs again, and so is the caller's patience.
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_a_wait_that_ends_in_time_raises_nothing_later() -> None:
    """The deadline of an emit that was confirmed must not cancel what the task does next."""
    deadlines = Deadlines()
    with deadlines.limit(0.02) as limit:
        await asyncio.sleep(0)
    with deadlines.limit(None):
        await asyncio.sleep(0.05)
    assert not limit.expired
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_inner_deadline_leaves_the_outer_one_alone() -> None:
    """A producer's own deadline within an emit's."""
    deadlines = Deadlines()
    outer = deadlines.limit(0.05)

    async def wait() -> None:
        with outer:
            with pytest.raises(TimeoutError), deadlines.limit(0.01):
                await _for_ever()
            assert not outer.expired
            await _for_ever()

    with pytest.raises(TimeoutError):
        await wait()
    assert outer.expired


async def test_deadlines_do_not_grow() -> None:
    """An app that runs for weeks keeps nothing of the waits that are over, whatever their timeouts were."""
    deadlines = Deadlines()
    for _ in range(1000):
        with deadlines.limit(5):
            pass
    for number in range(1000):
        with deadlines.limit(0.001 + number / 1e6):
            pass
    await asyncio.sleep(0.01)
    queues = deadlines._queues  # pyright: ignore[reportPrivateUsage]
    assert sum(len(queue.limits) for queue in queues.values()) == 0
    assert len(queues) < 10


async def test_brokers_leave_no_task_behind(faults: Callable[[str], Fault]) -> None:
    """Starts, outages and stops clean up after themselves."""
    faults("a").deliver = _late
    faults("a").ping = _failing(OSError("gone"))
    brokers: Brokers = connect("fake://a")
    for _ in range(3):
        async with brokers as emitter:
            with pytest.raises(ProducerTimeout):
                await emitter.emit(Event())
            await until(lambda: brokers.brokers["default"].state == "down")
    assert not [task for task in asyncio.all_tasks() if "dispytch" in task.get_name()]


# -- what a review found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(6))
async def test_a_start_while_the_last_user_stops_opens_anew(turns: int) -> None:
    """Tests and reloads overlap: whoever starts has a connection, whatever the one before is doing."""
    brokers = connect("memory://")
    await brokers.start()
    stopping = asyncio.create_task(brokers.stop())
    for _ in range(turns):
        await asyncio.sleep(0)
    await brokers.start()
    await stopping
    await brokers.emitter.emit(Event())
    await brokers.stop()
    assert not brokers.started


async def test_the_last_error_of_a_start_is_told_and_not_that_time_was_up(faults: Callable[[str], Fault]) -> None:
    """ "There is no exchange" helps; "did not answer within 5 s" after a third of a second is wrong twice."""
    faults("a").start = _failing(OSError("there is no such thing"))
    for number in range(8):
        with pytest.raises(StartupError, match="there is no such thing"):
            await connect("fake://a", startup_timeout=0.1 + number * 0.02).start()


async def test_an_attempt_that_hangs_is_told_with_its_own_time(faults: Callable[[str], Fault]) -> None:
    """The number in an error is the one that was waited for."""
    faults("a").start = _for_ever
    with pytest.raises(StartupError, match=r"did not answer within 0\.2 s"):
        await connect("fake://a", startup_timeout=0.2, timeout=5).start()


async def test_a_mistake_does_not_wait_for_a_broker_that_is_down(faults: Callable[[str], Fault]) -> None:
    """A refused password is known at once, and the other broker's trouble is told beside it."""
    faults("a").start = _failing(OSError("connection refused"))
    faults("b").start = _failing(ConfigurationError("the password is refused"))
    async with asyncio.timeout(10):
        with pytest.raises(ConfigurationError) as caught:
            await connect({"one": "fake://a", "two": "fake://b"}, startup_timeout=60).start()
    assert any("the password is refused" in problem for problem in caught.value.problems)
    assert any("'one'" in problem and "connection refused" in problem for problem in caught.value.problems)


async def test_a_broker_that_does_not_take_the_route_is_named_by_its_alias() -> None:
    """The alias stands in the settings; our producers' names do not."""

    class Misplaced(Event):
        __broker__ = "bus"

    async with connect({"bus": "memory://redis"}) as emitter:
        with pytest.raises(RouteError, match="broker 'bus' takes a RedisEventRoute"):
            await emitter.emit(Misplaced())


@pytest.mark.parametrize("seconds", [1.0, 2.0])
async def test_a_start_uses_the_time_that_it_is_given(seconds: float, faults: Callable[[str], Fault]) -> None:
    """Who waits for ten seconds is not to fail after six: the broker comes in the seventh."""
    faults("a").start = _failing(OSError("refused"))
    started = time.monotonic()
    with pytest.raises(StartupError, match="refused"):
        await connect("fake://a", startup_timeout=seconds).start()
    assert seconds - 0.15 < time.monotonic() - started < seconds + 0.1


@pytest.mark.parametrize("required", [True, False])
async def test_a_start_that_waits_says_for_whom(
    required: bool, faults: Callable[[str], Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """Thirty silent seconds look like a hang. Once is enough, and without the password."""
    caplog.set_level(logging.INFO, "dispytch_integrations")
    faults("a").start = _failing(OSError(f"refused, password {SECRET}"), times=3)
    async with connect(f"fake://app:{SECRET}@a", required=required) as emitter:
        while emitter.producers and not faults("a").open:
            await asyncio.sleep(0.01)
    until_when = "for up to 30 s" if required else "in the background"
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told[0] == (
        "WARNING",
        f"broker 'default' (fake://a) does not answer yet, and is tried again {until_when}: refused, password ***",
    )
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "answers now" in told[1][1]


async def test_a_refused_login_in_the_background_is_tried_again(
    own_redis: Callable[..., Redis], unique: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The password is set right at the broker an hour later: nobody should have to restart the app for that."""
    monkeypatch.setattr(_broker, "_AFTER_MISTAKE", 0.1)
    broker = await asyncio.to_thread(own_redis)
    async with redis.asyncio.Redis.from_url(broker.url) as admin:
        await admin.config_set("requirepass", "another")
        async with connect(broker.url, required=False, password=lambda: "geheim-4711", timeout=5) as emitter:
            with pytest.raises(BrokerUnavailableError, match="password"):
                await emitter.emit(Streamed(stream=unique))
            await asyncio.sleep(0.5)
            assert [record.message for record in caplog.records if "each minute" in record.message] != []
            told = [record for record in caplog.records if "cannot be used" in record.message]
            assert len(told) == 1, "once, and not each time"
            assert "geheim-4711" not in caplog.text
            await admin.config_set("requirepass", "geheim-4711")
            async with asyncio.timeout(10):
                while (await emitter.ping(timeout=2))["default"] is not None:
                    await asyncio.sleep(0.05)
            await emitter.emit(Streamed(stream=unique))
