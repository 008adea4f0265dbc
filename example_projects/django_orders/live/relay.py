"""The demo's relay: `manage.py dispytch relay` as a process, which the page stops and starts again."""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio import subprocess
from contextlib import suppress
from pathlib import Path

__all__ = ["RelayProcess"]

logger = logging.getLogger(__name__)

_MANAGE = Path(__file__).resolve().parent.parent / "manage.py"
_PATIENCE = 5.0
"""Seconds until one that was told to end is killed."""
_MOST_TOLD = 2000


class RelayProcess:
    """What a supervisor does in production. `log`: the file that takes what the relay says."""

    def __init__(self, log: Path) -> None:
        self.on = False
        self._log = log
        self._lock = asyncio.Lock()
        self._process: subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def turn(self, on: bool) -> None:
        """Start the process, or end it as a deployment does, and wait for its end: what it had in hand is settled."""
        async with self._lock:
            if on == self.on:
                return
            self.on = on
            if on:
                await self._start()
            else:
                await self._end()

    async def close(self) -> None:
        """End it."""
        await self.turn(False)

    async def ended(self) -> None:
        """Wait until the process has ended."""
        if self._watching is not None:
            await asyncio.wait({self._watching})

    @property
    def exit_code(self) -> int | None:
        """Of the last process; None: it runs, or there was none."""
        return None if self._process is None else self._process.returncode

    async def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await subprocess.create_subprocess_exec(
                *(sys.executable, _MANAGE, "dispytch", "relay"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal is for the server, which ends this one.
                start_new_session=True,
            )
        self._watching = asyncio.create_task(self._watch(self._process), name="live page's relay")

    async def _end(self) -> None:
        if self._process is None or self._watching is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        done, _ = await asyncio.wait({self._watching}, timeout=_PATIENCE)
        if not done:
            self._process.kill()
            await asyncio.wait({self._watching})

    async def _watch(self, process: subprocess.Process) -> None:
        code = await process.wait()
        if self.on:  # Nobody has told it to end.
            said = self._log.read_text(errors="replace")[-_MOST_TOLD:]
            logger.error("the outbox's relay ended with code %s. It said:\n%s", code, said)
