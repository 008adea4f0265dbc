"""Hooks: see every message before it is sent, when it is confirmed, when it failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dispytch_integrations.message import Message

__all__ = ["Hook"]


class Hook:
    """Override what you need. All are called synchronously and must be quick.

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

    def held(self, message: Message) -> None:
        """Called when it waits for a commit, or was put into an outbox, by who emits. What it raises is logged."""

    def delivering(self, messages: Sequence[Message]) -> Callable[[Sequence[Exception | None]], object] | None:
        """Called when messages are handed to the producer: of an emit one, of `emit_many` and of a relay many.

        What it returns is called with their outcomes, before `sent` and `failed`. What it raises is logged.
        """

    def sent(self, message: Message) -> None:
        """Called when the broker has confirmed. What it raises is logged and goes no further."""

    def failed(self, message: Message, error: Exception) -> None:
        """Called when the broker has not confirmed. What it raises is logged and goes no further."""
