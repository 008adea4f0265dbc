"""What can be written for Redis: URLs, options, credentials; and how mistakes are told."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, SSLConnection
from redis.credentials import UsernamePasswordCredentialProvider

from dispytch_integrations import EventBase, connect
from dispytch_integrations._redis_connections import Credentials, Direct, open_direct, option_names
from dispytch_integrations._redis_errors import translate
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DeliveryError,
    MessageTooLargeError,
    PermanentFailure,
    UnroutableError,
)
from dispytch_integrations.redis import RedisBackend, RedisOptions, RedisStreamEventRoute
from tests.support.brokers import Redis as OwnRedis

PASSWORD = "s3cr3t-p4ss"


class Order(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")

    number: int = 0


def _backend(url: str, options: RedisOptions | None = None, **client: Any) -> RedisBackend:
    return RedisBackend(BrokerURL.parse(url), options or RedisOptions(), client)


def _connection(url: str, options: RedisOptions | None = None, **client: Any) -> Any:
    parsed, options = BrokerURL.parse(url), options or RedisOptions()
    connections = open_direct(parsed, options, client, lambda command, reply: False, Credentials(None, None))
    assert isinstance(connections, Direct)
    pool: Any = connections._pool
    return pool.make_connection()


# -- credentials -----------------------------------------------------------------------------------------------------


async def test_password_as_url_option_file_and_function(own_redis: Callable[..., OwnRedis], tmp_path: Path) -> None:
    """Secrets come from wherever an operator keeps them, not from URLs alone."""
    broker = await asyncio.to_thread(own_redis, password=PASSWORD)
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    plain = f"redis://127.0.0.1:{broker.port}"
    provider = UsernamePasswordCredentialProvider(None, PASSWORD)
    ways: list[tuple[str, dict[str, Any]]] = [
        (f"redis://:{PASSWORD}@127.0.0.1:{broker.port}", {}),
        (f"redis://default:{PASSWORD}@127.0.0.1:{broker.port}", {}),
        (plain, {"password": PASSWORD}),
        (plain, {"username": "default", "password": file}),
        (plain, {"password": lambda: PASSWORD}),
        (plain, {"credential_provider": provider}),
    ]
    for url, options in ways:
        async with connect(url, startup_timeout=2, **options) as emitter:
            await emitter.emit(Order())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f":{PASSWORD}@", "check username and password"),
        (f"nobody:{PASSWORD}@", "check username and password"),
        ("", "none was given: write password=..., or redis://:password@host"),
        (f"{PASSWORD}@", "a user was given and no password: write password="),
    ],
)
async def test_wrong_password_is_a_configuration_error_without_the_password(
    own_redis: Callable[..., OwnRedis], given: str, expected: str
) -> None:
    """Trying again for 30 s is of no use; and the password must not land in the log."""
    broker = await asyncio.to_thread(own_redis, password="another")
    with pytest.raises(ConfigurationError, match=expected) as caught:
        await asyncio.wait_for(connect(f"redis://{given}127.0.0.1:{broker.port}").start(), 5)
    told: BaseException | None = caught.value
    while told is not None:
        assert PASSWORD not in f"{told}{told!r}"
        told = told.__cause__


async def test_password_that_changes_is_read_again_for_each_connection(own_redis: Callable[..., OwnRedis]) -> None:
    """Rotated passwords must not need a restart of the app."""
    broker = await asyncio.to_thread(own_redis, password="first")
    current = "first"
    async with connect(f"redis://127.0.0.1:{broker.port}", password=lambda: current) as emitter:
        await emitter.emit(Order())
        admin: Any = Redis(port=broker.port, password="first")
        await admin.config_set("requirepass", "second")
        current = "second"
        await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await admin.aclose()
        async with asyncio.timeout(10):
            while True:
                try:
                    await emitter.emit(Order())
                    break
                except DeliveryError:
                    await asyncio.sleep(0.05)


async def test_connections_with_a_password_log_nothing(
    own_redis: Callable[..., OwnRedis], caplog: pytest.LogCaptureFixture
) -> None:
    """redis-py warns at each connection of a provider that knows its older method alone: nothing a user can mend."""
    broker = await asyncio.to_thread(own_redis, password=PASSWORD)
    async with connect(f"redis://:{PASSWORD}@127.0.0.1:{broker.port}") as emitter:
        await emitter.emit(Order())
    assert caplog.text == ""


def test_secrets_are_in_no_repr() -> None:
    """Settings are printed while debugging."""
    backend = _backend(f"redis://user:{PASSWORD}@h", RedisOptions(password=PASSWORD, sentinel_password=PASSWORD))
    assert backend.secrets == (PASSWORD,)
    for shown in (backend, backend.address, RedisOptions(password=PASSWORD), backend.producer):
        assert PASSWORD not in f"{shown}{shown!r}"


# -- URLs and options ------------------------------------------------------------------------------------------------


async def test_database_comes_from_the_path(redis_url: str, unique: str) -> None:
    """redis://host/3 is how everybody else writes it."""
    url = redis_url.rpartition("/")[0]

    class There(EventBase):
        __route__ = RedisStreamEventRoute(stream=unique)

    async with connect(f"{url}/3") as emitter:
        await emitter.emit(There())
    client: Any = Redis.from_url(f"{url}/3")
    assert await client.xlen(unique) == 1
    await client.delete(unique)
    await client.aclose()


async def test_database_that_does_not_exist_is_a_configuration_error(redis_url: str) -> None:
    """It will not exist in 30 seconds either."""
    url = redis_url.rpartition("/")[0]
    with pytest.raises(ConfigurationError, match="DB index"):
        await asyncio.wait_for(connect(f"{url}/9999").start(), 5)


async def test_unix_socket_works(own_redis: Callable[..., OwnRedis], tmp_path: Path) -> None:
    """On one machine a socket file is faster and needs no port."""
    path = tmp_path / "redis.sock"
    await asyncio.to_thread(own_redis, options={"unixsocket": str(path)})
    async with connect(f"unix://{path}?db=1") as emitter:
        await emitter.emit(Order())
    client: Any = Redis(unix_socket_path=str(path), db=1)
    assert await client.xlen("orders") == 1
    await client.aclose()


async def test_valkey_scheme_and_client_options_reach_the_client(redis_url: str) -> None:
    """Every option of redis-py can be given, in the URL too."""
    target = redis_url.partition("://")[2]
    async with connect(f"valkey://{target}?client_name=dispytch-test&socket_keepalive=true", protocol=2) as emitter:
        await emitter.emit(Order())
        client: Any = Redis.from_url(redis_url)
        names = [each["name"] for each in await client.client_list()]
        await client.delete("orders")
        await client.aclose()
    assert "dispytch-test" in names


def test_tls_schemes_use_tls() -> None:
    """rediss:// must never fall back to plain text."""
    for scheme in ("rediss", "valkeys"):
        connection = _connection(f"{scheme}://h:7000", ssl_check_hostname=False)
        assert isinstance(connection, SSLConnection)
        assert (connection.host, connection.port) == ("h", 7000)
    assert type(_connection("redis://h")) is Connection


def test_client_timeouts_follow_ours_and_retries_are_off() -> None:
    """redis-py's ten retries write events twice, and its own timeouts outlast ours."""
    connection = _connection("redis://h", RedisOptions(timeout=1.5))
    assert (connection.socket_timeout, connection.socket_connect_timeout) == (1.5, 1.5)
    assert connection.retry._retries == 0
    assert _connection("redis://h", RedisOptions(timeout=1.5), socket_timeout=9).socket_timeout == 9


def test_every_option_of_the_client_can_be_given() -> None:
    """An option that cannot be reached is a reason not to use us."""
    for cls, scheme in ((Redis, "redis"), (Redis, "rediss")):
        clients = set(inspect.signature(cls).parameters)
        ours = {"host", "port", "db", "username", "password"}
        of_the_url = {"connection_pool", "unix_socket_path", "ssl", "single_connection_client"}
        deprecated = {"auto_close_connection_pool"}
        tls = {name for name in clients if name.startswith("ssl_")} if scheme == "redis" else set[str]()
        assert clients - ours - of_the_url - deprecated - tls <= set(option_names(scheme))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h1,h2", "redis\\+cluster://"),
        ("redis://h/mydb", "number of a database"),
        ("redis+sentinel://h1,h2", "mymaster"),
        ("redis+sentinel:///mymaster", "needs hosts"),
        ("redis+sentinel://h/mymaster/x", "number of a database"),
        ("redis+cluster://h/2", "database 0 alone"),
        ("unix://h/redis.sock", "three slashes"),
        ("unix://", "socket's path"),
    ],
)
def test_url_that_does_not_fit_says_what_to_write(url: str, says: str) -> None:
    """Found when the app starts, not at the first emit."""
    with pytest.raises(ConfigurationError, match=says):
        _backend(url)


def test_password_and_credential_provider_exclude_each_other() -> None:
    """redis-py would refuse them at the first connection, as an outage."""
    with pytest.raises(ConfigurationError, match="keep one"):
        _backend(f"redis://:{PASSWORD}@h", credential_provider=UsernamePasswordCredentialProvider(None, "x"))


async def test_unknown_option_is_told_with_the_nearest() -> None:
    """A typo must not be ignored."""
    with pytest.raises(ConfigurationError, match="socket_timeout"):
        async with connect("redis://h", socket_timeuot=3):
            pass


@pytest.mark.parametrize(
    ("url", "wrong", "says"),
    [
        ("redis://127.0.0.1:1", {"socket_timeout": "x"}, "socket_timeout is of type str; write a number"),
        ("redis+cluster://127.0.0.1:1", {"socket_timeout": "x"}, "socket_timeout is of type str; write a number"),
        ("redis://127.0.0.1:1", {"decode_responses": "x"}, "write True or False"),
        ("redis://127.0.0.1:1", {"credential_provider": "x"}, "write one of type CredentialProvider"),
        ("redis+sentinel://127.0.0.1:1/m", {"sentinel_kwargs": 1}, "write one of type dict"),
        ("redis+sentinel://127.0.0.1:1/m", {"protocol": 9}, "protocol"),
        ("rediss://127.0.0.1:1", {"ssl_ca_certs": "/nope"}, "ssl_ca_certs: there is no file '/nope'"),
        ("rediss://127.0.0.1:1?ssl_certfile=/nope", {}, "ssl_certfile: there is no file"),
        ("rediss://127.0.0.1:1", {"ssl_ca_certs": Path(__file__)}, "cannot be loaded.*check ssl_ca_certs"),
        ("rediss://127.0.0.1:1", {"ssl_cert_reqs": "x"}, "refuses the options"),
        ("redis+cluster://127.0.0.1:1", {"ssl": True, "ssl_ca_certs": "/nope"}, "ssl_ca_certs: there is no file"),
        ("redis+sentinel://127.0.0.1:1/m", {"ssl": True, "ssl_ca_certs": "/nope"}, "ssl_ca_certs: there is no file"),
        ("redis+sentinel://127.0.0.1:1/m", {"ssl_ca_certs": __file__}, "write ssl=True"),
        ("redis+cluster://127.0.0.1:1", {"ssl_ca_certs": __file__}, "write ssl=True"),
    ],
)
async def test_wrong_option_is_no_outage(url: str, wrong: dict[str, Any], says: str) -> None:
    """Trying it again for 30 s is of no use, and "cannot connect" would send people looking at the network."""
    with pytest.raises(ConfigurationError, match=says):
        await asyncio.wait_for(connect(url, **wrong).start(), 2)


def test_options_of_the_right_type_pass() -> None:
    """What the client takes must not be refused by us."""
    _backend("redis://h", socket_timeout=None, socket_connect_timeout=0.5, socket_keepalive=True, client_name="shop")
    _backend("rediss://h", ssl_cert_reqs=ssl.CERT_NONE, ssl_ca_certs=Path("/ca.pem"), ssl_check_hostname=False)
    _backend("rediss://h", ssl_cert_reqs="none", socket_type=socket.SOCK_STREAM, health_check_interval=1.5)


async def test_option_that_the_client_refuses_is_a_configuration_error() -> None:
    """What redis-py does not take is told as its word, at the start."""
    with pytest.raises(ConfigurationError, match="protocol"):
        async with connect("redis://127.0.0.1", protocol=9, startup_timeout=0.3):
            pass


# -- the translation table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'"), BrokerUnavailableError),
        (redis_errors.ReadOnlyError("You can't write against a read only replica."), BrokerUnavailableError),
        (redis_errors.BusyLoadingError("Redis is loading the dataset in memory"), BrokerUnavailableError),
        (redis_errors.ClusterDownError("The cluster is down"), BrokerUnavailableError),
        (redis_errors.MasterDownError("Link with MASTER is down"), BrokerUnavailableError),
        (redis_errors.TryAgainError("Multiple keys request during rehashing of slot"), BrokerUnavailableError),
        (redis_errors.AuthenticationError("Authentication required."), BrokerUnavailableError),
        (redis_errors.NoPermissionError("this user has no permissions"), PermanentFailure),
        (redis_errors.MovedError("1234 127.0.0.1:7001"), UnroutableError),
        (redis_errors.AskError("1234 127.0.0.1:7001"), UnroutableError),
        (redis_errors.ResponseError("WRONGTYPE Operation against a key holding another kind"), PermanentFailure),
        (redis_errors.ResponseError("MISCONF Redis is configured to save RDB snapshots"), BrokerUnavailableError),
        (redis_errors.ResponseError("NOREPLICAS Not enough good replicas to write."), BrokerUnavailableError),
        (redis_errors.ResponseError("unknown command 'XADD', with args beginning with: 'orders'"), PermanentFailure),
        (redis_errors.ResponseError("Protocol error: invalid bulk length"), MessageTooLargeError),
        (redis_errors.MaxConnectionsError("Too many connections"), BrokerUnavailableError),
        (redis_errors.ConnectionError("Connection refused"), BrokerUnavailableError),
        (redis_errors.TimeoutError("Timeout connecting to server"), BrokerUnavailableError),
        (OSError("Network is unreachable"), BrokerUnavailableError),
        (redis_errors.ResponseError("something new"), DeliveryError),
    ],
)
def test_client_errors_are_translated(raised: Exception, becomes: type[Exception]) -> None:
    """`except DeliveryError` must catch whatever Redis can do to a message, and its class says whether to retry."""
    translated = translate(raised, "<Message>")
    assert type(translated) is becomes
    assert "<Message> was refused" in str(translated)


def test_arguments_in_a_reply_are_cut_off() -> None:
    """Redis repeats the arguments of an unknown command, the payload among them."""
    reply = redis_errors.ResponseError(
        "unknown command 'XADD', with args beginning with: 'orders' '*' 'data' 'PAYLOAD'"
    )
    translated = translate(reply, "<Message>")
    assert "PAYLOAD" not in str(translated)
    assert translated.__cause__ is None
