"""What a test has put in the emitter's place (a mock, a fake), as a blocking emitter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from inspect import isawaitable
from typing import Any

from dispytch_integrations.blocking import BlockingEmitter, refuse_running_loop
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.events import EventBase

__all__ = ["blocking_over"]


def blocking_over(emitter: EventEmitter, loop: asyncio.AbstractEventLoop) -> BlockingEmitter:
    """The blocking emitter over one of `loop`, or over an object that stands for one, whose own methods are called."""
    # A mock with a specification passes isinstance, and has nothing of what it stands for.
    return (BlockingEmitter if issubclass(type(emitter), EventEmitter) else _OverDouble)(emitter, loop)


class _OverDouble(BlockingEmitter):
    def __init__(self, emitter: EventEmitter, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(emitter, loop)
        self._double: Any = emitter
        self._loop = loop

    def emit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        self._call("emit", event, headers=headers)

    def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        self._call("emit_many", list(events), headers=headers)

    def ping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        told: dict[str, DispytchError | None] = self._call("ping", timeout=timeout)
        return told

    def _call(self, method: str, *given: object, **keywords: object) -> Any:
        refuse_running_loop(method)
        keywords = {name: value for name, value in keywords.items() if value is not None}

        async def called() -> Any:
            result = getattr(self._double, method)(*given, **keywords)
            return await result if isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()
