"""Commands for Redis: packed, and waiting for their outcome. Needs no client library."""

from __future__ import annotations

import asyncio
from enum import Enum, auto

from dispytch_integrations.errors import HeaderError, ProducerTimeout
from dispytch_integrations.message import Message

__all__ = ["ASKING", "PING", "STREAM", "Command", "Delivery", "State", "encode", "pack"]

STREAM = "stream"
"""The property "kind" of a message for a stream; the others go to a pub/sub channel."""


class State(Enum):
    """How far a command is."""

    QUEUED = auto()
    WRITTEN = auto()
    SETTLED = auto()


def pack(*args: bytes) -> bytes:
    """A command as it is written: a RESP array of bulk strings."""
    return b"*%d\r\n%b" % (len(args), b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args]))


PING = pack(b"PING")
ASKING = pack(b"ASKING")
"""Goes before a command that a cluster node is to take for a slot that is moving to it."""


class Delivery:
    """The messages of one `deliver` call; `done` when each has its outcome."""

    __slots__ = ("commands", "done", "remaining")

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.remaining = 0

    def add(self, data: bytes, message: Message | None) -> Command:
        """One more command that has to be answered."""
        command = Command(self, data, message)
        self.commands.append(command)
        self.remaining += 1
        return command

    @property
    def outcomes(self) -> list[Exception | None]:
        """One outcome for each command, in order."""
        return [command.outcome for command in self.commands]

    def expire(self, timeout: float | None) -> None:
        """Give what is not answered a ProducerTimeout; what is not yet written never will be."""
        for command in self.commands:
            if command.state == State.QUEUED:
                command.settle(ProducerTimeout(f"{command} was not confirmed within {timeout} s: it was not sent yet"))
            elif command.state == State.WRITTEN:
                command.settle(
                    ProducerTimeout(f"{command} was not confirmed within {timeout} s: it may have been delivered")
                )

    def abandon(self) -> None:
        """Nobody waits any more: do not write what is not written yet."""
        for command in self.commands:
            if command.state == State.QUEUED:
                command.settle(None)


class Command:
    """One message on its way: packed, with its outcome once there is one."""

    __slots__ = ("asking", "data", "delivery", "message", "outcome", "redirections", "sequence", "state")

    def __init__(self, delivery: Delivery, data: bytes, message: Message | None) -> None:
        self.delivery = delivery
        self.data = data
        self.message = message
        self.state = State.QUEUED
        self.outcome: Exception | None = None
        # For a cluster: its place among all, how often it was sent elsewhere, and whether it needs ASKING.
        self.sequence = 0
        self.redirections = 0
        self.asking = False

    def settle(self, outcome: Exception | None) -> None:
        """Set the outcome; the first one counts."""
        if self.state == State.SETTLED:
            return
        self.state = State.SETTLED
        self.outcome = outcome
        delivery = self.delivery
        delivery.remaining -= 1
        if delivery.remaining == 0 and not delivery.done.done():
            delivery.done.set_result(None)

    def __str__(self) -> str:
        return "PING" if self.message is None else repr(self.message)


def encode(message: Message) -> bytes:
    """The command for a message: XADD or PUBLISH. Raises HeaderError."""
    payload = b"" if message.payload is None else message.payload
    destination = message.destination.encode()
    properties = message.properties
    if properties.get("kind") != STREAM:
        return pack(b"PUBLISH", destination, payload)
    parts = [b"XADD", destination]
    if (maxlen := properties.get("maxlen")) is not None:
        parts += (b"MAXLEN", b"~" if properties.get("approximate", True) else b"=", b"%d" % maxlen)
    parts += (b"*", b"data", payload)
    for name, value in message.headers.items():
        if name == "data":  # From a hook; the event's own are refused when it is prepared.
            raise HeaderError(f"{message!r}: the header 'data' is where the body goes; choose another name")
        parts += (name.encode(), value if isinstance(value, bytes) else str(value).encode())
    return pack(*parts)
