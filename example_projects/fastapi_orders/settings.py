"""The app's settings, read from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from example_projects.shop_demo.transports import transport_of

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What differs between a laptop, a test and production."""

    broker_url: str | None = None
    """Where events go, "kafka://localhost:9092"; None: the app does not start, and says what to write."""
    history: int = 100
    """How many events a page sees that is opened later; default 100."""

    @classmethod
    def from_environment(cls) -> Settings:
        """DISPYTCH_URL is the variable that `connect()` reads, too."""
        return cls(broker_url=os.environ.get("DISPYTCH_URL", "").strip() or None)

    @property
    def transport(self) -> str:
        """ "kafka", "rabbitmq", "redis" or "memory"; without a URL "kafka"."""
        return transport_of(self.broker_url or "kafka://")
