"""A thread on which signals are sent that come from the event loop: receivers may block there, and use the ORM."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextvars import Context
from queue import SimpleQueue
from typing import Any

from django.db import connections
from django.dispatch import Signal

__all__ = ["Receivers", "send"]

logger = logging.getLogger("dispytch_integrations.django")

_Job = tuple[Context | None, Callable[[], object]]


def send(signal: Signal, sender: Any, **arguments: Any) -> None:
    """Send a signal; what a receiver raises is logged (by Django, as of `send_robust`) and goes no further."""
    signal.send_robust(sender, **arguments)


class Receivers:
    """One daemon thread per process, started with the first job; a fork gets its own."""

    def __init__(self) -> None:
        self._pid = 0
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._locks: dict[int, threading.Lock] = {}

    def post(self, job: Callable[[], object], context: Context | None = None) -> None:
        """Run `job` on the thread, in `context`; its database connections are closed afterwards."""
        if self._pid != os.getpid():
            self._start()
        self._jobs.put((context, job))

    def flush(self, timeout: float) -> bool:
        """Wait until what was posted before has run, at most `timeout` seconds; was that reached?

        On the thread itself, in a receiver, there is no waiting: False.
        """
        if self._pid != os.getpid():
            return True
        if threading.current_thread() is self._thread:
            return False
        done = threading.Event()
        self.post(done.set)
        return done.wait(timeout)

    def _start(self) -> None:
        pid = os.getpid()
        # One per process: a lock that another thread held at the fork would stay locked in the child for ever.
        with self._locks.setdefault(pid, threading.Lock()):
            if self._pid == pid:
                return
            jobs: SimpleQueue[_Job] = SimpleQueue()
            thread = threading.Thread(target=self._run, args=(jobs,), name="dispytch signals", daemon=True)
            thread.start()
            # Only now: where the system refuses a thread, the next job tries again.
            self._jobs, self._thread, self._pid = jobs, thread, pid

    def _run(self, jobs: SimpleQueue[_Job]) -> None:
        while True:
            context, job = jobs.get()
            try:
                if context is None:
                    job()
                else:
                    context.run(job)
            except BaseException:  # SystemExit among them: later signals and logs need the thread.
                logger.exception("a receiver of an event's signal failed")
            finally:
                connections.close_all()
