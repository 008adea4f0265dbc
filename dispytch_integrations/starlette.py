"""An emitter for Starlette, and for any ASGI app.

    from dispytch_integrations.starlette import emitter_lifespan, get_emitter

    async def place_order(request: Request) -> Response:
        await get_emitter(request).emit(OrderPlaced(order_id=1))

    app = Starlette(routes=[...], lifespan=emitter_lifespan("kafka://localhost:9092"))

An app that has no lifespan, Django's for example, is wrapped: `EmitterMiddleware(app, "kafka://localhost:9092")`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncContextDecorator,
    ContextDecorator,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial, wraps
from logging import getLogger
from typing import Any, Literal, ParamSpec, cast

from dispytch_integrations._asyncapi_classes import Events
from dispytch_integrations._find_emitter import of_app, of_scope
from dispytch_integrations._lifespan import LifespanAnswer, OpenBrokers, known_to
from dispytch_integrations._missing import is_missing
from dispytch_integrations._outlet import OnTimeout
from dispytch_integrations.brokers import Brokers, Outbox, connect
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import ConfigurationError, MissingExtraError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.serialization import Serializer
from dispytch_integrations.settings import Config

try:
    from starlette.requests import HTTPConnection
    from starlette.routing import Route
    from starlette.types import Message, Receive, Scope, Send
except ModuleNotFoundError as exc:
    if not is_missing(exc, "starlette"):
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.starlette", extra="starlette") from exc

from dispytch_integrations._catalog_routes import catalog_endpoints
from dispytch_integrations._catalog_serving import Catalog
from dispytch_integrations._health_routes import endpoints
from dispytch_integrations.health import HealthCheck, ReadyOn

__all__ = [
    "EmitterLifespan",
    "EmitterMiddleware",
    "UserLifespan",
    "catalog_routes",
    "emitter_lifespan",
    "get_emitter",
    "health_routes",
]

State = Mapping[str, Any]
AnyASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
"""Other frameworks type what they take more narrowly than Starlette does."""
UserLifespan = Callable[
    [Any], AbstractAsyncContextManager[State | None] | AsyncIterator[State | None] | Iterator[State | None]
]
"""A lifespan of your own: an `@asynccontextmanager` function of the app; a bare generator function is accepted, too."""


def get_emitter(source: HTTPConnection | Mapping[str, object] | AnyASGIApp, name: str = "emitter") -> EventEmitter:
    """The emitter of a request, a WebSocket, an ASGI scope, or an app that is running.

    `name`: the one given to `emitter_lifespan` or `EmitterMiddleware`, or the key a hand-written lifespan yields.

    Raises NotStartedError when there is none; it says which causes are likely here and what to write.
    """
    if isinstance(source, HTTPConnection):
        return of_scope(source.scope, name)
    if isinstance(source, Mapping):
        return of_scope(cast("Scope", source), name)
    return of_app(source, name)


def emitter_lifespan(
    config: Config | Brokers = None,
    *,
    lifespan: UserLifespan | None = None,
    name: str = "emitter",
    timeout: float | None = 5.0,
    startup_timeout: float = 30.0,
    shutdown_timeout: float = 10.0,
    required: bool | None = None,
    on_timeout: Literal["raise", "log"] | OnTimeout = "raise",
    source: str | None = None,
    cloudevents: bool | str = True,
    prefix: str = "",
    max_size: int | None = None,
    hooks: Sequence[Hook] = (),
    serializer: Serializer | None = None,
    client: Mapping[str, Any] | None = None,
    outbox: Outbox | None = None,
    **options: Any,
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """A lifespan that opens the brokers before the app's startup and closes them after its shutdown.

        app = Starlette(lifespan=emitter_lifespan("kafka://localhost:9092", lifespan=my_lifespan))

    `config` and the keywords: see `connect`; nothing is read before the app starts. `config` may be the brokers that
    `connect()` has made, then the keywords belong there.
    `lifespan`: your own; inside it, `get_emitter(app)` works. What it yields is merged with the emitter.
    `name`: the key in `request.state`; several emitters have several names.

    Raises ConfigurationError for a lifespan that is none. At the app's start: what `connect` raises there, and
    ConfigurationError when two emitters of the app, or the emitter and your own state, have the same name.
    """
    brokers = _brokers(
        config,
        timeout=timeout,
        startup_timeout=startup_timeout,
        shutdown_timeout=shutdown_timeout,
        required=required,
        on_timeout=on_timeout,
        source=source,
        cloudevents=cloudevents,
        prefix=prefix,
        max_size=max_size,
        hooks=hooks,
        serializer=serializer,
        client=client,
        outbox=outbox,
        **options,
    )
    return EmitterLifespan(brokers, name, _as_context(lifespan))


class EmitterLifespan:
    """What `emitter_lifespan` returns: a lifespan function for any number of apps, entered any number of times."""

    def __init__(
        self, brokers: OpenBrokers, name: str, lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] | None
    ) -> None:
        self.name = name
        self._brokers = brokers
        self._lifespan = lifespan

    @asynccontextmanager
    async def __call__(self, app: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Open the brokers and run the user's lifespan inside."""
        async with self._brokers.opened() as emitter:
            with known_to(app, self.name, emitter):
                if self._lifespan is None:
                    yield {self.name: emitter}
                    return
                context = self._lifespan(app)
                if not isinstance(context, AbstractAsyncContextManager):
                    raise ConfigurationError(
                        f"the lifespan given as lifespan= returns a {type(context).__name__}; "
                        f"decorate it with contextlib.asynccontextmanager"
                    )
                async with context as state:
                    yield self._merged(emitter, state)

    def _merged(self, emitter: EventEmitter, state: object) -> dict[str, Any]:
        if state is None:
            return {self.name: emitter}
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                f"the lifespan given as lifespan= yields a {type(state).__name__}; yield a dict, or nothing"
            )
        merged = {self.name: emitter, **cast("State", state)}
        if merged[self.name] is not emitter:
            raise ConfigurationError(
                f"the lifespan given as lifespan= yields {self.name!r}, which is the emitter's name; rename either: "
                f"emitter_lifespan(..., name='events')"
            )
        return merged


_P = ParamSpec("_P")


def _app_by_keyword(init: Callable[_P, None]) -> Callable[_P, None]:
    """Take the app as a keyword, too: FastAPI before 0.120 gives it so.

    To type checkers it is positional only: beside `**options`, a keyword `app` would not fit `add_middleware`.
    """

    @wraps(init)
    def with_keyword(*args: Any, **keywords: Any) -> None:
        if "app" in keywords:
            args = (*args, keywords.pop("app"))
        init(*args, **keywords)

    return cast("Callable[_P, None]", with_keyword)


class EmitterMiddleware:
    """Gives any ASGI app an emitter, in HTTP requests and WebSockets, and answers the lifespan protocol for it.

        app = EmitterMiddleware(get_asgi_application(), "kafka://localhost:9092")
        app.add_middleware(EmitterMiddleware, config="kafka://localhost:9092")      # Starlette and FastAPI

    The emitter is `scope["state"][name]`: `request.state.emitter`, or `get_emitter(request)`. Brokers are open before
    the app's own startup and closed after its shutdown; an app without lifespan needs none. When a broker does not
    start, the server ends with our message.

    `config`, `name` and the keywords: see `emitter_lifespan`.
    """

    @_app_by_keyword
    def __init__(
        self,
        app: AnyASGIApp,
        /,
        config: Config | Brokers = None,
        *,
        name: str = "emitter",
        timeout: float | None = 5.0,
        startup_timeout: float = 30.0,
        shutdown_timeout: float = 10.0,
        required: bool | None = None,
        on_timeout: Literal["raise", "log"] | OnTimeout = "raise",
        source: str | None = None,
        cloudevents: bool | str = True,
        prefix: str = "",
        max_size: int | None = None,
        hooks: Sequence[Hook] = (),
        serializer: Serializer | None = None,
        client: Mapping[str, Any] | None = None,
        outbox: Outbox | None = None,
        **options: Any,
    ) -> None:
        self.app = app
        self.name = name
        self._brokers = _brokers(
            config,
            timeout=timeout,
            startup_timeout=startup_timeout,
            shutdown_timeout=shutdown_timeout,
            required=required,
            on_timeout=on_timeout,
            source=source,
            cloudevents=cloudevents,
            prefix=prefix,
            max_size=max_size,
            hooks=hooks,
            serializer=serializer,
            client=client,
            outbox=outbox,
            **options,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._live(scope, receive, send)
            return
        if kind in ("http", "websocket"):
            # Servers that know no lifespan state give none; the others a copy per request.
            scope.setdefault("state", {})[self.name] = self._brokers.emitter
        await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def checked(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._require_own_name(scope)
            await send(message)

        await LifespanAnswer(self.app, scope, receive, checked).run(self._opened(scope))

    @asynccontextmanager
    async def _opened(self, scope: Scope) -> AsyncGenerator[None, None]:
        async with self._brokers.opened() as emitter:
            with ExitStack() as stack:
                for app in self._apps(scope):
                    stack.enter_context(known_to(app, self.name, emitter))
                if "state" in scope:
                    scope["state"][self.name] = emitter
                yield

    def _apps(self, scope: Scope) -> Iterator[object]:
        """For whom `get_emitter(app)` works: this, the apps it wraps, the one whose middleware it is."""
        app: object = self
        while app is not None:
            yield app
            app = getattr(app, "app", None)
        yield scope.get("app")

    def _require_own_name(self, scope: Scope) -> None:
        emitter = self._brokers.emitter
        if scope.get("state", {}).get(self.name, emitter) is not emitter:
            raise ConfigurationError(
                f"the app's lifespan yields {self.name!r}, which is the name of EmitterMiddleware's emitter; "
                f"rename either: EmitterMiddleware(..., name='events')"
            )


def health_routes(
    path: str = "/health",
    *,
    ready_on: ReadyOn = "started",
    timeout: float = 1.0,
    outbox: bool = False,
    max_age: float | None = None,
    details: bool = True,
) -> list[Route]:
    """Two routes for load balancers and people: `path`/live and `path`/ready, about all emitters of the app.

        app = Starlette(routes=[*routes, *health_routes()], lifespan=emitter_lifespan(...))

    "live" answers 200 as long as the process does. "ready" answers 200 or 503, with the state of each broker as JSON.
    `ready_on`: "started" (default): a broker's outage answers 200 with the status "degraded", so that it does not take
    every process out of service; "broker": 503 unless each broker answers.
    `timeout`: seconds for the whole answer. `outbox`: tell of the outbox, too; `max_age`: seconds after which a
    waiting event is late. `details`: False: the status alone, where strangers may ask.

    Raises ConfigurationError for options that are none.
    """
    check = HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age)
    return [Route(f"{path}/{part}", endpoint) for part, endpoint in endpoints(check, details=details).items()]


def catalog_routes(
    path: str = "/events",
    *,
    events: Events = None,
    title: str | None = None,
    version: str | None = None,
    description: str | None = None,
    enabled: bool | None = None,
) -> list[Route]:
    """Three routes for people and tools: the catalogue's page at `path`, `path`/asyncapi.json, `path`/asyncapi.yaml.

        app = Starlette(routes=[*routes, *catalog_routes("/events", events="shop.events")], debug=True, lifespan=...)

    `events`, `title`, `version`, `description`: see `dispytch_integrations.asyncapi.describe`. The brokers are those of
    the app's emitter (of several: of the one called "emitter"), without users and passwords.
    `enabled`: None: where the app has `debug=True`, or the environment has DISPYTCH_CATALOG=1; else it answers 404.

    Who may see it is the app's to say, as for any route: `Mount("/internal", routes=catalog_routes(), middleware=...)`.

    Raises ConfigurationError for options that are none.
    """
    catalog = Catalog(
        "catalog_routes",
        getLogger("dispytch_integrations.starlette"),
        events=events,
        title=title,
        version=version,
        description=description,
        enabled=enabled,
    )
    return [Route(where, endpoint) for where, endpoint in catalog_endpoints(path, catalog).items()]


def _brokers(config: Config | Brokers, **keywords: Any) -> OpenBrokers:
    if hasattr(config, "router"):
        raise ConfigurationError(
            "emitter_lifespan was given an app: call it yourself, lifespan=emitter_lifespan('kafka://localhost:9092')"
        )
    if not isinstance(config, Brokers):
        return OpenBrokers(partial(connect, config, **keywords))
    defaults = inspect.signature(connect).parameters
    given = [key for key, value in keywords.items() if key not in defaults or value != defaults[key].default]
    if given:
        raise ConfigurationError(
            f"{', '.join(f'{key}=' for key in given)} cannot change brokers that are made; "
            f"write connect(..., {given[0]}=...), or give the URL instead of connect(...)"
        )
    return OpenBrokers(config)


def _as_context(lifespan: UserLifespan | None) -> Callable[[Any], AbstractAsyncContextManager[Any]] | None:
    """The lifespan as Starlette would call it. Raises ConfigurationError for what is recognizably none."""
    if lifespan is None:
        return None
    if inspect.isasyncgenfunction(lifespan):
        return asynccontextmanager(lifespan)
    if inspect.isgeneratorfunction(lifespan):
        return _lifted(contextmanager(lifespan))
    # What an @asynccontextmanager function returns is callable as well: as a decorator.
    if isinstance(lifespan, (AsyncContextDecorator, ContextDecorator)) or not callable(lifespan):
        raise ConfigurationError(
            f"lifespan= is a {type(lifespan).__name__}; give the function, and do not call it: lifespan=my_lifespan"
        )
    if inspect.iscoroutinefunction(lifespan):
        raise ConfigurationError(
            f"the lifespan {lifespan.__qualname__} never yields; "
            f"write `@asynccontextmanager` above it and `yield` where the app runs"
        )
    return cast("Callable[[Any], AbstractAsyncContextManager[Any]]", lifespan)


def _lifted(
    function: Callable[[Any], AbstractContextManager[Any]],
) -> Callable[[Any], AbstractAsyncContextManager[Any]]:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[Any, None]:
        with function(app) as state:
            yield state

    return lifespan
