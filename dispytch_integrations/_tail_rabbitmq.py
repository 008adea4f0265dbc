"""`tail` of RabbitMQ: a queue of its own, bound to the exchange; exclusive, so that it goes with the connection.

Consumers of other queues get what they get without it.
"""

# aiormq's futures say nothing about what they hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel, DeliveredMessage

from dispytch_integrations._rabbitmq_connection import Connection, Dialer
from dispytch_integrations._rabbitmq_errors import tell
from dispytch_integrations._rabbitmq_exchanges import exists
from dispytch_integrations._tail import LostError, MissingError, Request, Source
from dispytch_integrations._tail_arrival import Arrival
from dispytch_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from dispytch_integrations.backend import Backend
    from dispytch_integrations.rabbitmq import RabbitMQBackend

__all__ = ["RabbitMQSource"]

_BATCH = 200
"""Messages that are under way and not shown yet; the rest waits in the queue."""
_MOST_MESSAGES, _MOST_BYTES = 100_000, 64 * 1024 * 1024
"""What the queue holds for a terminal that does not keep up; the oldest go first."""
_LOOK_SECONDS = 5.0
_KNOWN = {"amq.direct": "direct", "amq.fanout": "fanout", "amq.topic": "topic", "amq.headers": "headers",
          "amq.match": "headers"}  # fmt: skip


class RabbitMQSource(Source):
    """An exchange."""

    def __init__(self, backend: Backend, request: Request, name: str) -> None:
        super().__init__(backend, request, name)
        self._connection: Connection | None = None
        self._channel: AbstractChannel | None = None
        self._arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        self._unacknowledged: int | None = None
        if request.from_beginning:
            raise ConfigurationError("an exchange keeps nothing, so there is no beginning; leave --from-beginning out")
        if not request.name:
            raise ConfigurationError(
                "the default exchange leads to one queue, whose consumers would go without; write another exchange"
            )

    async def open(self) -> str:
        """Bind a queue to the exchange, and consume it."""
        connection = self._connection = await self._dialer().connect()
        if not await exists(connection, self.name):
            raise MissingError(
                f"there is no exchange {self.name!r} in {self.backend.address}; look for a typing error, declare it, "
                f"or write --wait"
            )
        key, arguments = self._binding(await self._type(connection))
        self._arrived, self._unacknowledged = asyncio.Queue(), None
        try:
            channel = self._channel = await connection.channel(publisher_confirms=False)
            await channel.basic_qos(prefetch_count=_BATCH)
            declared = await channel.queue_declare(
                exclusive=True,
                auto_delete=True,
                arguments={"x-max-length": _MOST_MESSAGES, "x-max-length-bytes": _MOST_BYTES},
            )
            queue = declared.queue or ""
            await channel.queue_bind(queue, self.name, routing_key=key, arguments=arguments)
            await channel.basic_consume(queue, self._on_message, exclusive=True)
        except amqp.ChannelAccessRefused as exc:
            raise ConfigurationError(
                f"{self.backend.address} refuses the queue: {tell(exc)}; allow this user to configure, write and read "
                f"queues named amq.gen-*, and to read the exchange {self.name!r}"
            ) from exc
        shown = f", routing key {key!r}" if key else ""
        return f"the exchange {self.name!r}{shown}"

    def _dialer(self) -> Dialer:
        backend = cast("RabbitMQBackend", self.backend)
        if backend._dialer is None:
            options = backend._options
            backend._dialer = Dialer(backend._url, options.username, options.password, backend._client_options)
        backend._dialer.check_tls()
        return backend._dialer

    async def _type(self, connection: Connection) -> str | None:
        """What the exchange routes by; None: this user may not know. AMQP tells it in an error alone."""
        if self.name in _KNOWN:
            return _KNOWN[self.name]
        channel = await connection.channel(publisher_confirms=False)
        try:
            # Refused wherever the exchange is another one. Should it have gone in this moment, ours goes at once.
            await channel.exchange_declare(self.name, exchange_type="fanout", durable=False, auto_delete=True)
        except amqp.ChannelPreconditionFailed as exc:
            words = tell(exc)
            if "'type'" not in words:
                return "fanout"
            return words.rpartition("current is ")[2].strip("'\"")
        except amqp.ChannelClosed:
            return None
        await channel.exchange_delete(self.name, if_unused=True)
        raise MissingError(f"there is no exchange {self.name!r} in {self.backend.address} any more")

    def _binding(self, kind: str | None) -> tuple[str, dict[str, Any]]:
        """Routing key and arguments by which a queue gets all, or what was asked for. Raises ConfigurationError."""
        given = self.request.routing_key
        if given is not None:
            return given, {}
        if kind in ("topic", "x-rtopic"):
            return "#", {}
        if kind == "fanout":
            return "", {}
        if kind == "headers":
            return "", {"x-match": "all"}  # No header at all: each message has those.
        if kind == "direct":
            raise ConfigurationError(
                f"the exchange {self.name!r} is a direct one, which knows no pattern for all keys; write "
                f"--routing-key KEY"
            )
        told = "of a type that this user may not see" if kind is None else f"of the type {kind}"
        raise ConfigurationError(f"the exchange {self.name!r} is {told}; write what to bind by: --routing-key KEY")

    async def _on_message(self, message: DeliveredMessage) -> None:
        self._arrived.put_nowait(message)

    async def read(self) -> Sequence[Arrival]:
        """Messages; those that were returned before are acknowledged, and make room for as many."""
        connection, channel = self._connection, self._channel
        if connection is None or channel is None:
            raise LostError(f"the connection to {self.backend.address}")
        try:
            if self._unacknowledged is not None:
                await channel.basic_ack(self._unacknowledged, multiple=True)
                self._unacknowledged = None
            first = await self._first(connection, channel)
        except LostError:
            raise
        except (amqp.AMQPError, OSError, RuntimeError) as exc:
            raise LostError(f"the connection to {self.backend.address} ({tell(exc)})") from exc
        messages = [first]
        while not self._arrived.empty():
            messages.append(self._arrived.get_nowait())
        self._unacknowledged = messages[-1].delivery_tag
        return [self._arrival(message) for message in messages]

    async def _first(self, connection: Connection, channel: AbstractChannel) -> DeliveredMessage:
        """The next message, as soon as it comes. Raises LostError."""
        getting = asyncio.ensure_future(self._arrived.get())
        try:
            while True:
                ends: list[Any] = [connection.closing, channel.closing]
                await asyncio.wait({getting, *ends}, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    return getting.result()
                if connection.is_closed or channel.is_closed or any(end.done() for end in ends):
                    raise LostError(f"the connection to {self.backend.address}{_reason(ends)}")
                if not cast("Any", channel).consumers:
                    raise LostError("the queue was deleted by somebody else")
                if not await exists(connection, self.name):  # An exchange takes its bindings along, without a word.
                    raise LostError(f"the exchange {self.name!r} is gone")
        finally:
            getting.cancel()

    def _arrival(self, message: DeliveredMessage) -> Arrival:
        properties = message.header.properties
        headers = {name: _plain(value) for name, value in (properties.headers or {}).items()}
        position = {"routing_key": message.routing_key or ""}
        at = properties.timestamp
        return Arrival(
            "rabbitmq",
            message.exchange or self.name,
            message.body,
            headers,
            None,
            position,
            properties.content_type,
            at.astimezone(UTC) if isinstance(at, datetime) else None,
        )

    async def close(self) -> None:
        """Close the connection, and with it the queue."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            await connection.hang_up()


def _reason(ends: Sequence[Any]) -> str:
    for end in ends:
        if end.done() and not end.cancelled() and (error := end.exception()) is not None:
            return f" ({tell(error)})"
    return ""


def _plain(value: Any) -> Any:
    """A header's value as JSON knows it."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode(errors="backslashreplace")
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
