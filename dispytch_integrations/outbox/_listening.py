"""A relay that is woken by the database, over a connection of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.store import OutboxStore

__all__ = ["goes_on", "listen"]

logger = logging.getLogger("dispytch_integrations.outbox")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two attempts to connect."""


async def goes_on(over: asyncio.Event, seconds: float) -> bool:
    """Wait; False: the end has come meanwhile."""
    try:
        async with asyncio.timeout(seconds):
            await over.wait()
    except TimeoutError:
        return True
    return False


async def listen(store: OutboxStore, wake: Callable[[], None], over: asyncio.Event) -> None:
    """Call `wake` whenever the database says so, until the end. What is missed is found by looking, as ever."""
    pause = 0.0
    while await goes_on(over, pause):
        started = time.monotonic()
        listening = asyncio.ensure_future(store.listen(wake))
        ending = asyncio.ensure_future(over.wait())
        try:
            await asyncio.wait({listening, ending}, return_when=asyncio.FIRST_COMPLETED)
            if over.is_set():
                return
            await listening
        except ConfigurationError as exc:
            logger.error("the relay is not woken by the database: %s", exc)
            return
        except Exception as exc:
            logger.warning("the connection that listens is lost; trying again: %s", type(exc).__name__)
        finally:
            listening.cancel()
            ending.cancel()
            await asyncio.wait({listening, ending})
        lasted = time.monotonic() - started > _LONGEST_PAUSE
        pause = _FIRST_PAUSE if lasted else min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
