"""Brokers that do not answer: their events wait in the outbox, and no attempt is counted, until they do."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence

from dispytch_integrations._broker import Broker
from dispytch_integrations.outbox._words import told

__all__ = ["Outages"]

logger = logging.getLogger("dispytch_integrations.outbox")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two looks at a broker that does not answer."""


class Outages:
    """Which brokers are waited for; each is looked at until it answers. `on_end`: called then."""

    def __init__(self, brokers: Mapping[str, Broker], on_end: Callable[[], None]) -> None:
        self._brokers = brokers
        self._on_end = on_end
        self._waits: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, alias: str) -> bool:
        return alias in self._waits

    @property
    def aliases(self) -> Sequence[str]:
        """Those that are waited for; after `end`, those that were."""
        return sorted(self._waits)

    async def answers(self, alias: str) -> bool:
        """Does the broker answer? Then it is the messages that have failed."""
        try:
            await self._brokers[alias].ping()
        except Exception:
            return False
        return True

    def begin(self, alias: str, error: Exception | None) -> bool:
        """Wait for a broker; False: it is waited for already. `error`: by which that was found out."""
        if alias in self._waits:
            return False
        logger.warning(
            "broker %r does not answer; its events wait in the outbox: %s", alias, told(error), extra={"broker": alias}
        )
        self._waits[alias] = asyncio.create_task(self._wait_for(alias), name=f"dispytch relay waits for {alias}")
        return True

    async def _wait_for(self, alias: str) -> None:
        pause = _FIRST_PAUSE
        while True:
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            if await self.answers(alias):
                break
            pause = min(pause * 2, _LONGEST_PAUSE)
        logger.info("broker %r answers again", alias, extra={"broker": alias})
        del self._waits[alias]
        self._on_end()

    def forget(self) -> None:
        """Begin anew: nothing is known of any broker."""
        self._waits.clear()

    def cancel(self) -> set[asyncio.Task[None]]:
        """Wait no longer; what is to be awaited for that. The brokers stay known, for who looks at a relay's end."""
        waits = set(self._waits.values())
        for wait in waits:
            wait.cancel()
        return waits
