"""Redis and Valkey: routes, producer, and the connection that `connect("redis://...")` manages.

Two kinds of destination: a pub/sub channel (`RedisEventRoute`: whoever listens now gets it, nobody else ever) and a
stream (`RedisStreamEventRoute`: durable, read by consumer groups). Routes need no client library; the producer and
the backend need the extra `redis`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from dispytch_integrations._client_options import wrong_types
from dispytch_integrations._missing import is_missing
from dispytch_integrations._redis_commands import STREAM, Command, Delivery, encode
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL, Secret, scrub
from dispytch_integrations.errors import (
    ConfigurationError,
    DeliveryError,
    DispytchError,
    MissingExtraError,
    NotStartedError,
    RouteError,
    WrongLoopError,
    WrongProcessError,
)
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from dispytch_integrations._redis_connections import Connections, Credentials

__all__ = [
    "RedisBackend",
    "RedisEventConfig",
    "RedisEventRoute",
    "RedisOptions",
    "RedisProducer",
    "RedisStreamEventRoute",
]

logger = logging.getLogger(__name__)

_SEND_TIMEOUT = 5.0
_MOST_WARNINGS = 1000


class RedisEventConfig(BackendConfig):
    """Nothing: Redis knows no properties of a message, so that an event needs no `__backend_config__`.

    It is what keeps those of other transports away, whose settings would be ignored. Headers, which streams alone
    have, are given with the event: `emit(event, headers={...})`.
    """

    @model_validator(mode="before")
    @classmethod
    def _takes_nothing(cls, given: Any) -> Any:
        if given:
            raise ValueError(
                "Redis knows no properties of a message: leave __backend_config__ out, and give the headers of a "
                "stream's entry with emit(event, headers={...})"
            )
        return given


class RedisEventRoute(EventRoute):
    """A pub/sub channel: delivered to those who listen now, and kept for nobody.

        __route__ = RedisEventRoute(channel="alerts.{level}")

    It carries no headers, and so no CloudEvents attributes. That nobody listens is no error: it is counted in
    `RedisProducer.unheard`. For events that must not be lost see RedisStreamEventRoute.
    """

    transport: ClassVar[str] = "redis"
    destination_field: ClassVar[str | None] = "channel"
    config_type: ClassVar[type[BackendConfig]] = RedisEventConfig
    supports_headers: ClassVar[bool] = False

    channel: str
    """The channel's name."""

    @classmethod
    def check_address(cls, destination: str, properties: dict[str, Any]) -> None:
        """Raise RouteError for an empty name."""
        if not destination:
            raise RouteError(f'the channel is empty; write {cls.__name__}(channel="alerts")')


class RedisStreamEventRoute(EventRoute):
    """A stream: durable, read in order, by consumer groups too (XADD).

        __route__ = RedisStreamEventRoute(stream="orders", maxlen=100_000)

    The body is the entry's field "data"; headers are its other fields: the CloudEvents attributes ("ce_id",
    "ce_type", ...), "content-type", and the event's own. Needs Redis 5 or newer.
    """

    transport: ClassVar[str] = "redis"
    kind: ClassVar[str | None] = STREAM
    destination_field: ClassVar[str | None] = "stream"
    config_type: ClassVar[type[BackendConfig]] = RedisEventConfig
    supports_headers: ClassVar[bool] = True
    cloudevents_prefix: ClassVar[str] = "ce_"
    content_type_header: ClassVar[str | None] = "content-type"
    reserved_headers: ClassVar[frozenset[str]] = frozenset({"data"})

    stream: str
    """The stream's key."""
    maxlen: int | None = Field(default=None, ge=1)
    """Entries to keep: older ones are removed, read or not; None (default): all of them."""
    approximate: bool = True
    """May Redis keep some more than `maxlen`? It is far cheaper, and Redis's own default for `~`; False: exactly."""

    @classmethod
    def check_address(cls, destination: str, properties: dict[str, Any]) -> None:
        """Raise RouteError for an empty name."""
        if not destination:
            raise RouteError(f'the stream is empty; write {cls.__name__}(stream="orders")')


class RedisProducer(Producer):
    """Sends to Redis through a client of yours, from `redis.asyncio`.

        from redis.asyncio import Redis

        emitter = EventEmitter(RedisProducer(Redis()))

    The client is connected when needed and stays yours to close; one that you closed connects again, as redis-py
    does. Of its pool one connection is used, of its retries none for sending: they would write events twice.

    Raises ConfigurationError for a synchronous client, MissingExtraError without redis.
    """

    routes: ClassVar[tuple[type[EventRoute], ...]] = (RedisEventRoute, RedisStreamEventRoute)

    unheard: int
    """Messages published to channels on which nobody listened. Not counted in a cluster, where Redis does not tell.

    Each channel's first one is logged as a warning (up to 1000 channels).
    """

    def __init__(self, client: Redis) -> None:
        _require_redis("RedisProducer")
        from dispytch_integrations._redis_connections import connections_of

        self._setup(connections_of(client, self.answered))

    def _setup(self, connections: Connections | None) -> None:
        self.unheard = 0
        self._warned: set[str] = set()
        self._connections = connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Send messages with the next pipeline, in order. See Producer.deliver.

        Raises NotStartedError, WrongLoopError, WrongProcessError.
        """
        connections = self._open()
        delivery = Delivery()
        commands: list[Command] = []
        for message in messages:
            try:
                commands.append(delivery.add(encode(message), message))
            except (DispytchError, UnicodeError) as exc:
                delivery.add(b"", message).settle(exc)
        connections.submit(commands)
        if delivery.remaining:
            try:
                with self._deadlines.limit(timeout):
                    await delivery.done
            except TimeoutError:
                delivery.expire(timeout)
            finally:
                delivery.abandon()
        return delivery.outcomes

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Send one payload, without headers; return when Redis has answered, within `timeout` (5 s unless set).

        Raises RouteError for a route of another transport, and what an emit raises.
        """
        if not isinstance(route, self.routes):
            raise RouteError(f"RedisProducer takes no {type(route).__name__}; use RedisEventRoute(channel=...)")
        if config is not None and not isinstance(config, route.config_type):
            raise RouteError(f"a {type(route).__name__} goes with no {type(config).__name__}; leave it out")
        properties = {name: value for name, value in route.__dict__.items() if name != "safe" and value is not None}
        if route.kind is not None:
            properties["kind"] = route.kind
        destination = properties.pop(route.destination_field or "")
        route.check_address(destination, properties)
        message = Message(None, "", "default", destination, None, {}, properties, payload, "application/octet-stream")
        timeout = _SEND_TIMEOUT if self.timeout is None else self.timeout
        outcome = (await self.deliver((message,), timeout=timeout))[0]
        if outcome is not None:
            raise outcome

    def _open(self) -> Connections:
        """The connections, if they can be used here. Raises NotStartedError, WrongLoopError, WrongProcessError."""
        connections = self._connections
        if connections is None:
            raise NotStartedError(
                "the connection to Redis is not open: emit inside `async with connect(...) as emitter:`, or after "
                "the app's lifespan has started and before it ends"
            )
        loop = asyncio.get_running_loop()
        if loop is not self._loop or self._pid != os.getpid():
            self._bind(loop)
        return connections

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None:
            self._loop, self._pid = loop, os.getpid()
            return
        if self._pid != os.getpid():
            raise WrongProcessError(
                f"this RedisProducer was used in process {self._pid}, before a fork; make a client and a producer "
                f"of their own in this process"
            )
        raise WrongLoopError(
            "this RedisProducer and its client belong to another event loop; make both on the loop that emits, "
            "or use connect_blocking() from threads"
        )

    def answered(self, command: Command, reply: object) -> bool:
        """Called with each command's reply."""
        # 0 is the number of subscribers that got it; XADD answers with an id, a refusal is an exception.
        if reply == 0 and isinstance(reply, int) and command.message is not None:
            self._count_unheard(command.message.destination)
        return False

    def _count_unheard(self, channel: str) -> None:
        self.unheard += 1
        if channel not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(channel)
            logger.warning(
                "nobody listens on the Redis channel %r: what is published there is lost; subscribe before, "
                "or use RedisStreamEventRoute",
                channel,
            )


def _require_redis(what: str) -> None:
    try:
        import_module("redis.asyncio")
    except ModuleNotFoundError as exc:
        if not is_missing(exc, "redis"):
            raise
        raise MissingExtraError(what, extra="redis") from exc


class RedisOptions(BrokerOptions):
    """Options of `redis://`, beside those of the client.

    All options of redis-py's connections can be given, too: `socket_timeout`, `client_name`, `health_check_interval`,
    `ssl_ca_certs`, `credential_provider`, `protocol`... Its timeouts follow `timeout` unless given; it never retries.
    """

    username: str | None = None
    """User of the ACL; None: the URL's, else the default user."""
    password: Secret | None = Field(default=None, repr=False)
    """Text, a file's Path, or a function, both read again for each new connection; None: the URL's, else none."""
    db: int | None = Field(default=None, ge=0)
    """Number of the database; None: the URL's path (redis://host/0), else 0. A cluster has 0 alone."""
    sentinel_username: str | None = None
    """User at the sentinels; None: their default user."""
    sentinel_password: Secret | None = Field(default=None, repr=False)
    """Password at the sentinels, as `password`; None: they ask for none."""


class _ManagedProducer(RedisProducer):
    """The producer of a backend: refuses until its connections are there."""

    def __init__(self) -> None:
        self._setup(None)

    def open(self, connections: Connections) -> None:
        self._connections = connections
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()

    def close(self) -> None:
        self._connections = None
        self._loop = None


class RedisBackend(Backend):
    """A connection to Redis or Valkey: one server, the master behind Sentinel, or a cluster.

        redis://user:password@host:6379/0         also valkey://; rediss:// and valkeys:// with TLS
        unix:///run/redis.sock?db=1
        redis+sentinel://host1:26379,host2/mymaster/0
        redis+cluster://host1:6379,host2

    With Sentinel and a cluster `ssl=True` switches TLS on.
    """

    transport: ClassVar[str] = "redis"
    options_type: ClassVar[type[BrokerOptions]] = RedisOptions
    modules: ClassVar[tuple[str, ...]] = (
        "dispytch_integrations._redis_cluster",
        "dispytch_integrations._redis_connections",
        "email.parser",
    )  # The client tells its version, which metadata has.

    def __init__(self, url: BrokerURL, options: RedisOptions, client_options: Mapping[str, Any]) -> None:
        self._url = url
        self._options = options
        self._client_options = dict(client_options)
        self._secrets: set[str] = set()
        self._connections: Connections | None = None
        self._producer = _ManagedProducer()
        self.producer: Producer = self._producer
        self._check()

    @classmethod
    def require_client(cls) -> None:
        """Raise MissingExtraError without redis."""
        _require_redis("redis://")

    @classmethod
    def advice_for(cls, url: BrokerURL, name: str) -> str:
        """TLS is the URL's."""
        secure = {"redis": "rediss", "valkey": "valkeys"}.get(url.scheme)
        return f"it is for TLS: write {secure}://" if secure and (name == "ssl" or name.startswith("ssl_")) else ""

    @classmethod
    def client_option_names(cls, url: BrokerURL) -> Mapping[str, Any]:
        """The options of redis-py's connections for this kind of URL, with their defaults."""
        from dispytch_integrations._redis_connections import option_names

        return option_names(url.scheme)

    async def start(self) -> None:
        """Connect and PING. Raises ConfigurationError for wrong credentials, BrokerUnavailableError."""
        from dispytch_integrations._redis_connections import Credentials

        await self.stop()
        credentials = Credentials(
            self._url.username or self._options.username,
            self._options.password if self._url.password is None else self._url.password,
        )
        credentials.read()
        self._remember(credentials.last)
        connections = self._make(credentials)
        try:
            await self._greet(connections)
        except DeliveryError as exc:
            await connections.close()
            if (problem := self._problem(exc)) is not None:
                raise problem from exc
            raise
        except asyncio.CancelledError:
            await connections.close()
            raise
        self._connections = connections
        self._producer.open(connections)

    async def stop(self) -> None:
        """Send what waits, and close; cancelled, close at once. What is emitted afterwards gets NotStartedError."""
        connections, self._connections = self._connections, None
        self._producer.close()
        if connections is None:
            return
        try:
            await connections.drain()
        finally:
            await connections.close()

    async def ping(self) -> None:
        """PING on the connection that is in use; cancelled, it drops one that does not answer.

        Raises NotStartedError, BrokerUnavailableError.
        """
        if self._connections is None:
            raise NotStartedError(f"the connection to {self.address} is not open")
        await self._greet(self._connections)

    @property
    def secrets(self) -> Sequence[str]:
        """The passwords seen so far."""
        return tuple(self._secrets)

    @property
    def address(self) -> str:
        """The URL without its secrets."""
        return str(self._url)

    def _check(self) -> None:
        """Raise ConfigurationError with all that does not fit together."""
        url, options = self._url, self._options
        problems: list[str] = []
        several = url.scheme in ("redis+sentinel", "redis+cluster")
        if several and not url.hosts:
            problems.append(f"{url.scheme}:// needs hosts: write {url.scheme}://host1,host2")
        if not several and len(url.hosts) > 1:
            problems.append(f"{url.scheme}:// takes one host; for several write redis+sentinel:// or redis+cluster://")
        if url.scheme == "unix" and url.hosts:
            problems.append("unix:// takes a path and no host: write unix:///run/redis.sock (three slashes)")
        if url.scheme == "unix" and not url.path.strip("/"):
            problems.append("unix:// needs the socket's path: write unix:///run/redis.sock")
        if url.scheme == "redis+cluster" and (options.db or url.path.strip("/") not in ("", "0")):
            problems.append("a Redis cluster has the database 0 alone; leave the URL's path and `db` out")
        password = url.password is not None or options.password is not None
        if password and self._client_options.get("credential_provider") is not None:
            problems.append("a password and a credential_provider are both given; keep one of them")
        tls = [name for name, value in self._client_options.items() if name.startswith("ssl_") and value is not None]
        if several and tls and not self._client_options.get("ssl"):
            problems.append(f"{url.scheme}:// does not encrypt, so {', '.join(tls)} would go unused; write ssl=True")
        problems += self._path_problems()
        problems += self._type_problems()
        if problems:
            raise ConfigurationError(problems)
        self._remember(url.password)
        self._remember(options.password)
        self._remember(options.sentinel_password)

    def _path_problems(self) -> list[str]:
        from dispytch_integrations._redis_connections import database, sentinel_service

        try:
            if self._url.scheme == "redis+sentinel":
                sentinel_service(self._url)
            if self._url.scheme != "redis+cluster":
                database(self._url, self._options)
        except ConfigurationError as exc:
            return exc.problems
        return []

    def _type_problems(self) -> list[str]:
        from dispytch_integrations._redis_connections import KINDS

        given = {name: value for name, value in self._client_options.items() if value is not None}
        # Of this one the client takes a str or a number of the module ssl, and says so itself.
        defaults = {**self.client_option_names(self._url), "ssl_cert_reqs": None}
        return list(wrong_types(given, defaults, KINDS))

    def _remember(self, secret: object) -> None:
        if isinstance(secret, str) and secret:
            self._secrets.add(secret)

    def _about_credentials(self) -> str:
        if (
            self._url.password is None
            and self._options.password is None
            and self._client_options.get("credential_provider") is None
        ):
            # Without the user: it may be a password that was written in its place.
            given = (
                "a user was given and no password" if self._options.username or self._url.username else "none was given"
            )
            return f"{given}: write password=..., or redis://:password@host in the URL"
        return "check username and password"

    def _make(self, credentials: Credentials) -> Connections:
        from redis.exceptions import RedisError

        from dispytch_integrations._redis_connections import check_tls, open_direct

        try:
            check_tls(self._url.scheme, self._client_options)
            if self._url.scheme == "redis+cluster":
                from dispytch_integrations._redis_cluster import open_cluster

                return open_cluster(self._url, self._options, self._client_options, credentials)
            answered = self._producer.answered
            return open_direct(self._url, self._options, self._client_options, answered, credentials)
        except (RedisError, TypeError, ValueError) as exc:
            raise ConfigurationError(f"redis-py refuses the options: {scrub(str(exc), self.secrets)}") from exc

    async def _greet(self, connections: Connections) -> None:
        """PING; whoever may not say PING has been heard all the same."""
        from redis.exceptions import NoPermissionError

        try:
            await connections.ping()
        except DeliveryError as exc:
            if not isinstance(exc.__cause__, NoPermissionError):
                raise

    def _problem(self, exc: DeliveryError) -> ConfigurationError | None:
        """What is wrong in the settings, when trying again would be of no use."""
        from dispytch_integrations._redis_errors import refuses_credentials, refuses_settings, reply_text

        if (cause := refuses_credentials(exc)) is not None:
            said = scrub(reply_text(cause), self.secrets)
            return ConfigurationError(f"{self.address} refuses the credentials ({said}); {self._about_credentials()}")
        if (cause := refuses_settings(exc)) is not None:
            return ConfigurationError(f"{self.address} refuses the settings: {scrub(reply_text(cause), self.secrets)}")
        return None
