"""The relays of a process that relays its own outbox: one for each database that has one."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from django.db import connections as databases

from dispytch_integrations.brokers import Brokers
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.outbox.conf import OutboxSettings
from dispytch_integrations.django.outbox.store import DjangoStore, missing_tables
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.relay import Relay

__all__ = ["EmbeddedOutbox", "require_tables", "tables_are_missing"]

logger = logging.getLogger("dispytch_integrations.outbox")

_PATIENCE = 10.0
"""Seconds that a start waits for the databases' answers."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a relay that could not go on is replaced."""
_SETTLING = 2.0
"""Seconds beyond the longest timeout of a broker that relays get to settle what was under way."""


class EmbeddedOutbox:
    """What `connect(..., outbox=...)` starts beside the brokers, and stops before they are closed.

    Everything but `wake` is for the brokers' event loop.
    """

    external = False

    def __init__(self, settings: OutboxSettings) -> None:
        self._settings = settings
        self._relays: dict[str, Relay] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def start(self, brokers: Brokers) -> None:
        """Start a relay for each database; one that does not answer is tried again.

        Raises ConfigurationError when a broker's timeout does not fit into the lease.
        """
        self._stopping = asyncio.Event()
        for alias in self._settings.databases:
            self._relays[alias] = self._made(alias, brokers)
        for alias in self._settings.databases:
            self._running.add(asyncio.create_task(self._keep(alias, brokers), name=f"dispytch relay {alias}"))

    async def stop(self, brokers: Brokers) -> None:
        """Settle what is under way, give the leases back, and close the stores' connections."""
        self._stopping.set()
        longest = max((broker.timeout or 0.0 for broker in brokers.brokers.values()), default=0.0)
        end = time.monotonic() + longest + _SETTLING
        pending, self._running = self._running, set()
        while pending and time.monotonic() < end:
            for relay in self._relays.values():
                relay.stop()
            # Told again: one that was about to begin would not have heard it.
            _, pending = await asyncio.wait(pending, timeout=0.2)
        for task in pending:  # Its database hangs. What it held goes on when its leases have ended.
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=1.0)
        self._relays.clear()

    def wake(self) -> None:
        """Look at the tables now. From any thread."""
        for relay in tuple(self._relays.values()):
            relay.wake()

    @property
    def relays(self) -> Mapping[str, Relay]:
        """Those that run, by the alias of their database."""
        return self._relays

    def _made(self, alias: str, brokers: Brokers) -> Relay:
        return Relay(DjangoStore(alias), brokers.brokers, self._settings.options)

    async def _keep(self, alias: str, brokers: Brokers) -> None:
        """Run a relay until the stop, and another one where it could not go on: tables may come later."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                await self._relays[alias].run()
                continue
            except ConfigurationError as exc:
                logger.error("the outbox in database %r is not relayed, trying again in %.0f s: %s", alias, pause, exc)
            except Exception:
                logger.exception("the relay of database %r failed; another one starts in %.0f s", alias, pause)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.75, 1.25)):
                    await self._stopping.wait()
            pause = _FIRST_PAUSE if time.monotonic() - started > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            self._relays[alias] = self._made(alias, brokers)


def require_tables(aliases: Sequence[str]) -> None:
    """Raise SettingsError when the outbox's tables are missing in one of the databases.

    A database that does not answer is the app's own trouble: it is logged. Looked at on a thread of its own, for at
    most 10 s, with connections that nobody else uses.
    """
    problems: list[str] = []
    silent = list(aliases)

    def look() -> None:
        for alias in aliases:
            connection: Any = databases[alias].copy()
            connection.settings_dict["OPTIONS"].pop("pool", None)
            with suppress(Exception):
                try:
                    missing = missing_tables(connection)
                    silent.remove(alias)
                    if missing:
                        problems.append(tables_are_missing(alias, missing))
                finally:
                    connection.close()

    looking = threading.Thread(target=look, name="dispytch outbox tables", daemon=True)
    looking.start()
    looking.join(_PATIENCE)
    if problems:
        raise SettingsError(problems)
    for alias in silent:
        logger.warning("the outbox's database %r does not answer yet", alias)


def tables_are_missing(alias: str, missing: Sequence[str]) -> str:
    """What is said of a database without the outbox's tables."""
    command = "manage.py migrate" if alias == "default" else f"manage.py migrate --database {alias}"
    return f"the outbox's tables are missing in database {alias!r} ({' and '.join(missing)}): run {command}"
