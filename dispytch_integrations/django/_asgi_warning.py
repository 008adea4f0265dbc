"""ASGI servers whose lifespan never reaches us: there connections are opened late and, under uvicorn, never flushed."""

from __future__ import annotations

import logging
from typing import Any

from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_started

from dispytch_integrations.django._connections import connections

__all__ = ["lifespan_seen", "watch"]

logger = logging.getLogger("dispytch_integrations.django")


def watch() -> None:
    """Warn once, at the first request of an ASGI server, unless the lifespan has been run."""
    request_started.connect(_first_request, dispatch_uid="dispytch ASGI without lifespan")


def lifespan_seen() -> None:
    """The server runs our lifespan: there is nothing to warn of."""
    request_started.disconnect(dispatch_uid="dispytch ASGI without lifespan")


def _first_request(sender: Any, **arguments: Any) -> None:
    if "scope" not in arguments:
        return  # WSGI.
    # Django's test clients have handlers of their own, without a lifespan and without a need for one.
    if not (isinstance(sender, type) and issubclass(sender, ASGIHandler)) or sender.__module__ == "django.test.client":
        return
    lifespan_seen()
    if not connections.connects:
        return  # Nothing is in flight here that could be lost.
    logger.warning(
        "the ASGI server runs no lifespan of dispytch: brokers are connected at their first use, and events that are "
        "in flight when the server ends may be lost. In asgi.py write "
        "`from dispytch_integrations.django.asgi import get_asgi_application`, and with Channels give it the "
        '"lifespan", too. (daphne knows no lifespan: there connections are flushed at the exit of the process.)'
    )
