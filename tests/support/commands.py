"""Command lines for tests, each a process of its own whose output is read while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.arrivals import SECONDS

__all__ = ["ROOT", "Command", "children_of", "eventually", "is_alive"]

ROOT = Path(__file__).parents[2]


class Command:
    """A command that runs while in the block; what is left of its process group is killed at the end."""

    def __init__(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None, *, cwd: Path = ROOT
    ) -> None:
        self._log = directory / f"command-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has printed so far, errors included."""
        return self._log.read_text(errors="replace")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of JSON that it has printed; the last one may be under way."""
        return [json.loads(line) for line in self.output.splitlines(keepends=True) if line.endswith("}\n")]

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until it has printed `text`."""
        eventually(lambda: self.output.count(text) >= times, self.explain)

    def explain(self) -> str:
        return f"the command {'runs' if self.process.poll() is None else 'has ended'} and printed:\n{self.output}"

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """A signal to the parent alone, as a container runtime sends it."""
        self.process.send_signal(number)

    def exit_code(self, timeout: float = SECONDS) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {timeout} s; {self.explain()}")


def eventually(condition: Callable[[], object], explain: Callable[[], str] = lambda: "it did not happen") -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            pytest.fail(explain())
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and not its resource tracker. Linux alone tells."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def is_alive(pid: int) -> bool:
    """Does a process run? One that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
