"""No password in anything that we print: errors and what is chained to them, logs at DEBUG, warnings, reprs, commands.

Each test goes down one way on which passwords are held, with two of them, one of which has to be percent-encoded in a
URL; `Ears` hears all that the process says meanwhile, the client libraries' own logs included.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.applications import Starlette

from dispytch_integrations import EventBase, connect
from dispytch_integrations.backend import BrokerURL, scrub
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.health import check_health
from dispytch_integrations.kafka import KafkaBackend, KafkaEventRoute, KafkaOptions
from dispytch_integrations.rabbitmq import RabbitMQEventRoute, RabbitMQOptions
from dispytch_integrations.redis import RedisOptions, RedisStreamEventRoute
from dispytch_integrations.settings import load_brokers
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox
from dispytch_integrations.starlette import EmitterMiddleware
from tests.support.brokers import Redis, Tansu, free_port
from tests.support.commands import ROOT
from tests.support.proxy import TCPProxy

SECRETS = ("geheim-4711", "ge/heim@4711")
MARKS = ("geheim-4711", "ge/heim@4711", "ge%2Fheim", "heim@4711", "heim%404711")
SCHEMES = ("redis", "rediss", "redis+sentinel", "redis+cluster", "amqp", "amqps", "kafka", "kafka+ssl")


class RedisPlaced(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")


class RabbitPlaced(EventBase):
    __route__ = RabbitMQEventRoute(exchange="", routing_key="nowhere", mandatory=False)


class KafkaPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders")


class Ears(logging.Handler):
    """Hears logs and warnings of the whole process; `hear` what else is said."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep all of a record, what a formatter for JSON would show too."""
        self.heard.append(f"{record.name}: {record.getMessage()} {record.__dict__!r}")
        if record.exc_info and record.exc_info[1] is not None:
            self.hear(record.exc_info[1])

    def hear(self, said: object) -> None:
        """Keep what an object says of itself; of an exception, all that is chained to it."""
        self.heard.append(f"{said!s} {said!r}")
        if isinstance(said, BaseException):
            self.heard.append("".join(traceback.format_exception(said)))
            for each in chain(said):
                self.heard.append(f"{each!s} {each!r} {each.args!r} {getattr(each, '__notes__', '')!r}")

    def leaks(self) -> list[str]:
        """What was heard with a password in it."""
        return [text[:600] for text in self.heard if any(mark in text for mark in MARKS)]


def chain(exc: BaseException) -> list[BaseException]:
    """An exception and all behind it, what a `from None` hides too."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [exc]
    while left:
        each = left.pop()
        if each is None or any(each is known for known in found):
            continue
        found.append(each)
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
    return found


@pytest.fixture(autouse=True)
def ears() -> Iterator[Ears]:
    """Fails the test if a password was said, whatever else it checks."""
    ears = Ears()
    root = logging.getLogger()
    level = root.level
    root.addHandler(ears)
    root.setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ears
    root.removeHandler(ears)
    root.setLevel(level)
    for warning in caught:
        ears.heard.append(f"{warning.message} {warning.source!r}")
    assert ears.leaks() == []


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest) -> str:
    """A password."""
    return str(request.param)


def login(scheme: str) -> dict[str, Any]:
    """What a user needs beside name and password."""
    if scheme.startswith("kafka"):
        return {"sasl_mechanism": "PLAIN"}
    return {"ssl": True} if scheme in ("redis+sentinel", "redis+cluster") else {}


def url_with(scheme: str, secret: str, host: str) -> str:
    """A URL with a user and a password."""
    return f"{scheme}://shop:{quote(secret, safe='')}@{host}" + ("/mymaster" if scheme == "redis+sentinel" else "")


def event_of(scheme: str) -> EventBase:
    """An event for a transport."""
    if scheme.startswith("kafka"):
        return KafkaPlaced()
    return RabbitPlaced() if scheme.startswith("amqp") else RedisPlaced()


async def fails(ears: Ears, url: Any, **options: Any) -> None:
    """Start and emit; hear the error, and all objects on the way."""
    options.setdefault("startup_timeout", 0.05)
    try:
        brokers = connect(url, **options)
        ears.hear(brokers)
        for broker in brokers.brokers.values():
            for each in (broker, broker.backend, broker.options, broker.producer, broker.backend.address):
                ears.hear(each)
        async with brokers as emitter:
            await emitter.emit(event_of(next(iter(brokers.brokers.values())).backend.transport))
    except DispytchError as exc:
        ears.hear(exc)
        return
    pytest.fail("it was to fail")


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_url_that_is_wrong(ears: Ears, secret: str, scheme: str) -> None:
    """It is the first thing that goes wrong, and is printed by whoever catches it."""
    quoted = quote(secret, safe="")
    for url in (
        f"{scheme}://shop:{secret}@h:99999/x",
        f"{scheme}://shop:{quoted}@h:99999",
        f"{scheme}://shop:{quoted}@h:port",
        f"{scheme}://shop:{quoted}@h1,shop:{quoted}@h2",
        f"{scheme}:/shop:{quoted}@h",
        f"{scheme}x://shop:{quoted}@h",
        f"{scheme}://shop:{quoted}@h/a b?{secret}",
        f"{scheme}://shop:{quoted}@h?timeout={quoted}",
        f"{scheme}://shop:{quoted}@h?pasword={quoted}",
        f"{scheme}://h?password={quoted}&nothing=1",
        f"{scheme}://shop:{quoted}@h?nothing=1#{quoted}",
    ):
        await fails(ears, url)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_options_that_are_wrong(ears: Ears, secret: str, scheme: str) -> None:
    """Each is told by its name and what to write, not by what was written."""
    url = f"{scheme}://127.0.0.1:1" + ("/mymaster" if scheme == "redis+sentinel" else "")
    for options in (
        {"password": [secret], "timeout": -1},
        {"password": {"value": secret}},
        {"password": secret, "username": [secret]},
        {"password": secret, "pasword": secret},
        {"password": secret, "timeout": secret},
        {"password": secret, "client": {"pasword": secret}},
        {"password": secret, "client": secret},
        {"password": secret, "hooks": secret},
        {"password": lambda: [secret]},
        {"password": Path(f"/nowhere/{'x' * 10}"), "client_id": [secret], "client_name": [secret]},
    ):
        await fails(ears, url, **options)
        await fails(ears, {"default": {"url": url, **options}})


def test_reprs(ears: Ears, secret: str, tmp_path: Path) -> None:
    """Debuggers, error pages and `logger.debug(settings)` print them."""
    host = "h/mymaster"
    for scheme in SCHEMES:
        url = url_with(scheme, secret, "h")
        for each in (url, {"default": {"url": f"{scheme}://{host if 'sentinel' in scheme else 'h'}", "username": "shop",
                                       "password": secret}}):  # fmt: skip
            specs = load_brokers(each, login(scheme))
            ears.hear(specs)
            ears.hear(connect(each, **login(scheme)))
            ears.hear(BrokerURL.parse(url))
    for options in (
        KafkaOptions(password=secret, keyfile_password=secret, client={"sasl_plain_password": secret}),
        RabbitMQOptions(password=secret, client={"auth": secret}),
        RedisOptions(password=secret, sentinel_password=secret, client={"ssl_password": secret}),
    ):
        ears.hear(options)
    from sqlalchemy import create_engine

    outbox = SQLAlchemyOutbox(create_engine(f"postgresql+psycopg://shop:{quote(secret, safe='')}@h/shop"))
    ears.hear(outbox)
    ears.hear(connect("memory://", outbox=outbox))


def test_what_is_scrubbed(secret: str) -> None:
    """An error may repeat a URL as it was written, or a str as Python writes it."""
    for told in (secret, quote(secret, safe=""), quote(secret), repr(secret), repr(secret.encode())):
        cleaned = scrub(f"cannot read {told}!", [secret])
        assert not any(mark in cleaned for mark in MARKS)
    assert scrub("the long one: abcd; the short one: ab", ["ab", "abcd"]) == "the long one: ***; the short one: ***"
    assert scrub("it's a", ["'"]) == "it***s a"


# -- brokers that are away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        *((scheme, "url") for scheme in SCHEMES),
        *((scheme, way) for scheme in ("redis", "amqp", "kafka") for way in ("option", "function", "file")),
    ],
)
async def test_a_broker_that_is_away(ears: Ears, secret: str, scheme: str, way: str, tmp_path: Path) -> None:
    """At the start, at an emit while it is tried again, and in an answer about health."""
    file = tmp_path / "password"
    file.write_text(secret)
    url = url_with(scheme, secret, f"127.0.0.1:{free_port()}")
    options = login(scheme)
    if way != "url":
        url = url.replace(f":{quote(secret, safe='')}@", "@")
        options["password"] = {"option": secret, "function": lambda: secret, "file": file}[way]
    await fails(ears, url, **options)
    async with connect(url, required=False, startup_timeout=0.05, timeout=0.1, **options) as emitter:
        with pytest.raises(DispytchError) as caught:
            await emitter.emit(event_of(scheme))
        ears.hear(caught.value)
        ears.hear(emitter)
        health = await check_health(emitter, timeout=0.2)
        ears.hear(health)
        ears.hear(json.dumps(health.as_dict()))


@pytest.mark.parametrize("scheme", ["rediss", "amqps", "kafka+ssl", "redis", "amqp", "kafka"])
async def test_a_server_that_speaks_something_else(ears: Ears, secret: str, scheme: str) -> None:
    """It repeats what it was told, as some do in their errors."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(b"-ERR " + data + b"\r\n")
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await fails(ears, url_with(scheme, secret, host), startup_timeout=0.5, timeout=0.3, **login(scheme))


async def test_certificates_that_cannot_be_loaded(ears: Ears, secret: str, tmp_path: Path) -> None:
    """The password of a key is one, too."""
    import trustme

    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    (tmp_path / "none.pem").write_text("no certificate")
    for name in ("none.pem", "missing.pem"):
        path = str(tmp_path / name)
        kafka = {"certfile": path, "keyfile_password": secret}
        await fails(ears, url_with("kafka+ssl", secret, "127.0.0.1:1"), **kafka, **login("kafka"))
        await fails(ears, url_with("amqps", secret, "127.0.0.1:1"), certfile=path)
        await fails(ears, url_with("rediss", secret, "127.0.0.1:1"), ssl_certfile=path, ssl_password=secret)


# -- real brokers -----------------------------------------------------------------------------------------------------


async def test_redis(ears: Ears, secret: str, own_redis: Callable[..., Redis]) -> None:
    """Right and wrong passwords, of two users; lost connections, and a password that was changed."""
    from redis.asyncio import Redis as Client

    broker = await asyncio.to_thread(own_redis)
    admin: Any = Client(port=broker.port)
    await admin.acl_setuser("shop", enabled=True, passwords=[f"+{secret}"], keys=["orders"], categories=["+@all"])
    await admin.acl_setuser("blind", enabled=True, passwords=[f"+{secret}"], commands=["+ping"])
    right = url_with("redis", secret, f"127.0.0.1:{broker.port}")
    for wrong in (secret + "x", f"x{secret}"):
        await fails(ears, url_with("redis", wrong, f"127.0.0.1:{broker.port}"))
    await fails(ears, right.replace("shop:", "blind:"))
    async with TCPProxy("127.0.0.1", broker.port) as proxy:
        password = secret
        url = f"redis://127.0.0.1:{proxy.port}"
        async with connect(url, username="shop", password=lambda: password, timeout=0.5) as emitter:
            await emitter.emit(RedisPlaced())
            await proxy.stall()
            await hear_emit(ears, emitter, RedisPlaced())
            await proxy.resume()
            password = f"{secret}-rotated"
            await proxy.cut()
            for _ in range(3):
                await hear_emit(ears, emitter, RedisPlaced())
                await asyncio.sleep(0.3)
            ears.hear(json.dumps((await check_health(emitter, timeout=0.5)).as_dict()))
    await admin.aclose()


async def hear_emit(ears: Ears, emitter: Any, event: EventBase) -> None:
    """Emit, whatever comes of it."""
    try:
        await emitter.emit(event)
    except DispytchError as exc:
        ears.hear(exc)


async def test_rabbitmq(ears: Ears, secret: str, rabbitmq_url: str) -> None:
    """Wrong passwords; connections that are lost, and a new password that is wrong."""
    host, port = BrokerURL.parse(rabbitmq_url).hosts[0]
    await fails(ears, url_with("amqp", secret, f"{host}:{port}"))
    await fails(ears, f"amqp://{host}:{port}/nowhere", username="guest", password=secret)
    async with TCPProxy(host, port or 5672) as proxy:
        given = BrokerURL.parse(rabbitmq_url)
        password = given.password or "guest"
        url = f"amqp://127.0.0.1:{proxy.port}{given.path}"
        user = given.username or "guest"
        async with connect(url, username=user, password=lambda: password, timeout=0.5) as emitter:
            await emitter.emit(RabbitPlaced())
            password = secret
            await proxy.cut()
            for _ in range(3):
                await hear_emit(ears, emitter, RabbitPlaced())
                await asyncio.sleep(0.2)
            ears.hear(json.dumps((await check_health(emitter, timeout=0.3)).as_dict()))


class AskingTansu(Tansu):
    """Wants a login, which it grants to nobody."""

    def command(self) -> list[str]:
        """Program and arguments."""
        return [*super().command(), "--authentication"]


async def test_kafka(ears: Ears, secret: str, kafka_url: str) -> None:
    """aiokafka logs each request at DEBUG, the one that holds user and password of PLAIN included."""
    hosts = kafka_url.removeprefix("kafka://")
    with AskingTansu() as asking:
        for host in (f"127.0.0.1:{asking.port}", hosts):
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"):
                await fails(ears, url_with("kafka", secret, host), sasl_mechanism=mechanism)


async def test_kafka_with_a_login_that_is_taken(ears: Ears, secret: str, kafka_url: str) -> None:
    """The broker of the tests takes none: what a broker says to a login is played here."""
    host, _, port = kafka_url.removeprefix("kafka://").partition(",")[0].partition(":")
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            while True:
                request = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                key, correlation = request[:2], request[4:8]
                if key == b"\x00\x11":  # SaslHandshake: no error, one mechanism.
                    answer = correlation + b"\x00\x00" + b"\x00\x00\x00\x01\x00\x05PLAIN"
                elif (
                    key == b"\x00\x24"
                ):  # SaslAuthenticate: no error, no message, no bytes, and a lifetime in version 1.
                    seen.append(request)
                    answer = correlation + b"\x00\x00\xff\xff\x00\x00\x00\x00"
                    answer += b"\x00" * 8 if request[2:4] == b"\x00\x01" else b""
                else:
                    far_writer.write(len(request).to_bytes(4, "big") + request)
                    answer = await far_reader.readexactly(int.from_bytes(await far_reader.readexactly(4), "big"))
                writer.write(len(answer).to_bytes(4, "big") + answer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()
            far_writer.close()

    from dispytch_integrations._kafka_client import knock

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        place = ("127.0.0.1", int(server.sockets[0].getsockname()[1]))
        url = url_with("kafka", secret, f"{place[0]}:{place[1]}")
        backend = KafkaBackend(BrokerURL.parse(url), KafkaOptions(sasl_mechanism="PLAIN"), {})
        # Tansu advertises itself, so that it goes no further than the first connection.
        await knock([place], backend._client_options())
    assert any(secret.encode() in request for request in seen)
    assert any("SaslAuthenticateRequest" in text for text in ears.heard)


# -- frameworks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "amqp", "kafka"])
def test_the_blocking_emitter(ears: Ears, secret: str, scheme: str) -> None:
    """Its errors come from another thread."""
    url = url_with(scheme, secret, f"127.0.0.1:{free_port()}")
    with pytest.raises(DispytchError) as caught, connect_blocking(url, startup_timeout=0.3, **login(scheme)) as emitter:
        emitter.emit(event_of(scheme))
    ears.hear(caught.value)
    with connect_blocking(url, required=False, startup_timeout=0.2, timeout=0.2, **login(scheme)) as emitter:
        ears.hear(emitter)
        with pytest.raises(DispytchError) as caught:
            emitter.emit(event_of(scheme))
        ears.hear(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "amqp", "kafka"])
def test_an_app_that_does_not_start(ears: Ears, secret: str, scheme: str) -> None:
    """What a server prints of a lifespan that failed is its whole traceback."""
    url = url_with(scheme, secret, f"127.0.0.1:{free_port()}")
    lifespan = emitter_lifespan(url, startup_timeout=0.2, **login(scheme))
    middleware = EmitterMiddleware(Starlette(), url, startup_timeout=0.2, **login(scheme))
    for app in (FastAPI(lifespan=lifespan), middleware):
        ears.hear(app)
        with pytest.raises(DispytchError) as caught, TestClient(app):
            pass
        ears.hear(caught.value)


# -- databases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "port"),
    [("postgresql+asyncpg", 5432), ("postgresql+psycopg", 5432), ("mysql+pymysql", 3306)],
)
async def test_the_password_of_the_outbox(ears: Ears, secret: str, driver: str, port: int) -> None:
    """Of a database that is away, and of one that refuses it (MariaDB) or does not know the user (PostgreSQL)."""
    pytest.importorskip(driver.partition("+")[2])
    from sqlalchemy import create_engine
    from sqlalchemy.ext.asyncio import create_async_engine

    for each in (free_port(), port):
        url = f"{driver}://nobody:{quote(secret, safe='')}@127.0.0.1:{each}/shop"
        engine: Any = create_async_engine(url) if driver.endswith("asyncpg") else create_engine(url)
        outbox = SQLAlchemyOutbox(engine)
        ears.hear(outbox)
        try:
            async with asyncio.timeout(3), connect("memory://", outbox=outbox) as emitter:
                ears.hear(json.dumps((await check_health(emitter, timeout=0.5)).as_dict()))
                await asyncio.sleep(0.3)
        except Exception as exc:
            ears.hear(exc)


# -- commands ---------------------------------------------------------------------------------------------------------


def run(ears: Ears, *commands: tuple[tuple[str, ...], Mapping[str, str]]) -> list[str]:
    """Commands with their environments, at the same time, each in a process of its own; hear all that they print."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment in commands
    ]
    said = [process.communicate(timeout=50)[0] for process in processes]
    for each in said:
        ears.hear(each)
    return said


def test_the_relay(ears: Ears, secret: str) -> None:
    """Passwords in its environment and its arguments; a database that is away, URLs that are not readable."""
    quoted = quote(secret, safe="")
    away = f"postgresql://shop:{quoted}@127.0.0.1:{free_port()}/shop"
    broker = f"redis://shop:{quoted}@127.0.0.1:{free_port()}/0?timeout=0.3"
    script = str(Path(sys.executable).with_name("dispytch-integrations"))
    relay = (script, "relay", "--once", "--json")
    said = run(
        ears,
        (relay, {"DATABASE_URL": away, "DISPYTCH_URL": broker}),
        ((*relay, "--database-url", f"postgresql://shop:{secret}@127.0.0.1:x/shop", "--broker-url", broker), {}),
        ((*relay, "--database-url", away, "--broker-url", f"redis://shop:{quoted}@127.0.0.1?pasword={quoted}"), {}),
    )
    for each, says in zip(said, ("does not answer", "URL is not readable", "'pasword'"), strict=True):
        assert says in each


@pytest.mark.parametrize(("scheme", "secret"), list(zip(("redis", "kafka"), SECRETS, strict=True)))
def test_django(ears: Ears, secret: str, scheme: str, tmp_path: Path) -> None:
    """The checks, and `dispytch check`, which connects; DEBUG is on."""
    quoted = quote(secret, safe="")
    mechanism = "?sasl_mechanism=PLAIN" if scheme == "kafka" else ""
    settings = {"DJANGO_SETTINGS_MODULE": "tests.django.project.settings", "TEST_FOLDER": str(tmp_path)}
    away = {**settings, "TEST_BROKER": f"{scheme}://shop:{quoted}@127.0.0.1:{free_port()}{mechanism}"}
    wrong = {**settings, "TEST_BROKER": f"{scheme}://shop:{quoted}@h?pasword={quoted}"}
    django = ("-m", "django")
    said = run(
        ears,
        ((*django, "dispytch", "check", "--timeout", "0.5"), away),
        ((*django, "check"), wrong),
    )
    for each, says in zip(said, ("127.0.0.1", "'pasword'"), strict=True):
        assert says in each


def test_the_ears_hear(ears: Ears, secret: str) -> None:
    """All tests here rest on it."""
    cause = ValueError(secret)
    error = RuntimeError("nothing")
    error.__context__ = cause
    logging.getLogger("some.client").debug("connecting with %s", {"password": secret})
    ears.hear(error)
    ears.hear(f"postgresql://shop:{quote(secret, safe='')}@h")
    assert len(ears.leaks()) >= 3
    ears.heard.clear()
