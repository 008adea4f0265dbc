"""The event catalogue in an ASGI app: its endpoints for Starlette and FastAPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dispytch_integrations._catalog_serving import PARTS, Catalog
from dispytch_integrations._health_routes import Endpoint, _emitters
from dispytch_integrations.brokers import Brokers, brokers_of
from dispytch_integrations.errors import ConfigurationError

__all__ = ["catalog_endpoints"]


def catalog_endpoints(path: str, catalog: Catalog) -> Mapping[str, Endpoint]:
    """By their path: the page at `path`, the document below it. Raises ConfigurationError for a path that is none."""
    given: Any = path
    if not isinstance(given, str) or not given.startswith("/"):
        raise ConfigurationError(f"the event catalogue's path {given!r} does not begin with a slash; write '/events'")
    base = path.rstrip("/")
    return {(f"{base}/{part}" if part else base or "/"): _endpoint(part, catalog) for part in PARTS}


def _endpoint(part: str, catalog: Catalog) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        """The page for people, or the AsyncAPI document behind it."""
        if not catalog.is_on(debug=bool(getattr(request.app, "debug", False))):
            raise HTTPException(404)
        asked = request.headers.get("if-none-match")
        answer = await run_in_threadpool(catalog.answer, part, _brokers(request.scope), asked)
        return Response(answer.body, answer.status, answer.headers)

    return endpoint


def _brokers(scope: Mapping[str, Any]) -> Brokers | None:
    """Those of the app's emitter; of several, of the one called "emitter", else of the first."""
    emitters = _emitters(scope)
    emitter = emitters.get("emitter") or next(iter(emitters.values()), None)
    return None if emitter is None else brokers_of(emitter)
