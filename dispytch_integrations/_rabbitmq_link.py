"""The way to one RabbitMQ: a connection, one confirmed channel, and what is on its way there.

What is sent and not confirmed when the channel or the connection is lost is sent again, under the same event id, for
as long as somebody waits for it. If the broker closed the channel because of one of the messages, nobody says which:
those in flight are sent again in small groups, then one at a time, and the one that does it again alone is the one.
"""

# aiormq's futures, tasks and queues say nothing about what they hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiormq import exceptions as amqp
from pamqp.commands import Basic

from dispytch_integrations._deadlines import Deadlines
from dispytch_integrations._rabbitmq_channel import ConfirmChannel, Delivery, Publish
from dispytch_integrations._rabbitmq_connection import Connection, Dialer
from dispytch_integrations._rabbitmq_errors import is_message_fault, tell, translate, unroutable
from dispytch_integrations._rabbitmq_exchanges import Exchange, declare, exists
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    DispytchError,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)
from dispytch_integrations.message import Message

__all__ = ["Link"]

logger = logging.getLogger("dispytch_integrations.rabbitmq")

_LONGEST_DELAY = 5.0
_GROUP = 16
"""How many messages are sent at a time when one of them has closed the channel."""
_PAUSE = 0.01
_SILENT = 0.5
"""Seconds without an answer after which a ping that is cut off drops the connection."""


class Link:
    """One connection with its channel, kept open until `close`.

    `last_error`: what was wrong last; None: nothing yet.
    """

    def __init__(
        self, dialer: Dialer, exchanges: Sequence[Exchange], *, max_in_flight: int, reconnect_interval: float
    ) -> None:
        self._dialer = dialer
        self._exchanges = exchanges
        self._max_in_flight = max_in_flight
        self._reconnect_interval = reconnect_interval
        self._loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self._deadlines = Deadlines()
        self._connection: Connection | None = None
        self._channel: ConfirmChannel | None = None
        self._queue: deque[Publish] = deque()
        self._window = max_in_flight
        self._suspects: set[Publish] = set()
        self._known: set[str] = {""}
        self._doubted: set[str] = set()
        self._checks: dict[str, asyncio.Task[bool]] = {}
        self._restoring: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._hurry = asyncio.Event()
        self._idle = asyncio.Event()
        self._active = 0
        self._closing = False
        self.last_error: str | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it belongs to."""
        return self._loop

    # -- delivering ----------------------------------------------------------------------------------------------

    async def deliver(self, messages: Sequence[Message], timeout: float | None) -> list[Exception | None]:
        """Send messages, in order, and wait until each is confirmed or has failed; see Producer.deliver."""
        delivery = Delivery(self._loop.create_future(), len(messages))
        publishes = [Publish(message, delivery, index) for index, message in enumerate(messages)]
        if not publishes:
            return []
        limit = self._deadlines.limit(timeout)
        self._active += 1
        try:
            with limit:
                known = self._known
                unknown = {message.destination for message in messages if message.destination not in known}
                if unknown:
                    publishes = await self._with_known_exchanges(publishes, unknown)
                self._queue.extend(publishes)
                self._pump()
                await delivery.future
        except TimeoutError:
            if not limit.expired:
                raise
            delivery.future.cancel()
            sent = {publish.index for publish in publishes if publish.attempts}
            for index, message in enumerate(messages):
                if delivery.is_pending(index):
                    delivery.outcomes[index] = self._late(message, timeout, index in sent)
        finally:
            delivery.future.cancel()
            self._active -= 1
            if not self._active and self._closing:
                self._idle.set()
        return delivery.outcomes

    def _late(self, message: Message, timeout: float | None, sent: bool) -> DeliveryError:
        """Why a message was not confirmed in time, as an error; `sent`: did the broker get it, for all we know?"""
        connection = self._connection
        if connection is not None and connection.blocked:
            return ProducerTimeout(
                f"{message!r} was not confirmed within {timeout} s: the broker has blocked its publishers, an alarm "
                f"for memory or disk is set (rabbitmq-diagnostics alarms); it may be delivered once that is over"
            )
        if self._ready.is_set():
            doubt = "it may have been delivered" if sent else "it was still waiting for its turn"
            return ProducerTimeout(f"{message!r} was not confirmed within {timeout} s: {doubt}")
        if sent:
            return ProducerTimeout(
                f"{message!r} was not confirmed within {timeout} s: the connection was lost ({self.last_error}); "
                f"it may have been delivered"
            )
        return BrokerUnavailableError(
            f"{message!r} was not sent within {timeout} s: there is no connection ({self.last_error})"
        )

    def _pump(self) -> None:
        """Send what waits, as far as the bound on what is in flight allows."""
        channel = self._channel
        if channel is None:
            return
        queue, unconfirmed = self._queue, channel.unconfirmed
        while queue and len(unconfirmed) < self._window:
            publish = queue[0]
            if publish.fixed_id is not None and publish.fixed_id in channel.in_flight_ids:
                # A returned message is told from others by its message_id alone: two at a time would be mixed up.
                return
            queue.popleft()
            if publish.delivery.future.done():
                self._cleared(publish)
                continue
            try:
                channel.publish(publish)
            except Exception as exc:  # It cannot be encoded, whatever the reason: its own failure and no other's.
                publish.settle(translate(f"{publish.message!r} cannot be sent", exc))
                self._cleared(publish)

    def _answered(self, publish: Publish, taken: bool) -> None:
        if not taken:
            error = amqp.DeliveryError(None, Basic.Nack())
            publish.settle(translate(f"{publish.message!r} was not taken", error))
        elif publish.returned is not None:
            publish.settle(unroutable(publish.message, publish.returned))
        else:
            publish.settle(None)
        if self._suspects:
            self._cleared(publish)
        if self._queue:
            self._pump()

    def _cleared(self, publish: Publish) -> None:
        if self._suspects:
            self._suspects.discard(publish)
            if not self._suspects:
                self._window = self._max_in_flight

    # -- exchanges -----------------------------------------------------------------------------------------------

    async def _with_known_exchanges(self, publishes: list[Publish], unknown: set[str]) -> list[Publish]:
        """Check exchanges that were not used before; those to one that is missing fail, the others are returned."""
        found = dict(zip(unknown, await asyncio.gather(*(self._check(name) for name in unknown)), strict=True))
        kept: list[Publish] = []
        for publish in publishes:
            if found.get(publish.message.destination, True):
                kept.append(publish)
            else:
                publish.settle(self._missing(publish.message))
        return kept

    @staticmethod
    def _missing(message: Message) -> UnroutableError:
        name = message.destination
        return UnroutableError(
            f"{message!r} was not sent: there is no exchange {name!r}; declare it, have it declared by "
            f"connect(..., exchanges={{{name!r}: 'topic'}}), or look for a typing error in the route"
        )

    async def _check(self, name: str) -> bool:
        """Is there an exchange of that name? Asked once, however many want to know at a time."""
        task = self._checks.get(name)
        if task is None:
            task = self._checks[name] = self._loop.create_task(self._ask(name), name=f"dispytch exchange {name}")
            task.add_done_callback(lambda _: self._checks.pop(name, None))
        # One who gives up does not take the answer from the others.
        return await asyncio.shield(task)

    async def _ask(self, name: str) -> bool:
        while True:
            await self._ready.wait()
            connection = self._connection
            try:
                if connection is None or not await exists(connection, name):
                    return False
            except (amqp.AMQPError, OSError, RuntimeError):
                # The connection was lost meanwhile: ask the next one. The deadline is the caller's.
                await asyncio.sleep(_PAUSE)
                continue
            self._known.add(name)
            return True

    # -- opening, and opening again ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, declare the exchanges, open the channel. Raises BrokerUnavailableError, ConfigurationError."""
        try:
            await self._attach(first=True)
        except BaseException:
            await self._hang_up()
            raise

    async def _attach(self, *, first: bool) -> None:
        """Have a connection and a channel on it."""
        connection = self._connection
        if connection is None or not connection.is_opened:
            await self._hang_up()
            self._known = {""}
            connection = self._connection = await self._dialer.connect()
            self._known |= await declare(connection, self._exchanges, strict=first)
        if self._doubted:
            await self._look_for_doubted(connection)
        channel = await ConfirmChannel.opened(connection, self._answered)
        self._channel = channel
        closing: asyncio.Future[Any] = channel.closing
        closing.add_done_callback(partial(self._lost, channel))
        self._ready.set()
        self._pump()

    def _lost(self, channel: ConfirmChannel, closing: asyncio.Future[Any]) -> None:
        """The channel is closed, by the broker or with its connection."""
        error = None if closing.cancelled() else closing.exception()
        if self._closing or channel is not self._channel:
            return
        self._channel = None
        self._ready.clear()
        in_flight = [publish for publish in channel.unconfirmed.values() if not publish.delivery.over]
        self.last_error = tell(error) if error is not None else "the connection was closed"
        if is_message_fault(error):
            in_flight = self._blame(in_flight, error)
        elif not isinstance(error, amqp.ChannelClosed):
            logger.warning("lost the connection to %s (%s); reconnecting", self._dialer.address, self.last_error)
        self._queue.extendleft(reversed(in_flight))
        self._restoring = self._loop.create_task(self._restore(), name="dispytch rabbitmq reconnect")

    def _blame(self, in_flight: list[Publish], error: BaseException | None) -> list[Publish]:
        """Narrow down which message made the broker close the channel; return those to be sent again."""
        logger.info("%s closed the channel: %s", self._dialer.address, self.last_error)
        if isinstance(error, amqp.ChannelNotFoundEntity):
            # The exchange went away after it was checked: look which are still there before sending again.
            self._doubted = {publish.message.destination for publish in in_flight} - {""}
            self._known -= self._doubted
        if len(in_flight) == 1 and error is not None:
            [guilty] = in_flight
            self._doubted.clear()
            guilty.settle(translate(f"{guilty.message!r} was refused", error))
            self._cleared(guilty)
            return []
        if in_flight:
            self._window = 1 if len(in_flight) <= _GROUP else _GROUP
            self._suspects = set(in_flight)
        return in_flight

    async def _look_for_doubted(self, connection: Connection) -> None:
        for name in list(self._doubted):
            if await exists(connection, name):
                self._known.add(name)
            else:
                for publish in [publish for publish in self._queue if publish.message.destination == name]:
                    self._queue.remove(publish)
                    publish.settle(self._missing(publish.message))
                    self._cleared(publish)
            self._doubted.discard(name)

    async def _restore(self) -> None:
        delay = self._reconnect_interval
        told: str | None = None
        while True:
            try:
                async with asyncio.timeout(self._dialer.timeout):
                    await self._attach(first=False)
            except Exception as exc:  # Whatever it is: a function that reads the password may raise anything.
                self.last_error = self._dialer.scrubbed(str(exc) if isinstance(exc, DispytchError) else tell(exc))
                await self._hang_up()
            else:
                if told is not None:
                    logger.info("connected to %s again", self._dialer.address)
                return
            if self.last_error != told:
                told = self.last_error
                logger.warning("%s; trying again until it answers", told)
            self._hurry.clear()
            try:
                async with asyncio.timeout(delay * random.uniform(0.75, 1.25)):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            delay = min(delay * 2, _LONGEST_DELAY)

    # -- ping and close ------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        """Open and close a channel; while there is no connection, wait for the next. Cut off, drop a silent one.

        Raises BrokerUnavailableError.
        """
        while True:
            if not self._ready.is_set():
                self._hurry.set()
                await self._ready.wait()
            connection = self._connection
            if connection is None:
                raise BrokerUnavailableError(f"there is no connection ({self.last_error})")
            if connection.blocked:
                raise BrokerUnavailableError(
                    "the broker has blocked its publishers: an alarm for memory or disk is set "
                    "(rabbitmq-diagnostics alarms)"
                )
            try:
                await self._round_trip(connection)
            except (amqp.AMQPError, OSError, RuntimeError) as exc:
                if connection.is_opened or self._closing:
                    raise BrokerUnavailableError(f"{self._dialer.address} did not answer: {tell(exc)}") from exc
                await asyncio.sleep(_PAUSE)  # It was lost meanwhile: ask the next one.
            else:
                return

    async def _round_trip(self, connection: Connection) -> None:
        started = self._loop.time()
        try:
            channel = await connection.channel(publisher_confirms=False)
            await channel.close()
        except asyncio.CancelledError:
            if self._loop.time() - started >= _SILENT and not connection.blocked:
                connection.abort()
            raise

    async def close(self) -> None:
        """Wait until all is confirmed, and close; cancelled, close without waiting.

        What is not confirmed by then gets UnconfirmedError, or BrokerUnavailableError if it was never sent.
        """
        self._closing = True
        try:
            if self._active:
                await self._idle.wait()
        finally:
            self._give_up()
            tasks = [task for task in (self._restoring, *self._checks.values()) if task is not None and not task.done()]
            for task in tasks:
                task.cancel()
            await self._hang_up()
            if tasks:
                await asyncio.wait(tasks, timeout=Connection.CLOSE_SECONDS)

    def _give_up(self) -> None:
        channel, self._channel = self._channel, None
        left = [*self._queue, *(channel.unconfirmed.values() if channel is not None else ())]
        self._queue.clear()
        for publish in left:
            if publish.attempts:
                publish.settle(
                    UnconfirmedError(
                        f"{publish.message!r} was not confirmed before the connection was closed: "
                        f"it may have been delivered"
                    )
                )
            else:
                publish.settle(BrokerUnavailableError(f"{publish.message!r} was not sent: the connection is closed"))

    async def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.hang_up()
