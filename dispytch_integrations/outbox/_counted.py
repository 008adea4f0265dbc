"""What relays of this process have counted last, for metrics."""

from __future__ import annotations

from dispytch_integrations.outbox.store import Stats

__all__ = ["counted"]

counted: dict[str, Stats] = {}
"""By the database's name, as the relay calls it."""
