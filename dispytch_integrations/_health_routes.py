"""The health of an ASGI app over HTTP: whom to ask for a request, and the two endpoints for Starlette and FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dispytch_integrations._lifespan import emitters_of
from dispytch_integrations.brokers import brokers_of
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.health import Health, HealthCheck

__all__ = ["Endpoint", "endpoints"]

Endpoint = Callable[[Request], Awaitable[Response]]

_NO_STORE = {"Cache-Control": "no-store"}


def endpoints(check: HealthCheck, *, details: bool) -> Mapping[str, Endpoint]:
    """By the last part of their path: "live" and "ready"."""

    async def live(request: Request) -> Response:
        """200 as long as the process answers: what it lacks, a restart does not bring."""
        return JSONResponse({"status": "up"}, headers=_NO_STORE)

    async def ready(request: Request) -> Response:
        """200 or 503, and what is behind it."""
        emitters = _emitters(request.scope)
        if emitters:
            health = await check.of(emitters)
        else:
            health = Health(status="down", error="the app has no emitter: its lifespan has not run, or opens none")
        return JSONResponse(health.as_dict(details=details), 200 if health.ready else 503, headers=_NO_STORE)

    return {"live": live, "ready": ready}


def _emitters(scope: Mapping[str, Any]) -> Mapping[str, EventEmitter]:
    """Those that the request could use, by name; those over a producer of the user's are not ours to ask."""
    found = {**emitters_of(scope.get("app")), **scope.get("state", {})}
    return {
        name: emitter
        for name, emitter in found.items()
        if isinstance(emitter, EventEmitter) and brokers_of(emitter) is not None
    }
