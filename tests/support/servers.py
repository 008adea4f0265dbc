"""Real servers for tests, each a process of our own on a free port, and a client that loads them."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.brokers import free_port

__all__ = ["ROOT", "Server", "Shop", "serving"]

ROOT = Path(__file__).parent.parent.parent
"""What `tests` is imported from."""

_T = TypeVar("_T")


class Server:
    """A server's process. `port`; `output()`: all it has printed; its process group is killed at the end."""

    def __init__(self, command: Sequence[str], process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.command = command
        self.process = process
        self.port = port
        self._log = log

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def threads(self) -> int:
        """How many threads the process has (those of its children apart). Linux alone tells."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def connections_to(self, port: int) -> int:
        """How many connections to `port` the process has open (those of its children apart). Linux alone tells."""
        # Local address, remote address, state, ..., inode; addresses and ports in hexadecimal, 01 is established.
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        there = {f"socket:[{row[9]}]" for row in rows if int(row[2].rpartition(":")[2], 16) == port}
        return sum(os.readlink(file) in there for file in Path(f"/proc/{self.process.pid}/fd").iterdir())

    async def wait_for_output(self, text: str, times: int = 1) -> None:
        """Wait until it has printed `text` so many times."""
        async with asyncio.timeout(20):
            while self.output().count(text) < times:
                await asyncio.sleep(0.05)

    async def settle(self) -> None:
        """Wait until none of its processes works any more: a worker that still loads may not hear its SIGTERM."""
        async with asyncio.timeout(60):
            before = -1
            while (now := self._ticks()) - before > 2:  # A reloader looks at its files each second.
                before = now
                await asyncio.sleep(0.5)

    def _ticks(self) -> int:
        """The time of the processor that its processes have used, in hundredths of a second. Linux alone tells."""
        used = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                # Of pid (name) state parent group ...: the 14th and the 15th are used time; a name may have spaces.
                fields = file.read_text().rpartition(")")[2].split()
            except OSError:  # It has ended.
                continue
            if int(fields[2]) == self.process.pid:
                used += int(fields[11]) + int(fields[12])
        return used

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """A signal to the parent alone, as an init system or a container runtime sends SIGTERM."""
        self.process.send_signal(number)

    async def exit_code(self, timeout: float) -> int:
        """What it ends with. Fails after `timeout` seconds, with what it has printed."""
        try:
            return await asyncio.wait_for(self.process.wait(), timeout)
        except TimeoutError:
            pytest.fail(f"{' '.join(self.command)} has not ended in {timeout:g} seconds:\n{self.output()}")


@asynccontextmanager
async def serving(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], *, cwd: Path = ROOT
) -> AsyncGenerator[Server, None]:
    """Run a server while in the block; "{port}" in its command becomes a free port. It prints to `directory`.

    `environment`: beside that of the tests. The server is not waited for: see `Shop.place_first`.
    """
    port = free_port()
    log = directory / "server.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(argument.replace("{port}", str(port)) for argument in command),
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield Server(command, process, port, log)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()


class Shop:
    """A client that places orders; `placed`: the numbers that were answered with 2xx. `failed`: other answers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._numbers = itertools.count(1)
        self.placed: set[int] = set()
        self.failed: list[int] = []
        self._grown = asyncio.Condition()

    async def place(self, way: str) -> None:
        """Place one order, over a connection of its own. Raises OSError when there was no answer."""
        number = next(self._numbers)
        status, _ = await self.request("POST", f"/{way}/{number}")
        if not 200 <= status < 300:
            self.failed.append(status)
            return
        async with self._grown:
            self.placed.add(number)
            self._grown.notify_all()

    async def place_first(self, way: str) -> None:
        """Place an order as soon as the server answers."""
        await self._as_soon_as_it_answers(lambda: self.place(way))

    async def get_first(self, path: str) -> bytes:
        """Get a page as soon as the server answers; return its body."""
        return await self._as_soon_as_it_answers(lambda: self._page(path))

    async def _page(self, path: str) -> bytes:
        _, body = await self.request("GET", path)
        if not body:
            raise ConnectionResetError(f"{path}: the answer was cut, as by a server that reloads its code")
        return body

    async def place_until_closed(self, way: str) -> None:
        """Place orders until the server is gone."""
        while True:
            try:
                await self.place(way)
            except OSError:
                return

    async def wait_for(self, number: int) -> None:
        """Wait until so many orders have been placed."""
        async with self._grown:
            await asyncio.wait_for(self._grown.wait_for(lambda: len(self.placed) >= number), 30)

    async def _as_soon_as_it_answers(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        while True:
            try:
                return await ask()
            except OSError:
                if self._server.process.returncode is not None:
                    pytest.fail(f"the server ended:\n{self._server.output()}")
                await asyncio.sleep(0.05)

    async def request(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body. By hand: httpx takes ten times as long, and the load is to be on the server."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            writer.write(
                f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        if not head or (length and len(body) < int(length[1])):
            # A server that ends may have sent the head already.
            raise ConnectionResetError("closed before the end of its answer")
        return int(head.split(b" ", 2)[1]), body
