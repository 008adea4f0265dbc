"""Django's ASGI application, with a lifespan: brokers are open before the first request, flushed after the last.

    # asgi.py
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
    from dispytch_integrations.django.asgi import get_asgi_application
    application = get_asgi_application()

With Channels it takes the lifespan too: `ProtocolTypeRouter({"http": django, "lifespan": django, "websocket": ...})`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

from django.core.asgi import get_asgi_application as django_application

from dispytch_integrations._lifespan import ASGIApp, LifespanAnswer, Receive, Scope, Send
from dispytch_integrations.django import conf
from dispytch_integrations.django._asgi_warning import lifespan_seen
from dispytch_integrations.django._connections import connections
from dispytch_integrations.errors import ConfigurationError, StartupError

__all__ = ["EmitterApplication", "get_asgi_application"]


class EmitterApplication:
    """An ASGI application around Django's. It answers the lifespan protocol, and passes all else on."""

    def __init__(self, application: ASGIApp) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] == "lifespan":
            lifespan_seen()
            await LifespanAnswer(_no_lifespan, scope, receive, send).run(_opened())
            return
        await self.application(scope, receive, send)


def get_asgi_application() -> EmitterApplication:
    """Django's application, which opens the brokers of DISPYTCH when the server starts.

    Raises SettingsError with all that is wrong in DISPYTCH. When a broker is not reached within its STARTUP_TIMEOUT,
    the server ends with a message that names it (unless its REQUIRED is False).
    """
    application = django_application()
    conf.require(connections.settings().problems)
    return EmitterApplication(cast("ASGIApp", application))


@asynccontextmanager
async def _opened() -> AsyncGenerator[None, None]:
    try:
        await asyncio.to_thread(connections.open)
    except (ConfigurationError, StartupError) as exc:
        # Servers print the traceback of a failed startup: our message would stand below those of client libraries.
        raise exc.with_traceback(None) from None
    try:
        yield
    finally:
        await asyncio.to_thread(connections.close)


async def _no_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """Django knows no lifespan."""
    raise ValueError("no lifespan")
