"""The tools that tests break things with must break them: a fault that does not happen makes every test green."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from tests.support.brokers import Broker, RabbitMQ, Redis, Tansu, answers
from tests.support.proxy import TCPProxy


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """A server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@asynccontextmanager
async def _connected(proxy: TCPProxy) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"ping")
    return await asyncio.wait_for(reader.read(100), 0.3)


async def test_proxy_forwards_stalls_and_resumes(echo_port: int) -> None:
    """A half-open connection: it stays open and gives no answer; afterwards nothing is missing."""
    async with TCPProxy("127.0.0.1", echo_port) as proxy, _connected(proxy) as (reader, writer):
        assert await _ask(reader, writer) == b"ping"
        await proxy.stall()
        with pytest.raises(TimeoutError):
            await _ask(reader, writer)
        async with _connected(proxy) as (late_reader, late_writer):
            with pytest.raises(TimeoutError):
                await _ask(late_reader, late_writer)
            await proxy.resume()
            assert await reader.read(100) == b"ping"
            assert await late_reader.read(100) == b"ping"
            assert (proxy.accepted, proxy.connections) == (2, 2)


async def test_proxy_cuts_and_refuses(echo_port: int) -> None:
    """Cut: gone, but a new one is accepted. Refused: nobody listens, until resumed on the same port."""
    async with TCPProxy("127.0.0.1", echo_port) as proxy:
        port = proxy.port
        async with _connected(proxy) as (reader, writer):
            assert await _ask(reader, writer) == b"ping"
            await proxy.cut()
            with pytest.raises(ConnectionResetError):
                await reader.read(100)
        async with _connected(proxy) as (reader, writer):
            assert await _ask(reader, writer) == b"ping"
            await proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(proxy.host, port)
        await proxy.resume()
        assert proxy.port == port
        async with _connected(proxy) as (reader, writer):
            assert await _ask(reader, writer) == b"ping"


def _break(broker: Broker) -> None:
    assert answers(broker.port, broker.greeting)
    broker.pause()
    assert not answers(broker.port, broker.greeting, timeout=0.3)
    broker.resume()
    assert answers(broker.port, broker.greeting, timeout=5)
    broker.kill()
    assert not answers(broker.port, broker.greeting, timeout=0.3)
    broker.start()
    assert answers(broker.port, broker.greeting, timeout=5)


def test_own_kafka_pauses_and_restarts(own_kafka: Callable[[], Tansu]) -> None:
    """Fault tests of Kafka rest on it."""
    _break(own_kafka())


def test_own_redis_pauses_and_restarts(own_redis: Callable[[], Redis]) -> None:
    """Fault tests of Redis rest on it."""
    _break(own_redis())


def test_own_rabbitmq_sets_and_lifts_alarms(own_rabbitmq: Callable[[], RabbitMQ]) -> None:
    """A blocked publisher is only seen with a node whose alarm can be set."""
    node = own_rabbitmq()
    node.ctl("set_vm_memory_high_watermark", "0")
    assert "memory" in node.ctl("eval", "rabbit_alarm:get_alarms().").lower()
    again = own_rabbitmq()
    assert again is node
    assert node.ctl("eval", "rabbit_alarm:get_alarms().").strip() == "[]"
