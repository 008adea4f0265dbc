"""Brokers that live as long as an ASGI app: opened per event loop, and the lifespan protocol around any app.

Knows ASGI and no framework.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from dispytch_integrations.brokers import Brokers
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import ConfigurationError, DispytchError, StartupError

__all__ = ["ASGIApp", "LifespanAnswer", "OpenBrokers", "Receive", "Scope", "Send", "emitters_of", "known_to"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("dispytch_integrations.starlette")


# -- brokers per event loop ----------------------------------------------------------------------------------------


class OpenBrokers:
    """The brokers of one declaration in an app, made anew for each event loop that runs the app.

    A connection belongs to its loop, and one app object may run on two loops at a time: a test with two TestClients.
    Entered twice on one loop, as FastAPI does with a router that is included twice, the brokers are opened once.

    `config`: brokers made by `connect()`, which are used as they are on whatever loop, or what makes them.
    """

    def __init__(self, config: Brokers | Callable[[], Brokers]) -> None:
        self._config = config
        self._open: dict[asyncio.AbstractEventLoop, Brokers] = {}
        self._unopened = self._make()

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[EventEmitter, None]:
        """Open the brokers on the running loop. Raises what `Brokers.start` raises, with a readable traceback."""
        loop = asyncio.get_running_loop()
        brokers = self._open.setdefault(loop, self._make())
        try:
            await _start(brokers)
            try:
                yield brokers.emitter
            finally:
                await brokers.stop()
        finally:
            if not brokers.started:
                self._open.pop(loop, None)

    @property
    def emitter(self) -> EventEmitter:
        """The emitter on the running loop; where nothing was opened, one whose emits raise NotStartedError."""
        return self._open.get(asyncio.get_running_loop(), self._unopened).emitter

    def _make(self) -> Brokers:
        return self._config if isinstance(self._config, Brokers) else self._config()


async def _start(brokers: Brokers) -> None:
    """Start; what is wrong with the settings or a broker is raised without the chain of its causes.

    Servers print the traceback of a failed startup: our message would stand below a hundred lines of client
    libraries, which say nothing that it does not say. The chain goes to the log at the level DEBUG.
    """
    try:
        await brokers.start()
    except (ConfigurationError, StartupError) as exc:
        logger.debug("the brokers did not start", exc_info=exc)
        raise exc.with_traceback(None) from None


# -- which emitters an app has, while it runs ----------------------------------------------------------------------

_Known = dict[tuple[asyncio.AbstractEventLoop, str], list[EventEmitter]]
_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_by_id: dict[int, _Known] = {}
"""The same for apps without weak references, such as Litestar's, which live at least as long as their block."""


@contextmanager
def known_to(app: object, name: str, emitter: EventEmitter) -> Generator[None, None, None]:
    """Let `emitters_of(app)` find the emitter inside the block.

    Raises ConfigurationError when the app has another emitter of that name.
    """
    if app is None:
        yield
        return
    try:
        known = _known.setdefault(app, {})
    except TypeError:
        known = _by_id.setdefault(id(app), {})
    key = (asyncio.get_running_loop(), name)
    entries = known.setdefault(key, [])
    if entries and entries[0] is not emitter:
        raise ConfigurationError(
            f"the app has two emitters called {name!r}, opened by two lifespans or middlewares; give one of them "
            f"another name, as in emitter_lifespan(..., name='alerts'), or share one emitter_lifespan object"
        )
    entries.append(emitter)
    try:
        yield
    finally:
        entries.pop()
        if not entries:
            del known[key]
        if not known:
            _by_id.pop(id(app), None)


def emitters_of(app: object) -> Mapping[str, EventEmitter]:
    """The emitters that are open for `app`, by name; those of the running loop before those of others."""
    try:
        known = _known.get(app, {})
    except TypeError:
        known = _by_id.get(id(app), {})
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    found: dict[str, EventEmitter] = {}
    for (loop, name), entries in list(known.items()):
        if loop is here or name not in found:
            found[name] = entries[0]
    return found


# -- the lifespan protocol -----------------------------------------------------------------------------------------


class LifespanAnswer:
    """Answers a server's lifespan protocol: brokers up, the app's own startup; its shutdown, brokers closed.

    An app that does not speak the protocol (it raises without having taken the startup message, as Django does, or
    returns, or sends something else) is answered for. One that fails in its startup has failed: what it raises then
    would pass as "lifespan unsupported", and the server would serve an app that never started.
    """

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._stack = AsyncExitStack()
        self._asked = False  # the app has taken the startup message
        self._answered = False  # the app has answered it
        self._foreign = False  # the app has sent what is no lifespan message
        self._leaving = False  # the server has asked for the shutdown
        self._over = False  # the last message has gone to the server

    async def run(self, opened: AbstractAsyncContextManager[object]) -> None:
        """Speak the protocol from the server's first message to its last; `opened` is entered around the app."""
        self._startup = await self._receive()
        async with self._stack:
            try:
                await self._stack.enter_async_context(opened)
            except Exception as exc:
                await self._end("lifespan.startup.failed", exc)
                raise
            await self._serve()

    async def _serve(self) -> None:
        error = await self._run_app()
        if not self._answered:
            if error is not None and self._asked and not self._foreign:
                await self._end("lifespan.startup.failed", error)
            else:
                error = None
                await self._send({"type": "lifespan.startup.complete"})
        if not self._over:
            if not self._leaving:
                if error is not None:
                    logger.error("the app's lifespan ended with an error; its emitter stays open", exc_info=error)
                await self._receive()
            await self._end("lifespan.shutdown.failed" if error is not None else "lifespan.shutdown.complete", error)
        if error is not None:
            raise error

    async def _run_app(self) -> Exception | None:
        try:
            await self._app(self._scope, self._to_app, self._from_app)
        except Exception as exc:
            return exc
        return None

    async def _to_app(self) -> MutableMapping[str, Any]:
        if not self._asked:
            self._asked = True
            return self._startup
        message = await self._receive()
        self._leaving = True
        return message

    async def _from_app(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            await self._send(message)
            self._answered = True
        elif kind in ("lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            self._answered = True
            await self._close()
            await self._send(message)
        else:
            self._foreign = True
            raise RuntimeError(f"{kind!r} is no message of the lifespan protocol")

    async def _end(self, kind: str, error: Exception | None) -> None:
        await self._close()
        await self._send({"type": kind} if error is None else {"type": kind, "message": _told(error)})

    async def _close(self) -> None:
        """Before the last message: the server may end the process as soon as it has it."""
        self._over = True
        await self._stack.aclose()


def _told(error: Exception) -> str:
    """What the server prints: our errors say what to write, others need their type."""
    return str(error) if isinstance(error, DispytchError) else f"{type(error).__name__}: {error}"
