"""The command `relay` of both command lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.console import Console, Stream
from dispytch_integrations.outbox.runner import Runner
from dispytch_integrations.outbox.workers import Workers

__all__ = ["run_relay"]


def run_relay(
    make: Callable[[], Runner], given: Mapping[str, Any], stream: Stream, *, terminal: bool, color: bool
) -> int:
    """Run what `make` returns, or several processes of it, and show it; return the exit code.

    Raises ConfigurationError, DatabaseAwayError.
    """
    console = Console(stream, terminal=terminal, as_json=given["json"], color=color)
    every = given["report_every"] or console.every
    workers = given["workers"] or 1
    if workers > 1 and given["once"]:
        raise ConfigurationError("--once is the work of one process; leave out --workers")
    log = logging.getLogger("dispytch_integrations")
    level, propagate = log.level, log.propagate
    ours = not log.hasHandlers()  # A project that has its own way to log keeps it.
    if ours:
        log.addHandler(console)
        log.setLevel(logging.INFO)
        log.propagate = False
    try:
        if workers > 1:
            many = Workers(
                make, workers, liveness_file=given["liveness_file"], on_progress=console.progress, every=every
            )
            return many.main()
        runner = make()
        if given["liveness_file"]:
            runner.liveness_file = Path(given["liveness_file"])
        runner.on_progress, runner.every = console.progress, every
        return runner.main(once=given["once"])
    finally:
        console.clear()
        if ours:
            log.removeHandler(console)
            log.setLevel(level)
            log.propagate = propagate
