"""What tests of the Django integration say about the project's brokers."""

from __future__ import annotations

from typing import Any

from django.test import override_settings

from dispytch_integrations.django._connections import connections
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message

__all__ = ["broker_at", "pending", "sent"]


def broker_at(url: str, **settings: Any) -> override_settings:
    """DISPYTCH with one broker; keys that are not given keep their defaults."""
    return override_settings(DISPYTCH={"default": {"URL": url, **settings}})


def sent() -> list[Message]:
    """What the broker memory:// has got; waits for what was handed over after a commit."""
    assert connections.flush(20)
    if connections.session is None:
        return []
    producer = connections.session.brokers.producers["default"]
    assert isinstance(producer, MemoryProducer)
    return producer.sent


def pending() -> int:
    """How many messages are handed over and neither confirmed nor given up."""
    return 0 if connections.session is None else connections.session.handoff.pending
