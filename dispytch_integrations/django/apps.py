"""The app config: finds the project's events, and connects what watches; opens nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from django.apps import AppConfig
from django.core.signals import setting_changed
from django.utils.module_loading import autodiscover_modules

from dispytch_integrations._overriding import overriding

__all__ = ["DispytchConfig"]

_SETTINGS = ("DATABASE_ROUTERS", "DISPYTCH", "DISPYTCH_OUTBOX", "INSTALLED_APPS")
"""What says which connections there are."""


class DispytchConfig(AppConfig):
    """`INSTALLED_APPS += ["dispytch_integrations.django"]`."""

    name = "dispytch_integrations.django"
    label = "dispytch"
    verbose_name = "Events (dispytch)"

    def ready(self) -> None:
        """Import `events.py` of every app; register checks; close connections when settings or Celery's child end."""
        from dispytch_integrations.django import _asgi_warning, checks

        overriding.parts[:] = [_on_memory]
        checks.register()
        _asgi_warning.watch()
        setting_changed.connect(_settings_changed, dispatch_uid="dispytch settings")
        if "celery" in sys.modules:
            _close_with_celery()
        autodiscover_modules("events")


def _on_memory() -> AbstractContextManager[Callable[[], object]]:
    from dispytch_integrations.django._on_memory import on_memory

    return on_memory()


def _settings_changed(*, setting: str, **arguments: Any) -> None:
    from dispytch_integrations.django._connections import connections

    if setting in _SETTINGS:
        connections.reset()


def _close_with_celery() -> None:
    """A child of Celery's prefork pool ends without exit functions: what it has left to the loop would be lost."""
    from celery.signals import worker_process_shutdown

    worker_process_shutdown.connect(_worker_ends, weak=False, dispatch_uid="dispytch worker")


def _worker_ends(**arguments: Any) -> None:
    from dispytch_integrations.django._connections import connections

    connections.end()
