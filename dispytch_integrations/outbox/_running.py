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
    shared = [] if ours or not terminal else [handler for handler in logging.getLogger().handlers if _is_shown(handler)]
    if ours:
        log.addHandler(console)
        log.setLevel(logging.INFO)
        log.propagate = False
    for handler in shared:
        handler.addFilter(console.make_room)
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
        for handler in shared:
            handler.removeFilter(console.make_room)
        if ours:
            log.removeHandler(console)
            log.setLevel(level)
            log.propagate = propagate


def _is_shown(handler: logging.Handler) -> bool:
    """Does it write to a terminal, where the line of progress stands?"""
    stream: object = getattr(handler, "stream", None)
    isatty = getattr(stream, "isatty", None)
    return callable(isatty) and bool(isatty())
