"""A server for tests as far as ASGI's lifespan protocol goes, and requests without a network."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import MutableMapping
from typing import Any

from dispytch_integrations._lifespan import ASGIApp

__all__ = ["Server", "import_without"]

Message = MutableMapping[str, Any]


class Server:
    """Starts and stops an app's lifespan and sends it requests; servers differ, `state=False` is one that knows none.

    `answers`: what the app has sent in its lifespan. `error`: what it has raised there.
    """

    def __init__(self, app: ASGIApp, *, state: bool = True) -> None:
        self.app = app
        self.state: dict[str, Any] | None = {} if state else None
        self.answers: list[Message] = []
        self.error: Exception | None = None
        self.task: asyncio.Task[None] | None = None
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message | None] = asyncio.Queue()

    async def start(self) -> str:
        """Send the startup; return the type of the app's answer, "" when it gave none and ended."""
        self.task = asyncio.create_task(self._lifespan())
        return await self._ask("lifespan.startup")

    async def stop(self) -> str:
        """Send the shutdown; return the type of the app's answer, and wait for the end of its lifespan."""
        answer = await self._ask("lifespan.shutdown")
        assert self.task is not None
        await self.task
        return answer

    async def __aenter__(self) -> Server:
        assert await self.start() == "lifespan.startup.complete", (self.answers, self.error)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def get(self, path: str = "/", *, kind: str = "http") -> list[Message]:
        """Send one request (or connect a WebSocket: `kind="websocket"`); return what the app sends."""
        sent: list[Message] = []
        request: list[Message] = [{"type": "websocket.connect" if kind == "websocket" else "http.request"}]

        async def receive() -> Message:
            if not request:
                await asyncio.Event().wait()  # The client stays, and says no more.
            return request.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(self.scope(path, kind), receive, send)
        return sent

    def scope(self, path: str = "/", kind: str = "http") -> dict[str, Any]:
        """The scope of a request, with a copy of the lifespan's state, as servers give it."""
        scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "GET",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "client": ("192.0.2.1", 1000),
        }
        return scope if self.state is None else {**scope, "state": dict(self.state)}

    async def _ask(self, kind: str) -> str:
        self._to_app.put_nowait({"type": kind})
        answer = await self._from_app.get()
        return "" if answer is None else str(answer["type"])

    async def _lifespan(self) -> None:
        scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
        if self.state is not None:
            scope["state"] = self.state

        async def send(message: Message) -> None:
            self.answers.append(message)
            self._from_app.put_nowait(message)

        try:
            await self.app(scope, self._to_app.get, send)
        except Exception as exc:
            self.error = exc
        finally:
            self._from_app.put_nowait(None)


_WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name={package!r})

sys.meta_path.insert(0, Missing())
importlib.import_module({module!r})
"""


def import_without(package: str, module: str) -> str:
    """Import `module` in a process where `package` is not installed; return the last line of what it prints."""
    code = _WITHOUT.format(package=package, module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    return done.stderr.splitlines()[-1]
