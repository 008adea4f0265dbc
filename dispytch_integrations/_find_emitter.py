"""The emitter of an ASGI scope or app; where there is none, an error that names the likely cause and what to write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from dispytch_integrations._lifespan import emitters_of
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import NotStartedError

__all__ = ["of_app", "of_scope"]


def of_scope(scope: Mapping[str, Any], name: str) -> EventEmitter:
    """The emitter of a request or a WebSocket. Raises NotStartedError."""
    try:
        found = scope["state"][name]
    except KeyError:
        # A lifespan that no server has run, but a test around httpx's ASGITransport, reaches no scope.
        return _given(_known(scope.get("app"), name) or _missing_in_scope(scope, name), name)
    return _given(found, name)


def of_app(app: object, name: str) -> EventEmitter:
    """The emitter of an app that is running. Raises NotStartedError."""
    return _given(_known(app, name) or _missing_on_app(app, name), name)


def _known(app: object, name: str) -> object:
    """The emitter that a lifespan of ours keeps for the app, or a hand-written one keeps in `app.state`."""
    return emitters_of(app).get(name) or getattr(getattr(app, "state", None), name, None)


def _given(found: object, name: str) -> EventEmitter:
    if isinstance(found, NotStartedError):
        raise found
    if isinstance(found, Brokers):
        raise NotStartedError(
            f"{name!r} in the lifespan's state is what connect() returns, not an emitter: nothing has opened it; "
            f"write `async with connect(...) as emitter: yield {{{name!r}: emitter}}`"
        )
    # Not checked further: a test may put an object of its own there.
    return cast("EventEmitter", found)


def _missing_in_scope(scope: Mapping[str, Any], name: str) -> NotStartedError:
    causes = list(_causes(scope, name))
    if len(causes) == 1:
        return NotStartedError(f"there is no emitter {name!r} for this request: {causes[0]}")
    listed = "".join(f"\n  - {cause}" for cause in causes)
    return NotStartedError(f"there is no emitter {name!r} for this request. Likely causes:{listed}")


def _causes(scope: Mapping[str, Any], name: str) -> Iterator[str]:
    """What may be wrong, the likeliest first; what the scope rules out is left away."""
    app: Any = scope.get("app")
    if "litestar_app" in scope:
        yield "it is Litestar's: serve EmitterMiddleware(app, 'kafka://localhost:9092'), which opens one around the app"
        return
    state: Mapping[str, Any] | None = scope.get("state")
    names = {key for key, value in (state or {}).items() if isinstance(value, EventEmitter)} | set(emitters_of(app))
    if names:
        known = " and ".join(repr(key) for key in sorted(names))
        yield (
            f"the app has {known}; ask for that one (emitter_dependency or get_emitter take the name), "
            f"or open another: emitter_lifespan(..., name={name!r})"
        )
        return
    if "app_root_path" in scope:
        yield (
            f"the app is mounted at {scope.get('root_path', '')!r}, and the lifespan of a mounted app never runs: "
            f"put lifespan=emitter_lifespan(...) on the outermost app, mounted ones see its emitter"
        )
    if (scope.get("client") or ("",))[0] == "testclient" and not state:
        yield "TestClient was used without `with`, so that no lifespan ran: write `with TestClient(app) as client:`"
    elif state is None:
        yield (
            "whoever sent the request has run no lifespan, as httpx.ASGITransport: write "
            "`async with asgi_client(app) as client:`, from dispytch_integrations.testing, "
            "or use `with TestClient(app) as client:`"
        )
    router = getattr(app, "router", None)
    if getattr(getattr(router, "lifespan_context", None), "name", None) == name:
        # The app's own lifespan is ours, and has not run.
        yield "the server runs no lifespan: daphne never does, uvicorn not with `--lifespan off`"
        return
    if getattr(router, "on_startup", None):
        yield "the app's on_startup functions are ignored since it has a lifespan=: open the emitter in the lifespan"
    if state:
        keys = ", ".join(repr(key) for key in state)
        yield (
            f"the lifespan has yielded {keys} and no emitter: a hand-written one does "
            f"`async with connect(...) as emitter: yield {{{name!r}: emitter, ...}}`, "
            f"or give it to emitter_lifespan(..., lifespan=my_lifespan)"
        )
    else:
        yield (
            "the app opens none: write FastAPI(lifespan=emitter_lifespan('kafka://localhost:9092')), or Starlette; "
            f"a hand-written lifespan has to `yield {{{name!r}: emitter}}`"
        )


def _missing_on_app(app: object, name: str) -> NotStartedError:
    names = emitters_of(app)
    if names:
        known = " and ".join(repr(key) for key in sorted(names))
        return NotStartedError(f"the app has no emitter {name!r}, but {known}: get_emitter(app, name) takes the name")
    return NotStartedError(
        f"the app has no emitter {name!r}: emitter_lifespan and EmitterMiddleware give it one between its startup and "
        f"its shutdown, which has not happened, or is over; a mounted app has none, but get_emitter(request) "
        f"finds the outermost app's; a hand-written lifespan keeps its own as app.state.{name}"
    )
