"""Publishing through exchanges of the user's own channels, with aio-pika's public means alone.

Whether their channels confirm and whether they raise for a returned message is the user's choice; what can be known
is told all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import aiormq
from aio_pika import Exchange
from aio_pika.abc import AbstractExchange, AbstractRobustChannel
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import PublishError

from dispytch_integrations._rabbitmq_errors import translate, unroutable
from dispytch_integrations._rabbitmq_frames import PERSISTENT, encode_table, expiration_of
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, UnroutableError
from dispytch_integrations.message import Message

__all__ = ["Borrowed"]

logger = logging.getLogger("dispytch_integrations.rabbitmq")

_MOST_IN_FLIGHT = 500


class Borrowed:
    """The user's exchanges, by name. Raises ConfigurationError for what is no exchange of aio-pika."""

    def __init__(self, exchanges: Sequence[Any]) -> None:
        if isinstance(exchanges, AbstractExchange) or not isinstance(exchanges, Sequence) or isinstance(exchanges, str):
            raise ConfigurationError(
                f"RabbitMQProducer takes a list of exchanges, not a {type(exchanges).__name__}; "
                f"write RabbitMQProducer([exchange])"
            )
        problems = [problem for problem in map(_problem, exchanges) if problem is not None]
        if problems:
            raise ConfigurationError(problems)
        self._exchanges: dict[str, Exchange] = {exchange.name: exchange for exchange in exchanges}
        self._in_flight_ids: dict[tuple[int, str], asyncio.Future[None]] = {}
        silent = [
            name for name, each in self._exchanges.items() if not getattr(each.channel, "publisher_confirms", True)
        ]
        if silent:
            logger.warning(
                "the channel of the exchange %s was opened with publisher_confirms=False: events that get lost on the "
                "way go unnoticed; open it with connection.channel()",
                ", ".join(map(repr, silent)),
            )

    async def publish_all(self, messages: Sequence[Message], outcomes: list[Exception | None]) -> None:
        """Publish in order, pipelined, a bounded number at a time; append one outcome each."""
        for start in range(0, len(messages), _MOST_IN_FLIGHT):
            window = messages[start : start + _MOST_IN_FLIGHT]
            # Tasks take their first step in this order, and the channel's lock is fair.
            outcomes += await asyncio.gather(*(self.publish(message) for message in window))

    async def publish(self, message: Message) -> Exception | None:
        """Publish one; its outcome."""
        exchange = self._exchanges.get(message.destination)
        if exchange is None:
            known = ", ".join(map(repr, self._exchanges)) or "none"
            return UnroutableError(
                f"{message!r} was not sent: the exchange {message.destination!r} was not handed to RabbitMQProducer "
                f"(it has {known}); add it to the list, or look for a typing error in the route"
            )
        try:
            await _open(exchange, message)
            return await self._publish_alone(exchange, message)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # aiormq ends what is in flight like this when the user closes the channel: nobody cancelled the emit.
            return translate(f"{message!r} was not confirmed", ConnectionError("its channel was closed"))
        except PublishError as exc:  # Where the user asked for it (on_return_raises).
            return unroutable(message, _words(exc.frame))
        except Exception as exc:  # A message's failure is its outcome, whatever the client raises.
            return translate(f"{message!r} was not confirmed", exc)

    async def _publish_alone(self, exchange: Exchange, message: Message) -> Exception | None:
        """Publish; of messages with the same message_id one at a time: aiormq tells returned ones apart by it."""
        message_id: str | None = message.properties.get("message_id")
        if message_id is None:
            return await _publish(exchange, message)
        key = (id(exchange.channel), message_id)
        while (other := self._in_flight_ids.get(key)) is not None:
            await asyncio.shield(other)
        mine = self._in_flight_ids[key] = asyncio.get_running_loop().create_future()
        try:
            return await _publish(exchange, message)
        finally:
            del self._in_flight_ids[key]
            mine.set_result(None)


def _problem(exchange: Any) -> str | None:
    if not isinstance(exchange, AbstractExchange):
        return (
            f"RabbitMQProducer got a {type(exchange).__name__} where an exchange of aio-pika should be; "
            f"write RabbitMQProducer([await channel.declare_exchange('orders', 'topic')])"
        )
    if getattr(exchange, "internal", False):
        return f"the exchange {exchange.name!r} is internal: nobody can publish to it; hand over another one"
    return None


async def _open(exchange: Exchange, message: Message) -> None:
    """Wait for a robust channel that is being restored. Raises BrokerUnavailableError for one that stays closed."""
    channel = exchange.channel
    if not channel.is_closed:
        return
    closed = asyncio.ensure_future(channel.closed())
    if isinstance(channel, AbstractRobustChannel) and not closed.done():
        closed.cancel()
        await channel.ready()
        return
    raise BrokerUnavailableError(
        f"{message!r} was not sent: the channel of the exchange {exchange.name!r} is closed; open a new one and hand "
        f"its exchange to a new RabbitMQProducer, or let connect() keep the connection"
    )


async def _publish(exchange: Exchange, message: Message) -> Exception | None:
    channel = cast("Channel", await exchange.channel.get_underlay_channel())
    answer: object = await channel.basic_publish(
        message.payload or b"",
        exchange=exchange.name,
        routing_key=message.properties.get("routing_key", ""),
        properties=_properties(message),
        mandatory=message.properties.get("mandatory", True),
        # The confirm says more than a drained socket, and comes later.
        wait=False,
    )
    if isinstance(answer, DeliveredMessage):
        return unroutable(message, _words(answer.delivery))
    return None


def _words(frame: object) -> str | None:
    return frame.reply_text if isinstance(frame, aiormq.spec.Basic.Return) else None


def _properties(message: Message) -> aiormq.spec.Basic.Properties:
    """The message's properties. Raises HeaderError for a header that AMQP cannot carry."""
    # pamqp cuts long names without a word, and sends floats for which the broker closes the connection.
    encode_table(message.headers)
    get = message.properties.get
    timestamp = get("timestamp")
    return aiormq.spec.Basic.Properties(
        content_type=get("content_type") or message.content_type,
        content_encoding=get("content_encoding"),
        headers={name: _field(value) for name, value in message.headers.items()},
        delivery_mode=get("delivery_mode") or PERSISTENT,
        priority=get("priority"),
        correlation_id=get("correlation_id"),
        reply_to=get("reply_to"),
        expiration=expiration_of(message.properties),
        message_id=get("message_id"),
        timestamp=None if timestamp is None else datetime.fromtimestamp(timestamp, UTC),
        message_type=get("type"),
        user_id=get("user_id"),
        app_id=get("app_id"),
    )


def _field(value: Any) -> Any:
    """A header's value as pamqp takes it: it knows `bytearray` and not `bytes`."""
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, dict):
        return {name: _field(item) for name, item in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_field(item) for item in cast("list[object]", value)]
    return value
