"""RabbitMQ: route, configuration, producer, and the connection that `connect("rabbitmq://...")` manages.

Every message is confirmed by the broker, persistent unless said otherwise, and an error when no queue takes it.
Routes need no client library; the producer and the backend need the extra `rabbitmq`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from importlib import import_module
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dispytch_integrations._missing import is_missing
from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL, Secret
from dispytch_integrations.errors import (
    ConfigurationError,
    DispytchError,
    MissingExtraError,
    NotStartedError,
    ProducerTimeout,
    RouteError,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.events import BackendConfig, EventRoute, header_text
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

if TYPE_CHECKING:
    from aio_pika.abc import AbstractExchange

    from dispytch_integrations._rabbitmq_connection import Dialer
    from dispytch_integrations._rabbitmq_exchanges import Exchange
    from dispytch_integrations._rabbitmq_link import Link

__all__ = [
    "ExchangeOptions",
    "RabbitMQBackend",
    "RabbitMQEventConfig",
    "RabbitMQEventRoute",
    "RabbitMQOptions",
    "RabbitMQProducer",
]

_SEND_TIMEOUT = 5.0
_SHORT = 255
"""Bytes of an AMQP short string: names of exchanges, routing keys, most properties."""
_SHORT_PROPERTIES = (
    "content_type", "content_encoding", "correlation_id", "reply_to", "message_id", "type", "user_id", "app_id",
)  # fmt: skip


class RabbitMQEventConfig(BackendConfig):
    """Properties of an AMQP message. Strings may hold `{field}` parts; None leaves a property out."""

    delivery_mode: int | None = Field(default=None, ge=1, le=2)
    """2 (aio_pika's `DeliveryMode.PERSISTENT`): kept on disk by durable queues; 1: not. None: 2."""
    priority: int | None = Field(default=None, ge=0, le=255)
    """For queues that were declared with `x-max-priority`."""
    expiration: int | float | datetime | timedelta | None = None
    """How long a queue keeps it: seconds, a timedelta, or the moment until which (without a time zone:
    in this machine's local time, as `datetime.now()` gives it). None: without end."""
    headers: dict[str, Any] | None = None
    """Metadata beside the body: str, numbers, bool, bytes, datetime, Decimal, lists and dicts keep their type.

    A datetime without a time zone is one in UTC. Floats that are infinite or no number are refused.
    """
    content_type: str | None = None
    """Media type of the body; None: the serializer's."""
    content_encoding: str | None = None
    """What the body is compressed with, if it is; nothing is compressed here."""
    correlation_id: str | None = None
    """What this message answers, or whatever the application ties together with it."""
    reply_to: str | None = None
    """Where answers are expected, usually a queue's name."""
    message_id: str | None = None
    """Id of the AMQP message; None: a fresh one for each attempt. The event's own id is in its headers.

    Messages with the same id are sent one after the other: returned ones are told apart by it.
    """
    timestamp: int | float | datetime | timedelta | None = None
    """When it was made: seconds of the epoch, a moment (without a time zone: in UTC), or a timedelta from now. In
    whole seconds."""
    type: str | None = None
    """AMQP's property `type`, free for the application; the event's type is in its headers."""
    user_id: str | None = None
    """The user of the connection: RabbitMQ refuses any other."""
    app_id: str | None = None
    """Name of the application."""

    @field_validator("expiration")
    @classmethod
    def _not_negative(cls, value: object) -> object:
        seconds = value.total_seconds() if isinstance(value, timedelta) else value
        if isinstance(seconds, (int, float)) and not 0 <= seconds < 2**32 / 1000:
            raise ValueError("expiration is in seconds, from 0 to 49 days")
        if isinstance(value, datetime):
            _seconds_of(value)
        return value

    @field_validator("timestamp")
    @classmethod
    def _fits_64_bits(cls, value: object) -> object:
        if isinstance(value, (int, float)) and not -(2**63) < value < 2**63:
            raise ValueError("timestamp is in seconds since 1970, and of 64 bits")
        return value


class RabbitMQEventRoute(EventRoute):
    """An exchange and a routing key.

        __route__ = RabbitMQEventRoute(exchange="user.events", routing_key="user.{user_id}.email-changed")

    The default exchange, exchange="", leads to the queue that the routing key names. A broker's `prefix` goes in front
    of the exchange's name, not of the routing key: with the default exchange write it there yourself.
    """

    transport: ClassVar[str] = "rabbitmq"
    destination_field: ClassVar[str | None] = "exchange"
    config_type: ClassVar[type[BackendConfig]] = RabbitMQEventConfig
    supports_headers: ClassVar[bool] = True
    cloudevents_prefix: ClassVar[str] = "cloudEvents_"
    content_type_header: ClassVar[str | None] = None  # AMQP has a property for it.

    exchange: str
    """Name of the exchange, up to 255 bytes."""
    routing_key: str
    """What the exchange routes by, up to 255 bytes; empty where it does not (fanout, headers)."""
    mandatory: bool = True
    """Is it an UnroutableError when no queue takes it? False: the broker drops it then, and nobody knows."""

    @classmethod
    def check_address(cls, destination: str, properties: dict[str, Any]) -> None:
        """Raise RouteError when a name is longer than AMQP allows."""
        for what, text in (("exchange", destination), ("routing_key", properties.get("routing_key", ""))):
            # A character has at most four bytes: most texts need not be encoded to be measured.
            if len(text) * 4 > _SHORT and len(text.encode()) > _SHORT:
                raise RouteError(
                    f"the {what} {text[:40]!r}... has {len(text.encode())} bytes; AMQP allows {_SHORT}, shorten it"
                )

    @classmethod
    def encode_properties(cls, properties: dict[str, Any]) -> str | None:
        """Times as numbers: `expiration` in milliseconds as text, or `expires_at` and `timestamp` in epoch seconds.

        Raises RouteError for a property that is longer than AMQP allows, or a time before 1970.
        """
        for name in _SHORT_PROPERTIES:
            text = properties.get(name)
            if text is not None and len(text) * 4 > _SHORT and len(text.encode()) > _SHORT:
                raise RouteError(f"the property {name} has {len(text.encode())} bytes; AMQP allows {_SHORT}")
        expiration = properties.get("expiration")
        if isinstance(expiration, datetime):
            del properties["expiration"]
            # Of a naive one that is by this machine's clock, as in aio-pika: what datetime.now() gives, plus something.
            properties["expires_at"] = _seconds_of(expiration)
        elif isinstance(expiration, (int, float, timedelta)):
            seconds = expiration.total_seconds() if isinstance(expiration, timedelta) else expiration
            properties["expiration"] = str(int(seconds * 1000))
        timestamp = properties.get("timestamp")
        if isinstance(timestamp, datetime):
            properties["timestamp"] = int(_in_utc(timestamp).timestamp())
        elif isinstance(timestamp, timedelta):
            properties["timestamp"] = int(time.time() + timestamp.total_seconds())
        elif timestamp is not None:
            properties["timestamp"] = int(timestamp)
        if properties.get("timestamp", 0) < 0:
            raise RouteError("the property timestamp is before 1970, which AMQP does not know; put it into a header")
        if "delivery_mode" in properties:
            properties["delivery_mode"] = int(properties["delivery_mode"])
        return None

    @classmethod
    def encode_header(cls, value: Any) -> Any:
        """Types that AMQP knows stay what they are; UUIDs, dates and enums become text.

        A datetime without a time zone is one in UTC; one before 1970 becomes text (ISO 8601).
        Raises TypeError, for a float that is no number or infinite, too.
        """
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, bool) or value is None or isinstance(value, (str, bytes)):
            return value
        if isinstance(value, float):
            if not isfinite(value):
                raise TypeError(
                    f"for the float {value} RabbitMQ closes the connection; give it as str, or leave it out"
                )
            return value
        if isinstance(value, datetime):
            moment = _in_utc(value)
            return moment if moment.timestamp() >= 0 else moment.isoformat()
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise TypeError("an int of more than 64 bits is not known to AMQP; give it as str")
            return value
        if isinstance(value, Decimal):
            # AMQP's decimals have 32 bits; others travel as text rather than with other digits.
            exponent = value.as_tuple().exponent
            small = isinstance(exponent, int) and -9 <= exponent <= 0 and abs(value.scaleb(-exponent)) < 2**31
            return value if small else str(value)
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if isinstance(value, Mapping):
            items = cast("Mapping[str, Any]", value).items()
            return {_encodable(str(name)): _encodable(cls.encode_header(item)) for name, item in items}
        if isinstance(value, (list, tuple)):
            return [_encodable(cls.encode_header(item)) for item in cast("Sequence[object]", value)]
        return header_text(value)


def _seconds_of(moment: datetime) -> float:
    """Seconds since 1970. Raises ValueError for a moment at the very ends of the calendar, which has none."""
    try:
        return moment.timestamp()
    except (OSError, OverflowError) as exc:
        raise ValueError(f"{moment} has no time in seconds: {exc}") from exc


def _encodable(value: Any) -> Any:
    """What stands within a header, as it is. Raises UnicodeEncodeError, a ValueError, for half a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    return value


def _in_utc(moment: datetime) -> datetime:
    """`moment`, with UTC where it has no time zone."""
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


class _RabbitMQProducer(Producer):
    """What both producers have in common."""

    routes: ClassVar[tuple[type[EventRoute], ...]] = (RabbitMQEventRoute,)

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Send one payload; return when the broker has confirmed, within `timeout` (5 s unless set).

        Raises RouteError for a route or configuration of another transport, and what an emit raises.
        """
        if not isinstance(route, RabbitMQEventRoute):
            raise RouteError(f"no RabbitMQ producer takes a {type(route).__name__}; use a RabbitMQEventRoute")
        if config is not None and not isinstance(config, RabbitMQEventConfig):
            raise RouteError(f"a RabbitMQEventRoute goes with a RabbitMQEventConfig, not a {type(config).__name__}")
        properties: dict[str, Any] = {"routing_key": route.routing_key, "mandatory": route.mandatory}
        route.check_address(route.exchange, properties)
        headers: dict[str, Any] = {}
        if config is not None:
            given = config.__dict__.items()
            properties |= {name: value for name, value in given if value is not None and name != "headers"}
            headers = {name: route.encode_header(value) for name, value in (config.headers or {}).items()}
            route.encode_properties(properties)
        message = Message(
            None, "", "default", route.exchange, None, headers, properties, payload, "application/octet-stream"
        )
        timeout = _SEND_TIMEOUT if self.timeout is None else self.timeout
        outcome = (await self.deliver((message,), timeout=timeout))[0]
        if outcome is not None:
            raise outcome


class RabbitMQProducer(_RabbitMQProducer):
    """Publishes to exchanges of yours, from aio-pika.

        exchange = await channel.declare_exchange("user.events", "topic", durable=True)
        emitter = EventEmitter(RabbitMQProducer([exchange]))

    `timeout`: seconds for one emit; None: the emitter's. Connection and channel stay yours. Open the channel with
    publisher confirms, as aio-pika does by default: without them a lost event goes unnoticed. A robust channel that is
    being restored is waited for; an emit whose connection is cut is reported, not repeated, unlike with `connect`.

    Raises ConfigurationError for what is no exchange of aio-pika, MissingExtraError without aio-pika.
    """

    def __init__(self, exchanges: Sequence[AbstractExchange], timeout: float | None = None) -> None:
        _require_aio_pika("RabbitMQProducer")
        from dispytch_integrations._rabbitmq_borrowed import Borrowed

        self._borrowed = Borrowed(exchanges)
        self.timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Publish messages, pipelined, in order. See Producer.deliver. Raises WrongLoopError, WrongProcessError."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._pid = loop, os.getpid()
        elif loop is not self._loop or self._pid != os.getpid():
            raise _wrong_place("this RabbitMQProducer and its channel", self._pid)
        outcomes: list[Exception | None] = []
        limit = self._deadlines.limit(timeout)
        try:
            with limit:
                if len(messages) == 1:
                    outcomes.append(await self._borrowed.publish(messages[0]))
                else:
                    await self._borrowed.publish_all(messages, outcomes)
        except TimeoutError:
            if not limit.expired:
                raise
            outcomes += [
                ProducerTimeout(f"{message!r} was not confirmed within {timeout} s: it may have been delivered")
                for message in messages[len(outcomes) :]
            ]
        return outcomes


class _ManagedProducer(_RabbitMQProducer):
    """The producer of a backend: refuses until its connection is there."""

    def __init__(self) -> None:
        self.link: Link | None = None

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Send messages; see Producer.deliver. Raises NotStartedError, WrongLoopError, WrongProcessError."""
        link = self.link
        if link is None:
            raise NotStartedError(
                "the connection to RabbitMQ is not open: emit inside `async with connect(...) as emitter:`, or after "
                "the app's lifespan has started and before it ends"
            )
        if asyncio.get_running_loop() is not link.loop:
            raise _wrong_place("this connection to RabbitMQ", link.pid)
        return await link.deliver(messages, timeout)


def _wrong_place(what: str, pid: int) -> DispytchError:
    if pid != os.getpid():
        return WrongProcessError(
            f"{what} was used in process {pid}, before a fork; open one in this process, after the fork"
        )
    return WrongLoopError(
        f"{what} belongs to another event loop; emit on the loop that opened it, or use connect_blocking() from threads"
    )


def _require_aio_pika(what: str) -> None:
    try:
        import_module("aio_pika")
    except ModuleNotFoundError as exc:
        if not is_missing(exc, "aio_pika"):
            raise
        raise MissingExtraError(what, extra="rabbitmq", package="aio-pika") from exc


class ExchangeOptions(BaseModel):
    """How an exchange is declared, where its type is not enough.

    exchanges={"user.events": {"type": "topic", "durable": False}}
    """

    model_config = ConfigDict(extra="forbid")

    type: str
    """What it routes by: "direct", "fanout", "topic", "headers", or what a plugin brings."""
    durable: bool = True
    """Does it survive a restart of the broker? Default: yes."""
    auto_delete: bool = False
    """Does it go when its last queue is unbound? Default: no."""
    arguments: dict[str, Any] = {}
    """The broker's own: {"alternate-exchange": "unrouted"}."""


_TYPES = ("direct", "fanout", "topic", "headers")
"""Those that RabbitMQ brings. Plugins have others."""
_EXCHANGE = "a type ('topic'), a mapping ({'type': 'topic', 'durable': False}), or None if it is declared elsewhere"


def _wrong_exchange(given: object) -> str:
    """What is wrong with an exchange of the settings; nothing, if nothing is."""
    if isinstance(given, str):
        return _wrong_type(given)
    if given is None or isinstance(given, ExchangeOptions):
        return ""
    if not isinstance(given, Mapping):
        return f"is of type {type(given).__name__}; write {_EXCHANGE}"
    options, known = cast("Mapping[object, object]", given), list(ExchangeOptions.model_fields)
    told = [f"has the unknown option {name!r}{nearest(str(name), known)}" for name in options if name not in known]
    if "type" not in options:
        told.append("has no type (write 'type': 'topic')")
    elif isinstance(kind := options["type"], str) and (wrong := _wrong_type(kind)):
        told.append(wrong)
    try:
        ExchangeOptions.model_validate({"type": "topic", **{name: options[name] for name in known if name in options}})
    except ValidationError as exc:
        told += [
            f"has a wrong {error['loc'][0]}: {error['msg']}"
            for error in exc.errors(include_url=False, include_input=False)
        ]
    return ", ".join(told)


def _wrong_type(kind: str) -> str:
    """A misspelt type; one that is quite another may be a plugin's."""
    near = "" if kind in _TYPES else nearest(kind.lower(), _TYPES)
    return f"has the unknown type {kind!r}{near}" if near else ""


def _no_exchanges() -> dict[str, str | ExchangeOptions | None]:
    return {}


class RabbitMQOptions(BrokerOptions):
    """Options of `rabbitmq://`, beside those of the client.

    The client's, in short: `heartbeat` (seconds, default 15), `name` (of the connection, as the broker's pages show
    it), `ssl_context`, `cafile`, `certfile`, `keyfile`, `no_verify_ssl`, `auth`, `client_properties`,
    `happy_eyeballs_delay`, `local_addr`; `client={"timeout": 10.0}` bounds one attempt to connect.
    """

    username: str | None = None
    """User; None: "guest". The URL's comes before it."""
    password: Secret | None = Field(default=None, repr=False)
    """Text, a file's Path, or a function, both read again for each new connection; None: "guest". As `username`."""
    exchanges: Mapping[str, str | ExchangeOptions | None] = Field(default_factory=_no_exchanges)
    """Exchanges to declare at the start and after each lost connection, by name: a type ("topic"), ExchangeOptions as
    a mapping, or None to have one only looked for. `prefix` goes in front of the names. Others are looked for before
    their first use."""
    max_in_flight: int = Field(default=1000, ge=1, le=65535)
    """Messages sent and not yet confirmed; more than that wait for their turn. Default 1000."""
    reconnect_interval: float = Field(default=0.1, gt=0)
    """Seconds between the first two attempts to connect again; doubled up to 5, spread by a quarter. Default 0.1."""

    @field_validator("exchanges", mode="before")
    @classmethod
    def _exchanges_are_told_of(cls, value: object) -> object:
        """One line for what is wrong, where pydantic would have one for each thing it might have been."""
        if not isinstance(value, Mapping):
            name = value if isinstance(value, str) else "orders"
            raise ValueError(
                f"it is of type {type(value).__name__}; write a mapping from names to types, such as "
                f"exchanges={{{name!r}: 'topic'}}, or None in place of the type if it is declared elsewhere"
            )
        problems = [
            f"{name!r} {told}"
            for name, given in cast("Mapping[object, object]", value).items()
            if (told := _wrong_exchange(given))
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return cast("object", value)


class RabbitMQBackend(Backend):
    """A connection to RabbitMQ, with one confirmed channel.

        rabbitmq://user:password@host:5672/vhost        also amqp://; amqps:// with TLS (port 5671)
        rabbitmq://node1,node2,node3/vhost              tried in turn

    What is in flight when the connection is lost, or when the broker closes the channel because of somebody else's
    message, is sent again within its deadline, under the same event id.
    """

    transport: ClassVar[str] = "rabbitmq"
    options_type: ClassVar[type[BrokerOptions]] = RabbitMQOptions
    modules: ClassVar[tuple[str, ...]] = (
        "dispytch_integrations._rabbitmq_exchanges",
        "dispytch_integrations._rabbitmq_link",
    )

    def __init__(self, url: BrokerURL, options: RabbitMQOptions, client_options: Mapping[str, Any]) -> None:
        self.require_client()
        self._url = url
        self._options = options
        self._client_options = dict(client_options)
        self._producer = _ManagedProducer()
        self.producer: Producer = self._producer
        self._dialer: Dialer | None = None
        from dispytch_integrations._rabbitmq_connection import option_problems

        problems = list(option_problems(url, self._client_options))
        if "" in options.exchanges:
            problems.append(
                "exchanges: the default exchange '' is always there, and nobody may declare it; leave it out"
            )
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def require_client(cls) -> None:
        """Raise MissingExtraError without aio-pika."""
        _require_aio_pika("rabbitmq://")

    @classmethod
    def advice_for(cls, url: BrokerURL, name: str) -> str:
        """aiormq takes no password for a key."""
        if name != "keyfile_password":
            return ""
        return "the client takes none: load the key into an ssl.SSLContext, and write ssl_context=..."

    @classmethod
    def client_option_names(cls, url: BrokerURL) -> Mapping[str, Any]:
        """The options of aio-pika's and aiormq's connections, with their defaults."""
        from dispytch_integrations._rabbitmq_connection import CLIENT_OPTIONS

        return CLIENT_OPTIONS

    async def start(self) -> None:
        """Connect, declare the exchanges, open the channel.

        Raises ConfigurationError for wrong credentials, certificates, virtual host or exchanges;
        BrokerUnavailableError; UnroutableError when an exchange that is only looked for is missing.
        """
        from dispytch_integrations._rabbitmq_connection import Dialer
        from dispytch_integrations._rabbitmq_link import Link

        await self.stop()
        options = self._options
        if self._dialer is None:
            self._dialer = Dialer(self._url, options.username, options.password, self._client_options)
        self._dialer.check_tls()
        link = Link(
            self._dialer,
            [self._exchange(name, given) for name, given in options.exchanges.items()],
            max_in_flight=options.max_in_flight,
            reconnect_interval=options.reconnect_interval,
        )
        await link.open()
        self._producer.link = link

    def _exchange(self, name: str, given: str | ExchangeOptions | None) -> Exchange:
        from dispytch_integrations._rabbitmq_exchanges import Exchange

        name = self._options.prefix + name
        if isinstance(given, ExchangeOptions):
            return Exchange(name=name, **given.model_dump())
        return Exchange(name=name, type=given)

    async def stop(self) -> None:
        """Wait for what is not confirmed yet, and close; cancelled, close at once. Later emits get NotStartedError."""
        link, self._producer.link = self._producer.link, None
        if link is None:
            return
        if link.loop is asyncio.get_running_loop() and link.pid == os.getpid():
            await link.close()

    async def ping(self) -> None:
        """Open and close a channel; while there is no connection, wait for the next one.

        Cut off by the caller's deadline, it drops a connection that has not answered, so that a new one is opened.
        Raises NotStartedError, BrokerUnavailableError.
        """
        link = self._producer.link
        if link is None:
            raise NotStartedError(f"the connection to {self.address} is not open")
        await link.ping()

    @property
    def secrets(self) -> Sequence[str]:
        """The passwords seen so far."""
        known: set[str] = set() if self._dialer is None else set(self._dialer.secrets)
        if self._url.password:
            known.add(self._url.password)
        if isinstance(self._options.password, str):
            known.add(self._options.password)
        # RabbitMQ's well-known one is no secret, and a word of everyday texts.
        return tuple(known - {"guest"})

    @property
    def address(self) -> str:
        """The URL without its secrets."""
        return str(self._url)
