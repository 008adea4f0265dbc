"""Django signals of what becomes of events and brokers.

    from dispytch_integrations.django.signals import event_failed

    @receiver(event_failed)
    def keep(sender, event, error, **kwargs):
        FailedEvent.objects.create(type=sender.__name__, body=event.model_dump_json())

Receivers may use the ORM, and may raise: that is logged, and hurts nobody. For `emit` and `aemit` they run where the
event was emitted, before the call returns. For events after a commit, and for brokers, they run on a thread of their
own (with the context variables of whoever emitted), whose database connections are closed after each.

With the outbox they are sent where the relay runs: in the process of `manage.py dispytch relay`, or with EMBEDDED in
this one. `event` is None there, since the message was read from the table, and `sender` is found by the event type.
"""

from __future__ import annotations

import os
import threading

from django.dispatch import Signal

__all__ = ["broker_started", "broker_stopped", "event_emitted", "event_failed"]

event_emitted = Signal()
"""The broker has confirmed an event.

`sender`: the event's class; `event`: the event, None in a relay; `message`: the Message (id, destination, headers,
payload); `alias`: the broker's alias; `after_commit`: was it sent by `emit_on_commit`?
"""

event_failed = Signal()
"""An event was not confirmed: arguments as `event_emitted`, and `error`: the exception.

An UnconfirmedError (ProducerTimeout among them) says that it may have been delivered all the same. A relay sends it
for each attempt that counts, and tries again until MAX_ATTEMPTS; none for what a broker that is down has not got yet.
"""

broker_started = Signal()
"""A connection was made for the first time in this process. `sender`: the backend's class; `alias`: of the broker;
`address`: without secrets."""

broker_stopped = Signal()
"""A connection was closed. Arguments as `broker_started`, and `abandoned`: messages that were in flight and not
waited for any longer."""


def _after_fork() -> None:
    # The loop's thread asks them at every event: in a child they would be locked for ever, if they were at the fork.
    for signal in (event_emitted, event_failed, broker_started, broker_stopped):
        signal.lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Not on Windows, where nothing forks.
    os.register_at_fork(after_in_child=_after_fork)
