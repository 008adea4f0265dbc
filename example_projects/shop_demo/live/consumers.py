"""A consumer per broker: what the shop has emitted, as anybody else would receive it.

Each opens at the end of what the broker holds, and is ready when its block is entered: what is emitted inside it
arrives. They use the client libraries alone: nothing of ours is needed to read its events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.producer import Producer
from example_projects.shop_demo.live.feed import Received
from example_projects.shop_demo.transports import EXCHANGE, transport_of

__all__ = ["Consumer", "consumer_for", "from_kafka", "from_memory", "from_rabbitmq", "from_redis"]

Consumer = Callable[[], AbstractAsyncContextManager[AsyncIterator[Received]]]
"""Opens a connection of its own; entered again when that one broke."""


def consumer_for(url: str, topics: tuple[str, ...], producer: Producer | None) -> Consumer:
    """The consumer for the broker of this URL. `producer`: the emitter's, which is all there is to hear on memory."""
    match transport_of(url):
        case "kafka":
            return partial(from_kafka, url, topics)
        case "rabbitmq":
            return partial(from_rabbitmq, url, topics)
        case "redis":
            return partial(from_redis, url, topics)
        case _:
            return partial(from_memory, cast("MemoryProducer", producer), topics)


@asynccontextmanager
async def from_kafka(url: str, topics: tuple[str, ...]) -> AsyncGenerator[AsyncIterator[Received], None]:
    """Read topics from their end, without a consumer group: every page sees every event."""
    from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped, unused-ignore]

    access = _kafka_access(url)
    await _create_topics(access, topics)
    consumer: Any = AIOKafkaConsumer(
        *topics,
        **access,
        auto_offset_reset="latest",
        # A broker that answers only when this is over (Tansu does) would let the page wait for half a second.
        fetch_max_wait_ms=50,
    )
    await consumer.start()
    try:
        await consumer.seek_to_end()

        async def messages() -> AsyncGenerator[Received, None]:
            while True:
                batches = await consumer.getmany(timeout_ms=2000)
                if not batches:
                    # The client goes on quietly without a broker; the page wants to know.
                    async with asyncio.timeout(5):
                        await consumer.topics()
                for record in chain.from_iterable(batches.values()):
                    headers = {name: value.decode(errors="replace") for name, value in record.headers}
                    key = None if record.key is None else record.key.decode(errors="replace")
                    yield Received(record.topic, record.value or b"null", headers, key)

        async with aclosing(messages()) as received:
            yield received
    finally:
        # Without its broker, stop() raises the CancelledError of a task of its own: that is not ours to pass on.
        await asyncio.wait({asyncio.create_task(consumer.stop())}, timeout=5)


async def _create_topics(access: dict[str, Any], topics: tuple[str, ...]) -> None:
    """Otherwise they come with the first event, and a reader that starts at the end would begin behind it."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped, unused-ignore]
    from aiokafka.errors import KafkaError  # type: ignore[import-untyped, unused-ignore]

    admin: Any = AIOKafkaAdminClient(**access)
    await admin.start()
    try:
        existing = await admin.list_topics()
        missing = [NewTopic(topic, num_partitions=1, replication_factor=1) for topic in topics if topic not in existing]
        if missing:
            await admin.create_topics(missing)
    except KafkaError as exc:
        logging.getLogger(__name__).warning("topics were not created, the broker may do it itself: %r", exc)
    finally:
        await admin.close()


def _kafka_access(url: str) -> dict[str, Any]:
    """Where the brokers are and how to get in, from the same URL that the emitter has."""
    from aiokafka.helpers import create_ssl_context  # type: ignore[import-untyped, unused-ignore]

    read = BrokerURL.parse(url)
    hosts = [(f"[{host}]" if ":" in host else host, port or 9092) for host, port in read.hosts]
    ssl, sasl = read.scheme == "kafka+ssl", read.username is not None
    access: dict[str, Any] = {
        "bootstrap_servers": ",".join(f"{host}:{port}" for host, port in hosts),
        "security_protocol": ("SASL_" if sasl else "") + ("SSL" if ssl else "PLAINTEXT"),
    }
    if ssl:
        access["ssl_context"] = create_ssl_context()
    if sasl:
        access["sasl_mechanism"] = read.query.get("sasl_mechanism", "PLAIN")
        access["sasl_plain_username"], access["sasl_plain_password"] = read.username, read.password
    return access


@asynccontextmanager
async def from_rabbitmq(url: str, topics: tuple[str, ...]) -> AsyncGenerator[AsyncIterator[Received], None]:
    """Bind a queue of our own to the shop's exchange. It goes with the connection; yours would be durable."""
    import aio_pika

    connection = await aio_pika.connect(_plain(url, scheme="amqps" if url.startswith("amqps") else "amqp"))
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        exchange = await channel.get_exchange(EXCHANGE)
        queue = await channel.declare_queue(exclusive=True)
        for topic in topics:
            await queue.bind(exchange, routing_key=topic)

        async def messages() -> AsyncGenerator[Received, None]:
            async with queue.iterator() as incoming:
                async for message in incoming:
                    async with message.process():
                        headers = {name: str(value) for name, value in message.headers.items()}
                        if message.content_type:
                            headers["content-type"] = message.content_type
                        yield Received(message.routing_key or "", message.body, headers)

        async with aclosing(messages()) as received:
            yield received


@asynccontextmanager
async def from_redis(url: str, topics: tuple[str, ...]) -> AsyncGenerator[AsyncIterator[Received], None]:
    """Read streams from their end."""
    from redis.asyncio import Redis

    scheme = {"valkey": "redis", "valkeys": "rediss"}.get(url.partition("://")[0])
    async with Redis.from_url(_plain(url, scheme=scheme), decode_responses=True) as redis:  # pyright: ignore[reportUnknownMemberType]
        positions: dict[Any, Any] = {}
        for topic in topics:
            newest: Any = await redis.xrevrange(topic, count=1)
            positions[topic] = newest[0][0] if newest else "0-0"

        async def messages() -> AsyncGenerator[Received, None]:
            while True:
                # Shorter than the client's own socket_timeout of 5 s.
                answer: Any = await redis.xread(positions, block=2000)
                for topic, entries in _streams(answer):
                    for position, fields in entries:
                        positions[topic] = position
                        body = fields.pop("data", "")
                        yield Received(topic, body.encode(), fields)

        async with aclosing(messages()) as received:
            yield received


def _streams(answer: Any) -> list[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """What XREAD answers: pairs under RESP2, a mapping with lists of lists under RESP3."""
    if not isinstance(answer, dict):
        return answer or []
    streams = cast("dict[str, list[list[tuple[str, dict[str, str]]]]]", answer)
    return [(topic, [entry for batch in batches for entry in batch]) for topic, batches in streams.items()]


@asynccontextmanager
async def from_memory(
    producer: MemoryProducer, topics: tuple[str, ...]
) -> AsyncGenerator[AsyncIterator[Received], None]:
    """Receive from the memory transport, in this process."""
    with producer.subscribe() as subscription:

        async def messages() -> AsyncGenerator[Received, None]:
            async for message in subscription:
                # On a RabbitMQ route the destination is the exchange.
                topic = message.properties.get("routing_key") or message.destination
                if topic in topics:
                    headers = {name: str(value) for name, value in message.headers.items()}
                    yield Received(topic, message.payload or b"null", headers, message.ordering_key)

        async with aclosing(messages()) as received:
            yield received


def _plain(url: str, *, scheme: str | None = None) -> str:
    """The URL without our options in its query, and with the scheme that the client knows."""
    own, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme or own}://{rest}"
