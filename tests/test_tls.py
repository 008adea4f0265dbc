"""TLS and passwords against real servers, with certificates made here: what works, and how what cannot is told.

Redis and RabbitMQ end TLS themselves. The Kafka-compatible broker of the tests (Tansu 0.6) does not: its command
refuses `--cert` beside `--key`, and with one of them it goes on in plain text. So a proxy made with Python's ssl
stands in front of it, whose address it advertises; it asks for client certificates as Kafka's listener does. Tansu does
ask for a login (`--authentication`), but keeps its users in memory and lets nobody create one without a login: what is
tested of SASL is being refused. A login that succeeds, PLAIN, OAUTHBEARER and Kerberos are not.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from dispytch_integrations import EventBase, connect
from dispytch_integrations._client_options import load_own
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.settings import load_brokers
from tests.support.brokers import BrokerMissing, RabbitMQ, Redis, Tansu, free_port

PASSWORD = "geheim-4711"
QUICK = 20.0
"""Seconds within which it must be told, and not after the `startup_timeout` of 30, for which an outage is tried again.

Mostly it takes 0.3. But with TLS 1.3 a refusal comes after the handshake, and is lost when the server's reset overtakes
it: then the next attempt, or the one after it, hears it.
"""

UNTRUSTED = r"its certificate is not accepted: self-signed certificate in certificate chain; write {trust}=\.\.\."
OTHER_HOST = "not valid for '127.0.0.1'; write a host that the certificate names"
EXPIRED = "certificate has expired; renew it at the broker"
WANTED = r"it wants another certificate of ours \(.*\); write {own}=\.\.\., of an authority that it trusts"
NO_TLS = "it speaks no TLS there.*; write {plain}://, or its port for TLS"
HAS_TLS = "it speaks TLS there; write {secure}://, or its port without TLS"


class Papers:
    """Certificates as files: of an authority, a server for `localhost` alone, an expired one, and clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        authority, stranger = trustme.CA(), trustme.CA()
        self.authority = str(directory / "authority.pem")
        authority.cert_pem.write_to_path(self.authority)
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        self.server = self._write("server", authority.issue_cert("localhost"))
        self.expired = self._write(
            "expired",
            authority.issue_cert(
                "localhost", "expired.test", not_before=past, not_after=past + datetime.timedelta(days=9)
            ),
        )
        self.client = self._write("client", authority.issue_cert("shop@example.com"))
        self.stranger = self._write("stranger", stranger.issue_cert("shop@example.com"))

    def _write(self, name: str, certificate: trustme.LeafCert) -> tuple[str, str]:
        """The files of a certificate and of its key."""
        chain, key = self.directory / f"{name}.pem", self.directory / f"{name}-key.pem"
        chain.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(key))
        return str(chain), str(key)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    """The certificates of all tests here."""
    return Papers(tmp_path_factory.mktemp("papers"))


def unavailable(reason: str) -> NoReturn:
    """Skip; fail in CI, where it would be a hole that nobody sees."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason} (CI=true: nothing is skipped)", pytrace=False)
    pytest.skip(reason)


async def refused(url: str, says: str, **options: Any) -> None:
    """Connecting must be refused quickly, as a setting that is wrong, in our words and without the password."""
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=says) as caught:
        async with connect(url, **options):
            pass
    assert time.monotonic() - started < QUICK
    assert "Traceback" not in str(caught.value)
    assert "_ssl.c" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


# -- Redis ------------------------------------------------------------------------------------------------------------


class RedisPlaced(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")
    stream: str


class RedisServers:
    """Servers with TLS on a port of their own, by what they do: "server", "expired", "asking" (client certificates)."""

    def __init__(self, papers: Papers) -> None:
        self.papers = papers
        self.brokers: dict[str, Redis] = {}
        self.ports: dict[str, int] = {}
        self.start("server", papers.server)
        self.start("expired", papers.expired)
        self.start("asking", papers.server, {"tls-auth-clients": "yes"})

    def start(self, name: str, files: tuple[str, str], options: Mapping[str, str] | None = None) -> None:
        self.ports[name] = free_port()
        tls = {
            "tls-port": str(self.ports[name]),
            "tls-cert-file": files[0],
            "tls-key-file": files[1],
            "tls-ca-cert-file": self.papers.authority,
            "tls-auth-clients": "no",
        }
        broker = Redis(password=PASSWORD, options={**tls, **(options or {})})
        self.brokers[name] = broker
        broker.start()

    def url(self, name: str, *, scheme: str = "rediss", login: str = f":{PASSWORD}@", host: str = "localhost") -> str:
        return f"{scheme}://{login}{host}:{self.ports[name]}"


@pytest.fixture(scope="module")
def redis_servers(papers: Papers) -> Iterator[RedisServers]:
    """Three servers, for all tests here."""
    try:
        servers = RedisServers(papers)
    except RuntimeError as exc:
        if "tls-port" in str(exc):
            unavailable("this Redis is built without TLS")
        raise
    except BrokerMissing as exc:
        unavailable(str(exc))
    yield servers
    for broker in servers.brokers.values():
        broker.close()


class TestRedis:
    @pytest.fixture
    def trust(self, papers: Papers) -> dict[str, Any]:
        return {"ssl_ca_certs": papers.authority}

    async def test_an_event_arrives(
        self, redis_servers: RedisServers, papers: Papers, trust: dict[str, Any], unique: str
    ) -> None:
        """Over TLS, with a password, with our own certificate where one is wanted, and as a user of the ACL."""
        chain, key = papers.client
        own: dict[str, Any] = {"ssl_certfile": chain, "ssl_keyfile": key}
        from redis.asyncio import Redis as Client

        for name, wanted in (("server", {}), ("asking", own)):
            options: dict[str, Any] = {**trust, **wanted}
            port = redis_servers.brokers[name].port
            admin: Any = Client(port=port, password=PASSWORD)
            await admin.acl_setuser("ann", enabled=True, passwords=["+ge/heim@4711"], keys=["*"], categories=["+@all"])
            async with connect(redis_servers.url(name), **options) as emitter:
                await emitter.emit(RedisPlaced(stream=unique))
            async with connect(redis_servers.url(name, login="ann:ge%2Fheim%404711@"), **options) as emitter:
                await emitter.emit(RedisPlaced(stream=unique))
            assert await admin.xlen(unique) == 2
            await admin.aclose()

    async def test_a_certificate_that_is_not_accepted(self, redis_servers: RedisServers, trust: dict[str, Any]) -> None:
        """Trying again mends no certificate: it is told at once, each with what to write."""
        await refused(redis_servers.url("server"), UNTRUSTED.format(trust="ssl_ca_certs"))
        await refused(redis_servers.url("server", host="127.0.0.1"), OTHER_HOST, **trust)
        await refused(redis_servers.url("expired"), EXPIRED, **trust)

    async def test_a_client_certificate_that_is_missing_or_not_trusted(
        self, redis_servers: RedisServers, papers: Papers, trust: dict[str, Any]
    ) -> None:
        """With TLS 1.3 it is refused after the handshake, when the client thinks that it is connected."""
        says = WANTED.format(own="ssl_certfile and ssl_keyfile")
        await refused(redis_servers.url("asking"), says, **trust)
        chain, key = papers.stranger
        await refused(redis_servers.url("asking"), says, ssl_certfile=chain, ssl_keyfile=key, **trust)

    async def test_tls_where_there_is_none_and_the_other_way_round(
        self, redis_servers: RedisServers, trust: dict[str, Any]
    ) -> None:
        """Redis waits for more when it reads a handshake, and hangs up without a word when it waits for one."""
        plain = f"rediss://:{PASSWORD}@localhost:{redis_servers.brokers['server'].port}"
        await refused(plain, NO_TLS.format(plain="redis"), timeout=1.0, **trust)
        for login in ("", f":{PASSWORD}@"):
            url = redis_servers.url("server", scheme="redis", login=login)
            await refused(url, HAS_TLS.format(secure="rediss"))

    @pytest.mark.parametrize("login", [":wrong@", "bob:wrong@", "ann:wrong%2F@", ""])
    async def test_a_wrong_password(self, redis_servers: RedisServers, trust: dict[str, Any], login: str) -> None:
        """As without TLS."""
        expected = "check username and password" if login else "none was given: write password="
        await refused(redis_servers.url("server", login=login), expected, **trust)

    async def test_a_user_who_may_not_write(
        self, redis_servers: RedisServers, trust: dict[str, Any], unique: str
    ) -> None:
        """A permission that is missing is told at the first event, and no retry hides it."""
        from redis.asyncio import Redis as Client

        admin: Any = Client(port=redis_servers.brokers["server"].port, password=PASSWORD)
        await admin.acl_setuser(
            unique, enabled=True, passwords=[f"+{PASSWORD}"], keys=["other:*"], categories=["+@all"]
        )
        await admin.aclose()
        async with connect(redis_servers.url("server", login=f"{unique}:{PASSWORD}@"), **trust) as emitter:
            with pytest.raises(Exception, match="ACL SETUSER"):
                await emitter.emit(RedisPlaced(stream=unique))

    async def test_a_cluster(self, redis_servers: RedisServers, papers: Papers, trust: dict[str, Any]) -> None:
        """ssl=True is checked as rediss:// is."""
        url = redis_servers.url("server", scheme="redis+cluster")
        await refused(url, UNTRUSTED.format(trust="ssl_ca_certs"), ssl=True)
        await refused(
            redis_servers.url("asking", scheme="redis+cluster", host="127.0.0.1"), OTHER_HOST, ssl=True, **trust
        )
        await refused(url, "it speaks TLS there; write ssl=True")

    async def test_sentinels(self, redis_servers: RedisServers) -> None:
        """The client of the sentinels keeps their errors to itself, and tells its own options instead."""
        url = redis_servers.url("server", scheme="redis+sentinel") + "/mymaster"
        await refused(url, r"the sentinel localhost:\d+ .*it speaks TLS there; write sentinel_kwargs={'ssl': True}")
        says = UNTRUSTED.format(trust=r"sentinel_kwargs\['ssl_ca_certs'\]")
        await refused(url, says, sentinel_kwargs={"ssl": True})
        plain = f"redis+sentinel://localhost:{free_port()}/mymaster"
        with pytest.raises(BrokerUnavailableError, match=r"name no master \(localhost:\d+: .*call failed") as caught:
            await load_brokers(plain, {})[0].backend.start()
        assert "<redis" not in str(caught.value)


# -- RabbitMQ ---------------------------------------------------------------------------------------------------------


class RabbitPlaced(EventBase):
    __route__ = RabbitMQEventRoute(exchange="", routing_key="{queue}")
    queue: str


_ADVANCED = """
[{{rabbit, [
  {{ssl_listeners, [{{"127.0.0.1", {port}}}]}},
  {{ssl_options, [
    {{cacertfile, "{authority}"}}, {{certfile, "{server[0]}"}}, {{keyfile, "{server[1]}"}},
    {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}},
    {{sni_hosts, [{{"expired.test", [{{certfile, "{expired[0]}"}}, {{keyfile, "{expired[1]}"}}]}}]}}
  ]}}
]}}].
"""


class RabbitMQWithTLS(RabbitMQ):
    """A node that listens with TLS beside its plain port, wants client certificates, and shows two of its own."""

    start_seconds = 50.0

    def __init__(self, papers: Papers) -> None:
        super().__init__()
        self.tls_port = free_port()
        self.advanced = self.directory / "advanced.config"
        self.advanced.write_text(
            _ADVANCED.format(
                port=self.tls_port, authority=papers.authority, server=papers.server, expired=papers.expired
            )
        )

    def environment(self) -> Mapping[str, str]:
        """The process's environment."""
        return {**super().environment(), "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.advanced)}


@pytest.fixture(scope="module")
def rabbitmq(papers: Papers) -> Iterator[RabbitMQWithTLS]:
    """One node for all tests here: starting takes seconds."""
    broker = RabbitMQWithTLS(papers)
    try:
        broker.start()
    except BrokerMissing as exc:
        broker.close()
        unavailable(str(exc))
    yield broker
    broker.close()


class TestRabbitMQ:
    @pytest.fixture
    def trust(self, papers: Papers) -> dict[str, Any]:
        return {"cafile": papers.authority}

    @pytest.fixture
    def options(self, papers: Papers, trust: dict[str, Any]) -> dict[str, Any]:
        return {**trust, "certfile": papers.client[0], "keyfile": papers.client[1]}

    async def test_an_event_arrives(self, rabbitmq: RabbitMQWithTLS, options: dict[str, Any], unique: str) -> None:
        """With our own certificate, which this node wants; `server_hostname` when the host goes by another name."""
        import aio_pika

        connection = await aio_pika.connect(rabbitmq.url)
        async with connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(unique, exclusive=True)
            async with connect(f"amqps://localhost:{rabbitmq.tls_port}", **options) as emitter:
                await emitter.emit(RabbitPlaced(queue=unique))
            named: dict[str, Any] = {**options, "server_hostname": "localhost"}
            async with connect(f"amqps://127.0.0.1:{rabbitmq.tls_port}", **named) as emitter:
                await emitter.emit(RabbitPlaced(queue=unique))
            for _ in range(2):
                assert await queue.get(no_ack=True) is not None

    async def test_a_certificate_that_is_not_accepted(self, rabbitmq: RabbitMQWithTLS, options: dict[str, Any]) -> None:
        """As with Redis."""
        url = f"amqps://localhost:{rabbitmq.tls_port}"
        untrusting: dict[str, Any] = {name: value for name, value in options.items() if name != "cafile"}
        await refused(url, UNTRUSTED.format(trust="cafile"), **untrusting)
        await refused(f"amqps://127.0.0.1:{rabbitmq.tls_port}", OTHER_HOST, **options)
        await refused(url, EXPIRED, server_hostname="expired.test", **options)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_client_certificate_that_is_missing_or_not_trusted(
        self, rabbitmq: RabbitMQWithTLS, papers: Papers, version: ssl.TLSVersion
    ) -> None:
        """With TLS 1.2 the handshake fails, with 1.3 what comes after it."""
        for files in (None, papers.stranger):
            context = ssl.create_default_context(cafile=papers.authority)
            context.maximum_version = version
            if files is not None:
                context.load_cert_chain(*files)
            url = f"amqps://localhost:{rabbitmq.tls_port}"
            await refused(url, WANTED.format(own="certfile and keyfile"), ssl_context=context)

    async def test_tls_where_there_is_none_and_the_other_way_round(
        self, rabbitmq: RabbitMQWithTLS, options: dict[str, Any]
    ) -> None:
        """The most frequent mistake: the scheme of one with the port of the other."""
        await refused(f"amqps://localhost:{rabbitmq.port}", NO_TLS.format(plain="amqp"), **options)
        await refused(f"amqp://localhost:{rabbitmq.tls_port}", HAS_TLS.format(secure="amqps"))

    async def test_a_wrong_password_and_a_wrong_virtual_host(
        self, rabbitmq: RabbitMQWithTLS, options: dict[str, Any]
    ) -> None:
        """As without TLS."""
        where = f"localhost:{rabbitmq.tls_port}"
        await refused(f"amqps://guest:{PASSWORD}@{where}", "refuses the user 'guest': check username", **options)
        await refused(f"amqps://{where}/nowhere", "virtual host 'nowhere'.*rabbitmqctl add_vhost", **options)

    async def test_a_node_with_a_bad_certificate_is_passed_over(
        self, rabbitmq: RabbitMQWithTLS, options: dict[str, Any]
    ) -> None:
        """One node of a cluster whose certificate does not do must not keep the app from using the others."""
        hosts = f"127.0.0.1:{rabbitmq.tls_port},localhost:{rabbitmq.tls_port}"
        async with connect(f"amqps://{hosts}", **options) as emitter:
            await emitter.ping()


# -- Kafka ------------------------------------------------------------------------------------------------------------


class KafkaPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="{topic}")
    topic: str


class TLSFront:
    """Ends TLS in front of a plain port, in threads: unlike asyncio's it tells a client why it is refused."""

    def __init__(self, papers: Papers, target: int, *, port: int = 0, **options: Any) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=papers.authority)
        self._context.load_cert_chain(*options.get("files", papers.server))
        self._context.maximum_version = options.get("version", ssl.TLSVersion.MAXIMUM_SUPPORTED)
        if options.get("asking"):
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # Closed.
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, self._context.wrap_socket(connection, server_side=True) as near:
            with socket.create_connection(("127.0.0.1", self._target)) as far:
                while True:
                    for source in [near] if near.pending() else select.select([near, far], [], [])[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        (far if source is near else near).sendall(data)


class AdvertisedTansu(Tansu):
    """Says that it is to be found at the proxy; `more`: arguments of its command."""

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.front_port = free_port()
        self._more = more

    def command(self) -> list[str]:
        """Program and arguments."""
        return [*super().command()[:-1], f"tcp://localhost:{self.front_port}", *self._more]


@pytest.fixture(scope="module")
def kafka() -> Iterator[AdvertisedTansu]:
    """A broker that is reached through `front_port`."""
    yield from _tansu()


def _tansu(*more: str) -> Iterator[AdvertisedTansu]:
    broker = AdvertisedTansu(*more)
    try:
        broker.start()
    except BrokerMissing as exc:
        broker.close()
        unavailable(str(exc))
    yield broker
    broker.close()


@pytest.fixture(scope="module")
def front(papers: Papers, kafka: AdvertisedTansu) -> Iterator[Callable[..., int]]:
    """A function that puts a proxy in front of the broker, and returns its port."""
    fronts: list[TLSFront] = []

    def make(**options: Any) -> int:
        fronts.append(TLSFront(papers, kafka.port, **options))
        return fronts[-1].port

    yield make
    for each in fronts:
        each.close()


class TestKafka:
    @pytest.fixture
    def trust(self, papers: Papers) -> dict[str, Any]:
        return {"cafile": papers.authority}

    async def test_an_event_arrives(
        self, kafka: AdvertisedTansu, front: Callable[..., int], papers: Papers, unique: str
    ) -> None:
        """Through TLS with our own certificate; the client follows the address that the broker advertises."""
        from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]

        front(port=kafka.front_port, asking=True)
        certfile, keyfile = papers.client
        url = f"kafka+ssl://localhost:{kafka.front_port}"
        async with connect(url, cafile=papers.authority, certfile=certfile, keyfile=keyfile) as emitter:
            await emitter.emit(KafkaPlaced(topic=unique))
        context = ssl.create_default_context(cafile=papers.authority)
        context.load_cert_chain(certfile, keyfile)
        consumer: Any = AIOKafkaConsumer(
            unique,
            bootstrap_servers=f"localhost:{kafka.front_port}",
            auto_offset_reset="earliest",
            security_protocol="SSL",
            ssl_context=context,
        )
        await consumer.start()
        try:
            record = await asyncio.wait_for(consumer.getone(), 10)
        finally:
            await consumer.stop()
        assert unique.encode() in record.value

    async def test_a_certificate_that_is_not_accepted(
        self, front: Callable[..., int], papers: Papers, trust: dict[str, Any]
    ) -> None:
        """As with Redis."""
        port = front()
        await refused(f"kafka+ssl://localhost:{port}", UNTRUSTED.format(trust="cafile"))
        await refused(f"kafka+ssl://127.0.0.1:{port}", OTHER_HOST, **trust)
        await refused(f"kafka+ssl://localhost:{front(files=papers.expired)}", EXPIRED, **trust)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_client_certificate_that_is_missing_or_not_trusted(
        self, front: Callable[..., int], papers: Papers, trust: dict[str, Any], version: ssl.TLSVersion
    ) -> None:
        """As with RabbitMQ."""
        url = f"kafka+ssl://localhost:{front(asking=True, version=version)}"
        says = WANTED.format(own="certfile and keyfile")
        await refused(url, says, **trust)
        await refused(url, says, certfile=papers.stranger[0], keyfile=papers.stranger[1], **trust)

    async def test_tls_where_there_is_none_and_the_other_way_round(
        self, kafka: AdvertisedTansu, front: Callable[..., int], trust: dict[str, Any]
    ) -> None:
        """A broker takes the handshake for the length of a request, and waits for the rest of it."""
        await refused(f"kafka+ssl://localhost:{kafka.port}", NO_TLS.format(plain="kafka"), timeout=1.0, **trust)
        login: dict[str, Any] = {"username": "ann", "password": PASSWORD, "sasl_mechanism": "SCRAM-SHA-256"}
        for options in ({}, login):
            url = f"kafka://localhost:{front()}"
            await refused(url, HAS_TLS.format(secure=r"kafka\+ssl"), timeout=1.0, **options)

    @pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
    async def test_a_login_that_is_refused(self, kafka: AdvertisedTansu, mechanism: str) -> None:
        """By a broker that knows nobody of this name, and by one that knows no logins."""
        login: dict[str, Any] = {"username": "ann", "password": PASSWORD, "sasl_mechanism": mechanism}
        for asking in _tansu("--authentication"):
            await refused(f"kafka://localhost:{asking.port}", "the user or password is wrong; check username", **login)
        await refused(f"kafka://localhost:{kafka.port}", "does not offer this SASL mechanism; check sasl_mech", **login)


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "rediss", "amqp", "amqps", "kafka", "kafka+ssl"])
async def test_an_outage_stays_an_outage(scheme: str) -> None:
    """A broker that is only down is tried again, whatever is asked of it about TLS: it may come back."""
    with pytest.raises(ConnectionError, match="not connected within startup_timeout"):
        async with connect(f"{scheme}://127.0.0.1:{free_port()}", startup_timeout=0.3):
            pass


@pytest.mark.parametrize("scheme", ["redis", "amqp", "kafka"])
async def test_a_server_that_hangs_up_is_an_outage(scheme: str) -> None:
    """So does a broker that is starting, or the balancer in front of one."""
    hung_up = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hung_up
        hung_up += 1
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionError, match="not connected within startup_timeout") as caught:
            async with connect(f"{scheme}://127.0.0.1:{port}", startup_timeout=0.5):
                pass
    assert hung_up > 1
    assert not isinstance(caught.value, (ConfigurationError, BrokerUnavailableError))


# -- certificates of our own -----------------------------------------------------------------------------------------


def test_a_certificate_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    """ "PEM lib" says nothing; and nothing may wait at a terminal for a password."""
    authority = trustme.CA()
    certificate, other = authority.issue_cert("app.test"), authority.issue_cert("other.test")
    chain, key, locked = (tmp_path / name for name in ("chain.pem", "key.pem", "locked.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(key))
    private = load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.encode()))
    )
    strange = tmp_path / "strange.pem"
    other.private_key_pem.write_to_path(str(strange))

    def load(certfile: Path | None, keyfile: Path | None, password: str | None = None) -> str:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            load_own(context, password, "write secret=...", certfile=certfile, keyfile=keyfile)
        except ConfigurationError as exc:
            return str(exc)
        return ""

    assert load(None, None) == load(chain, key) == load(chain, locked, PASSWORD) == ""
    assert "or the key has a password: write secret=..." in load(chain, locked)
    assert "or the key has another password" in load(chain, locked, f"{PASSWORD}x")
    assert PASSWORD not in load(chain, locked, f"{PASSWORD}x")
    assert "the key is not the one of the certificate; check certfile and keyfile" in load(chain, strange)
    assert "certfile holds no certificate, or keyfile (by default the same file) no key" in load(chain, None)
    assert "keyfile is the key of a certificate: write certfile=..., too" in load(None, key)
    assert "keyfile: there is no file '/nowhere/key.pem'" in load(chain, Path("/nowhere/key.pem"))
