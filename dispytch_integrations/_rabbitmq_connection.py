"""Opening a connection to RabbitMQ: hosts, credentials, TLS, and the errors that make no second try worth it.

aiormq's connection and not aio-pika's robust one: ours tries several hosts, waits between attempts with a growing,
spread delay, reads a rotated password again, and can drop a connection whose other end is silent.
"""

# aiormq's futures, tasks and queues say nothing about what they hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from aiormq import exceptions as amqp
from aiormq.auth import AuthMechanism
from aiormq.connection import Connection as AMQPConnection
from aiormq.connection import (
    FrameReceiver,
    ReceivedFrame,
    TCPTransportFactory,
    TLSTransportFactory,
    TransportFactory,
)
from pamqp import commands as spec
from pamqp.base import Frame
from pamqp.frame import FrameTypes
from yarl import URL

from dispytch_integrations._client_options import load_own, require_files, speaks_tls, tls_problem, wrong_types
from dispytch_integrations._rabbitmq_errors import tell
from dispytch_integrations.backend import BrokerURL, Secret, read_secret, scrub
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError

__all__ = ["CLIENT_OPTIONS", "Connection", "Dialer", "option_problems"]

CLIENT_OPTIONS: Mapping[str, Any] = {
    # aiormq reads these from the URL's query.
    "auth": "plain",
    "cadata": None,
    "cafile": None,
    "capath": None,
    "certfile": None,
    "heartbeat": 15,
    "keyfile": None,
    "name": "",
    "no_verify_ssl": False,
    # Arguments of aiormq's connection.
    "client_properties": None,
    "ssl_context": None,
    "transport_factory": None,
    # Arguments of asyncio's open_connection.
    "family": 0,
    "flags": 0,
    "happy_eyeballs_delay": None,
    "interleave": None,
    "limit": 65536,
    "local_addr": None,
    "proto": 0,
    "server_hostname": None,
    "ssl_handshake_timeout": None,
    "ssl_shutdown_timeout": None,
    # Of aio_pika.connect: seconds for one attempt.
    "timeout": 10.0,
}
"""Options of the client and their defaults. `heartbeat`, seconds, is less than aiormq's 60: dead peers show sooner."""

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "cadata": str,
    "cafile": (str, Path),
    "capath": (str, Path),
    "certfile": (str, Path),
    "client_properties": dict,
    "happy_eyeballs_delay": (int, float),
    "interleave": int,
    "keyfile": (str, Path),
    "local_addr": tuple,
    "server_hostname": str,
    "ssl_context": ssl.SSLContext,
    "ssl_handshake_timeout": (int, float),
    "ssl_shutdown_timeout": (int, float),
    "transport_factory": TransportFactory,
}
_FOR_TLS = (
    "ssl_context", "cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl", "server_hostname",
    "ssl_handshake_timeout", "ssl_shutdown_timeout",
)  # fmt: skip
_IN_QUERY = ("auth", "cadata", "cafile", "capath", "certfile", "heartbeat", "keyfile", "name", "no_verify_ssl")
_ARGUMENTS = ("client_properties", "transport_factory")
_ACCESS_REFUSED, _NOT_ALLOWED = 403, 530
_NO_HEARTBEAT = 65535
"""From here on, and for anything that is not whole, aiormq takes 0: a dead peer would go unnoticed."""
_PORTS = {"amqp": 5672, "amqps": 5671}


def option_problems(url: BrokerURL, given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with options of the client, as far as can be seen without connecting."""
    unused = [name for name in _FOR_TLS if given.get(name)]
    if url.scheme != "amqps" and unused:
        yield f"{url.scheme}:// does not encrypt, so {', '.join(unused)} would go unused; write amqps://"
    yield from wrong_types({name: value for name, value in given.items() if value is not None}, CLIENT_OPTIONS, _KINDS)
    heartbeat = given.get("heartbeat")
    if isinstance(heartbeat, float) or (isinstance(heartbeat, int) and not 0 <= heartbeat < _NO_HEARTBEAT):
        yield f"heartbeat={heartbeat} would be taken for none; write whole seconds, 0 for none"
    auth = given.get("auth")
    known = [mechanism.lower() for mechanism in AuthMechanism.__members__]
    if isinstance(auth, str) and auth.lower() not in known:
        yield f"auth={auth!r} is not known to aiormq; write one of {', '.join(known)}"


class _Factory(TransportFactory):
    """Makes a transport as another factory does, and remembers it."""

    def __init__(self, inner: TransportFactory) -> None:
        self._inner = inner
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._inner.create(url, **kwargs)
        return reader, self.writer


class _Receiver(FrameReceiver):
    """Reads frames while a connection is being opened, and tells why the broker closes it: aiormq forgets the words."""

    def __init__(self, inner: FrameReceiver) -> None:
        self._inner = inner

    async def get_frame(self) -> ReceivedFrame:
        received = await self._inner.get_frame()
        frame = received[2]
        if isinstance(frame, spec.Connection.Close):
            words = frame.reply_text or ""
            if frame.reply_code == _ACCESS_REFUSED:
                raise amqp.ProbableAuthenticationError(words)
            if frame.reply_code == _NOT_ALLOWED:
                raise amqp.ConnectionNotAllowed(words)
            raise amqp.ConnectionClosed(frame.reply_code, words)
        return received


class Connection(AMQPConnection):
    """aiormq's connection that can be aborted, and knows whether the broker has blocked it."""

    CLOSE_SECONDS: ClassVar[float] = 0.8

    _factory: _Factory

    @staticmethod
    async def _rpc(
        request: Frame, writer: asyncio.StreamWriter, frame_receiver: FrameReceiver, wait_response: bool = True
    ) -> FrameTypes | None:
        return await AMQPConnection._rpc(request, writer, _Receiver(frame_receiver), wait_response)

    @property
    def blocked(self) -> bool:
        """Has the broker said that it reads no publishes: an alarm for memory or disk?"""
        # `ready` waits for nothing else once connected, and there is no public flag.
        if not self.connected.is_set():
            return False
        waiting = self.ready()
        try:
            waiting.send(None)
        except StopIteration:
            return False
        waiting.close()
        return True

    def abort(self) -> None:
        """Close the socket at once, without AMQP's farewell; whoever uses the connection sees it lost."""
        if self._factory.writer is not None:
            self._factory.writer.transport.abort()

    async def hang_up(self) -> None:
        """Close as AMQP wants it, for a moment; then as a socket. Does not raise."""
        closing = asyncio.ensure_future(self.close())
        try:
            await asyncio.wait({closing}, timeout=self.CLOSE_SECONDS)
        finally:
            if not closing.done():
                self.abort()
                closing.cancel()
        if not closing.done():
            await asyncio.wait({closing}, timeout=self.CLOSE_SECONDS)
        if closing.done() and not closing.cancelled():
            closing.exception()  # Seen: a connection that was lost closes with its error.


class Dialer:
    """Opens connections to one broker. `secrets`: the passwords it has read so far."""

    def __init__(
        self,
        url: BrokerURL,
        username: str | None,
        password: Secret | None,
        client_options: Mapping[str, Any],
    ) -> None:
        self._scheme = "amqps" if url.scheme == "amqps" else "amqp"
        self._url = url
        self._username = url.username or username or "guest"
        self._password: Secret | None = password if url.password is None else url.password
        self._options = {**CLIENT_OPTIONS, **client_options}
        self._next_host = 0
        self.secrets: set[str] = {url.password} if url.password else set()
        self.vhost = unquote(url.path.removeprefix("/")) or "/"
        self.timeout: float | None = self._options["timeout"]
        """Seconds one attempt may take."""

    @property
    def address(self) -> str:
        """Where it connects to, without secrets."""
        return str(self._url)

    def scrubbed(self, text: str) -> str:
        """`text` without the passwords that were read so far."""
        return scrub(text, tuple(self.secrets))

    def check_tls(self) -> None:
        """Load certificates and keys. Raises ConfigurationError when that fails: to the client it is an outage."""
        options = self._options
        if self._scheme != "amqps" or options["ssl_context"] is not None:
            return
        require_files(cafile=options["cafile"])
        try:
            data = options["cadata"]
            context = ssl.create_default_context(
                cafile=options["cafile"], capath=options["capath"], cadata=b64decode(data) if data else None
            )
        except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError: a file that holds something else.
            words = exc.strerror if isinstance(exc, OSError) else None
            raise ConfigurationError(
                f"certificates to trust cannot be loaded ({words or exc}); check cafile, capath and cadata (base64)"
            ) from exc
        advice = "load it into an ssl.SSLContext, and write ssl_context=..."
        load_own(context, None, advice, certfile=options["certfile"], keyfile=options["keyfile"])

    async def connect(self) -> Connection:
        """Open a connection to the next host that answers.

        Raises BrokerUnavailableError with what each host said, ConfigurationError for wrong credentials or vhost, and
        when TLS can work with none of them.
        """
        hosts = self._url.hosts or (("localhost", None),)
        failures: list[str] = []
        hopeless: list[str] = []
        for _ in hosts:
            host, given_port = hosts[self._next_host % len(hosts)]
            port = given_port or _PORTS[self._scheme]
            try:
                return await self._connect_to(host, port)
            except ConfigurationError:
                raise
            except (amqp.AMQPError, OSError) as exc:
                self._next_host += 1
                problem = await self._tls_problem(exc, host, port)
                told = self.scrubbed(problem or tell(exc))
                (failures if problem is None else hopeless).append(f"{host}: {told}")
        if hopeless:
            raise ConfigurationError(f"cannot connect to {self._url}: {'; '.join([*hopeless, *failures])}")
        raise BrokerUnavailableError(f"cannot connect to {self._url}: {'; '.join(failures)}")

    async def _tls_problem(self, exc: Exception, host: str, port: int) -> str | None:
        if self._scheme == "amqps":
            plain = "amqp://, or its port for TLS (5671)"
            return tls_problem(exc, trust="cafile", own="certfile and keyfile", port=plain)
        # The broker hangs up on what is no TLS; a refused connection has a number instead.
        ended = isinstance(exc, amqp.AMQPConnectionError) and not isinstance(exc.__cause__, ConnectionRefusedError)
        if ended and await speaks_tls(host, port):
            return "it speaks TLS there; write amqps://, or its port without TLS (5672)"
        return None

    async def _connect_to(self, host: str, port: int) -> Connection:
        options = self._options
        arguments = {name: options[name] for name in _ARGUMENTS if options[name] is not None}
        factory = _Factory(arguments.pop("transport_factory", None) or self._default_factory())
        others = {
            name: value
            for name, value in options.items()
            if name not in (*_IN_QUERY, *_ARGUMENTS, "ssl_context", "timeout") and value != CLIENT_OPTIONS[name]
        }
        try:
            connection = Connection(
                self._amqp_url(host, port),
                context=options["ssl_context"],
                transport_factory=factory,
                **arguments,
                **others,
            )
        except (TypeError, ValueError) as exc:
            raise ConfigurationError(f"aiormq refuses its options: {self.scrubbed(str(exc))}") from exc
        connection._factory = factory
        connection.vhost = self.vhost  # As it is: a path in a URL would have it quoted and unquoted.
        try:
            async with asyncio.timeout(self.timeout):
                await connection.connect()
        except amqp.ProbableAuthenticationError as exc:
            raise ConfigurationError(
                f"{self._url} refuses the user {self._username!r}: check username and password "
                f"(rabbitmqctl authenticate_user tells), and that a guest comes from localhost"
            ) from exc
        except amqp.ConnectionNotAllowed as exc:
            if "limit" in str(exc):  # Of connections, say: that passes.
                raise
            raise self._not_allowed(exc) from exc
        except BaseException:  # Cancelled, too: nothing stays open.
            await connection.hang_up()
            raise
        return connection

    def _default_factory(self) -> TransportFactory:
        return TLSTransportFactory() if self._scheme == "amqps" else TCPTransportFactory()

    def _amqp_url(self, host: str, port: int) -> URL:
        password = "guest" if self._password is None else read_secret(self._password)
        if self._password is not None:
            self.secrets.add(password)
        query = {
            name: str(int(value)) if isinstance(value, bool) else str(value)
            for name in _IN_QUERY
            if (value := self._options[name]) not in (None, "")
        }
        return URL.build(scheme=self._scheme, host=host, port=port, user=self._username, password=password, query=query)

    def _not_allowed(self, exc: BaseException) -> ConfigurationError:
        return ConfigurationError(
            f"{self._url} does not let the user {self._username!r} into the virtual host {self.vhost!r}: {tell(exc)}; "
            f"create it (rabbitmqctl add_vhost), or allow the user (rabbitmqctl set_permissions)"
        )
