"""The outbox on the page: what waits in it, and a switch that stops its relay and starts it again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

from dispytch_integrations.outbox import OutboxStore, Relay, Selection, State
from example_projects.shop_demo.live.feed import Feed, OutboxState, WaitingEvent

__all__ = ["RelaySwitch", "Switch", "outbox_on_page"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_SETTLE_SECONDS = 0.1
_MOST_NAMED = 12
"""Waiting events that the page names; the others it counts."""


class Switch(Protocol):
    """What stops a relay and starts it again. `on`: has nobody stopped it?"""

    on: bool

    async def turn(self, on: bool) -> None:
        """Returns when the relay has given its shards back, or runs again."""
        ...

    async def close(self) -> None:
        """End what was started here."""
        ...


@asynccontextmanager
async def outbox_on_page(feed: Feed, store: OutboxStore, switch: Switch | None) -> AsyncGenerator[None, None]:
    """Tell the pages how the outbox is doing, as long as the block runs; for the lifespan of an app.

    `store`: one that nobody else uses; it is opened and closed. `switch`: of the relay, closed at the end; None: that
    is somebody else's, and the page has no button for it.
    """
    async with AsyncExitStack() as stack:
        if switch is not None:
            stack.push_async_callback(switch.close)
        stack.push_async_callback(store.close)
        await store.open()
        watching = asyncio.create_task(_watch(feed, store, switch), name="live page's outbox")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})


class RelaySwitch:
    """Stops this process's relay as a deployment does, and runs it again: what was stored meanwhile goes out then."""

    def __init__(self, relay: Relay) -> None:
        self.on = True
        self._relay = relay
        self._lock = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None

    async def turn(self, on: bool) -> None:
        """Returns when the relay has given its shards back, or runs again."""
        async with self._lock:
            if on == self.on:
                return
            self.on = on
            if on:
                self._running = asyncio.create_task(self._relay.run(), name="relay, run again")
                return
            self._relay.stop()
            if self._running is not None:
                await asyncio.wait({self._running})
            while self._relay.shards:  # noqa: ASYNC110 - it tells nobody when it has ended
                await asyncio.sleep(0.01)
            await asyncio.sleep(_SETTLE_SECONDS)

    async def close(self) -> None:
        """End what was started here; the first run ends with its app."""
        if self._running is not None:
            self._relay.stop()
            await asyncio.wait({self._running})


async def _watch(feed: Feed, store: OutboxStore, switch: Switch | None) -> None:
    while True:
        if feed.is_watched:
            try:
                feed.set_outbox(await _look(store, switch))
            except Exception as exc:
                logger.warning("the live page cannot look into the outbox: %s", type(exc).__name__)
        await asyncio.sleep(_LOOK_SECONDS)


async def _look(store: OutboxStore, switch: Switch | None) -> OutboxState:
    stats = await store.stats()
    first = await store.rows(Selection(states=[State.WAITING]), limit=_MOST_NAMED) if stats.waiting else []
    return OutboxState(
        waiting=stats.waiting,
        oldest=None if stats.oldest is None else round(stats.oldest, 1),
        dead=stats.dead,
        first=[WaitingEvent(type=row.type, key=row.ordering_key) for row in first],
        relays=len(stats.relays),
        # Whole seconds: else there were news of it four times a second.
        heartbeat=None if stats.heartbeat is None else int(stats.heartbeat),
        relaying=None if switch is None else switch.on,
    )
