"""A TCP proxy that breaks connections on demand: what a network does to a client, without touching the broker."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

__all__ = ["TCPProxy"]


class TCPProxy:
    """Forwards a port of its own to `host:port`, until told otherwise.

        async with TCPProxy("127.0.0.1", 6379) as proxy:
            client = Redis(port=proxy.port)
            await proxy.stall()

    All its methods are coroutines. `connections`: how many are open now; `accepted`: how many there were.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.host = "127.0.0.1"
        self.port = 0
        self.accepted = 0

    @property
    def connections(self) -> int:
        """How many connections are open on the client's side."""
        return len(self._tasks)

    async def __aenter__(self) -> TCPProxy:
        await self._listen()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.refuse()

    async def cut(self) -> None:
        """Close every connection (RST); new ones are accepted."""
        tasks = list(self._tasks)
        for writer in list(self._writers):
            # Without lingering the kernel sends RST where it would send an orderly FIN.
            connection = writer.get_extra_info("socket")
            with suppress(OSError):  # It has just ended by itself.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refuse(self) -> None:
        """Stop listening, so that connecting is refused, and close every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.cut()

    async def stall(self) -> None:
        """Go on accepting, but forward nothing in either direction: half-open connections."""
        self._flowing.clear()

    async def freeze(self) -> None:
        """Forward nothing any more on the connections that are open; new ones work: a host that died without a word."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def resume(self) -> None:
        """Forward again, what was held back included; listen again after `refuse`."""
        self._flowing.set()
        if self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, reuse_address=True)
        self.port = int(self._server.sockets[0].getsockname()[1])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers, flowing = [writer], self._flowing
        self._writers.add(writer)
        try:
            await flowing.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            writers.append(far_writer)
            self._writers.add(far_writer)
            # Either side's end ends both, as far as a client can tell.
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, flowing)),
                asyncio.create_task(self._pump(far_reader, writer, flowing)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # The target refuses: the client's connection ends, as it would without us.
        finally:
            for each in writers:
                self._writers.discard(each)
                each.close()
                with suppress(OSError):
                    await each.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                await flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # Cut, by us or by an end.
