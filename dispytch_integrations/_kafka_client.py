"""A started AIOKafkaProducer as we use it. Importing this needs aiokafka.

The one place that knows the client's insides. What has no public way there: whether it was started, adding a record
without serializing it again, asking about one topic without creating it, dropping a dead connection, and an end
that waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from aiokafka import errors as kafka_errors
from aiokafka.conn import AIOKafkaConnection, CloseReason, create_conn  # type: ignore[import-untyped]
from aiokafka.producer.message_accumulator import BatchBuilder  # type: ignore[import-untyped]
from aiokafka.protocol.metadata import MetadataRequest  # type: ignore[import-untyped]

from dispytch_integrations._client_options import answers_plainly, speaks_tls, tls_problem
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    NotStartedError,
    WrongLoopError,
    WrongProcessError,
)

__all__ = ["Client", "knock"]

_HEDGE_SECONDS = 0.3
"""After which the next broker of a cluster is asked, too: one that hangs does not make the others unreachable."""
_DEAD_SECONDS = 0.25
"""Silence after which a connection counts as dead when the time for an answer is over."""
_END_SECONDS = 0.4
"""What each half of closing without a flush may take."""


class _HideLogins(logging.Filter):
    """aiokafka logs each request at DEBUG, the one with the password of PLAIN or the token of OAUTHBEARER included."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, without what a login sends."""
        if isinstance(record.args, tuple):
            names = [type(argument).__name__ for argument in record.args]
            record.args = tuple(
                f"{name}(***)" if name.startswith("SaslAuthenticateRequest") else argument
                for name, argument in zip(names, record.args, strict=True)
            )
        return True


logging.getLogger("aiokafka.conn").addFilter(_HideLogins())


class Client:
    """An AIOKafkaProducer; whoever started it stops it."""

    def __init__(self, raw: Any) -> None:
        """Raises ConfigurationError when `raw` is no AIOKafkaProducer."""
        if not isinstance(raw, AIOKafkaProducer):
            raise ConfigurationError(
                f"KafkaProducer takes an AIOKafkaProducer, not a {type(raw).__name__}; write "
                f"KafkaProducer(AIOKafkaProducer(bootstrap_servers=...)), or connect('kafka://...')"
            )
        self.raw: Any = raw
        self.net: Any = self.raw.client
        self.cluster: Any = self.net.cluster
        self.accumulator: Any = self.raw._message_accumulator
        self.partitioner: Any = self.raw._partitioner
        self.request_timeout: float = self.raw._request_timeout_ms / 1000
        self.max_request_size: int = self.raw._max_request_size
        self.max_batch_size: int = self.accumulator._batch_size
        manager: Any = self.raw._txn_manager
        self._transactions: Any = manager if manager is not None and manager.transactional_id is not None else None
        self._sender: Any = self.raw._sender
        self.loop: asyncio.AbstractEventLoop = self.raw._loop
        self._pid = os.getpid()

    def check(self) -> bool:
        """Can it send? False: its sending task has died (another producer took its transactional_id, for example).

        Raises what is a mistake of the program: NotStartedError, WrongLoopError, WrongProcessError.
        """
        # A client that was never started, or was stopped, would let a send hang for ever. The sender's task is the
        # last thing that start() makes.
        if self.raw._closed:
            raise NotStartedError(
                "the AIOKafkaProducer was stopped, and cannot be started again; make a new one and "
                "`await raw_kafka_producer.start()`, or let connect('kafka://...') do both"
            )
        if asyncio.get_running_loop() is not self.loop or os.getpid() != self._pid:
            raise self._wrong_place()
        task = self._sender.sender_task
        if task is None:
            raise NotStartedError(
                "the AIOKafkaProducer was not started, or its start failed; write "
                "`await raw_kafka_producer.start()` before the first emit, or let connect('kafka://...') do it"
            )
        transactions = self._transactions
        if transactions is not None and not transactions.is_in_transaction():
            raise NotStartedError(
                "the AIOKafkaProducer has a transactional_id, and no transaction is open; "
                "emit within `async with raw_kafka_producer.transaction():`"
            )
        return not task.done()

    def _wrong_place(self) -> Exception:
        if os.getpid() != self._pid:
            return WrongProcessError(
                f"the AIOKafkaProducer was made in process {self._pid}, before a fork; make one in this process"
            )
        return WrongLoopError(
            "the AIOKafkaProducer belongs to another event loop; emit on the loop that it was made on, "
            "or make one on this loop"
        )

    def builder(self, size: int) -> Any:
        """An empty batch of at most `size` bytes before compression; a single record may be larger."""
        accumulator = self.accumulator
        transactional = self._transactions is not None
        return BatchBuilder(size, accumulator._compression_type, is_transactional=transactional)

    # -- topics --------------------------------------------------------------------------------------------------

    async def look_up(self, topics: Sequence[str], *, create: bool) -> dict[str, type[Exception] | None]:
        """Ask the brokers about topics: the error each is answered with, None for one that is there.

        `create`: may the broker create them, if it is set up to? One older than Kafka 0.11 decides that itself.
        Raises a KafkaError when no broker answers.
        """
        answer = await self._ask(MetadataRequest(list(topics), allow_auto_topic_creation=create))
        errors: dict[str, type[Exception] | None] = dict.fromkeys(topics, kafka_errors.UnknownTopicOrPartitionError)
        for code, topic, *_ in answer.topics:
            error: Any = kafka_errors.for_code(code)
            errors[topic] = None if error is kafka_errors.NoError else error
        return errors

    async def learn(self, topic: str, *, create: bool) -> None:
        """Return when the client itself knows the topic's partitions. Raises a KafkaError.

        `create` as in `look_up`: the client's own request for one topic may create it, the one for all may not.
        """
        if create:
            await self.raw.partitions_for(topic)
            return
        await self.net.force_metadata_update()
        while self.cluster.partitions_for_topic(topic) is None:
            await asyncio.sleep(0.1)
            await self.net.force_metadata_update()

    # -- health --------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """Return when a broker answers.

        Cancelled while none does, connections that were silent are dropped; when all known brokers are gone, the
        first addresses are asked for new ones, which aiokafka itself does once only. Raises a KafkaError.
        """
        asked: dict[Any, float] = {}
        try:
            await self._ask(MetadataRequest([]), asked)
        except asyncio.CancelledError:
            now = self.loop.time()
            for node, since in asked.items():
                if now - since >= _DEAD_SECONDS:
                    self._drop(node)
            raise
        except kafka_errors.KafkaError:
            await self.net.bootstrap()

    async def _ask(self, request: Any, asked: dict[Any, float] | None = None) -> Any:
        """The first answer of any broker; they are asked in turn, the next one when one hangs or fails."""
        nodes = [broker.nodeId for broker in self.cluster.brokers()] or ["bootstrap"]
        random.shuffle(nodes)
        tasks: set[asyncio.Task[Any]] = set()
        error: Exception = kafka_errors.NodeNotReadyError("no broker is known")
        try:
            while nodes or tasks:
                if nodes:
                    node = nodes.pop()
                    if asked is not None:
                        asked[node] = self.loop.time()
                    tasks.add(self.loop.create_task(self.net.send(node, request)))
                done, tasks = await asyncio.wait(
                    tasks, timeout=_HEDGE_SECONDS if nodes else None, return_when=asyncio.FIRST_COMPLETED
                )
                answers: list[Any] = []
                for failure, task in [(task.exception(), task) for task in done]:
                    if failure is None:
                        answers.append(task.result())
                    elif isinstance(failure, kafka_errors.KafkaError):
                        error = failure
                    else:
                        raise failure
                if answers:
                    return answers[0]
            raise error
        finally:
            for task in tasks:
                task.cancel()

    def _drop(self, node: Any) -> None:
        for (node_id, _), connection in list(self.net._conns.items()):
            if node_id == node:
                _abort(connection)
                connection.close(reason=CloseReason.CONNECTION_TIMEOUT)

    # -- the end -------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Flush what is pending and close; cancelled, close without flushing."""
        try:
            await self.raw.stop()
        except asyncio.CancelledError:
            await self.abort()
            raise

    async def abort(self) -> None:
        """Close at once: what is pending fails, no task and no connection is left."""
        self.raw._closed = True
        self.accumulator._closed = True
        self._fail_pending(kafka_errors.KafkaConnectionError("the connection was closed before the confirmation"))
        tasks = self._own_tasks()
        for task in tasks:
            task.cancel()
        for connection in self.net._conns.values():
            _abort(connection)
        if tasks:
            await asyncio.wait(tasks, timeout=_END_SECONDS)
        closing = self.loop.create_task(self.net.close())
        await asyncio.wait({closing}, timeout=_END_SECONDS)
        closing.cancel()

    def _fail_pending(self, error: Exception) -> None:
        queued: Iterable[Any] = (batch for batches in self.accumulator._batches.values() for batch in batches)
        # A batch that waits for another attempt is expected among the pending ones when it ends.
        self.accumulator._pending_batches.update(queued)
        self.accumulator._batches.clear()
        for batch in list(self.accumulator._pending_batches):
            batch.failure(error)
            for future in (batch.future, batch._drain_waiter):
                if future.done() and not future.cancelled():
                    future.exception()  # Seen: whoever waits is told by a future of their own.

    def _own_tasks(self) -> set[asyncio.Task[Any]]:
        """The tasks that the client started and keeps to itself, found by whose coroutine they run."""
        owners = (self._sender, self.accumulator, self.net)
        found: set[asyncio.Task[Any]] = set()
        for task in asyncio.all_tasks():
            frame = getattr(task.get_coro(), "cr_frame", None)
            if frame is not None and any(frame.f_locals.get("self") is owner for owner in owners):
                found.add(task)
        return found


def _abort(connection: Any) -> None:
    # A transport that has something left to write to a dead peer never closes by itself.
    writer = connection._writer
    if writer is not None:
        writer.transport.abort()


_CREDENTIALS = (
    "client_id",
    "request_timeout_ms",
    "ssl_context",
    "security_protocol",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "sasl_kerberos_service_name",
    "sasl_kerberos_domain_name",
    "sasl_oauth_token_provider",
)
_HOPELESS = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.IncompatibleBrokerVersion,
)
"""What another attempt does not mend."""
_SCRAM_ANSWERS = ("v", "r", "s", "i")
"""Parts of SCRAM's answers. aiokafka looks for one where a broker that refuses has written `e=` (Tansu does)."""
_GREETING = b"\x00\x00\x00\x0a\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"
"""ApiVersions, version 0, without a client id: what every broker answers, before any login."""


async def knock(hosts: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> None:
    """Open and close a connection to the first of `hosts` that lets us in.

    aiokafka's start would only log why it did not, and tell the caller that it did not.

    Raises BrokerUnavailableError with each host's reason, ConfigurationError when credentials or a certificate are
    refused, or the client refuses the options.
    """
    credentials = {name: options[name] for name in _CREDENTIALS if name in options}
    try:
        AIOKafkaConnection(*hosts[0], **credentials)
    except (AssertionError, TypeError, ValueError) as exc:  # A token provider of a wrong type, a missing library.
        raise ConfigurationError(f"AIOKafkaProducer refuses its options: {exc}") from exc
    secure = str(options.get("security_protocol", "")).endswith("SSL")
    reasons: list[str] = []
    hopeless: list[str] = []
    for host, port in hosts:
        try:
            connection: Any = await create_conn(host, port, **credentials)
        except Exception as exc:  # Whatever it is, the next host may do.
            wrong = _login_problem(exc) or await _tls_problem(exc, host, port, secure=secure)
            (reasons if wrong is None else hopeless).append(f"{host}:{port}: {wrong or _reason(exc, credentials)}")
            continue
        await connection.close()
        return
    if hopeless:
        raise ConfigurationError(f"the broker does not let us in ({'; '.join([*hopeless, *reasons])})")
    raise BrokerUnavailableError(f"cannot be reached ({'; '.join(reasons)})")


def _login_problem(exc: Exception) -> str | None:
    """What is wrong with user, password or mechanism; None: something else happened."""
    if isinstance(exc, kafka_errors.UnsupportedSaslMechanismError | kafka_errors.IllegalSaslStateError):
        return "the broker does not offer this SASL mechanism; check sasl_mechanism"
    scram = isinstance(exc, KeyError) and exc.args[0] in _SCRAM_ANSWERS
    if scram or isinstance(exc, kafka_errors.SaslAuthenticationFailed):
        return "the user or password is wrong; check username, password and sasl_mechanism"
    if isinstance(exc, _HOPELESS) or isinstance(exc.__cause__, _HOPELESS):
        return f"{str(exc) or type(exc).__name__}; check username, password and sasl_mechanism"
    return None


async def _tls_problem(exc: Exception, host: str, port: int, *, secure: bool) -> str | None:
    """What is wrong with TLS; None: it may be an outage. The host is asked again where its silence may mean either."""
    problem = tls_problem(exc, trust="cafile", own="certfile and keyfile", port="kafka://, or its port for TLS")
    if problem is not None or isinstance(exc, ConnectionRefusedError):
        return problem
    if secure and await answers_plainly(host, port, _GREETING):
        return "it speaks no TLS there; write kafka://, or its port for TLS"
    if (
        not secure
        and isinstance(exc, kafka_errors.KafkaConnectionError | TimeoutError)
        and await speaks_tls(host, port)
    ):
        return "it speaks TLS there; write kafka+ssl://, or its port without TLS"
    return None


def _reason(exc: Exception, credentials: Mapping[str, Any]) -> str:
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, kafka_errors.KafkaConnectionError) and credentials.get("sasl_mechanism"):
        return f"{exc}; does it offer {credentials['sasl_mechanism']}?"
    return str(exc) or type(exc).__name__
