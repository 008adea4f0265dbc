"""Kafka: topics, keys and partitions. Needs the extra `kafka` (aiokafka) to send, not to declare events."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator
from pydantic_core import to_jsonable_python

from dispytch_integrations._client_options import load_own, require_files, wrong_types
from dispytch_integrations._missing import is_missing
from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL, Secret, read_secret, scrub
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    MissingExtraError,
    NotStartedError,
    RouteError,
)
from dispytch_integrations.events import BackendConfig, EventRoute, header_text
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]

    from dispytch_integrations._kafka_client import Client
    from dispytch_integrations._kafka_delivery import Delivery

__all__ = ["KafkaBackend", "KafkaEventConfig", "KafkaEventRoute", "KafkaOptions", "KafkaProducer"]

_MAX_REQUEST_SIZE = 1_048_576
"""aiokafka's default."""
_DEFAULT_PORT = 9092
_DEFAULT_TIMEOUT = 5.0
_LONGEST_MS = 2**31 - 1
"""Kafka's protocol counts timeouts in 32 bits."""
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")

_VALUES: Mapping[str, tuple[object, ...]] = {
    "acks": ("all", 0, 1, -1),
    "compression_type": (None, "gzip", "snappy", "lz4", "zstd"),
}
_KINDS: Mapping[str, type] = {
    "client_id": str,
    "sasl_kerberos_domain_name": str,
    "sasl_plain_password": str,
    "sasl_plain_username": str,
    "ssl_context": ssl.SSLContext,
}
"""Types of the client's options whose default is None. The client itself checks the others when it is made."""

SASLMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"]


class KafkaEventConfig(BackendConfig):
    """What Kafka alone knows about an event. Strings may hold `{field}` parts.

    __backend_config__ = KafkaEventConfig(partition_key="{order_id}", headers={"tenant": "{tenant}"})
    """

    partition_key: Any = None
    """The record's key: str, int, UUID, bytes, or a dict (as JSON). Equal keys share a partition, and arrive in order.
    None: the ordering key of the event, if it has one."""
    partition: int | None = Field(default=None, ge=0, lt=2**31)
    """Number of the partition; None: the client's partitioner chooses by the key."""
    timestamp_ms: int | None = Field(default=None, ge=0, lt=2**63)
    """Milliseconds since 1970 UTC; None: when it is sent."""
    headers: dict[str, Any] | None = None
    """Headers of the record: str, bytes, numbers, UUIDs, dates, dicts; or pairs as aiokafka takes them."""

    @field_validator("partition_key")
    @classmethod
    def _key_can_be_encoded(cls, value: object) -> object:
        if value is not None:
            _key_text(value)
        return value

    @field_validator("headers", mode="before")
    @classmethod
    def _pairs_are_headers(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        pairs = cast("list[tuple[str, Any]]", value)
        headers = dict(pairs)
        if len(headers) != len(pairs):
            raise ValueError("a header's name stands twice; a message has one value for each name")
        return headers


class KafkaEventRoute(EventRoute):
    """A topic.

    __route__ = KafkaEventRoute(topic="orders.{tenant}")
    """

    transport: ClassVar[str] = "kafka"
    destination_field: ClassVar[str | None] = "topic"
    config_type: ClassVar[type[BackendConfig]] = KafkaEventConfig
    supports_headers: ClassVar[bool] = True
    supports_tombstones: ClassVar[bool] = True
    # Source: CloudEvents' Kafka protocol binding, binary content mode.
    cloudevents_prefix: ClassVar[str] = "ce_"
    content_type_header: ClassVar[str | None] = "content-type"

    topic: str
    """Name of the topic; may hold `{field}` parts."""

    @classmethod
    def check_address(cls, destination: str, properties: dict[str, Any]) -> None:
        """Raise RouteError unless Kafka allows the topic's name: 1 to 249 of letters, digits, `.`, `_` and `-`."""
        if _TOPIC.fullmatch(destination) is None or destination in (".", ".."):
            raise RouteError(
                f"{destination[:260]!r} is no name for a Kafka topic; "
                f"write 1 to 249 of the letters a-z and A-Z, digits, '.', '_' and '-'"
            )

    @classmethod
    def encode_properties(cls, properties: dict[str, Any]) -> str | None:
        """Encode the partition key as the record's `key`; it is the default ordering key, too."""
        key = properties.pop("partition_key", None)
        if key is None:
            return None
        if isinstance(key, bytes):
            properties["key"] = key
            return key.decode() if _is_text(key) else key.hex()
        text = key if isinstance(key, str) else _key_text(key)
        try:
            properties["key"] = text.encode()
        except UnicodeEncodeError as exc:
            raise RouteError(f"the partition key cannot be encoded: {exc.reason}; clean the value") from exc
        return text


def _key_text(key: object) -> str:
    """A key as text; equal dicts give equal text, whatever their order. Raises TypeError."""
    if isinstance(key, Mapping):
        return json.dumps(to_jsonable_python(key), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    text = header_text(key)
    return text if isinstance(text, str) else text.hex()


def _is_text(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True


class KafkaProducer(Producer):
    """Sends through an AIOKafkaProducer that you start and stop yourself.

        raw_kafka_producer = AIOKafkaProducer(bootstrap_servers="localhost:9092", acks="all")
        await raw_kafka_producer.start()
        emitter = EventEmitter(KafkaProducer(raw_kafka_producer))

    `timeout`: seconds for one emit; None: the emitter's default. `allow_auto_create_topics`: may a topic that does
    not exist be created by the broker, if it does that? The client's key and value serializers are not used: keys
    and payloads are bytes when they get here.

    An emit through a client that was never started, or was stopped, raises NotStartedError.
    Raises MissingExtraError without aiokafka, ConfigurationError for another object than an AIOKafkaProducer.
    """

    routes: ClassVar[tuple[type[EventRoute], ...]] = (KafkaEventRoute,)

    def __init__(
        self, producer: AIOKafkaProducer, timeout: float | None = None, *, allow_auto_create_topics: bool = True
    ) -> None:
        _require_aiokafka("KafkaProducer")
        from dispytch_integrations._kafka_client import Client
        from dispytch_integrations._kafka_delivery import Delivery

        self.timeout = timeout
        self._delivery: Delivery | None = Delivery(Client(producer), create_topics=allow_auto_create_topics)

    async def send(self, payload: bytes | None, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Send one payload; return when the broker has confirmed it. None is a tombstone.

        Raises ProducerTimeout after the producer's timeout (default 5 s), UnroutableError for a topic that does not
        exist, MessageTooLargeError, RouteError, or another DeliveryError.
        """
        message = _message(payload, route, config)
        outcomes = await self.deliver((message,), timeout=self.timeout or _DEFAULT_TIMEOUT)
        if outcomes[0] is not None:
            raise outcomes[0]

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Send messages, in order per partition; several go as batches. As Producer.deliver."""
        delivery = self._delivery
        if delivery is None:
            raise _not_open()
        if len(messages) == 1:
            return [await delivery.deliver_one(messages[0], timeout)]
        return await delivery.deliver_many(messages, timeout)

    async def deliver_in_order(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[Exception | None]:
        """Send messages, one batch at a time per partition, so that nothing overtakes. As Producer.deliver_in_order."""
        delivery = self._delivery
        if delivery is None:
            raise _not_open()
        if len(messages) == 1:
            return [await delivery.deliver_one(messages[0], timeout)]
        from dispytch_integrations._kafka_in_order import deliver_in_order

        return await deliver_in_order(delivery, messages, timeout)


class _ManagedProducer(KafkaProducer):
    """The producer of a backend, which opens and closes what is behind it."""

    def __init__(self) -> None:
        self.timeout = None
        self.switch(None)

    def switch(self, delivery: Delivery | None) -> None:
        """Deliver through `delivery` from now on; None: not at all."""
        if (before := getattr(self, "_delivery", None)) is not None:
            before.topics.close()
        self._delivery = delivery


def _not_open() -> NotStartedError:
    return NotStartedError(
        "the connection to Kafka is not open; emit inside `async with connect('kafka://...') as emitter:`, "
        "or after the app's lifespan has started"
    )


def _message(payload: bytes | None, route: EventRoute, config: BackendConfig | None) -> Message:
    if not isinstance(route, KafkaEventRoute):
        raise RouteError(f"KafkaProducer takes a KafkaEventRoute, not a {type(route).__name__}")
    if config is not None and not isinstance(config, KafkaEventConfig):
        raise RouteError(f"a KafkaEventRoute goes with a KafkaEventConfig, not a {type(config).__name__}")
    values = {} if config is None else {key: value for key, value in config.__dict__.items() if value is not None}
    given: dict[str, Any] = values.pop("headers", {})
    headers = {name: route.encode_header(value) for name, value in given.items() if value is not None}
    route.check_address(route.topic, values)
    ordering_key = route.encode_properties(values)
    return Message(None, "message", "default", route.topic, ordering_key, headers, values, payload)


class KafkaOptions(BrokerOptions):
    """What can be set for Kafka; every other option is one of AIOKafkaProducer (acks, linger_ms, ssl_context, ...).

    Unless told otherwise the client waits for all replicas (`acks="all"`), is not idempotent (consumers drop
    duplicates by the event's id), and its `request_timeout_ms` is our `timeout`, at least one second.
    """

    username: str | None = None
    """User for SASL; None: the one in the URL."""
    password: Secret | None = Field(default=None, repr=False)
    """Password for SASL: text, a function, or the path of a file, read at each start; None: the one in the URL."""
    sasl_mechanism: SASLMechanism | None = None
    """How to log in; None: no login. There is no default for a user: PLAIN would send the password as it is."""
    cafile: Path | None = None
    """Certificates to trust for kafka+ssl://; None: the system's. For all else give the client's `ssl_context`."""
    certfile: Path | None = None
    """Our own certificate, where the broker asks for one."""
    keyfile: Path | None = None
    """Its key; None: in the same file."""
    keyfile_password: Secret | None = Field(default=None, repr=False)
    """The key's password: text, a function, or the path of a file; None: it has none."""
    topics: list[str] = Field(default_factory=list[str])
    """Topics, without the prefix, that must exist when the app starts; none is created. In a URL: with commas."""
    allow_auto_create_topics: bool = True
    """May the broker create a topic that does not exist, if it is set up to? False: UnroutableError."""

    @field_validator("topics", mode="before")
    @classmethod
    def _topics_of_text(cls, value: object) -> object:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class KafkaBackend(Backend):
    """A connection to a Kafka cluster: kafka://host1:9092,host2 or kafka+ssl://."""

    transport: ClassVar[str] = "kafka"
    options_type: ClassVar[type[BrokerOptions]] = KafkaOptions
    modules: ClassVar[tuple[str, ...]] = (
        "dispytch_integrations._kafka_client",
        "dispytch_integrations._kafka_delivery",
        "dispytch_integrations._kafka_in_order",
    )

    def __init__(self, url: BrokerURL, options: KafkaOptions, client_options: Mapping[str, Any]) -> None:
        self.require_client()
        self._url = url
        self._options = options
        self._hosts = [(host, port or _DEFAULT_PORT) for host, port in url.hosts] or [("localhost", _DEFAULT_PORT)]
        self._given = dict(client_options)
        size = self._given.get("max_request_size", _MAX_REQUEST_SIZE)
        self.max_size = size if isinstance(size, int) else None
        self._secrets: list[str] = [url.password] if url.password else []
        self._client: Client | None = None
        self._producer = _ManagedProducer()
        self.producer = self._producer
        problems = list(self._problems())
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def require_client(cls) -> None:
        """Raise MissingExtraError when aiokafka is not installed."""
        _require_aiokafka("kafka://")

    @classmethod
    def client_option_names(cls, url: BrokerURL) -> Mapping[str, Any]:
        """The options of AIOKafkaProducer, but for those that the URL or the emitter decides."""
        cls.require_client()
        from aiokafka import AIOKafkaProducer

        parameters = inspect.signature(cast("Any", AIOKafkaProducer)).parameters
        decided = {"loop", "api_version", "bootstrap_servers", "key_serializer", "value_serializer"}
        return {
            name: parameter.default if isinstance(parameter.default, (str, bool, int, float)) else None
            for name, parameter in parameters.items()
            if name not in decided
        }

    async def start(self) -> None:
        """One attempt to connect.

        Raises BrokerUnavailableError with each host's reason; ConfigurationError when credentials, a certificate or
        an option of the client is refused, or a topic of `topics` is missing.
        """
        await self._close_old()
        self._switch(await self._open())

    async def _open(self) -> Delivery:
        """A new client, started. As `start`."""
        from aiokafka import AIOKafkaProducer
        from aiokafka import errors as kafka_errors

        from dispytch_integrations._kafka_client import Client, knock
        from dispytch_integrations._kafka_delivery import Delivery

        options = self._client_options()
        addresses = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self._hosts]
        try:
            # Before the first connection: what the client refuses is no outage.
            client = Client(cast("Any", AIOKafkaProducer)(bootstrap_servers=addresses, **options))
        except (AssertionError, RuntimeError, TypeError, ValueError) as exc:
            raise ConfigurationError(f"AIOKafkaProducer refuses its options: {scrub(str(exc), self.secrets)}") from exc
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.abort)
            await knock(self._hosts, options)
            try:
                await client.raw.start()
            except kafka_errors.KafkaError as exc:
                raise BrokerUnavailableError(f"cannot be reached: {exc}") from exc
            delivery = Delivery(client, create_topics=self._options.allow_auto_create_topics)
            await self._check_topics(delivery)
            stack.pop_all()
        return delivery

    def _switch(self, delivery: Delivery) -> None:
        self._client = delivery.client
        self._producer.switch(delivery)

    async def stop(self) -> None:
        """Flush what is pending and close; cancelled, close without flushing."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await client.stop()
        finally:
            self._producer.switch(None)

    async def ping(self) -> None:
        """Ask for the cluster's metadata; a client that has broken down is replaced by a new one.

        Raises NotStartedError, BrokerUnavailableError. The next ping tries again to replace it.
        """
        client = self._client
        if client is None:
            raise NotStartedError(f"{self.address} is not connected to; call start() first")
        if client.check():
            await client.ping()
            return
        delivery = await self._open()
        if self._client is not client:  # Stopped meanwhile, or replaced by another ping.
            await delivery.client.abort()
            await self.ping()
            return
        self._switch(delivery)
        await client.abort()

    @property
    def secrets(self) -> Sequence[str]:
        """The passwords, as far as they have been read."""
        return self._secrets

    @property
    def address(self) -> str:
        """Where it connects to, without secrets."""
        return str(self._url)

    def _problems(self) -> Iterable[str]:
        options, secure = self._options, self._url.scheme == "kafka+ssl"
        user = options.username or self._url.username or self._given.get("sasl_plain_username")
        password = options.password or self._url.password or self._given.get("sasl_plain_password")
        mechanism = options.sasl_mechanism
        if self._url.path not in ("", "/"):
            yield f"kafka:// takes no path; remove {self._url.path!r} from the URL"
        if (user or password) and mechanism is None:
            yield "a user or password needs a way to log in; write sasl_mechanism='SCRAM-SHA-512' (or 'PLAIN', ...)"
        if mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512") and not (user and password):
            yield f"sasl_mechanism={mechanism!r} needs a user and a password; write username=... and password=..."
        if mechanism == "OAUTHBEARER" and self._given.get("sasl_oauth_token_provider") is None:
            yield "sasl_mechanism='OAUTHBEARER' needs sasl_oauth_token_provider=..., aiokafka's AbstractTokenProvider"
        files = [name for name in ("cafile", "certfile", "keyfile") if getattr(options, name) is not None]
        tls = [*files, *(name for name in ("ssl_context",) if self._given.get(name) is not None)]
        if tls and not secure:
            yield f"{' and '.join(tls)} is for TLS; write kafka+ssl:// in the URL"
        if options.keyfile is not None and options.certfile is None:
            yield "keyfile is the key of a certificate: write certfile=..., too"
        if files and "ssl_context" in self._given:
            yield f"{' and '.join(files)} and ssl_context say the same; give one of them"
        if "security_protocol" in self._given:
            yield "security_protocol follows from the URL and sasl_mechanism; write kafka:// or kafka+ssl:// instead"
        if self._given.get("transactional_id") is not None:
            yield (
                "transactional_id needs an open transaction for every emit, and connect() opens none; leave it out, "
                "or make an AIOKafkaProducer of your own and emit within its transactions: KafkaProducer(producer)"
            )
        for name in options.topics:
            try:
                KafkaEventRoute.check_address(options.prefix + name, {})
            except RouteError as exc:
                yield f"topics: {exc}"
        yield from wrong_types(self._given, self.client_option_names(self._url), _KINDS)
        for name, values in _VALUES.items():
            given = self._given.get(name, values[0])
            if given not in values:
                hint = nearest(str(given), [value for value in values if isinstance(value, str)])
                yield f"{name} is one of {', '.join(repr(value) for value in values)}{hint}"
        compression = self._given.get("compression_type")
        if compression in ("snappy", "lz4", "zstd") and find_spec("cramjam") is None:
            yield (
                f"compression_type={compression!r} needs a library that is not installed: "
                f"pip install 'aiokafka[{compression}]'"
            )
        if mechanism == "GSSAPI" and find_spec("gssapi") is None:
            yield "sasl_mechanism='GSSAPI' needs a library that is not installed: pip install 'aiokafka[gssapi]'"

    def _client_options(self) -> dict[str, Any]:
        """What a new client is given; passwords and certificates are read now, they may have changed."""
        options, secure = self._options, self._url.scheme == "kafka+ssl"
        given: dict[str, Any] = {"acks": "all", **self._given}
        if options.timeout is not None:
            given.setdefault("request_timeout_ms", round(min(max(1000, options.timeout * 1000), _LONGEST_MS)))
        protocol = "SSL" if secure else "PLAINTEXT"
        if secure and given.get("ssl_context") is None:
            given["ssl_context"] = self._ssl_context()
        if options.sasl_mechanism is not None:
            protocol = "SASL_SSL" if secure else "SASL_PLAINTEXT"
            given["sasl_mechanism"] = options.sasl_mechanism
            if username := options.username or self._url.username:
                given["sasl_plain_username"] = username
            if password := options.password or self._url.password:
                given["sasl_plain_password"] = read_secret(password)
        given["security_protocol"] = protocol
        self._remember(given.get("sasl_plain_password"))
        return given

    def _ssl_context(self) -> ssl.SSLContext:
        options = self._options
        password = None if options.keyfile_password is None else read_secret(options.keyfile_password)
        self._remember(password)
        require_files(cafile=options.cafile)
        try:
            context = ssl.create_default_context(cafile=options.cafile)
        except OSError as exc:  # ssl.SSLError is one: a file that holds something else.
            raise ConfigurationError(f"cafile holds no certificate ({exc.strerror or exc})") from exc
        advice = "write keyfile_password=..."
        load_own(context, password, advice, certfile=options.certfile, keyfile=options.keyfile)
        return context

    def _remember(self, secret: str | None) -> None:
        if secret and secret not in self._secrets:
            self._secrets.append(secret)

    async def _close_old(self) -> None:
        client, self._client = self._client, None
        self._producer.switch(None)
        if client is not None and not client.loop.is_closed():
            await client.abort()

    async def _check_topics(self, delivery: Delivery) -> None:
        if not self._options.topics:
            return
        names = [self._options.prefix + name for name in self._options.topics]
        missing = await delivery.topics.check(names)
        if missing:
            raise ConfigurationError(
                f"there is no topic {', '.join(repr(name) for name in missing)} at {self.address}, or this user may "
                f"not see it; create it, or correct topics=[...]"
            )


def _require_aiokafka(what: str) -> None:
    try:
        importlib.import_module("aiokafka")
    except ModuleNotFoundError as exc:
        if not is_missing(exc, "aiokafka"):
            raise
        raise MissingExtraError(what, extra="kafka", package="aiokafka") from exc
