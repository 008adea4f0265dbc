"""RabbitMQ: what arrives, what is refused, and what a user's own channel can know."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from dispytch_integrations import EventBase, EventEmitter, connect, event_id
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    HeaderError,
    NotStartedError,
    RouteError,
    StartupError,
    UnconfirmedError,
    UnroutableError,
    WrongLoopError,
)
from dispytch_integrations.rabbitmq import (
    RabbitMQBackend,
    RabbitMQEventConfig,
    RabbitMQEventRoute,
    RabbitMQOptions,
    RabbitMQProducer,
)
from tests.contract import Listen, MakeRoute, ProducerContract, Receive, Received


@pytest.fixture
async def channel(rabbitmq_url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of the raw client."""
    connection = await aio_pika.connect(rabbitmq_url)
    async with connection:
        yield await connection.channel()


async def _queue(channel: AbstractChannel, exchange: str, key: str = "#", kind: str = "topic") -> AbstractQueue:
    """An exchange, and a queue that gets what is published to it."""
    await channel.declare_exchange(exchange, kind, auto_delete=True)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, key)
    return queue


async def _next(queue: AbstractQueue, count: int = 1) -> list[AbstractIncomingMessage]:
    arrived: list[AbstractIncomingMessage] = []
    async with queue.iterator(no_ack=True) as messages:
        async for message in messages:
            arrived.append(message)
            if len(arrived) == count:
                break
    return arrived


class TestContract(ProducerContract):
    """RabbitMQ keeps every promise of a transport."""

    @pytest.fixture
    def url(self, rabbitmq_url: str) -> str:
        return rabbitmq_url

    @pytest.fixture
    def route(self) -> MakeRoute:
        return lambda destination: RabbitMQEventRoute(exchange=destination, routing_key="key")

    @pytest.fixture
    async def listen(self, channel: AbstractChannel) -> Listen:
        async def listen(emitter: EventEmitter, destination: str) -> Receive:
            queue = await _queue(channel, destination)

            async def receive(count: int) -> list[Received]:
                return [
                    Received(message.body, {name: str(value) for name, value in message.headers.items()})
                    for message in await _next(queue, count)
                ]

            return receive

        return listen


class _Color(Enum):
    RED = "red"


def _event(exchange: str, config: RabbitMQEventConfig | None = None, **route: Any) -> EventBase:
    class Placed(EventBase):
        __route__ = RabbitMQEventRoute(exchange=exchange, routing_key="placed.{order_id}", **route)
        __backend_config__ = config

        order_id: int = 1

    return Placed()


# -- dispytch's API ------------------------------------------------------------------------------------------------


async def test_example_of_dispytch_works_as_written(rabbitmq_url: str, channel: AbstractChannel, unique: str) -> None:
    """Moving from dispytch costs one import; the event must then really be there."""

    class UserEvent(EventBase):
        __route__ = RabbitMQEventRoute(
            exchange=unique,
            routing_key="user.email-changed",
        )

        user_id: str
        email: str

    connection = await aio_pika.connect(rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(unique, aio_pika.ExchangeType.DIRECT)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(exchange, "user.email-changed")

        producer = RabbitMQProducer([exchange], timeout=None)
        emitter = EventEmitter(producer)

        await emitter.emit(UserEvent(user_id="abc123", email="user@example.com"))
        [message] = await _next(queue)
        await exchange.delete()
    assert json.loads(message.body) == {"user_id": "abc123", "email": "user@example.com"}
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT


@pytest.mark.parametrize("raises", [True, False])
async def test_unroutable_on_a_channel_of_the_users_is_an_error(rabbitmq_url: str, unique: str, raises: bool) -> None:
    """aio-pika reports a message that nobody took as a success unless asked: that is how events vanish."""
    connection = await aio_pika.connect(rabbitmq_url)
    async with connection:
        channel = await connection.channel(on_return_raises=raises)
        exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
        emitter = EventEmitter(RabbitMQProducer([exchange]))
        with pytest.raises(UnroutableError, match=r"placed\.1"):
            await emitter.emit(_event(unique))
        await emitter.emit(_event(unique, mandatory=False))


async def test_what_is_no_exchange_is_refused_at_once(unique: str, channel: AbstractChannel) -> None:
    """A name instead of an exchange must not fail at the first event, in production."""
    exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
    with pytest.raises(ConfigurationError, match="got a str"):
        RabbitMQProducer([unique])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match=r"RabbitMQProducer\(\[exchange\]\)"):
        RabbitMQProducer(exchange)  # type: ignore[arg-type]
    internal = await channel.declare_exchange(f"{unique}-internal", "topic", auto_delete=True, internal=True)
    with pytest.raises(ConfigurationError, match="internal"):
        RabbitMQProducer([internal])


async def test_exchange_that_was_not_handed_over_is_refused(channel: AbstractChannel, unique: str) -> None:
    """The error names the exchange that is missing and those that are there."""
    exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
    emitter = EventEmitter(RabbitMQProducer([exchange]))
    with pytest.raises(UnroutableError, match=f"'elsewhere' was not handed .*'{unique}'"):
        await emitter.emit(_event("elsewhere"))


async def test_closed_channel_of_the_users_is_said(rabbitmq_url: str, unique: str) -> None:
    """After the connection is closed an emit fails with the reason, and does not hang."""
    for connecting in (aio_pika.connect, aio_pika.connect_robust):
        connection = await connecting(rabbitmq_url)
        channel = await connection.channel()
        exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
        emitter = EventEmitter(RabbitMQProducer([exchange]))
        await channel.close()
        with pytest.raises(BrokerUnavailableError, match="closed"):
            await emitter.emit(_event(unique))
        await connection.close()


async def test_channel_closed_by_the_user_does_not_cancel_the_emits_in_flight(rabbitmq_url: str, unique: str) -> None:
    """aiormq ends what is in flight with CancelledError, which would tear down the request's task group."""
    connection = await aio_pika.connect(rabbitmq_url)
    channel = await connection.channel()
    exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
    emitter = EventEmitter(RabbitMQProducer([exchange], timeout=0.5))
    emits = [asyncio.create_task(emitter.emit(_event(unique, mandatory=False))) for _ in range(200)]
    await asyncio.sleep(0)
    await connection.close()
    outcomes = await asyncio.gather(*emits, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), UnconfirmedError, BrokerUnavailableError}


async def test_send_can_be_called_directly(channel: AbstractChannel, unique: str) -> None:
    """A producer is usable without events, as in dispytch."""
    queue = await _queue(channel, unique)
    producer = RabbitMQProducer([await channel.get_exchange(unique)])
    await producer.send(
        b"raw", RabbitMQEventRoute(exchange=unique, routing_key="k"), RabbitMQEventConfig(priority=4, headers={"a": 1})
    )
    [message] = await _next(queue)
    assert (message.body, message.priority, message.headers) == (b"raw", 4, {"a": 1})
    with pytest.raises(UnroutableError):
        await producer.send(b"raw", RabbitMQEventRoute(exchange="other", routing_key="k"))


def test_producer_is_bound_to_its_loop(rabbitmq_url: str, unique: str) -> None:
    """A channel used from another loop hangs or corrupts its state; an error says so instead."""

    async def make() -> tuple[Any, EventEmitter]:
        connection = await aio_pika.connect(rabbitmq_url)
        channel = await connection.channel()
        exchange = await channel.declare_exchange(unique, "topic", auto_delete=True)
        emitter = EventEmitter(RabbitMQProducer([exchange]))
        await emitter.emit(_event(unique, mandatory=False))
        return connection, emitter

    async def misuse(emitter: EventEmitter) -> None:
        with pytest.raises(WrongLoopError, match="another event loop"):
            await emitter.emit(_event(unique, mandatory=False))

    with asyncio.Runner() as runner:
        connection, emitter = runner.run(make())
        with asyncio.Runner() as other:
            other.run(misuse(emitter))
        runner.run(connection.close())


# -- properties ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["managed", "borrowed"])
async def emitter(request: pytest.FixtureRequest, rabbitmq_url: str, unique: str) -> AsyncIterator[EventEmitter]:
    """An emitter over a managed connection, and one over a channel of the user's."""
    if request.param == "managed":
        async with connect(rabbitmq_url, cloudevents=False) as managed:
            yield managed
        return
    connection = await aio_pika.connect(rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        yield EventEmitter(RabbitMQProducer([await channel.declare_exchange(unique, "topic", auto_delete=True)]))


async def test_properties_arrive(emitter: EventEmitter, channel: AbstractChannel, unique: str) -> None:
    """Every property of dispytch's configuration reaches the consumer, `{field}` parts filled."""
    queue = await _queue(channel, unique)
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    config = RabbitMQEventConfig(
        delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT, priority=7, expiration=60, headers={"to": "{order_id}"},
        content_type="text/x", content_encoding="none", correlation_id="c{order_id}", reply_to="r", message_id="m",
        timestamp=moment, type="t", user_id="guest", app_id="shop",
    )  # fmt: skip
    await emitter.emit(_event(unique, config))
    [message] = await _next(queue)
    assert message.delivery_mode == 1
    assert message.priority == 7
    assert message.expiration == 60
    assert message.headers == {"to": "1"}
    assert (message.content_type, message.content_encoding) == ("text/x", "none")
    assert (message.correlation_id, message.reply_to, message.message_id) == ("c1", "r", "m")
    assert message.timestamp == moment
    assert (message.type, message.user_id, message.app_id) == ("t", "guest", "shop")


@pytest.mark.parametrize(
    ("expiration", "seconds"),
    [
        (2, 2.0),
        (1.5, 1.5),
        (timedelta(minutes=1), 60.0),
        (lambda: datetime.now(UTC) + timedelta(seconds=90), 90.0),
        (lambda: datetime.now() + timedelta(seconds=90), 90.0),
    ],
)
async def test_expiration_takes_every_type_of_time(
    emitter: EventEmitter, channel: AbstractChannel, unique: str, expiration: Any, seconds: float
) -> None:
    """Seconds, not milliseconds: off by a thousand, events would expire before they are read."""
    queue = await _queue(channel, unique)
    value: Any = expiration() if callable(expiration) else expiration
    await emitter.emit(_event(unique, RabbitMQEventConfig(expiration=value)))
    [message] = await _next(queue)
    assert message.expiration is not None
    assert seconds - 5 <= float(message.expiration) <= seconds  # type: ignore[arg-type]


@pytest.mark.parametrize("timestamp", [1767323045, 1767323045.7, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)])
async def test_timestamp_takes_every_type_of_time(
    emitter: EventEmitter, channel: AbstractChannel, unique: str, timestamp: Any
) -> None:
    """A timestamp is a moment, however it is written."""
    queue = await _queue(channel, unique)
    await emitter.emit(_event(unique, RabbitMQEventConfig(timestamp=timestamp)))
    [message] = await _next(queue)
    assert message.timestamp == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


async def test_headers_keep_the_types_that_amqp_knows(
    emitter: EventEmitter, channel: AbstractChannel, unique: str
) -> None:
    """A headers exchange matches by type and value; and a UUID must not raise, as it does in aio-pika."""
    queue = await _queue(channel, unique)
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    uuid = UUID("0b0ff5a0-5d0f-4b23-a0b5-2b1f26a3c111")
    given = {
        "int": 3, "big": 2**40, "negative": -5, "float": 0.5, "bool": True, "bytes": b"\x00\xff", "moment": moment,
        "decimal": Decimal("1.25"), "list": [1, uuid, "x"], "dict": {"a": {"b": _Color.RED}}, "uuid": uuid,
        "enum": _Color.RED, "huge": Decimal("123456789012.5"),
    }  # fmt: skip
    await emitter.emit(_event(unique), headers=given)
    [message] = await _next(queue)
    assert dict(message.headers) == {
        **given, "bytes": bytearray(b"\x00\xff"), "list": [1, str(uuid), "x"], "dict": {"a": {"b": "red"}},
        "uuid": str(uuid), "enum": "red", "huge": "123456789012.5",
    }  # fmt: skip
    with pytest.raises(HeaderError, match="64 bits"):
        await emitter.emit(_event(unique), headers={"n": 2**63})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")], {"ratio": float("nan")}])
async def test_float_that_is_no_number_is_refused(
    emitter: EventEmitter, channel: AbstractChannel, unique: str, value: object
) -> None:
    """RabbitMQ closes the connection for one, and with it everybody's events: it must not get there."""
    queue = await _queue(channel, unique)
    with pytest.raises(HeaderError, match=r"'ratio'.*give it as str"):
        await emitter.emit(_event(unique), headers={"ratio": value})
    await emitter.emit(_event(unique))
    assert len(await _next(queue)) == 1


@pytest.mark.parametrize("headers", [{"n" * 129: "x"}, {"nested": {"n" * 129: "x"}}])
async def test_header_with_a_name_that_is_too_long_is_refused(
    emitter: EventEmitter, channel: AbstractChannel, unique: str, headers: dict[str, Any]
) -> None:
    """pamqp cuts it after 128 bytes without a word: consumers would look for it in vain."""
    await _queue(channel, unique)
    with pytest.raises(HeaderError, match="AMQP allows 128"):
        await emitter.emit(_event(unique), headers=headers)


async def test_times_before_1970_keep_their_value(emitter: EventEmitter, channel: AbstractChannel, unique: str) -> None:
    """A date of birth must not arrive as 1970-01-01, which is what AMQP's unsigned seconds make of it."""
    queue = await _queue(channel, unique)
    await emitter.emit(_event(unique), headers={"born": datetime(1960, 2, 3, tzinfo=UTC)})
    [message] = await _next(queue)
    assert message.headers["born"] == "1960-02-03T00:00:00+00:00"
    with pytest.raises(RouteError, match="timestamp is before 1970"):
        await emitter.emit(_event(unique, RabbitMQEventConfig(timestamp=datetime(1960, 2, 3, tzinfo=UTC))))


async def test_time_without_a_zone_is_in_utc(
    emitter: EventEmitter, channel: AbstractChannel, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same value must not mean two moments, one in a header and one in the timestamp, on a machine in New York."""
    queue = await _queue(channel, unique)
    naive = datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        await emitter.emit(_event(unique, RabbitMQEventConfig(timestamp=naive)), headers={"at": naive})
    finally:
        monkeypatch.undo()
        time.tzset()
    [message] = await _next(queue)
    assert message.timestamp == message.headers["at"] == naive.replace(tzinfo=UTC)


async def test_events_are_persistent_by_default(emitter: EventEmitter, channel: AbstractChannel, unique: str) -> None:
    """aio-pika's default is transient: a restarted broker would have lost what it had confirmed."""
    queue = await _queue(channel, unique)
    await emitter.emit(_event(unique))
    await emitter.emit(_event(unique, RabbitMQEventConfig(priority=1)))
    assert [message.delivery_mode for message in await _next(queue, 2)] == [2, 2]


async def test_same_message_id_in_flight_is_told_apart(
    emitter: EventEmitter, channel: AbstractChannel, unique: str
) -> None:
    """Returned messages are recognised by message_id: two with the same one would pass for delivered."""
    queue = await _queue(channel, unique, "placed.1")

    class Placed(EventBase):
        __route__ = RabbitMQEventRoute(exchange=unique, routing_key="placed.{order_id}")
        __backend_config__ = RabbitMQEventConfig(message_id="same")

        order_id: int

    outcomes = await asyncio.gather(
        *(emitter.emit(Placed(order_id=1 + number % 2)) for number in range(60)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), UnroutableError] * 30
    assert len(await _next(queue, 30)) == 30


# -- routes --------------------------------------------------------------------------------------------------------


async def test_default_exchange_leads_to_a_queue(rabbitmq_url: str, channel: AbstractChannel) -> None:
    """Work queues are addressed by name, without an exchange of their own; a prefix leaves the queue's name alone."""
    queue = await channel.declare_queue(exclusive=True)

    class Job(EventBase):
        __route__ = RabbitMQEventRoute(exchange="", routing_key=queue.name)

    async with connect(rabbitmq_url, prefix="staging.") as emitter:
        await emitter.emit(Job())
    [message] = await _next(queue)
    assert message.exchange == ""


async def test_unroutable_is_an_error_unless_it_may_be(rabbitmq_url: str, unique: str) -> None:
    """An event that no queue takes is lost: only who wrote mandatory=False does not mind."""
    async with connect(rabbitmq_url, exchanges={unique: {"type": "topic", "auto_delete": True}}) as emitter:
        with pytest.raises(UnroutableError, match=r"'placed\.1'.*mandatory=False"):
            await emitter.emit(_event(unique))
        await emitter.emit(_event(unique, mandatory=False))
        with pytest.raises(ExceptionGroup) as caught:
            await emitter.emit_many([_event(unique), _event(unique, mandatory=False), _event(unique)])
        assert [type(error) for error in caught.value.exceptions] == [UnroutableError, UnroutableError]


def test_names_that_are_too_long_are_refused_before_sending() -> None:
    """AMQP's short strings have 255 bytes; the client would raise in the middle of a connection."""
    with pytest.raises(RouteError, match="256 bytes"):
        RabbitMQEventRoute.check_address("ü" * 128, {"routing_key": ""})
    with pytest.raises(RouteError, match="routing_key"):
        RabbitMQEventRoute.check_address("", {"routing_key": "k" * 256})
    RabbitMQEventRoute.check_address("e" * 255, {"routing_key": "k" * 255})
    with pytest.raises(RouteError, match="correlation_id"):
        RabbitMQEventRoute.encode_properties({"correlation_id": "c" * 256})


@pytest.mark.parametrize("wrong", [{"priority": 256}, {"delivery_mode": 3}, {"expiration": -1}, {"unknown": 1}])
def test_configuration_is_checked_where_it_is_written(wrong: dict[str, Any]) -> None:
    """A priority of 300 should fail at import, not at the first event."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RabbitMQEventConfig(**wrong)


# -- connections ---------------------------------------------------------------------------------------------------


async def test_exchanges_are_declared_at_the_start(rabbitmq_url: str, channel: AbstractChannel, unique: str) -> None:
    """A fresh broker has no exchanges: the app brings its own, durable, with the prefix."""
    async with connect(rabbitmq_url, exchanges={unique: "fanout"}, prefix="staging."):
        exchange = await channel.declare_exchange(f"staging.{unique}", "fanout", durable=True)
    await exchange.delete()


async def test_exchange_declared_otherwise_is_said_at_the_start(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """Another service declared it with another type: the error names the exchange, at start-up and not later."""
    await _queue(channel, unique, kind="direct")
    with pytest.raises(ConfigurationError, match=f"'{unique}' cannot be declared.*inequivalent arg 'type'"):
        async with connect(rabbitmq_url, exchanges={unique: "topic"}):
            pass
    async with connect(rabbitmq_url, exchanges={unique: None}):
        pass
    with pytest.raises(ConfigurationError, match=r"exchange type 'x-other'; write 'direct', .*enable the plugin"):
        async with connect(rabbitmq_url, exchanges={unique + "-other": "x-other"}):
            pass


async def test_checked_exchange_that_is_missing_is_said_at_the_start(rabbitmq_url: str, unique: str) -> None:
    """An exchange of a partner's is not ours to declare, but its absence should be known before the first event."""
    with pytest.raises(StartupError, match=f"no exchange '{unique}'"):
        async with connect(rabbitmq_url, exchanges={unique: None}, startup_timeout=0.5):
            pass


async def test_wrong_password_is_a_configuration_error_without_the_password(rabbitmq_url: str) -> None:
    """Thirty seconds of retries help nobody, and the password must not end up in a log."""
    port = BrokerURL.parse(rabbitmq_url).hosts[0][1]
    with pytest.raises(ConfigurationError, match="refuses the user 'guest'") as caught:
        async with connect(f"rabbitmq://guest:hunter2@127.0.0.1:{port}"):
            pass
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.__cause__)


async def test_missing_vhost_is_a_configuration_error(rabbitmq_url: str, unique: str) -> None:
    """The path of the URL is a virtual host; a typing error there should be named."""
    port = BrokerURL.parse(rabbitmq_url).hosts[0][1]
    with pytest.raises(ConfigurationError, match=f"virtual host '{unique}/x'"):
        async with connect(f"amqp://127.0.0.1:{port}/{unique}%2Fx"):
            pass


async def test_password_is_read_again_at_each_start(rabbitmq_url: str, tmp_path: Path) -> None:
    """Secrets are rotated while the app lives."""
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    url = BrokerURL.parse(rabbitmq_url.replace("guest:guest@", "", 1))
    backend = RabbitMQBackend(url, RabbitMQOptions(username="guest", password=secret), {})
    with pytest.raises(ConfigurationError, match="refuses"):
        await backend.start()
    assert "wrong" in backend.secrets
    secret.write_text("guest\n")
    await backend.start()
    await backend.ping()
    await backend.stop()


async def test_second_host_is_taken_when_the_first_refuses(rabbitmq_url: str) -> None:
    """A cluster has several nodes; one that is down must not keep the app from starting."""
    port = BrokerURL.parse(rabbitmq_url).hosts[0][1]
    async with connect(f"rabbitmq://127.0.0.1:1,127.0.0.1:{port}") as emitter:
        await emitter.ping()


async def test_options_of_the_client_reach_it(rabbitmq_url: str) -> None:
    """Who knows aio-pika's options need not learn ours."""
    async with connect(rabbitmq_url, heartbeat=7, name="shop", client={"timeout": 3.0}) as emitter:
        connection = emitter.producers["default"].link._connection  # type: ignore[attr-defined]
        assert connection.heartbeat_timeout == 7
        assert connection.connection_name == "shop"
    with pytest.raises(ConfigurationError, match=r"'hartbeat' \(did you mean 'heartbeat'\?\)"):
        async with connect(rabbitmq_url, hartbeat=7):
            pass


@pytest.mark.parametrize(
    ("url", "wrong", "says"),
    [
        ("rabbitmq://127.0.0.1:1", {"client_properties": "abc"}, "client_properties is of type str; write one of"),
        ("rabbitmq://127.0.0.1:1", {"heartbeat": "abc"}, "heartbeat is of type str; write a number"),
        ("rabbitmq://127.0.0.1:1?heartbeat=7.5", {}, "write whole seconds"),
        ("rabbitmq://127.0.0.1:1", {"client": {"timeout": "abc"}}, "timeout is of type str; write a number"),
        ("rabbitmq://127.0.0.1:1", {"exchanges": {"": None}}, "always there.*leave it out"),
        ("rabbitmq://127.0.0.1:1", {"auth": "krb"}, "auth='krb' is not known.*plain"),
        ("amqps://127.0.0.1:1", {"cafile": "/nope"}, "cafile: there is no file '/nope'"),
        ("amqps://127.0.0.1:1?certfile=/nope", {}, "certfile: there is no file"),
        ("amqps://127.0.0.1:1", {"cafile": Path(__file__)}, "cannot be loaded.*check cafile"),
        ("amqps://127.0.0.1:1", {"cadata": "a"}, "cadata .base64."),
    ],
)
async def test_wrong_option_is_no_outage(url: str, wrong: dict[str, Any], says: str) -> None:
    """Trying it again for 30 s is of no use, and "cannot connect" would send people looking at the network."""
    with pytest.raises(ConfigurationError, match=says):
        await asyncio.wait_for(connect(url, **wrong).start(), 2)


@pytest.mark.parametrize(
    "option",
    [
        {"cafile": "/ca.pem"},
        {"certfile": "/cert.pem", "keyfile": "/key.pem"},
        {"cadata": "abc"},
        {"no_verify_ssl": True},
        {"ssl_context": ssl.create_default_context()},
    ],
)
def test_options_of_tls_are_refused_where_nothing_is_encrypted(option: dict[str, Any]) -> None:
    """Who gives certificates means TLS: a password must not go over the network in plain text because of a scheme."""
    for scheme in ("rabbitmq", "amqp"):
        with pytest.raises(ConfigurationError, match=f"{', '.join(option)} would go unused; write amqps://"):
            RabbitMQBackend(BrokerURL.parse(f"{scheme}://h"), RabbitMQOptions(), option)
    RabbitMQBackend(BrokerURL.parse("amqps://h"), RabbitMQOptions(), option)


async def test_nothing_is_left_after_the_close(rabbitmq_url: str, unique: str) -> None:
    """A worker that reloads its app a hundred times must not collect a hundred half-dead connections."""
    for _ in range(3):
        async with connect(rabbitmq_url) as emitter:
            with pytest.raises(UnroutableError):
                await emitter.emit(_event(unique))
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_producer_refuses_before_start_and_after_stop(rabbitmq_url: str, unique: str) -> None:
    """The backend's producer is one object: it says so instead of hanging, and works again after a second start."""
    backend = RabbitMQBackend(BrokerURL.parse(rabbitmq_url), RabbitMQOptions(), {})
    emitter = EventEmitter(backend.producer)
    for _ in range(2):
        with pytest.raises(NotStartedError):
            await emitter.emit(_event(unique))
        with pytest.raises(NotStartedError):
            await backend.ping()
        await backend.start()
        await backend.ping()
        with pytest.raises(UnroutableError):
            await emitter.emit(_event(unique))
        await backend.stop()
        await backend.stop()


async def test_nack_is_an_error(rabbitmq_url: str, channel: AbstractChannel, unique: str) -> None:
    """A full queue that rejects what comes is a delivery that failed."""
    await channel.declare_exchange(unique, "topic", auto_delete=True)
    queue = await channel.declare_queue(exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    await queue.bind(unique, "#")
    async with connect(rabbitmq_url) as emitter:
        await emitter.emit(_event(unique))
        outcomes = await asyncio.gather(*(emitter.emit(_event(unique)) for _ in range(20)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert refused
    assert all(type(error) is DeliveryError and "was not taken: refused" in str(error) for error in refused)


async def test_emitting_again_keeps_the_event_and_changes_the_message(
    rabbitmq_url: str, channel: AbstractChannel, unique: str
) -> None:
    """The event's id tells duplicates; the AMQP message_id is the attempt's, so that returns are never mixed up."""
    queue = await _queue(channel, unique)
    event = _event(unique)
    async with connect(rabbitmq_url) as emitter:
        await emitter.emit(event)
        await emitter.emit(event)
    first, second = await _next(queue, 2)
    assert first.headers["cloudEvents_id"] == second.headers["cloudEvents_id"] == event_id(event)
    assert first.message_id != second.message_id


def test_import_needs_no_client() -> None:
    """Routes are declared where events are: a service that only shares the classes needs no driver."""
    code = (
        "import sys; sys.modules['aio_pika'] = sys.modules['aiormq'] = None\n"
        "from dispytch_integrations.rabbitmq import *\n"
        "from dispytch_integrations.errors import MissingExtraError\n"
        "RabbitMQEventRoute(exchange='', routing_key='q')\n"
        "try: RabbitMQProducer([])\n"
        "except MissingExtraError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "RabbitMQProducer needs aio-pika: pip install 'dispytch-integrations[rabbitmq]'"
