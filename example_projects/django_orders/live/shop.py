"""What the page says of this shop: three ways in which events are made."""

from __future__ import annotations

from example_projects.shop_demo.live.page import Kind, Link, Shop, Step

__all__ = ["SHOP", "TOPICS"]

SHOP = Shop(
    kinds=[
        Kind(
            name="placed",
            topic="orders.placed",
            made_in=Step("Service", "place()"),
            sent_with=Step("Commit", "emit_on_commit()"),
        ),
        Kind(
            name="packed",
            topic="orders.packed",
            made_in=Step("Celery task", "pack()"),
            sent_with=Step("Emitter", "emit()"),
        ),
        Kind(
            name="cancelled",
            topic="orders.cancelled",
            made_in=Step("Model", "Cancellation"),
            sent_with=Step("Signal", "@emits(post_save)"),
        ),
    ],
    links=[Link("Admin", "admin/")],
)

TOPICS = tuple(kind.topic for kind in SHOP.kinds)
"""What the page listens to."""
