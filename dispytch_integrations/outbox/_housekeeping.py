"""What a relay does once a minute: tell of rows that are not for it, and delete what has expired."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping

from dispytch_integrations._broker import Broker
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.store import OutboxStore, Selection, State, Waiting

__all__ = ["Housekeeping"]

logger = logging.getLogger("dispytch_integrations.outbox")

_SECONDS = 60.0
"""How often, give or take a quarter."""


class Housekeeping:
    """That of one relay."""

    def __init__(self, store: OutboxStore, brokers: Mapping[str, Broker], options: RelayOptions) -> None:
        self._store = store
        self._brokers = brokers
        self._options = options
        self._told: Waiting | None = None
        self.due = 0.0
        """When it is done next, on the monotonic clock."""

    async def keep(self, newest: int) -> None:
        """Do it, if it is time. `newest`: format of the newest rows that it reads. Raises what the store does."""
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + _SECONDS * random.uniform(0.75, 1.25)
        self._tell(await self._store.waiting(list(self._brokers), newest), newest)
        for state, seconds in ((State.SENT, self._options.keep_sent), (State.DEAD, self._options.keep_dead)):
            if seconds is not None:
                await self._store.discard(Selection(states=(state,), older_than=seconds))

    def _tell(self, waiting: Waiting, newest: int) -> None:
        if waiting == self._told:
            return
        self._told = waiting
        for alias, count in waiting.unknown.items():
            logger.warning(
                "%d events wait for broker %r, which this relay does not have; it has %s",
                *(count, alias, ", ".join(repr(each) for each in self._brokers) or "none"),
            )
        if waiting.newer:
            logger.warning(
                "%d events were stored with a codec that this relay does not have, or by a newer version (format above "
                "%d): start it with the app's own codec (--app, or DISPYTCH_OUTBOX['CODEC']), or update it",
                *(waiting.newer, newest),
            )
