"""The app config of the outbox: its label, its checks; opens nothing."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["OutboxConfig"]


class OutboxConfig(AppConfig):
    """`INSTALLED_APPS += ["dispytch_integrations.django.outbox"]`."""

    name = "dispytch_integrations.django.outbox"
    label = "dispytch_outbox"
    verbose_name = "Outbox (dispytch)"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        from dispytch_integrations.django.outbox import checks

        checks.register()
