"""Redis breaks: refused, cut, half-open, restarted. What was confirmed is there, and nothing is there twice."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    NotStartedError,
    ProducerTimeout,
    StartupError,
    UnconfirmedError,
)
from dispytch_integrations.redis import RedisBackend, RedisOptions, RedisProducer, RedisStreamEventRoute
from tests.support.brokers import Redis as OwnRedis
from tests.support.brokers import free_port
from tests.support.proxy import TCPProxy


class Order(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str
    number: int = 0


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    client: Any = Redis.from_url(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[TCPProxy]:
    """A way to the shared Redis that can be broken."""
    target = urlsplit(redis_url)
    async with TCPProxy(target.hostname or "127.0.0.1", target.port or 6379) as proxy:
        yield proxy


async def _numbers(client: Any, stream: str) -> list[int]:
    return [json.loads(fields[b"data"])["number"] for _, fields in await client.xrange(stream)]


async def _recovered(emitter: EventEmitter, stream: str) -> None:
    """Wait until an emit is confirmed again."""
    async with asyncio.timeout(15):
        while True:
            try:
                await emitter.emit(Order(stream=stream, number=-1))
                return
            except DeliveryError:
                await asyncio.sleep(0.05)


async def test_start_where_nobody_listens_fails_in_time_and_names_the_address() -> None:
    """A wrong port must stop the app with a reason, not hang it."""
    port = free_port()
    with pytest.raises(StartupError, match=f"127.0.0.1:{port}"):
        async with connect(f"redis://127.0.0.1:{port}", startup_timeout=0.5):
            pass


async def test_bare_producer_without_a_broker_says_nothing_was_sent(unique: str) -> None:
    """An outage is told as one at once; retrying is safe, since nothing was sent."""
    client: Any = Redis(port=free_port(), retry=Retry(NoBackoff(), 0))
    with pytest.raises(BrokerUnavailableError, match="was not sent"):
        await EventEmitter(RedisProducer(client)).emit(Order(stream=unique))
    await client.aclose()


async def test_cut_under_load_loses_nothing_confirmed_and_doubles_nothing(
    proxy: TCPProxy, client: Any, unique: str
) -> None:
    """redis-py's retries write twice; giving up silently loses. Neither is allowed, whatever is in flight."""
    confirmed: set[int] = set()
    unconfirmed: set[int] = set()
    not_sent: set[int] = set()
    enough = asyncio.Event()

    async def emit(emitter: EventEmitter, number: int) -> None:
        try:
            await emitter.emit(Order(stream=unique, number=number))
            confirmed.add(number)
        except UnconfirmedError:
            unconfirmed.add(number)
        except BrokerUnavailableError:
            not_sent.add(number)
        if len(confirmed) >= 300:
            enough.set()

    async with connect(f"redis://127.0.0.1:{proxy.port}", timeout=5) as emitter:
        for round_ in range(4):
            emits = [asyncio.create_task(emit(emitter, round_ * 1000 + number)) for number in range(1000)]
            await asyncio.wait_for(enough.wait(), 10)
            await proxy.cut()
            await asyncio.gather(*emits)
            enough.clear()
            confirmed_before = len(confirmed)
            await _recovered(emitter, f"{unique}-probe")
            assert confirmed_before
    numbers = Counter(await _numbers(client, unique))
    await client.delete(unique, f"{unique}-probe")
    assert confirmed <= set(numbers), "a confirmed event is missing"
    assert not not_sent & set(numbers), "an event that was told as not sent was delivered"
    assert max(numbers.values()) == 1, "an event was written twice"
    assert len(confirmed) + len(unconfirmed) + len(not_sent) == 4000
    assert unconfirmed or not_sent, "the cut hit nothing: this test tests nothing"


async def test_half_open_connection_times_out_and_writes_once(proxy: TCPProxy, client: Any, unique: str) -> None:
    """A black hole must cost the deadline, not minutes; and what is delivered late is delivered once."""
    async with connect(f"redis://127.0.0.1:{proxy.port}", timeout=0.4) as emitter:
        await emitter.emit(Order(stream=unique, number=0))
        await proxy.stall()
        async with asyncio.timeout(3):
            outcomes = await asyncio.gather(
                *(emitter.emit(Order(stream=unique, number=number)) for number in range(1, 20)),
                return_exceptions=True,
            )
        assert {type(outcome) for outcome in outcomes} == {ProducerTimeout}
        await proxy.resume()
        await _recovered(emitter, f"{unique}-probe")
    numbers = Counter(await _numbers(client, unique))
    await client.delete(unique, f"{unique}-probe")
    assert max(numbers.values()) == 1


async def test_emits_behind_a_stalled_pipeline_are_told_as_not_sent(proxy: TCPProxy, client: Any, unique: str) -> None:
    """What never left the process can be emitted again without a second thought; the error says so."""
    raw: Any = Redis(port=proxy.port)
    emitter = EventEmitter(RedisProducer(raw), timeout=0.3)
    emitter.on_timeout(_raise_nothing)
    await emitter.emit(Order(stream=unique, number=0))
    await proxy.stall()
    producer = emitter.producer
    first = asyncio.create_task(_deliver(producer, unique, 1))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(_deliver(producer, unique, 2))
    assert "may have been delivered" in str(await first)
    assert "not sent yet" in str(await second)
    await proxy.cut()
    await proxy.resume()
    await emitter.emit(Order(stream=unique, number=3))
    numbers = await _numbers(client, unique)
    await raw.aclose()
    await client.delete(unique)
    assert 2 not in numbers


def _raise_nothing(event: EventBase) -> None: ...


async def _deliver(producer: object, stream: str, number: int) -> Exception | None:
    assert isinstance(producer, RedisProducer)
    emitter = EventEmitter(producer)
    _, message = emitter.prepare(Order(stream=stream, number=number))
    [outcome] = await producer.deliver([message], timeout=0.3)
    return outcome


async def test_idle_connection_that_the_server_closed_is_noticed_before_the_next_emit(
    proxy: TCPProxy, client: Any, unique: str
) -> None:
    """Firewalls and restarts close idle connections: the first emit afterwards must not pay for it."""
    async with connect(f"redis://127.0.0.1:{proxy.port}") as emitter:
        await emitter.emit(Order(stream=unique, number=0))
        await proxy.cut()
        await asyncio.sleep(0.05)  # The end of the stream travels through the kernel.
        await emitter.emit(Order(stream=unique, number=1))
    numbers = await _numbers(client, unique)
    await client.delete(unique)
    assert numbers == [0, 1]


async def test_restart_is_survived(own_redis: Callable[..., OwnRedis], unique: str) -> None:
    """Brokers are updated while apps run: emits fail during it, with an outage, and go on after it."""
    broker = await asyncio.to_thread(own_redis)
    async with connect(broker.url) as emitter:
        await emitter.emit(Order(stream=unique, number=0))
        await asyncio.to_thread(broker.stop)
        with pytest.raises(DeliveryError):
            await emitter.emit(Order(stream=unique, number=1))
        await asyncio.to_thread(broker.start)
        await _recovered(emitter, unique)


async def test_refused_while_connected_fails_fast(proxy: TCPProxy, client: Any, unique: str) -> None:
    """While Redis is known to be gone, requests must not queue up behind deadlines."""
    async with connect(f"redis://127.0.0.1:{proxy.port}", timeout=5) as emitter:
        await emitter.emit(Order(stream=unique, number=0))
        await proxy.refuse()
        await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            for _ in range(5):
                with pytest.raises(BrokerUnavailableError):
                    await emitter.emit(Order(stream=unique, number=1))
    await client.delete(unique)


# -- the backend by itself -------------------------------------------------------------------------------------------


def _backend(port: int, timeout: float = 5.0) -> RedisBackend:
    return RedisBackend(BrokerURL.parse(f"redis://127.0.0.1:{port}/0"), RedisOptions(timeout=timeout), {})


async def test_stop_drains_and_stays_stopped(proxy: TCPProxy, client: Any, unique: str) -> None:
    """redis-py reconnects silently after its close; ours stays closed, and what was accepted before is sent."""
    backend = _backend(proxy.port)
    await backend.start()
    emitter = EventEmitter(backend.producer)
    emits = [asyncio.create_task(emitter.emit(Order(stream=unique, number=n))) for n in range(2000)]
    await asyncio.sleep(0)
    await backend.stop()
    await asyncio.gather(*emits)
    accepted = proxy.accepted
    with pytest.raises(NotStartedError):
        await emitter.emit(Order(stream=unique, number=-1))
    with pytest.raises(NotStartedError):
        await backend.ping()
    await backend.stop()
    assert proxy.accepted == accepted
    assert sorted(await _numbers(client, unique)) == list(range(2000))
    await client.delete(unique)


async def test_cancelled_stop_closes_without_flushing(proxy: TCPProxy, client: Any, unique: str) -> None:
    """A shutdown has an end: what is not confirmed by then is told to whoever waits for it."""
    backend = _backend(proxy.port)
    await backend.start()
    emitter = EventEmitter(backend.producer)
    await emitter.emit(Order(stream=unique))
    await proxy.stall()
    emit = asyncio.create_task(emitter.emit(Order(stream=unique)))
    await asyncio.sleep(0.05)
    late = asyncio.create_task(emitter.emit(Order(stream=unique)))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await backend.stop()
    async with asyncio.timeout(2):
        with pytest.raises(UnconfirmedError):
            await emit
        with pytest.raises(BrokerUnavailableError):
            await late
    await client.delete(unique)


async def test_ping_drops_a_connection_that_does_not_answer(proxy: TCPProxy, client: Any, unique: str) -> None:
    """A half-open connection is found by the health check; the next emit gets a new one."""
    backend = _backend(proxy.port, timeout=30)
    await backend.start()
    emitter = EventEmitter(backend.producer, timeout=30)
    await emitter.emit(Order(stream=unique, number=0))
    await proxy.stall()
    stuck = asyncio.create_task(emitter.emit(Order(stream=unique, number=1)))
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await backend.ping()
    async with asyncio.timeout(2):
        await asyncio.gather(stuck, return_exceptions=True)
    accepted = proxy.accepted
    await proxy.resume()
    await backend.ping()
    assert proxy.accepted == accepted + 1
    await backend.stop()
    await client.delete(unique)


async def test_backend_starts_again_after_a_stop(proxy: TCPProxy, client: Any, unique: str) -> None:
    """A reloaded app starts the same backend again; nothing of the old connection may be used."""
    backend = _backend(proxy.port)
    for number in range(3):
        await backend.start()
        await EventEmitter(backend.producer).emit(Order(stream=unique, number=number))
        await backend.stop()
        assert await _until_closed(proxy)
    assert await _numbers(client, unique) == [0, 1, 2]
    await client.delete(unique)


async def _until_closed(proxy: TCPProxy) -> bool:
    async with asyncio.timeout(5):
        while proxy.connections:
            await asyncio.sleep(0.01)
    return True


async def test_failed_start_leaves_nothing_open(proxy: TCPProxy) -> None:
    """Start is tried again and again during an outage: each attempt must clean up after itself."""
    await proxy.stall()
    backend = _backend(proxy.port)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await backend.start()
    await proxy.resume()
    assert await _until_closed(proxy)
    with pytest.raises(NotStartedError):
        await EventEmitter(backend.producer).emit(Order(stream="never"))
