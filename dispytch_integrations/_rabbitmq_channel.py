"""A confirmed AMQP channel that only publishes: what is sent in one turn of the event loop goes out in one write.

Why below `Channel.basic_publish`: per message it takes a lock, an `asyncio.timeout`, a frame object for each part and
a hop between two tasks for the confirm; together more than half of the time of a confirmed publish. What is used of
aiormq instead: the connection hands the frames of a channel to `channel.frames.put`, and writes what it gets from
`channel.write_queue`. Opening, closing and errors stay aiormq's.
"""

# aiormq's futures, tasks and queues say nothing about what they hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import aiormq
from aiormq.abc import AbstractConnection, ChannelFrame
from aiormq.channel import Channel
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from dispytch_integrations._rabbitmq_frames import publish_frames
from dispytch_integrations.message import Message

__all__ = ["ConfirmChannel", "Delivery", "Publish"]

_PENDING = Exception()


class Delivery:
    """One call of `deliver`: its outcomes, and the future it waits for."""

    __slots__ = ("_open", "future", "outcomes")

    def __init__(self, future: asyncio.Future[None], count: int) -> None:
        self.future = future
        self.outcomes: list[Exception | None] = [_PENDING] * count
        self._open = count

    @property
    def over(self) -> bool:
        """Does nobody wait any more: all settled, timed out, or cancelled?"""
        return self.future.done()

    def settle(self, index: int, outcome: Exception | None) -> None:
        """Set one outcome; the last one ends the wait."""
        if self.future.done():
            return
        self.outcomes[index] = outcome
        self._open -= 1
        if not self._open:
            self.future.set_result(None)

    def is_pending(self, index: int) -> bool:
        """Has this one no outcome yet?"""
        return self.outcomes[index] is _PENDING


class Publish:
    """One message on its way: waiting to be sent, or sent and not confirmed."""

    __slots__ = ("attempts", "delivery", "fixed_id", "index", "message", "message_id", "returned")

    def __init__(self, message: Message, delivery: Delivery, index: int) -> None:
        self.message = message
        self.delivery = delivery
        self.index = index
        self.fixed_id: str | None = message.properties.get("message_id")
        self.message_id = ""
        self.attempts = 0
        self.returned: str | None = None
        """What the broker said when it gave the message back; None: it did not."""

    def settle(self, outcome: Exception | None) -> None:
        """Tell whoever waits for it."""
        self.delivery.settle(self.index, outcome)


Answered = Callable[[Publish, bool], None]
"""Called with a message and whether the broker took it (ack, not nack)."""


class ConfirmChannel(Channel):
    """See the module's docstring. `unconfirmed`: what is in flight, by delivery tag, in order."""

    def __init__(self, connection: AbstractConnection, number: int, answered: Answered) -> None:
        super().__init__(connection, number, publisher_confirms=True)
        # Before the channel's reader, a task, has run: it will read from this one.
        self.frames = _Frames(self)
        self.unconfirmed: dict[int, Publish] = {}
        self.in_flight_ids: dict[str, Publish] = {}
        self._answered = answered
        self._frame_max = connection.connection_tune.frame_max or 131072
        self._last_tag = 0
        # Unique without a system call per message.
        self._id_prefix = os.urandom(12).hex()
        self._buffer: list[bytes] = []
        self._filled = asyncio.Event()

    @classmethod
    async def opened(cls, connection: AbstractConnection, answered: Answered) -> ConfirmChannel:
        """Open a channel on `connection`, with confirms."""
        number = next(number for number in range(1, 65536) if number not in connection.channels)
        channel = cls(connection, number, answered)
        connection.channels[number] = channel
        await channel.open()
        channel.create_task(channel._write())
        return channel

    def publish(self, publish: Publish) -> None:
        """Send one message with the next write. Raises HeaderError, MessageTooLargeError: nothing was sent."""
        tag = self._last_tag + 1
        message_id = publish.fixed_id or f"{self._id_prefix}{tag:08x}"
        data = publish_frames(self.number, publish.message, message_id, self._frame_max)
        self._last_tag = tag
        publish.message_id = message_id
        publish.attempts += 1
        publish.returned = None
        self.unconfirmed[tag] = publish
        self.in_flight_ids[message_id] = publish
        if not self._buffer:
            self._filled.set()
        self._buffer.append(data)

    async def _write(self) -> None:
        """Hand what has been collected to the connection, and wait until its socket has taken it."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            payload = b"".join(self._buffer)
            self._buffer.clear()
            drained = self.create_future()
            await self.write_queue.put(ChannelFrame(payload=payload, should_close=False, drain_future=drained))
            await drained

    def confirmed(self, tag: int, multiple: bool, taken: bool) -> None:
        """The broker's answer to one message, or to all up to it."""
        if not multiple:
            publish = self.unconfirmed.pop(tag, None)
            if publish is not None:
                self._forget(publish, taken)
            return
        for known in list(self.unconfirmed):
            if known > tag:
                break
            self._forget(self.unconfirmed.pop(known), taken)

    def _forget(self, publish: Publish, taken: bool) -> None:
        self.in_flight_ids.pop(publish.message_id, None)
        self._answered(publish, taken)


class _Frames(asyncio.Queue[Any]):
    """What the connection has read for the channel: answers to publishes are taken out here, without a task's turn."""

    def __init__(self, channel: ConfirmChannel) -> None:
        super().__init__()
        self._channel = channel
        self._return: aiormq.spec.Basic.Return | None = None
        self._body_left = 0

    async def put(self, item: Any) -> None:
        """Take one (weight, frame)."""
        frame = item[1]
        if isinstance(frame, aiormq.spec.Basic.Ack):
            self._channel.confirmed(frame.delivery_tag or 0, frame.multiple, True)
        elif isinstance(frame, aiormq.spec.Basic.Nack):
            self._channel.confirmed(frame.delivery_tag or 0, frame.multiple, False)
        elif isinstance(frame, aiormq.spec.Basic.Return):
            self._return = frame
        elif isinstance(frame, ContentHeader):
            # Only returns have content: nothing is consumed on this channel. The ack follows the return.
            publish = self._channel.in_flight_ids.get(frame.properties.message_id or "")
            if publish is not None and self._return is not None:
                publish.returned = self._return.reply_text or "NO_ROUTE"
            self._return = None
        elif not isinstance(frame, ContentBody):
            await super().put(item)
