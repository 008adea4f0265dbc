"""Hooks: see every message before it is sent, when it is confirmed, when it failed."""

from __future__ import annotations

from dispytch_integrations.message import Message

__all__ = ["Hook"]


class Hook:
    """Override what you need. All three are called synchronously and must be quick.

        class Tenant(Hook):
            def before_send(self, message: Message) -> None:
                message.headers["tenant"] = current_tenant.get()

        connect("kafka://localhost:9092", hooks=[Tenant()])

    Hooks belong to the broker: direct emits, emits after commit and the outbox relay are all seen.
    """

    def before_send(self, message: Message) -> None:
        """Called in the emitter's context when the message is complete; may change its headers.

        What it raises, the emit raises, and nothing is sent.
        """

    def sent(self, message: Message) -> None:
        """Called when the broker has confirmed. What it raises is logged and goes no further."""

    def failed(self, message: Message, error: Exception) -> None:
        """Called when the broker has not confirmed. What it raises is logged and goes no further."""
