"""The app."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["OrdersConfig"]


class OrdersConfig(AppConfig):
    """`events.py` is found by dispytch's own app config; signals are ours to connect, as always."""

    name = "example_projects.django_orders.orders"
    label = "orders"

    def ready(self) -> None:
        """Connect the signals. Nothing is opened."""
        from example_projects.django_orders.orders import signals  # noqa: F401  # pyright: ignore[reportUnusedImport]
