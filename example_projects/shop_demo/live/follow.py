"""Keeps the feed filled: opens the consumer, opens it again when it broke, and ends the feed before the server does."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

from dispytch_integrations.producer import Producer
from example_projects.shop_demo.live.consumers import Consumer, consumer_for
from example_projects.shop_demo.live.feed import BrokerState, Feed

__all__ = ["closed_before_shutdown", "following", "live_feed"]

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


@asynccontextmanager
async def live_feed(
    url: str, topics: tuple[str, ...], producer: Producer | None, *, history: int = 100
) -> AsyncGenerator[Feed, None]:
    """The feed of what arrives on these topics of the broker at `url`; for the lifespan of an app.

    `producer`: the emitter's; only memory needs it. `history`: how many events a page sees that is opened later.
    """
    feed = Feed(BrokerState.of(url), history)
    async with following(feed, consumer_for(url, topics, producer)):
        with closed_before_shutdown(feed):
            yield feed


@asynccontextmanager
async def following(feed: Feed, consumer: Consumer, *, timeout: float = 15.0) -> AsyncGenerator[None, None]:
    """Publish what the consumer receives, as long as the block runs.

    `timeout`: seconds for the first connection. Raises what the consumer raised, or TimeoutError.
    """
    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_follow(feed, consumer, opened), name="live page's consumer")
    try:
        async with asyncio.timeout(timeout):
            await opened
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _follow(feed: Feed, consumer: Consumer, opened: asyncio.Future[None]) -> None:
    while True:
        try:
            async with consumer() as messages:
                feed.set_connected(True)
                if not opened.done():
                    opened.set_result(None)
                async for received in messages:
                    feed.publish(received)
        except Exception as exc:
            if not opened.done():
                opened.set_exception(exc)
                return
            logger.warning("the live page's consumer lost its broker (%s); trying again", type(exc).__name__)
        feed.set_connected(False)
        await asyncio.sleep(_RETRY_SECONDS)


@contextmanager
def closed_before_shutdown(feed: Feed) -> Generator[None, None, None]:
    """End the pages' streams as soon as the process is told to end.

    A server waits for open connections first and runs the lifespan's end last: a page that is open would hold it
    for ever. So we hear the signal beside the server, whose own handler is called as before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # A test's thread: no server, no signals.
        return
    loop = asyncio.get_running_loop()

    def closing(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(feed.close)
        servers = previous[signal.Signals(number)]
        if callable(servers):
            servers(number, frame)

    # Only where the server has a handler of its own: what else would happen must go on happening.
    previous = {
        number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))
    }
    for number in previous:
        signal.signal(number, closing)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is closing:
                signal.signal(number, handler)
