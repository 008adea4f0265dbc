"""Redis: the contract on channels and on streams, dispytch's own API, and what becomes of each message."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar, cast

import pytest
import redis as sync_redis
from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster

from dispytch_integrations import EventBase, EventEmitter, connect, event_id
from dispytch_integrations.errors import (
    ConfigurationError,
    HeaderError,
    MissingExtraError,
    PermanentFailure,
    ProducerTimeout,
    RouteError,
    WrongLoopError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventConfig
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.rabbitmq import RabbitMQEventConfig
from dispytch_integrations.redis import RedisEventConfig, RedisEventRoute, RedisProducer, RedisStreamEventRoute
from tests.contract import Listen, MakeRoute, ProducerContract, Receive, Received
from tests.support.brokers import Redis as OwnRedis


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    """A client of redis.asyncio, as a user has it."""
    client: Any = Redis.from_url(redis_url)
    yield client
    await client.aclose()


class TestRedisChannels(ProducerContract):
    @pytest.fixture
    def url(self, redis_url: str) -> str:
        return redis_url

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: RedisEventRoute(channel=destination)

    @pytest.fixture
    async def listen(self, redis_url: str) -> AsyncIterator[Listen]:
        client: Any = Redis.from_url(redis_url)
        pubsub: Any = client.pubsub()

        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            await pubsub.subscribe(destination)

            async def receive(count: int) -> list[Received]:
                received: list[Received] = []
                while len(received) < count:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=10)
                    if message is not None:
                        received.append(Received(message["data"]))
                return received

            return receive

        yield listen
        await pubsub.aclose()
        await client.aclose()


class TestRedisStreams(ProducerContract):
    @pytest.fixture
    def url(self, redis_url: str) -> str:
        return redis_url

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: RedisStreamEventRoute(stream=destination)

    @pytest.fixture
    async def listen(self, redis_url: str) -> AsyncIterator[Listen]:
        client: Any = Redis.from_url(redis_url)
        streams: list[str] = []

        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            streams.append(destination)
            last = b"0"

            async def receive(count: int) -> list[Received]:
                nonlocal last
                received: list[Received] = []
                while len(received) < count:
                    for _, entries in await _read_stream(client, destination, last, count - len(received)):
                        received += [_received(fields) for _, fields in entries]
                        last = entries[-1][0]
                return received

            return receive

        yield listen
        await client.delete("never", *streams)
        await client.aclose()


async def _read_stream(client: Any, stream: str, last: bytes, count: int) -> Any:
    answer: Any = await client.xread({stream: last}, count=count, block=4000)
    return answer.items() if isinstance(answer, dict) else answer


def _received(fields: dict[bytes, bytes]) -> Received:
    headers = {name.decode(): value.decode() for name, value in fields.items() if name != b"data"}
    return Received(fields[b"data"], headers)


class _Alert(EventBase):
    __route__ = RedisEventRoute(channel="{channel}")

    channel: str
    level: str = "critical"


class _Order(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str
    number: int = 0


# -- dispytch's API ------------------------------------------------------------------------------------------------


async def test_dispytchs_page_works_with_the_import_changed(client: Any) -> None:
    """Who comes from dispytch changes an import, nothing else."""

    class SystemAlert(EventBase):
        __route__ = RedisEventRoute(channel="system.alerts")

        level: str
        message: str

    pubsub = client.pubsub()
    await pubsub.subscribe("system.alerts")
    await pubsub.get_message(timeout=5)
    emitter = EventEmitter(RedisProducer(client))
    await emitter.emit(SystemAlert(level="critical", message="CPU temperature high"))
    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
    await pubsub.aclose()
    assert message is not None
    assert message["data"] == b'{"level":"critical","message":"CPU temperature high"}'


async def test_synchronous_client_is_refused_at_once(redis_url: str) -> None:
    """A redis.Redis would block the event loop; dispytch fails at the first emit, with a riddle."""
    with sync_redis.Redis.from_url(redis_url) as client:
        with pytest.raises(ConfigurationError, match=r"from redis\.asyncio import Redis"):
            RedisProducer(cast("Redis", client))


async def test_what_is_no_client_is_refused_with_what_to_write(client: Any) -> None:
    """A URL, a pipeline, a cluster's client: each mistake is told with its own remedy."""
    with pytest.raises(ConfigurationError, match=r"Redis\.from_url"):
        RedisProducer(cast("Redis", "redis://localhost"))
    with pytest.raises(ConfigurationError, match="Pipeline"):
        RedisProducer(client.pipeline())
    cluster = RedisCluster(host="127.0.0.1", port=7000)
    with pytest.raises(ConfigurationError, match=r"redis\+cluster://"):
        RedisProducer(cast("Any", cluster))


async def test_send_called_directly_confirms(client: Any, unique: str) -> None:
    """A producer is usable without an emitter, as dispytch's is."""
    producer = RedisProducer(client)
    await producer.send(b"body", RedisStreamEventRoute(stream=unique, maxlen=10))
    await producer.send(b"body", RedisEventRoute(channel=unique))
    [(_, fields)] = await client.xrange(unique)
    assert fields == {b"data": b"body"}
    assert producer.unheard == 1
    await client.set(unique, "no stream")
    with pytest.raises(PermanentFailure, match="WRONGTYPE"):
        await producer.send(b"body", RedisStreamEventRoute(stream=unique))
    await client.delete(unique)


async def test_producer_bound_to_another_loop_says_so(redis_url: str, unique: str) -> None:
    """A client used from a second event loop hangs or fails obscurely in redis-py."""
    client: Any = Redis.from_url(redis_url)
    emitter = EventEmitter(RedisProducer(client))
    await emitter.emit(_Alert(channel=unique))
    with pytest.raises(WrongLoopError, match="loop that emits"):
        await asyncio.to_thread(asyncio.run, emitter.emit(_Alert(channel=unique)))
    await client.aclose()


def test_producer_used_after_a_fork_says_so(redis_url: str) -> None:
    """A connection shared by two processes mixes up their answers."""
    program = f"""
import asyncio, os
from redis.asyncio import Redis
from dispytch_integrations import EventBase, EventEmitter
from dispytch_integrations.errors import WrongProcessError
from dispytch_integrations.redis import RedisEventRoute, RedisProducer
class Alert(EventBase):
    __route__ = RedisEventRoute(channel="fork")
async def run(emitter=None):
    emitter = emitter or EventEmitter(RedisProducer(Redis.from_url({redis_url!r})))
    await emitter.emit(Alert())
    return emitter
emitter = asyncio.run(run())
if (child := os.fork()) == 0:
    try:
        asyncio.run(run(emitter))
    except WrongProcessError:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_routes_need_no_client_library() -> None:
    """Event classes are imported where nothing is sent: a missing extra fails at the producer, with the pip line."""
    program = """
import sys
sys.modules["redis"] = None
from dispytch_integrations.redis import RedisBackend, RedisEventRoute, RedisProducer, RedisStreamEventRoute
from dispytch_integrations.errors import MissingExtraError
RedisEventRoute(channel="a"); RedisStreamEventRoute(stream="b", maxlen=3)
del sys.modules["redis"]
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "redis":
            raise ModuleNotFoundError(f"No module named {name!r}", name="redis")
sys.meta_path.insert(0, Nowhere())
for use in (lambda: RedisProducer(None), RedisBackend.require_client):
    try:
        use()
    except MissingExtraError as exc:
        assert "pip install 'dispytch-integrations[redis]'" in str(exc), exc
    else:
        raise SystemExit("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
    assert issubclass(MissingExtraError, ImportError)


# -- many at once --------------------------------------------------------------------------------------------------


async def test_500_concurrent_emits_through_the_default_client_all_arrive(client: Any, unique: str) -> None:
    """redis-py's own pool fails 400 of these with MaxConnectionsError."""
    client.connection_pool.max_connections = 2
    emitter = EventEmitter(RedisProducer(client))
    await asyncio.gather(*(emitter.emit(_Order(stream=unique, number=number)) for number in range(500)))
    entries = await client.xrange(unique)
    await client.delete(unique)
    assert len(entries) == 500


async def test_concurrent_emits_keep_their_order(client: Any, unique: str) -> None:
    """A pipeline is filled in the order of the emits: a stream's readers rely on it."""
    async with connect(_url(client)) as emitter:
        await asyncio.gather(*(emitter.emit(_Order(stream=unique, number=number)) for number in range(2000)))
    numbers = [int(fields[b"data"].rpartition(b":")[2][:-1]) for _, fields in await client.xrange(unique)]
    await client.delete(unique)
    assert numbers == list(range(2000))


def _url(client: Any) -> str:
    kwargs = client.connection_pool.connection_kwargs
    return f"redis://{kwargs['host']}:{kwargs['port']}/{kwargs.get('db', 0)}"


async def test_large_messages_are_cut_into_several_pipelines(client: Any, unique: str) -> None:
    """Megabytes in one write would hold up the confirmations of all that goes with them."""

    class Large(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique)
        text: str

    emitter = EventEmitter(RedisProducer(client), timeout=30)
    await emitter.emit_many([Large(text="x" * 300_000) for _ in range(40)])
    length = await client.xlen(unique)
    await client.delete(unique)
    assert length == 40


async def test_cancelled_emit_does_not_harm_its_neighbours(client: Any, unique: str) -> None:
    """A request that is cancelled (a client hangs up) must not fail the others that share its pipeline."""
    emitter = EventEmitter(RedisProducer(client))
    for turns in range(12):  # Cancelled before it is written, while it is, and while the answer is awaited.
        neighbours = [asyncio.create_task(emitter.emit(_Order(stream=unique, number=1))) for _ in range(5)]
        cancelled = asyncio.create_task(emitter.emit(_Order(stream=unique, number=2)))
        neighbours += [asyncio.create_task(emitter.emit(_Order(stream=unique, number=3))) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*neighbours)
        await asyncio.gather(cancelled, return_exceptions=True)
    entries = [fields[b"data"] for _, fields in await client.xrange(unique)]
    await client.delete(unique)
    assert sum(b'"number":2' not in entry for entry in entries) == 120


async def test_exhausted_pool_of_the_user_is_told(redis_url: str, unique: str) -> None:
    """The producer takes one connection of the user's pool; where none is left the error says what to do."""
    pool: Any = BlockingConnectionPool.from_url(redis_url, max_connections=1, timeout=0.05)
    client: Any = Redis(connection_pool=pool)
    taken = await pool.get_connection()
    with pytest.raises(ConnectionError, match="No connection available"):
        await EventEmitter(RedisProducer(client)).emit(_Alert(channel=unique))
    await pool.release(taken)
    await pool.aclose()


# -- streams -------------------------------------------------------------------------------------------------------


async def test_maxlen_trims_exactly_or_approximately(client: Any, unique: str) -> None:
    """A stream that is never trimmed fills the memory; trimming exactly costs, so both can be had."""

    class Exact(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique, maxlen=10, approximate=False)
        n: int

    class Roughly(EventBase):
        __route__ = RedisStreamEventRoute(stream=f"{unique}-2", maxlen=10)
        n: int

    emitter = EventEmitter(RedisProducer(client))
    await emitter.emit_many([Exact(n=n) for n in range(300)])
    await emitter.emit_many([Roughly(n=n) for n in range(300)])
    exactly, roughly = await client.xlen(unique), await client.xlen(f"{unique}-2")
    await client.delete(unique, f"{unique}-2")
    assert exactly == 10
    assert 10 < roughly < 300


async def test_wrongtype_affects_its_message_alone(client: Any, unique: str) -> None:
    """One key that is no stream must not fail the events that travel in the same pipeline."""
    await client.set(f"{unique}-text", "no stream")
    events = [_Order(stream=f"{unique}-text" if n == 3 else unique, number=n) for n in range(10)]
    emitter = EventEmitter(RedisProducer(client))
    with pytest.raises(ExceptionGroup) as caught:
        await emitter.emit_many(events)
    length = await client.xlen(unique)
    await client.delete(unique, f"{unique}-text")
    [error] = caught.value.exceptions
    assert isinstance(error, PermanentFailure)
    assert "is no stream" in str(error)
    assert length == 9


@pytest.mark.parametrize("how", ["caller", "hook"])
async def test_header_called_data_is_refused(redis_url: str, unique: str, how: str) -> None:
    """The body is the field "data": a header of that name would hide it from consumers."""

    class Data(Hook):
        def before_send(self, message: Message) -> None:
            message.headers["data"] = "x"

    async with connect(redis_url, hooks=[Data()] if how == "hook" else []) as emitter:
        with pytest.raises(HeaderError, match="'data'"):
            await emitter.emit(_Order(stream=unique), headers={"data": "x"} if how == "caller" else None)


async def test_message_read_back_from_storage_goes_to_its_stream(client: Any, unique: str) -> None:
    """The outbox stores plain data: whether it was meant for a channel or a stream must be in it."""
    kept: list[Message] = []

    class Keeper(Producer):
        routes: ClassVar[Any] = RedisProducer.routes

        async def send(self, payload: bytes, route: Any, config: Any = None) -> None: ...

        async def deliver(self, messages: Any, *, timeout: float | None = None) -> list[Exception | None]:
            kept.extend(messages)
            return [None] * len(messages)

    class Trimmed(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique, maxlen=2, approximate=False)
        n: int

    await EventEmitter(Keeper()).emit_many([*(Trimmed(n=n) for n in range(4)), _Alert(channel=unique)])
    stored = [
        Message(m.id, m.type, m.broker, m.destination, m.ordering_key, m.headers, m.properties, m.payload) for m in kept
    ]
    assert [m.properties.get("kind") for m in stored] == ["stream"] * 4 + [None]
    producer = RedisProducer(client)
    assert await producer.deliver(stored, timeout=5) == [None] * 5
    length = await client.xlen(unique)
    await client.delete(unique)
    assert length == 2
    assert producer.unheard == 1


async def test_stream_fields_hold_identity_and_body(client: Any, redis_url: str, unique: str) -> None:
    """Consumers in other languages find the body in "data" and the CloudEvents attributes beside it."""
    event = _Order(stream=unique, number=7)
    async with connect(redis_url) as emitter:
        await emitter.emit(event, headers={"tenant": "acme"})
    [(_, fields)] = await client.xrange(unique)
    await client.delete(unique)
    assert fields[b"ce_id"].decode() == event_id(event)
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"tenant"] == b"acme"
    assert set(fields) >= {b"data", b"ce_specversion", b"ce_type", b"ce_source", b"ce_time"}


@pytest.mark.parametrize("route", [RedisEventRoute(channel=""), RedisStreamEventRoute(stream="")])
async def test_empty_destination_is_refused(client: Any, route: Any) -> None:
    """An empty name is a mistake, and Redis takes it without a word."""
    with pytest.raises(RouteError, match="is empty"):

        class Nowhere(EventBase):
            __route__ = route

    with pytest.raises(RouteError, match="is empty"):
        await RedisProducer(client).send(b"{}", route)


@pytest.mark.parametrize("route", [RedisEventRoute(channel="alerts"), RedisStreamEventRoute(stream="orders")])
@pytest.mark.parametrize(
    "config", [KafkaEventConfig(headers={"tenant": "acme"}), RabbitMQEventConfig(headers={"tenant": "acme"})]
)
async def test_configuration_of_another_transport_is_refused(client: Any, route: Any, config: Any) -> None:
    """An event that moved from Kafka to Redis must not lose its headers without a word."""
    with pytest.raises(
        RouteError, match=f"is a {type(config).__name__}, but a {type(route).__name__} goes with a Redis"
    ):

        class Moved(EventBase):
            __route__ = route
            __backend_config__ = config

    with pytest.raises(RouteError, match="leave it out"):
        await RedisProducer(client).send(b"{}", route, config)
    with pytest.raises(ValueError, match="leave __backend_config__ out"):
        RedisEventConfig.model_validate({"headers": {"tenant": "acme"}})


# -- channels ------------------------------------------------------------------------------------------------------


async def test_nobody_listening_is_counted_and_warned_of_once(
    client: Any, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A channel without subscribers loses everything; the first one says so, and a metric can be made of the rest."""
    producer = RedisProducer(client)
    emitter = EventEmitter(producer)
    pubsub = client.pubsub()
    await pubsub.subscribe(f"{unique}-heard")
    await pubsub.get_message(timeout=5)
    with caplog.at_level(logging.WARNING, "dispytch_integrations.redis"):
        for channel in (unique, unique, f"{unique}-b", f"{unique}-heard"):
            await emitter.emit(_Alert(channel=channel))
    await pubsub.aclose()
    assert producer.unheard == 3
    assert [unique in record.getMessage() for record in caplog.records] == [True, True]
    assert all("RedisStreamEventRoute" in record.getMessage() for record in caplog.records)


# -- what the broker refuses ---------------------------------------------------------------------------------------


async def test_refusals_are_told_by_kind(
    own_redis: Callable[..., OwnRedis], unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An app retries after an outage, and not what would be refused again: the error's class must say which."""
    broker = await asyncio.to_thread(own_redis)
    admin: Any = Redis(port=broker.port)

    async def refused(prepare: Callable[[], Awaitable[Any]], mend: Callable[[], Awaitable[Any]]) -> Exception:
        await prepare()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await emitter.emit(_Order(stream=unique))
        await mend()
        return caught.value

    client: Any = Redis(port=broker.port)
    emitter = EventEmitter(RedisProducer(client))
    out_of_memory = await refused(
        lambda: admin.config_set("maxmemory", "1"), lambda: admin.config_set("maxmemory", "0")
    )
    replica = await refused(
        lambda: admin.execute_command("REPLICAOF", "127.0.0.1", "1"),
        lambda: admin.execute_command("REPLICAOF", "NO", "ONE"),
    )
    forbidden = await refused(
        lambda: admin.execute_command("ACL", "SETUSER", "default", "-xadd"),
        lambda: admin.execute_command("ACL", "SETUSER", "default", "+xadd"),
    )
    await emitter.emit(_Order(stream=unique))
    await client.aclose()
    await admin.aclose()
    assert isinstance(out_of_memory, ConnectionError)
    assert isinstance(replica, ConnectionError)
    assert isinstance(forbidden, PermanentFailure)
    for error, word in ((out_of_memory, "memory"), (replica, "read only"), (forbidden, "permissions")):
        assert word in str(error)
        assert '"number"' not in str(error), "the payload is in the error"


async def test_timeout_of_one_emit_leaves_the_producer_usable(own_redis: Callable[..., OwnRedis], unique: str) -> None:
    """A broker that hangs for a second costs the emits of that second, nothing after it."""
    broker = await asyncio.to_thread(own_redis)
    async with connect(broker.url, timeout=0.3) as emitter:
        await emitter.emit(_Order(stream=unique))
        broker.pause()
        with pytest.raises(ProducerTimeout, match="may have been delivered"):
            await emitter.emit(_Order(stream=unique))
        broker.resume()
        async with asyncio.timeout(10):
            while True:
                try:
                    await emitter.emit(_Order(stream=unique))
                    break
                except ConnectionError:
                    await asyncio.sleep(0.05)
