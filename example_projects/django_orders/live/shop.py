"""What the page says of this shop: three ways in which events are made."""

from __future__ import annotations

from django.conf import settings

from example_projects.shop_demo.live.page import Kind, Link, Shop, Step

__all__ = ["SHOP", "TOPICS"]


def _after_commit(title: str, code: str) -> Step:
    """What is emitted in a transaction goes by the outbox, where there is one."""
    return Step("Outbox" if settings.OUTBOX else title, code)


SHOP = Shop(
    kinds=[
        Kind(
            name="placed",
            topic="orders.placed",
            made_in=Step("Service", "place()"),
            sent_with=_after_commit("Commit", "emit_on_commit()"),
        ),
        Kind(
            name="packed",
            topic="orders.packed",
            made_in=Step("Celery task", "pack()"),
            sent_with=Step("Outbox", "emit_on_commit()") if settings.OUTBOX else Step("Emitter", "emit()"),
        ),
        Kind(
            name="cancelled",
            topic="orders.cancelled",
            made_in=Step("Model", "Cancellation"),
            sent_with=_after_commit("Signal", "@emits(post_save)"),
        ),
    ],
    links=[
        Link("Admin", "admin/"),
        *([Link("Outbox", "admin/dispytch_outbox/outboxevent/")] if settings.OUTBOX else []),
    ],
    outbox=settings.OUTBOX,
)

TOPICS = tuple(kind.topic for kind in SHOP.kinds)
"""What the page listens to."""
