"""Connections to one Redis, or to the master that Sentinel names: opened from a URL or taken from the user's client."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import unquote

import redis
from redis import asyncio as redis_asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError

from dispytch_integrations._client_options import answers_plainly, load_own, require_files, speaks_tls, tls_problem
from dispytch_integrations._redis_commands import Command
from dispytch_integrations._redis_errors import refuses_credentials, refuses_settings, reply_text
from dispytch_integrations._redis_pipeline import Lane, PoolSource
from dispytch_integrations.backend import BrokerURL, Secret, read_secret
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, DeliveryError, DispytchError

if TYPE_CHECKING:
    from dispytch_integrations.redis import RedisOptions

__all__ = [
    "KINDS",
    "Answered",
    "Connections",
    "Credentials",
    "Diagnose",
    "Direct",
    "check_tls",
    "connections_of",
    "open_direct",
    "option_names",
    "tls_trouble",
]

Answered = Callable[[Command, Any], bool]
"""Sees each command with its reply; returns whether it takes the command over."""

Diagnose = Callable[[Exception], Awaitable[str | None]]
"""Told why no connection was made; answers what is wrong in the settings, None if it may be an outage."""

DEFAULT_PORT, SENTINEL_PORT = 6379, 26379
_DIGITS = 9
"""Of a database's number: Redis counts them in 32 bits."""

KINDS: Mapping[str, type | tuple[type, ...]] = {
    "credential_provider": CredentialProvider,
    "retry": Retry,
    "sentinel_kwargs": dict,
    "socket_keepalive_options": dict,
    "ssl_ca_certs": (str, Path),
    "ssl_ca_path": (str, Path),
    "ssl_certfile": (str, Path),
    "ssl_ciphers": str,
    "ssl_keyfile": (str, Path),
}
"""Types of the client's options whose default is None; the client checks some others when it is made."""


class Connections(Protocol):
    """How a producer's commands reach Redis."""

    def submit(self, commands: Sequence[Command]) -> None:
        """Send commands, in order per destination; they are settled when answered."""
        ...

    async def ping(self) -> None:
        """Ask for an answer; open what is not open.

        Raises DeliveryError or the client's errors, ConfigurationError when TLS cannot work.
        """
        ...

    async def drain(self) -> None:
        """Wait until everything is settled; cancelled, settle the rest as not confirmed."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Direct:
    """One lane: a single server, or the master behind Sentinel."""

    def __init__(
        self,
        pool: ConnectionPool,
        answered: Answered,
        also_close: Iterable[redis_asyncio.Redis] = (),
        diagnose: Diagnose | None = None,
    ) -> None:
        self._pool = pool
        self._also_close = also_close
        self._diagnose = diagnose
        self._lane = Lane(PoolSource(pool), answered)

    def submit(self, commands: Sequence[Command]) -> None:
        self._lane.submit(commands)

    async def ping(self) -> None:
        try:
            await self._lane.ping()
        except DeliveryError as exc:
            problem = None if self._diagnose is None else await self._diagnose(exc)
            if problem is None:
                raise
            await self.close()  # The sentinels may have been reached.
            raise ConfigurationError(problem) from exc

    async def drain(self) -> None:
        await self._lane.drain()

    async def close(self) -> None:
        await self._pool.disconnect()
        for client in self._also_close:
            await client.aclose()


class Credentials(CredentialProvider):
    """User and password, read again for each connection: a file or function may give a new password at any time."""

    def __init__(self, username: str | None, password: Secret | None) -> None:
        self._username = username
        self._password = password
        self.last: str | None = None
        """The password that was read last: not to be shown."""

    def read(self) -> None:
        """Read the password. Raises ConfigurationError when that fails."""
        self.last = None if self._password is None else read_secret(self._password)

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """What the client asks for when it connects."""
        try:
            self.read()
        except Exception as exc:
            # The client closes a connection that is half made for its own errors only.
            words = str(exc) if isinstance(exc, DispytchError) else type(exc).__name__
            raise AuthenticationError(f"the password could not be read: {words}") from exc
        password = self.last or ""
        return (password,) if self._username is None else (self._username, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same; the client's own version logs a warning for each connection."""
        return self.get_credentials()


def connections_of(client: object, answered: Answered) -> Direct:
    """The connections of a user's client. Raises ConfigurationError for anything else than that."""
    if isinstance(client, Pipeline) or not isinstance(client, redis_asyncio.Redis):
        raise ConfigurationError(_refusal(client))
    return Direct(client.connection_pool, answered)


def _refusal(client: object) -> str:
    right = "write `from redis.asyncio import Redis` and RedisProducer(Redis())"
    if isinstance(client, redis.Redis) and not isinstance(client, redis_asyncio.Redis):
        return f"RedisProducer got a synchronous redis.Redis, which would block the event loop; {right}"
    if isinstance(client, redis_asyncio.RedisCluster):
        return 'RedisProducer takes the client of one server; for a cluster write connect("redis+cluster://h1,h2")'
    if isinstance(client, str):
        return "RedisProducer got a str; for a URL write connect(url), or RedisProducer(Redis.from_url(url))"
    return f"RedisProducer got a {type(client).__name__}, which is no client of redis.asyncio; {right}"


def open_direct(
    url: BrokerURL,
    options: RedisOptions,
    client_options: Mapping[str, Any],
    answered: Answered,
    credentials: Credentials,
) -> Direct:
    """Connections for a URL, not connected yet. Raises ConfigurationError, and the client's errors for its options."""
    kwargs = common_options(options, client_options, credentials)
    if url.scheme == "redis+sentinel":
        return _open_sentinel(url, options, kwargs, answered)
    if url.scheme == "unix":
        kwargs["path"] = unquote(url.path)
    else:
        host, port = url.hosts[0] if url.hosts else ("localhost", None)
        kwargs.update(host=host, port=port or DEFAULT_PORT)
    pool: ConnectionPool = ConnectionPool(
        connection_class=_connection_class(url.scheme), db=database(url, options), **kwargs
    )
    # What is wrong with the options shows here, and not as an outage that is tried again.
    pool.make_connection()  # type: ignore[no-untyped-call]
    if url.scheme == "unix":
        return Direct(pool, answered)
    secure = _connection_class(url.scheme) is SSLConnection
    scheme = "redis://" if secure else "rediss://"
    return Direct(pool, answered, diagnose=partial(tls_trouble, kwargs["host"], kwargs["port"], secure, scheme))


def _open_sentinel(url: BrokerURL, options: RedisOptions, kwargs: dict[str, Any], answered: Answered) -> Direct:
    sentinel_kwargs: dict[str, Any] = {
        "socket_timeout": kwargs["socket_timeout"],
        "socket_connect_timeout": kwargs["socket_connect_timeout"],
        "retry": Retry(NoBackoff(), 0),
        **kwargs.pop("sentinel_kwargs", {}),
    }
    if options.sentinel_password is not None:
        sentinel_kwargs["credential_provider"] = Credentials(options.sentinel_username, options.sentinel_password)
    own = {name: kwargs.pop(name) for name in ("min_other_sentinels", "force_master_ip") if name in kwargs}
    hosts = [(host, port or SENTINEL_PORT) for host, port in url.hosts]
    sentinel = Sentinel(hosts, sentinel_kwargs=sentinel_kwargs, **own)  # type: ignore[no-untyped-call]
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        sentinel_service(url), sentinel, db=database(url, options), **kwargs
    )
    pool.make_connection()  # type: ignore[no-untyped-call]
    diagnose = partial(_sentinel_trouble, sentinel.sentinels, hosts, bool(sentinel_kwargs.get("ssl")))
    return Direct(pool, answered, sentinel.sentinels, diagnose)


async def tls_trouble(host: str, port: int, secure: bool, other: str, exc: Exception, *, where: str = "") -> str | None:
    """What is wrong with TLS when a host could not be connected to; None: it may be an outage.

    `secure`: is TLS on? `other`: what to write to have it the other way; `where`: where the options for it stand. The
    host is asked again where its silence may mean either.
    """
    if refuses_credentials(exc) is not None or refuses_settings(exc) is not None:
        return None
    mapping = (where + "[{!r}]") if where else "{}"
    trust, own = mapping.format("ssl_ca_certs"), f"{mapping.format('ssl_certfile')} and {mapping.format('ssl_keyfile')}"
    port_of_tls = f"{other}, or its port for TLS"
    problem = tls_problem(exc, trust=trust, own=own, port=port_of_tls)
    if problem is None and secure and await answers_plainly(host, port, b"PING\r\n"):
        problem = f"it speaks no TLS there; write {port_of_tls}"
    if problem is None and not secure and await speaks_tls(host, port):
        problem = f"it speaks TLS there; write {other}, or its port without TLS"
    return None if problem is None else f"{host}:{port} cannot be connected to: {problem}"


async def _sentinel_trouble(
    clients: Sequence[redis_asyncio.Redis], hosts: Sequence[tuple[str, int]], secure: bool, exc: Exception
) -> str | None:
    """`tls_trouble` of the sentinels, whose errors their client keeps to itself. Raises BrokerUnavailableError."""
    if "No master found" not in str(exc):
        return tls_problem(exc, trust="ssl_ca_certs", own="ssl_certfile and ssl_keyfile", port="ssl=False")
    told: list[str] = []
    pings: list[Awaitable[object]] = [cast("Any", client).ping() for client in clients]
    outcomes = await asyncio.gather(*pings, return_exceptions=True)
    for (host, port), outcome in zip(hosts, outcomes, strict=False):
        if isinstance(outcome, Exception):
            other = f"sentinel_kwargs={{'ssl': {not secure}}}"
            problem = await tls_trouble(host, port, secure, other, outcome, where="sentinel_kwargs")
            if problem is not None:
                return f"the sentinel {problem}"
            told.append(f"{host}:{port}: {reply_text(outcome)}")
    words = "; ".join(told) or "check the master's name in the URL"
    raise BrokerUnavailableError(f"the sentinels name no master ({words})") from exc


def check_tls(scheme: str, client_options: Mapping[str, Any]) -> None:
    """Load certificates and keys, if TLS is on. Raises ConfigurationError when that fails, and the client's errors.

    The client itself loads them when it connects, and a missing file would look like an outage.
    """
    if _connection_class(scheme) is not SSLConnection and not client_options.get("ssl"):
        return
    options = {name: value for name, value in client_options.items() if name.startswith("ssl_")}
    require_files(ssl_ca_certs=client_options.get("ssl_ca_certs"))
    # First: the client would ask for a key's password at the terminal.
    load_own(
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        client_options.get("ssl_password"),
        "write ssl_password=...",
        ssl_certfile=client_options.get("ssl_certfile"),
        ssl_keyfile=client_options.get("ssl_keyfile"),
    )
    context: Any = SSLConnection(**options).ssl_context
    try:
        context.get()
    except OSError as exc:  # ssl.SSLError is one: a file that holds something else.
        raise ConfigurationError(
            f"certificates to trust cannot be loaded ({exc.strerror or exc}); check ssl_ca_certs and ssl_ca_path"
        ) from exc


def common_options(
    options: RedisOptions, client_options: Mapping[str, Any], credentials: Credentials
) -> dict[str, Any]:
    """The client's options for every kind of URL: ours where the user gave none."""
    kwargs: dict[str, Any] = {
        "socket_timeout": options.timeout,
        "socket_connect_timeout": options.timeout,
        # Nothing is sent twice: what is lost is told, and the user decides.
        "retry": Retry(NoBackoff(), 0),
        **client_options,
    }
    if credentials.last is not None:
        kwargs["credential_provider"] = credentials
    return kwargs


def database(url: BrokerURL, options: RedisOptions) -> int:
    """The number of the database: the option, else the URL's path, else 0. Raises ConfigurationError."""
    if options.db is not None or url.scheme == "unix":
        return options.db or 0
    text = url.path.strip("/")
    if url.scheme == "redis+sentinel":
        text = text.partition("/")[2]
    if not text:
        return 0
    if not text.isdecimal() or len(text) > _DIGITS:
        raise ConfigurationError(
            f"{url.scheme}:// ends with the number of a database, as in /0, not with {url.path[:60]!r}"
        )
    return int(text)


def sentinel_service(url: BrokerURL) -> str:
    """The name of the master that the sentinels watch. Raises ConfigurationError."""
    name = unquote(url.path.strip("/").partition("/")[0])
    if not name:
        raise ConfigurationError("the master's name is missing: write redis+sentinel://host1,host2/mymaster/0")
    return name


def _connection_class(scheme: str) -> type[AbstractConnection]:
    if scheme == "unix":
        return UnixDomainSocketConnection
    return SSLConnection if scheme in ("rediss", "valkeys") else Connection


_SECONDS = 5.0
"""What redis-py before 8 has no default for is a number all the same."""
_FROM_URL = frozenset({"host", "port", "path", "db", "username", "password", "startup_nodes"})


def option_names(scheme: str) -> dict[str, Any]:
    """The client's options for a URL of this scheme, with their defaults; None where the default says nothing."""
    if scheme == "redis+cluster":
        return _parameters(redis_asyncio.RedisCluster)
    names = _parameters(*reversed(_connection_class(scheme).__mro__))
    names["max_connections"] = 100
    if scheme == "redis+sentinel":
        names |= _parameters(*reversed(SSLConnection.__mro__))
        names |= {
            "ssl": False,
            "check_connection": False,
            "min_other_sentinels": 0,
            "force_master_ip": None,
            "sentinel_kwargs": None,
        }
    return names


def _parameters(*classes: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in classes:
        if "__init__" not in vars(cls):
            continue
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY or parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                telling = isinstance(parameter.default, (bool, int, float, str))
                found[name] = parameter.default if telling else None
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in found and found[name] is None:
            found[name] = _SECONDS
    return {name: default for name, default in found.items() if name not in _FROM_URL}
