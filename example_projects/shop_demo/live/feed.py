"""What has come back from the broker, for every page that is open and for those that are opened later."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from dispytch_integrations.backend import BrokerURL
from example_projects.shop_demo.transports import transport_of

__all__ = ["Arrived", "BrokerState", "Feed", "Item", "OutboxState", "Received", "WaitingEvent"]

_MOST_UNREAD = 1000


@dataclass(frozen=True, slots=True)
class Received:
    """A message as a consumer took it from the broker."""

    topic: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    key: str | None = None


class Arrived(BaseModel):
    """A message as the page shows it."""

    number: str
    """Where a page that was cut off goes on: "RUN-POSITION"."""
    topic: str
    key: str | None
    type: str
    id: str
    time: datetime
    """When the event was made, if it says so, else when it arrived."""
    milliseconds: float | None
    """From the emit to here; None where the event does not say when it was made."""
    headers: dict[str, str]
    body: Any


class BrokerState(BaseModel):
    """Which broker it is, and whether the consumer hears it."""

    transport: str
    address: str
    connected: bool

    @classmethod
    def of(cls, url: str) -> BrokerState:
        """Of the broker with this URL, which is not heard yet."""
        # str() of a BrokerURL leaves out user, password and options.
        return cls(transport=transport_of(url), address=str(BrokerURL.parse(url)), connected=False)


class WaitingEvent(BaseModel):
    """An event in the outbox."""

    type: str
    key: str | None


class OutboxState(BaseModel):
    """How the outbox is doing."""

    waiting: int
    oldest: float | None
    """Seconds that the oldest event has waited; None: none waits."""
    dead: int
    first: list[WaitingEvent]
    """Those that have waited longest."""
    relays: int
    """How many live."""
    heartbeat: int | None
    """Seconds since a relay was heard of; None: there was none yet."""
    relaying: bool | None
    """Has nobody stopped the relay? None: it cannot be stopped from the page."""


Item = Arrived | BrokerState | OutboxState
"""What a page is told."""


class Feed:
    """Hands each message to every listener, and keeps the last ones for those who come later.

    `history`: how many it keeps.
    """

    def __init__(self, state: BrokerState, history: int) -> None:
        self.state = state
        self.outbox: OutboxState | None = None
        """None: there is none, or nobody has looked yet."""
        self._kept: deque[Arrived] = deque(maxlen=history)
        self._listeners: set[asyncio.Queue[Item | None]] = set()
        self._run = secrets.token_hex(4)
        self._position = 0
        self._closed = False

    def publish(self, received: Received) -> None:
        """Show a message on all pages."""
        self._position += 1
        arrived = _arrived(received, f"{self._run}-{self._position}")
        self._kept.append(arrived)
        self._tell(arrived)

    def set_connected(self, connected: bool) -> None:
        """Say on all pages whether the broker is heard."""
        if connected != self.state.connected:
            self.state = self.state.model_copy(update={"connected": connected})
            self._tell(self.state)

    def set_outbox(self, outbox: OutboxState) -> None:
        """Say on all pages how the outbox is doing."""
        if outbox != self.outbox:
            self.outbox = outbox
            self._tell(outbox)

    @property
    def is_watched(self) -> bool:
        """Is a page open?"""
        return bool(self._listeners)

    def close(self) -> None:
        """End all listeners, and those that come from now on: the server wants to go."""
        self._closed = True
        for queue in self._listeners:
            _put(queue, None)

    async def listen(self, after: str | None = None) -> AsyncGenerator[Item, None]:
        """The states, the kept messages (only those after the number `after`), then all that comes."""
        if self._closed:
            return
        queue: asyncio.Queue[Item | None] = asyncio.Queue(_MOST_UNREAD)
        self._listeners.add(queue)
        try:
            # Taken in one go: what comes while they are sent waits in the queue.
            outbox = [] if self.outbox is None else [self.outbox]
            missed: list[Item] = [self.state, *outbox, *self._kept_after(after)]
            for one in missed:
                yield one
            while (item := await queue.get()) is not None:
                yield item
        finally:
            self._listeners.discard(queue)

    def _kept_after(self, number: str | None) -> list[Arrived]:
        run, _, position = (number or "").partition("-")
        if run != self._run or not position.isdecimal():
            return list(self._kept)
        return [arrived for arrived in self._kept if int(arrived.number.partition("-")[2]) > int(position)]

    def _tell(self, item: Item) -> None:
        for queue in list(self._listeners):
            if queue.qsize() >= _MOST_UNREAD - 1:
                # Too slow a reader is cut off; a browser comes back by itself and says where it was.
                self._listeners.discard(queue)
                item_or_end = None
            else:
                item_or_end = item
            _put(queue, item_or_end)


def _put(queue: asyncio.Queue[Item | None], item: Item | None) -> None:
    try:
        queue.put_nowait(item)
    except asyncio.QueueFull:  # Its last place holds the end.
        pass


def _arrived(received: Received, number: str) -> Arrived:
    now = datetime.now(UTC)
    made = _time(_attribute(received.headers, "time"))
    return Arrived(
        number=number,
        topic=received.topic,
        key=received.key,
        type=_attribute(received.headers, "type") or received.topic,
        id=_attribute(received.headers, "id") or "",
        time=made or now,
        milliseconds=None if made is None else max((now - made).total_seconds() * 1000, 0.0),
        headers=dict(received.headers),
        body=_json(received.body),
    )


def _attribute(headers: Mapping[str, str], name: str) -> str | None:
    """A CloudEvents attribute: each transport has its own prefix for them."""
    return next(
        (headers[key] for prefix in ("ce_", "cloudEvents_", "cloudEvents:") if (key := prefix + name) in headers), None
    )


def _time(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        return None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
