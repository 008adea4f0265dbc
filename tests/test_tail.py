"""`dispytch-integrations tail`: what travels is seen, and nobody notices that it is looked at."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]
from aiokafka.client import AIOKafkaClient  # type: ignore[import-untyped]
from pydantic import Field
from redis import asyncio as redis_asyncio

from dispytch_integrations import EventBase, connect
from dispytch_integrations._cli_tail import _line, rendered
from dispytch_integrations._rabbitmq_connection import Connection, Dialer
from dispytch_integrations._tail import MissingError, Request, follow, source_of
from dispytch_integrations._tail_arrival import Arrival, Filter
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.serialization import MessagePackSerializer
from dispytch_integrations.settings import load_brokers
from tests.support.arrivals import SECONDS
from tests.support.brokers import RabbitMQ, Redis, Tansu, free_port
from tests.support.commands import ROOT, Command, eventually
from tests.support.proxy import TCPProxy

pytestmark = pytest.mark.timeout(120)

CLI = [sys.executable, "-m", "dispytch_integrations.cli"]
SECRET = "geheim-47"


class TailedKafka(EventBase):
    __route__ = KafkaEventRoute(topic="{place}")
    __ordering_key__ = "{number}"
    __event_type__ = "tail.kafka"

    place: str = Field(exclude=True)
    number: int


class TailedGone(EventBase):
    __route__ = KafkaEventRoute(topic="{place}")
    __ordering_key__ = "{number}"
    __tombstone__ = True

    place: str = Field(exclude=True)
    number: int


class TailedRabbitMQ(EventBase):
    __route__ = RabbitMQEventRoute(exchange="{place}", routing_key="orders.{number}", mandatory=False, safe=".")
    __event_type__ = "tail.rabbitmq"

    place: str = Field(exclude=True)
    number: int


class TailedStream(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __event_type__ = "tail.stream"

    place: str = Field(exclude=True)
    number: int


class TailedChannel(EventBase):
    __route__ = RedisEventRoute(channel="{place}", safe=".")

    place: str = Field(exclude=True)
    number: int


class Tail:
    """What was heard so far. `told`: the lines about the connection."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.told: list[str] = []
        self.changed = asyncio.Condition()

    @property
    def numbers(self) -> list[int]:
        return [arrival.decoded[1]["number"] for arrival in self.arrivals]

    async def until(self, condition: Callable[[Tail], object]) -> None:
        async with asyncio.timeout(SECONDS), self.changed:
            await self.changed.wait_for(lambda: condition(self))

    async def has(self, count: int) -> list[Arrival]:
        await self.until(lambda tail: len(tail.arrivals) >= count)
        return self.arrivals


@asynccontextmanager
async def tailing(url: str, name: str, *, wait: bool = False, **request: Any) -> AsyncGenerator[Tail]:
    """Listen to a place in this process. Raises what the command would end with."""
    [spec] = load_brokers(url, {})
    source = source_of(spec.backend, Request(name, **request), spec.options.prefix)
    tail = Tail()
    changes: set[asyncio.Task[None]] = set()

    async def show(arrivals: Sequence[Arrival]) -> bool:
        async with tail.changed:
            tail.arrivals += arrivals
            tail.changed.notify_all()
        return True

    async def notify() -> None:
        async with tail.changed:
            tail.changed.notify_all()

    def tell(text: str) -> None:
        tail.told.append(text)
        changes.add(asyncio.create_task(notify()))

    following = asyncio.create_task(follow(source, show, tell, wait=wait, start_timeout=5))
    told = asyncio.create_task(tail.until(lambda tail: tail.told))
    await asyncio.wait({following, told}, return_when=asyncio.FIRST_COMPLETED)
    if following.done():
        told.cancel()
        following.result()
    try:
        yield tail
    finally:
        following.cancel()
        await asyncio.wait({following})
    if not following.cancelled():
        following.result()


@asynccontextmanager
async def amqp_connection(url: str) -> AsyncGenerator[Connection]:
    connection = await Dialer(BrokerURL.parse(url), None, None, {}).connect()
    yield connection
    await connection.close()


@asynccontextmanager
async def exchange(url: str, name: str, kind: str, **options: Any) -> AsyncGenerator[str]:
    """An exchange of that type, while in the block."""
    async with amqp_connection(url) as connection:
        channel = await connection.channel(publisher_confirms=False)
        await channel.exchange_declare(name, exchange_type=kind, **options)
        try:
            yield name
        finally:
            await channel.exchange_delete(name)


@asynccontextmanager
async def redis_client(url: str) -> AsyncGenerator[Any]:
    async with redis_asyncio.Redis.from_url(url) as client:
        yield client


# -- what is seen ----------------------------------------------------------------------------------------------------


async def told_of(url: str, cls: Callable[..., EventBase], place: str, **options: Any) -> dict[str, Any]:
    """What tail says of an event of our own emitter."""
    async with connect(url, **options) as emitter, tailing(url, place) as tail:
        await emitter.emit(cls(place=place, number=7), headers={} if cls is TailedChannel else {"tenant": "acme"})
        [arrival] = await tail.has(1)
        return arrival.as_json()


@pytest.mark.parametrize("cloudevents", [True, "ce_", "cloudEvents_", "x-"])
async def test_an_event_on_rabbitmq_is_known_by_its_headers(
    rabbitmq_url: str, unique: str, cloudevents: bool | str
) -> None:
    """Id and type are what people look for first; the prefix of their headers can be chosen."""
    async with exchange(rabbitmq_url, unique, "topic"):
        told = await told_of(rabbitmq_url, TailedRabbitMQ, unique, cloudevents=cloudevents)
    assert (told["type"], told["source"], told["body"], told["encoding"]) == (
        "tail.rabbitmq", "/tests", {"number": 7}, "json",
    )  # fmt: skip
    assert (told["destination"], told["position"]) == (unique, {"routing_key": "orders.7"})
    assert (told["headers"]["tenant"], len(told["id"]), told["content_type"]) == ("acme", 36, "application/json")


@pytest.mark.parametrize("cloudevents", [True, "cloudEvents_"])
async def test_an_event_in_a_stream_is_known_by_its_fields(
    redis_url: str, unique: str, cloudevents: bool | str
) -> None:
    """The same of Redis, where headers are fields of the entry."""
    async with redis_client(redis_url) as client:
        await client.xadd(unique, {"data": '{"number": 1}'})
        told = await told_of(redis_url, TailedStream, unique, cloudevents=cloudevents)
        [entry] = await client.xrevrange(unique, count=1)
        assert await client.xinfo_groups(unique) == []
        await client.delete(unique)
    assert (told["type"], told["body"], len(told["id"])) == ("tail.stream", {"number": 7}, 36)
    assert (told["position"], told["headers"]["tenant"]) == ({"entry": entry[0].decode()}, "acme")


@pytest.mark.parametrize("cloudevents", [True, "cloudEvents_"])
async def test_an_event_in_a_topic_is_known_by_its_headers(
    kafka_url: str, unique: str, cloudevents: bool | str
) -> None:
    """And of Kafka, with key, partition and offset, by which it can be found again."""
    async with connect(kafka_url) as emitter:
        await emitter.emit(TailedKafka(place=unique, number=1))
    told = await told_of(kafka_url, TailedKafka, unique, cloudevents=cloudevents)
    assert (told["type"], told["body"], len(told["id"]), told["key"]) == ("tail.kafka", {"number": 7}, 36, "7")
    assert (set(told["position"]), told["headers"]["tenant"]) == ({"partition", "offset"}, "acme")


async def test_a_channel_shows_bodies_alone(redis_url: str, unique: str) -> None:
    """Pub/sub has no headers: nothing is made up."""
    told = await told_of(redis_url, TailedChannel, unique)
    assert (told["id"], told["type"], told["headers"], told["body"]) == (None, None, {}, {"number": 7})


async def test_a_pattern_hears_several_channels(redis_url: str, unique: str) -> None:
    """`alerts.*`, when it is not known yet which one matters."""
    async with connect(redis_url) as emitter, tailing(redis_url, f"{unique}.*") as tail:
        for place in (f"{unique}.a", f"{unique}.b"):
            await emitter.emit(TailedChannel(place=place, number=1))
        assert [arrival.destination for arrival in await tail.has(2)] == [f"{unique}.a", f"{unique}.b"]


async def test_the_beginning_is_the_first_that_is_kept(kafka_url: str, redis_url: str, unique: str) -> None:
    """What happened before somebody looked is why they look."""
    for url, cls in ((kafka_url, TailedKafka), (redis_url, TailedStream)):
        async with connect(url) as emitter:
            await emitter.emit_many([cls(place=unique, number=number) for number in range(300)])
        async with tailing(url, unique, from_beginning=True) as tail:
            await tail.has(300)
            assert sorted(tail.numbers) == list(range(300))
    async with redis_client(redis_url) as client:
        await client.delete(unique)


async def test_without_it_only_what_comes_is_shown(kafka_url: str, redis_url: str, unique: str) -> None:
    """A topic with a million events does not flood the screen."""
    for url, cls in ((kafka_url, TailedKafka), (redis_url, TailedStream)):
        async with connect(url) as emitter:
            await emitter.emit(cls(place=unique, number=1))
            async with tailing(url, unique) as tail:
                await emitter.emit(cls(place=unique, number=2))
                await tail.has(1)
                assert tail.numbers == [2]
    async with redis_client(redis_url) as client:
        await client.delete(unique)


async def test_the_brokers_prefix_stands_before_the_name(redis_url: str, unique: str) -> None:
    """The name is the one in the code; staging.orders is what the settings make of it, and may be written, too."""
    url = f"{redis_url}?prefix={unique}."
    for name in ("orders", f"{unique}.orders"):
        async with connect(url) as emitter, tailing(url, name) as tail:
            await emitter.emit(TailedChannel(place="orders", number=1))
            [arrival] = await tail.has(1)
            assert arrival.destination == f"{unique}.orders"


# -- RabbitMQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key"), [("topic", None), ("fanout", None), ("headers", None), ("direct", "orders.1")]
)
async def test_every_type_of_exchange_can_be_heard(rabbitmq_url: str, unique: str, kind: str, key: str | None) -> None:
    """Who wants to see all need not know how the exchange routes."""
    options = {"durable": kind == "fanout", "auto_delete": False}
    async with (
        exchange(rabbitmq_url, unique, kind, **options),
        connect(rabbitmq_url) as emitter,
        tailing(rabbitmq_url, unique, routing_key=key) as tail,
    ):
        await emitter.emit(TailedRabbitMQ(place=unique, number=1))
        await tail.has(1)
        assert tail.numbers == [1]


async def test_a_direct_exchange_asks_for_its_key(rabbitmq_url: str, unique: str) -> None:
    """`#` means nothing to it: without a word nothing would ever be shown."""
    async with exchange(rabbitmq_url, unique, "direct"), amqp_connection(rabbitmq_url) as connection:
        with pytest.raises(ConfigurationError, match=r"is a direct one.*write --routing-key KEY"):
            async with tailing(rabbitmq_url, unique):
                pass
        channel = await connection.channel()
        await channel.exchange_declare(unique, passive=True)  # Finding out its type has left it there.


async def test_a_routing_key_chooses(rabbitmq_url: str, unique: str) -> None:
    """One customer's events of thousands."""
    async with (
        exchange(rabbitmq_url, unique, "topic"),
        connect(rabbitmq_url) as emitter,
        tailing(rabbitmq_url, unique, routing_key="*.2") as tail,
    ):
        await emitter.emit_many([TailedRabbitMQ(place=unique, number=number) for number in (1, 2)])
        await tail.has(1)
        assert tail.numbers == [2]


def queues_of(broker: RabbitMQ) -> list[str]:
    return broker.ctl("-q", "list_queues", "--no-table-headers", "name").split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_queue_is_left_behind(own_rabbitmq: Callable[[], RabbitMQ], tmp_path: Path, number: signal.Signals) -> None:
    """A queue without a reader fills the broker's disk; kill -9 runs no cleanup."""
    broker = own_rabbitmq()
    before = set(queues_of(broker))
    with Command([*CLI, "tail", broker.url, "amq.topic"], tmp_path) as command:
        command.wait_for("listening to the exchange 'amq.topic', routing key '#'")
        [queue] = set(queues_of(broker)) - before
        assert queue.startswith("amq.gen-")
        command.terminate(number)
        command.exit_code()
        eventually(lambda: queue not in queues_of(broker))


async def test_other_consumers_get_everything(rabbitmq_url: str, unique: str) -> None:
    """Looking must not take events away from those who work on them."""
    async with exchange(rabbitmq_url, unique, "topic"), amqp_connection(rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.queue_declare(unique, exclusive=True)
        await channel.queue_bind(unique, unique, routing_key="#")
        async with connect(rabbitmq_url) as emitter, tailing(rabbitmq_url, unique) as tail:
            await emitter.emit_many([TailedRabbitMQ(place=unique, number=number) for number in range(500)])
            await tail.has(500)
            assert tail.numbers == list(range(500))  # More than are under way at once: they are acknowledged.
        assert (await channel.queue_declare(unique, passive=True)).message_count == 500


async def test_an_exchange_that_goes_is_told(rabbitmq_url: str, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bindings go with it, and the broker says nothing: one would look at silence for ever."""
    monkeypatch.setattr("dispytch_integrations._tail_rabbitmq._LOOK_SECONDS", 0.1)
    async with connect(rabbitmq_url) as emitter:
        async with exchange(rabbitmq_url, unique, "topic"):
            listening = tailing(rabbitmq_url, unique)
            tail = await listening.__aenter__()
        await tail.until(lambda tail: any(f"lost: the exchange {unique!r} is gone" in told for told in tail.told))
        async with exchange(rabbitmq_url, unique, "topic"):
            await tail.until(lambda tail: "connected again" in tail.told[-1])
            await emitter.emit(TailedRabbitMQ(place=unique, number=3))
            await tail.has(1)
            await listening.__aexit__(None, None, None)


async def test_a_user_who_may_not_bind_is_told_what_is_needed(
    own_rabbitmq: Callable[[], RabbitMQ], unique: str
) -> None:
    """ACCESS_REFUSED alone says nothing about what to allow."""
    broker = own_rabbitmq()
    await asyncio.to_thread(broker.ctl, "add_user", unique, SECRET)
    await asyncio.to_thread(broker.ctl, "set_permissions", unique, "nothing", "nothing", ".*")
    url = broker.url.replace("guest:guest", f"{unique}:{SECRET}")
    with pytest.raises(ConfigurationError, match=r"allow this user to configure, write and read queues named amq.gen"):
        async with tailing(url, "amq.topic"):
            pass


# -- Kafka -------------------------------------------------------------------------------------------------------------


async def test_no_consumer_group_is_left_behind(kafka_url: str, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of its own would show up in everybody's lag dashboards, for days."""
    asked: set[str] = set()
    send = AIOKafkaClient.send

    async def spy(self: Any, node: Any, request: Any, **options: Any) -> Any:
        asked.add(type(request).__name__.partition("Request")[0])
        return await send(self, node, request, **options)

    monkeypatch.setattr(AIOKafkaClient, "send", spy)
    async with connect(kafka_url) as emitter, tailing(kafka_url, unique, wait=True) as tail:
        await emitter.emit(TailedKafka(place=unique, number=1))
        await tail.has(1)
    assert "Fetch" in asked
    assert not asked & {"FindCoordinator", "JoinGroup", "OffsetCommit", "OffsetFetch", "Heartbeat"}, asked


async def test_partitions_that_are_added_are_read(kafka_url: str, unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic grows while somebody looks at it: half of the events would be missing."""
    # Tansu adds none: until `grown` the client is not told of all but the first.
    grown, ask = asyncio.Event(), AIOKafkaConsumer.partitions_for_topic
    monkeypatch.setattr(
        AIOKafkaConsumer, "partitions_for_topic", lambda self, topic: ask(self, topic) if grown.is_set() else {0}
    )
    async with connect(kafka_url) as emitter:
        await emitter.emit(TailedGone(place=unique, number=0))
        async with tailing(kafka_url, unique) as tail:
            assert "1 partition" in tail.told[0]
            await emitter.emit_many([TailedKafka(place=unique, number=number) for number in range(40)])
            grown.set()
            await tail.until(lambda tail: len([each for each in tail.arrivals if each.payload is not None]) == 40)
            assert len({arrival.position["partition"] for arrival in tail.arrivals}) > 1


async def test_a_topic_is_not_made_by_looking(kafka_url: str, unique: str) -> None:
    """A typing error must not become a topic, where brokers make them on demand."""
    from confluent_kafka.admin import AdminClient

    with pytest.raises(MissingError, match=f"there is no topic '{unique}'.*or write --wait"):
        async with tailing(kafka_url, unique):
            pass
    admin = AdminClient({"bootstrap.servers": kafka_url.removeprefix("kafka://"), "log_level": 0})
    topics = await asyncio.to_thread(lambda: admin.list_topics(timeout=10).topics)
    assert unique not in topics


async def test_tombstones_are_shown(kafka_url: str, unique: str) -> None:
    """That a key is deleted is an event, too."""
    async with connect(kafka_url) as emitter:
        await emitter.emit(TailedGone(place=unique, number=5))
        async with tailing(kafka_url, unique, from_beginning=True) as tail:
            [arrival] = await tail.has(1)
    assert (arrival.key, arrival.as_json()["body"], arrival.as_json()["size"]) == ("5", None, None)
    assert "a tombstone" in rendered(arrival, lambda text, role: text, 80)


# -- outages -----------------------------------------------------------------------------------------------------------


async def test_a_lost_stream_goes_on_where_it_was(own_redis: Callable[..., Redis], unique: str) -> None:
    """A restart of the broker is told, and costs nothing."""
    broker = own_redis(options={"appendonly": "yes", "appendfsync": "always"})
    async with connect(broker.url) as emitter:
        await emitter.emit(TailedStream(place=unique, number=1))
        async with tailing(broker.url, unique, from_beginning=True) as tail:
            await tail.has(1)
            await asyncio.to_thread(broker.stop)
            await tail.until(lambda tail: "lost: " in tail.told[-1] or "waiting: " in tail.told[-1])
            await asyncio.to_thread(broker.start)
            async with connect(broker.url) as other:
                await other.emit(TailedStream(place=unique, number=2))
            await tail.has(2)
            assert tail.numbers == [1, 2]
            assert "connected again, listening to the stream" in tail.told[-1]


async def test_a_lost_topic_goes_on_where_it_was(own_kafka: Callable[[], Tansu], unique: str) -> None:
    """aiokafka itself would wait in silence."""
    broker = own_kafka()
    async with connect(broker.url) as emitter:
        await emitter.emit(TailedKafka(place=unique, number=1))
    async with tailing(broker.url, unique, from_beginning=True) as tail:
        await tail.has(1)
        await asyncio.to_thread(broker.pause)
        await tail.until(lambda tail: "lost: " in tail.told[-1])
        await asyncio.to_thread(broker.resume)
        await tail.until(lambda tail: "connected again" in tail.told[-1])
        async with connect(broker.url) as emitter:
            await emitter.emit(TailedKafka(place=unique, number=2))
        await tail.has(2)
        assert tail.numbers == [1, 2]


async def test_a_connection_to_rabbitmq_that_is_cut_is_made_again(rabbitmq_url: str, unique: str) -> None:
    """What came in between is lost, and that is said: an exclusive queue goes with its connection."""
    address = BrokerURL.parse(rabbitmq_url)
    host, port = address.hosts[0][0], address.hosts[0][1] or 5672
    async with exchange(rabbitmq_url, unique, "topic"), TCPProxy(host, port) as proxy:
        url = rabbitmq_url.replace(f"{host}:{port}", f"{proxy.host}:{proxy.port}")
        async with connect(rabbitmq_url) as emitter, tailing(url, unique) as tail:
            await proxy.cut()
            await tail.until(lambda tail: "connected again" in tail.told[-1])
            assert any("lost: " in told and "what comes meanwhile is not shown" in told for told in tail.told)
            await emitter.emit(TailedRabbitMQ(place=unique, number=1))
            await tail.has(1)


async def test_a_connection_to_a_channel_that_is_cut_is_made_again(redis_url: str, unique: str) -> None:
    """The same of Redis pub/sub."""
    address = BrokerURL.parse(redis_url)
    host, port = address.hosts[0][0], address.hosts[0][1] or 6379
    async with TCPProxy(host, port) as proxy:
        url = redis_url.replace(f"{host}:{port}", f"{proxy.host}:{proxy.port}")
        async with connect(redis_url) as emitter, tailing(url, unique) as tail:
            await proxy.cut()
            await tail.until(lambda tail: "connected again" in tail.told[-1])
            await emitter.emit(TailedChannel(place=unique, number=1))
            await tail.has(1)


async def test_a_channel_whose_connection_is_silent_is_noticed(
    redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that forgets a connection sends no goodbye."""
    monkeypatch.setattr("dispytch_integrations._tail_redis._PING_SECONDS", 0.1)
    monkeypatch.setattr("dispytch_integrations._tail_redis._SILENT_SECONDS", 0.5)
    monkeypatch.setattr("dispytch_integrations._tail_redis._BLOCK_SECONDS", 0.2)
    address = BrokerURL.parse(redis_url)
    host, port = address.hosts[0][0], address.hosts[0][1] or 6379
    async with TCPProxy(host, port) as proxy:
        url = redis_url.replace(f"{host}:{port}", f"{proxy.host}:{proxy.port}")
        async with tailing(url, unique) as tail:
            await asyncio.sleep(1.0)
            assert len(tail.told) == 1  # Silence alone is none: it is asked.
            await proxy.stall()
            await tail.until(lambda tail: "silent for" in "".join(tail.told))


async def test_a_stream_can_be_waited_for(redis_url: str, unique: str) -> None:
    """A consumer's author starts tail before the first event there ever was."""
    with pytest.raises(MissingError, match=f"there is no stream '{unique}'.*write --wait"):
        async with tailing(redis_url, unique, kind="stream"):
            pass
    async with connect(redis_url) as emitter, tailing(redis_url, unique, kind="stream", wait=True) as tail:
        assert "waiting: there is no stream" in tail.told[0]
        await emitter.emit(TailedStream(place=unique, number=1))
        await tail.has(1)
    async with redis_client(redis_url) as client:
        await client.delete(unique)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "request_", "told"),
    [
        ("memory://", {}, "lives inside of the process that emits"),
        ("redis://h", {"routing_key": "#"}, "--routing-key is RabbitMQ's"),
        ("amqp://h", {"kind": "stream"}, "--stream is Redis's"),
        ("amqp://h", {"from_beginning": True}, "leave --from-beginning out"),
    ],
)
async def test_what_a_transport_does_not_have_is_told(url: str, request_: dict[str, Any], told: str) -> None:
    """An option that is ignored would look like an event that never came."""
    with pytest.raises(ConfigurationError, match=told):
        async with tailing(url, "orders", **request_):
            pass


async def test_a_name_that_becomes_a_stream_is_followed(redis_url: str, unique: str) -> None:
    """The first thing that a newcomer does: tail, and then emit the first event. It must not wait for ever."""
    async with connect(redis_url) as emitter, tailing(redis_url, unique) as tail:
        assert "once there is one" in tail.told[0]
        for number in (1, 2):
            await emitter.emit(TailedStream(place=unique, number=number))
        await tail.has(2)
        assert tail.numbers == [1, 2]
    async with redis_asyncio.Redis.from_url(redis_url) as client:
        await client.delete(unique)


async def test_a_channel_has_no_beginning(redis_url: str, unique: str) -> None:
    """`--from-beginning` on pub/sub would wait for what nobody has kept."""
    with pytest.raises(ConfigurationError, match="a channel keeps nothing"):
        async with tailing(redis_url, unique, from_beginning=True):
            pass


async def test_a_broker_that_does_not_answer_is_told_without_its_password(unique: str) -> None:
    """Exit code 3, and what to write to wait for it."""
    for scheme in ("redis", "amqp", "kafka"):
        login = f"u:{SECRET}@"
        more = "?sasl_mechanism=PLAIN" if scheme == "kafka" else ""
        with pytest.raises(BrokerUnavailableError, match=r"does not answer: .*write --wait") as caught:
            async with tailing(f"{scheme}://{login}127.0.0.1:{free_port()}{more}", unique):
                pass
        assert SECRET not in str(caught.value)


# -- filters and looks -------------------------------------------------------------------------------------------------

ARRIVAL = Arrival(
    "kafka",
    "orders",
    json.dumps({"id": 7, "customer": {"city": "Bonn", "vip": True}, "items": [{"sku": "a"}, {"sku": "b"}],
                "note": None, "price": 1.5}).encode(),
    {"ce_specversion": "1.0", "ce_id": "e-1", "ce_type": "com.shop.placed", "ce_source": "/shop", "tenant": "acme"},
    "k7",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("customer.city", "Bonn", True),
        ("customer.city", "Bo*", True),
        ("customer.city", "Köln", False),
        ("customer.vip", "true", True),
        ("note", "null", True),
        ("price", "1.5", True),
        ("items.sku", "b", True),
        ("items.sku", "c", False),
        ("type", "com.shop.*", True),
        ("type", "com.*.gone", False),
        ("id", "e-1", True),
        ("id", "7", False),
        ("body.id", "7", True),
        ("key", "k7", True),
        ("source", "/shop", True),
        ("headers.tenant", "acme", True),
        ("headers.tenant", "other", False),
        ("absent", "", False),
        ("absent", "*", False),
    ],
)
def test_a_filter_looks_at_body_headers_type_and_id(name: str, value: str, holds: bool) -> None:
    """One order's events among a thousand others."""
    assert Filter(name, value)(ARRIVAL) is holds


@pytest.mark.parametrize(
    ("payload", "content_type", "encoding", "body", "shown"),
    [
        (b'{"a": 1}', None, "json", {"a": 1}, '{"a": 1}'),
        (MessagePackSerializer().serialize({"a": 1}), "application/msgpack", "msgpack", {"a": 1}, "(MessagePack)"),
        (MessagePackSerializer().serialize({"a": 1}), None, "msgpack", {"a": 1}, "(MessagePack)"),
        ("grüße".encode(), "text/plain", "text", "grüße", "grüße"),
        (b"\x00\xff" * 40, "image/x", "base64", None, "(80 bytes, image/x)"),
        (b"", None, "text", "", "(an empty body)"),
        (b"[" * 100_000, None, "text", None, "[["),
    ],
)
def test_every_body_is_shown_readably(
    payload: bytes, content_type: str | None, encoding: str, body: Any, shown: str
) -> None:
    """Not everything on a broker is JSON, and a broken body is what one looks for."""
    arrival = Arrival("kafka", "orders", payload, content_type=content_type)
    told = arrival.as_json()
    assert (told["encoding"], told["size"]) == (encoding, len(payload))
    if body is not None:
        assert told["body"] == body
    assert shown in rendered(arrival, lambda text, role: text, 80)


def test_an_event_in_structured_mode_is_known_by_its_body() -> None:
    """Other producers put the attributes beside the data."""
    body = {"specversion": "1.0", "id": "e-9", "type": "x.y", "source": "/z", "data": {}}
    arrival = Arrival("redis", "channel", json.dumps(body).encode())
    assert (arrival.attribute("id"), arrival.attribute("type")) == ("e-9", "x.y")


def test_a_terminal_obeys_no_event() -> None:
    """An escape sequence in a customer's name must not repaint the operator's screen."""
    nasty = "\x1b[2J\x9b31m\u202e\u2066"
    arrival = Arrival(
        "kafka", nasty, json.dumps({nasty: nasty}, ensure_ascii=False).encode(),
        {"ce_specversion": "1.0", "ce_type": nasty, "ce_id": nasty, "ce_time": nasty, nasty: nasty}, nasty,
    )  # fmt: skip
    for each in (arrival, Arrival("redis", "c", nasty.encode()), Arrival("redis", "c", b"\xff", content_type=nasty)):
        shown = rendered(each, lambda text, role: text, 80)
        assert all(char == "\n" or char.isprintable() for char in shown), repr(shown)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a": NaN, "b": 1e400}',
        b'{"a": "\\ud800"}',
        '{"a": "\x9b31m \u202e \U000e0001"}'.encode(),
        b"\x81\xc4\x01a\x01",
        b"\x81\xa1a\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"[" * 900 + b"]" * 900,
        b"9" * 5000,
    ],
    ids=["no number", "half a pair", "obeyed", "key of bytes", "no number in MessagePack", "deep", "long"],
)
def test_json_is_json_whatever_a_body_is(payload: bytes) -> None:
    """The script that reads the lines, and the command itself, would end at the first odd event of a busy topic."""
    arrival = Arrival("redis", "orders", payload, {"odd": float("nan"), "esc": "\x9b2J"})
    line = _line(arrival)
    fields = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert fields["destination"] == "orders"
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    shown = rendered(arrival, lambda text, _: text, 80)
    assert shown.replace("\n", "").isprintable()
    if b"\xf3\xa0\x80\x81" in payload:
        assert fields["body"] == json.loads(payload)
        assert "\\udb40\\udc01" in shown


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", "soon"])
def test_a_time_at_the_end_of_the_calendar_is_shown_as_it_is(time: str) -> None:
    """Anybody may write such a header; it would end the command."""
    shown = rendered(Arrival("redis", "o", b"{}", {"ce_specversion": "1.0", "ce_time": time}), lambda text, _: text, 80)
    assert time in shown


async def test_an_entry_of_the_year_11476_is_shown(redis_url: str, unique: str) -> None:
    """Whoever adds to a stream may choose the id, and with it the time; it would end the command."""
    async with redis_client(redis_url) as client:
        for number, entry in enumerate(("5-1", "300000000000000-1", "18446744073709551000-1")):
            await client.xadd(unique, {"data": json.dumps({"number": number})}, id=entry)
        async with tailing(redis_url, unique, from_beginning=True) as tail:
            await tail.has(3)
            assert tail.numbers == [0, 1, 2]


def test_a_filter_of_many_stars_answers_at_once() -> None:
    """A regular expression of them would try their places for years, and Ctrl-C would not end it."""
    arrival = Arrival("redis", "orders", json.dumps({"a": "a" * 100}).encode())
    assert not Filter("a", "*a" * 20 + "*b")(arrival)
    assert Filter("a", "*a" * 20 + "*")(arrival)
    assert not Filter("a", "a" * 60 + "*" + "a" * 60)(arrival)


def test_lines_are_as_wide_as_the_terminal() -> None:
    """Eighty columns is what people have; what fits on one line takes one."""
    arrival = Arrival(
        "kafka", "orders", json.dumps({"text": "short"}).encode(),
        {"ce_specversion": "1.0", "ce_type": "com.shop.a-rather-long-type-of-event", "ce_id": "0" * 36,
         "ce_source": "/shop", **{f"header-{number}": "value" for number in range(9)}},
    )  # fmt: skip
    lines = rendered(arrival, lambda text, role: text, 80).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any("0" * 36 in line for line in lines)


# -- as a process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(redis_url: str, unique: str) -> Iterator[str]:
    """A stream of 20,000 entries of a kilobyte."""
    import redis

    client: Any
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(20):
            pipeline = client.pipeline()
            for number in range(1000):
                pipeline.xadd(unique, {"data": json.dumps({"number": number, "text": "x" * 1000})})
            pipeline.execute()
        yield unique
        client.delete(unique)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "tail", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def peak_of(pid: int) -> int:
    """Megabytes that a process has had at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_json_is_for_scripts_and_count_ends_it(redis_url: str, filled: str) -> None:
    """`| jq` gets objects and nothing else; what is said about the connection goes to standard error."""
    done = start(redis_url, filled, "--from-beginning", "--json", "--filter", "number=5", "--count", "2")
    out, err = done.communicate(timeout=30)
    assert done.returncode == 0, err
    assert [json.loads(line)["body"]["number"] for line in out.splitlines()] == [5, 5]
    assert err == f"listening to the stream {filled!r} of {redis_url}; Ctrl-C ends\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory a process has had")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_stops_costs_no_memory_and_delays_no_end(
    redis_url: str, filled: str, number: signal.Signals
) -> None:
    """Ctrl-S in a terminal, or `less`: the events wait at the broker, and Ctrl-C still ends it at once."""
    reading = start(redis_url, filled, "--from-beginning", "--json", "--count", "1")
    reading.communicate(timeout=30)
    waiting = start(redis_url, filled, "--from-beginning", "--json")
    assert waiting.stdout is not None
    waiting.stdout.readline()
    time.sleep(1.5)  # Far longer than reading all of it would take.
    assert peak_of(waiting.pid) < resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024 + 15
    started = time.monotonic()
    waiting.send_signal(number)
    assert waiting.wait(timeout=10) == 0
    assert time.monotonic() - started < 3
    waiting.communicate()


def test_a_reader_that_has_seen_enough_ends_it(redis_url: str, unique: str) -> None:
    """`tail ... | head -1` ends with head, and not with the event after it."""
    import redis

    client: Any
    with redis.Redis.from_url(redis_url) as client:
        client.xadd(unique, {"data": "{}"})
        command = start(redis_url, unique, "--from-beginning")
        assert command.stdout is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.wait(timeout=10) == 0
        assert "Traceback" not in cast("Any", command.stderr).read()
        cast("Any", command.stderr).close()
        client.delete(unique)


def test_it_ends_with_the_codes_of_its_help(redis_url: str, rabbitmq_url: str, unique: str) -> None:
    """A script tells a typing error from an outage."""
    dead = f"redis://u:{SECRET}@127.0.0.1:{free_port()}"
    for arguments, code, told in (
        ([rabbitmq_url, unique], 2, f"there is no exchange {unique!r}"),
        ([redis_url, unique, "--stream"], 2, f"there is no stream {unique!r}"),
        ([redis_url, unique, "--filter", "x"], 2, "--filter takes FIELD=VALUE"),
        ([redis_url, unique, "--stream", "--channel"], 2, "exclude each other"),
        (["kafak://h", unique], 2, "did you mean 'kafka'?"),
        ([dead, unique], 3, "does not answer"),
    ):
        command = start(*arguments)
        out, err = command.communicate(timeout=30)
        assert (command.returncode, out) == (code, ""), err
        assert told in err
        assert SECRET not in err
        assert "Traceback" not in err
