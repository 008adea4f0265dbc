"""The outbox on the page: what waits in it, and a switch that stops its relay and starts it again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from dispytch_integrations.outbox import OutboxStore, Relay
from example_projects.shop_demo.live.feed import Feed, OutboxState

__all__ = ["RelaySwitch", "outbox_on_page"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_SETTLE_SECONDS = 0.1


@asynccontextmanager
async def outbox_on_page(feed: Feed, store: OutboxStore, relay: Relay) -> AsyncGenerator[RelaySwitch, None]:
    """Tell the pages how the outbox is doing, as long as the block runs; for the lifespan of an app.

    `store`: one that nobody else uses; it is opened and closed. `relay`: the one that this process runs.
    """
    await store.open()
    switch = RelaySwitch(relay)
    watching = asyncio.create_task(_watch(feed, store, switch), name="live page's outbox")
    try:
        yield switch
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        await switch.close()
        await store.close()


class RelaySwitch:
    """Stops a relay as a deployment does, and runs it again: what was stored meanwhile goes out then."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.on = True
        self._lock = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None

    async def turn(self, on: bool) -> None:
        """Returns when the relay has given its shards back, or runs again."""
        async with self._lock:
            if on == self.on:
                return
            self.on = on
            if on:
                self._running = asyncio.create_task(self.relay.run(), name="relay, run again")
                return
            self.relay.stop()
            if self._running is not None:
                await asyncio.wait({self._running})
            while self.relay.shards:  # noqa: ASYNC110 - it tells nobody when it has ended
                await asyncio.sleep(0.01)
            await asyncio.sleep(_SETTLE_SECONDS)

    async def close(self) -> None:
        """End what was started here; the first run ends with its app."""
        if self._running is not None:
            self.relay.stop()
            await asyncio.wait({self._running})


async def _watch(feed: Feed, store: OutboxStore, switch: RelaySwitch) -> None:
    while True:
        if feed.is_watched:
            try:
                stats = await store.stats()
            except Exception as exc:
                logger.warning("the live page cannot look into the outbox: %s", type(exc).__name__)
            else:
                feed.set_outbox(
                    OutboxState(
                        waiting=stats.waiting,
                        oldest=None if stats.oldest is None else round(stats.oldest, 1),
                        dead=stats.dead,
                        delivered=switch.relay.counts.sent,
                        relays=len(stats.relays),
                        relaying=switch.on,
                    )
                )
        await asyncio.sleep(_LOOK_SECONDS)
