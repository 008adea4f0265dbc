"""The app's settings, read from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from example_projects.shop_demo.transports import transport_of

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What differs between a laptop, a test and production."""

    broker_url: str | None = None
    """Where events go, "kafka://localhost:9092"; None: the app does not start, and says what to write."""
    outbox: bool = False
    """Does the shop have a database, and store events in it with its orders? Default: no, orders are in memory."""
    database_url: str = f"sqlite:///{Path(__file__).with_name('db.sqlite3')}"
    """Where orders are stored with `outbox`; or "postgresql://user:password@host:5432/name", which needs asyncpg."""
    history: int = 100
    """How many events a page sees that is opened later; default 100."""

    @classmethod
    def from_environment(cls) -> Settings:
        """DISPYTCH_URL is the variable that `connect()` reads, too. The others: OUTBOX=1, DATABASE_URL."""
        environment = os.environ
        return cls(
            broker_url=environment.get("DISPYTCH_URL", "").strip() or None,
            outbox=environment.get("OUTBOX", "").lower() in ("1", "true", "yes"),
            database_url=environment.get("DATABASE_URL") or cls.database_url,
        )

    @property
    def transport(self) -> str:
        """ "kafka", "rabbitmq", "redis" or "memory"; without a URL "kafka"."""
        return transport_of(self.broker_url or "kafka://")
