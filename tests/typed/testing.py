# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What tests of a user's project use."""

from __future__ import annotations

from typing import assert_type

from django.test import TestCase

from dispytch_integrations import EventBase
from dispytch_integrations.django.testing import (
    EmittedEvents,
    EmittedEventsMixin,
    capture_events,
    override_brokers,
)
from dispytch_integrations.message import Message
from tests.typed.orders import OrderPlaced


def looking(events: EmittedEvents) -> None:
    placed = events.assert_emitted(OrderPlaced, order_id=1)
    assert_type(placed, OrderPlaced)
    assert_type(placed.order_id, int)
    assert_type(events.assert_pending(OrderPlaced), OrderPlaced)
    assert_type(events.assert_rolled_back(OrderPlaced), OrderPlaced)
    events.assert_not_emitted(OrderPlaced, order_id=2)
    assert_type(events[0], EventBase)
    assert_type(events[:2], list[EventBase])
    assert_type(events.emitted, list[EventBase])
    assert_type(events.pending, list[EventBase])
    assert_type(events.messages, list[Message])

    events.assert_emitted(placed)  # type: ignore[arg-type]
    events.assert_emitted(int)  # type: ignore[type-var]
    events.assert_emitted("OrderPlaced")  # type: ignore[arg-type]


def contexts() -> None:
    with capture_events() as events:
        assert_type(events, EmittedEvents)
    with override_brokers("memory"):
        pass
    with override_brokers(None):
        pass
    override_brokers("kafak")  # type: ignore[arg-type]


class OrderTests(EmittedEventsMixin, TestCase):
    def test_an_order_is_announced(self) -> None:
        assert_type(self.emitted_events, EmittedEvents)

    @override_brokers()
    def decorated(self, number: int) -> str:
        return str(number)

    def test_a_decorated_method_is_what_it_was(self) -> None:
        assert_type(self.decorated(1), str)
