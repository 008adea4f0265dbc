"""What becomes of the outbox's events, as Django's signals, in the process that relays them."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.dispatch import Signal

from dispytch_integrations.django._events import event_classes
from dispytch_integrations.django._receivers import Receivers, send
from dispytch_integrations.django.signals import event_emitted, event_failed
from dispytch_integrations.errors import BrokerUnavailableError, NotAttemptedError
from dispytch_integrations.events import EventBase, event_type
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message

__all__ = ["RelaySignals"]


class RelaySignals(Hook):
    """A hook of brokers. Messages with an event were emitted here: who emits tells of them."""

    def __init__(self, receivers: Receivers) -> None:
        self._receivers = receivers
        self._classes: dict[str, type[EventBase]] | None = None

    def sent(self, message: Message) -> None:
        """Send `event_emitted`."""
        if message.event is None:
            self._post(event_emitted, message)

    def failed(self, message: Message, error: Exception) -> None:
        """Send `event_failed` for an attempt that was made: one that an outage hinders is none."""
        if message.event is None and not isinstance(error, (BrokerUnavailableError, NotAttemptedError)):
            self._post(event_failed, message, error=error)

    def _post(self, signal: Signal, message: Message, **more: Any) -> None:
        if not signal.receivers:
            return
        if self._classes is None:
            self._classes = {event_type(cls): cls for cls in event_classes()}
        # A class that was renamed or removed since: its receivers are not known any more, those of all are.
        sender = self._classes.get(message.type)
        if not signal.has_listeners(sender):
            return
        arguments = {"event": None, "message": message, "alias": message.broker, "after_commit": True, **more}
        self._receivers.post(partial(send, signal, sender, **arguments))
