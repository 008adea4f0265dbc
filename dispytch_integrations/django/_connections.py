"""The project's brokers in this process: opened where events are sent, closed when the process ends.

Nothing is opened at import or in `ready()`. All connections of a process live on one event loop in one daemon thread
(`_blocking_loop`), for sync and async views alike: Django makes event loops come and go.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dispytch_integrations._blocking_calls import Calls, refuse_patched_threads
from dispytch_integrations._blocking_handoff import Handoff, LeftMessage
from dispytch_integrations._blocking_loop import Opened, loop_thread
from dispytch_integrations._broker import Broker
from dispytch_integrations.brokers import Brokers, connect
from dispytch_integrations.django import conf
from dispytch_integrations.django._receivers import Receivers, send
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.signals import broker_started, broker_stopped, event_emitted, event_failed
from dispytch_integrations.errors import ConfigurationError, NotStartedError

__all__ = ["Connections", "Session", "connections", "tell_after_commit"]

logger = logging.getLogger("dispytch_integrations.django")

_RECEIVERS_SECONDS = 5.0
"""How long the end of a process waits for receivers of signals."""


class Session:
    """What is open in this process: the brokers, the way to their event loop, and what was left to it."""

    def __init__(self, read: conf.Read, receivers: Receivers) -> None:
        thread = loop_thread()
        brokers = connect(read.config)
        brokers.on_change = partial(_tell_broker, receivers, set[str]())
        self.read = read
        self.opened = Opened(thread, brokers)
        self.brokers: Brokers = brokers
        self.calls: Calls = thread.calls
        self.handoff = Handoff(
            thread.loop,
            partial(_settle, receivers),
            lambda alias: read.max_pending.get(alias, conf.DEFAULT_MAX_PENDING),
        )

    @property
    def usable(self) -> bool:
        """Was it opened in this process, and is its event loop still there?"""
        return self.opened.pid == os.getpid() and not self.opened.lost

    @property
    def shutdown_timeout(self) -> float:
        """Seconds that what is in flight gets at the end."""
        return max((broker.options.shutdown_timeout for broker in self.brokers.brokers.values()), default=0.0)


class Connections:
    """Opens the brokers of DISPYTCH at their first use, or at a server's start; at most once per process."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._foreign: list[Session] = []
        self._users = 0
        self._closed = False
        self._locks: dict[int, threading.RLock] = {}
        self._pid = 0
        self._read: conf.Read | None = None
        self.ending = False
        """Does the interpreter end, so that nothing is flushed any more unless who emits waits for it?"""
        self.receivers = Receivers()
        self.override: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Mapping[str, Any]]] | None = None
        """Tests put other brokers in the place of the project's."""

    # -- opening -------------------------------------------------------------------------------------------------

    def reach(self) -> Session:
        """What is open; at the first use in this process it is opened, in the background.

        Raises SettingsError with all that is wrong, NotStartedError after the app's shutdown.
        """
        session = self._session
        if session is not None and session.usable:
            return session
        with self._lock:
            if self._closed and self._pid == os.getpid():
                raise NotStartedError(
                    "the project's brokers are closed: the event was emitted after the server's shutdown or "
                    "close_brokers(); emit before, or call open_brokers() first"
                )
            return self._open(wait=False)

    @property
    def session(self) -> Session | None:
        """What is open in this process; None: nothing."""
        session = self._session
        return session if session is not None and session.usable else None

    def open(self) -> None:
        """Connect now, and wait for it, as at a server's start. Counted: `close` as often.

        Raises SettingsError, StartupError when a required broker was not reached within its STARTUP_TIMEOUT.
        """
        with self._lock:
            self._closed = False
            if self._pid != os.getpid():
                self._users = 0
            self._open(wait=True)
            self._users += 1

    def _open(self, *, wait: bool) -> Session:
        session = self._session
        if session is not None and session.usable:
            return session
        if session is not None:
            # A fork's copy: collected, its sockets would be closed in the parent's epoll.
            self._foreign.append(session)
        refuse_patched_threads()
        read = self.settings()
        conf.require(read.problems)
        session = Session(read, self.receivers)
        try:
            session.opened.open(wait=wait)
        except SettingsError:
            raise
        except ConfigurationError as exc:  # Of a URL that is a function, or found by the client itself.
            raise SettingsError([f"DISPYTCH: {problem}" for problem in exc.problems]) from exc
        if self._pid != os.getpid():
            self._pid, self._users = os.getpid(), 0
            _at_exit(self)
        self._closed = False
        self._session = session
        return session

    def settings(self) -> conf.Read:
        """DISPYTCH as it was read, with a test's brokers in place of its own; read again when settings change."""
        read = self._read
        if read is None:
            read = conf.read()
            if self.override is not None:
                config = self.override(read.config)
                read = replace(read, config=config, problems=() if config else read.problems)
            self._read = read
        return read

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Undo one `open`; the last one refuses new emits, flushes within SHUTDOWN_TIMEOUT, and closes."""
        with self._lock:
            self._users = max(self._users - 1, 0)
            if self._users:
                return
            self._end()
            self._closed, self._pid = True, os.getpid()
        # Not under the lock: a receiver that emits waits for it.
        self.receivers.flush(_RECEIVERS_SECONDS)

    def reset(self) -> None:
        """Close, and read the settings again at the next use; nothing is refused meanwhile."""
        with self._lock:
            self._end()
            self._closed = False
            self._users = 0
            self._read = None
        self.receivers.flush(_RECEIVERS_SECONDS)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was left to the event loop is confirmed or given up, and receivers have run.

        `timeout`: seconds; None: SHUTDOWN_TIMEOUT. Was that reached?
        """
        session = self.session
        flushed = True
        if session is not None:
            flushed = session.handoff.flush(session.shutdown_timeout if timeout is None else timeout)
        return self.receivers.flush(_RECEIVERS_SECONDS if timeout is None else timeout) and flushed

    def _end(self) -> None:
        session = self.session
        if session is None:
            return
        end = time.monotonic() + session.shutdown_timeout
        session.handoff.flush(session.shutdown_timeout)
        # Who comes now finds another session or none. Who has found this one is refused by it, and looks again, or has
        # left something before the close, which is waited for.
        self._session = None
        session.handoff.close()
        session.handoff.flush(max(end - time.monotonic(), 0.0))
        session.opened.close()

    def end(self) -> None:
        """Flush and close at the exit of the interpreter."""
        self.ending = True
        self._end()
        self.receivers.flush(_RECEIVERS_SECONDS)

    @property
    def _lock(self) -> threading.RLock:
        # One per process: a lock that another thread held at the fork would stay locked in the child for ever.
        return self._locks.setdefault(os.getpid(), threading.RLock())


connections = Connections()
"""Those of this process."""


def _at_exit(connections: Connections) -> None:
    """Flush and close when the interpreter ends; called once per process that has opened something."""
    pid = os.getpid()

    def own(function: Callable[[], object]) -> None:
        if pid == os.getpid():
            function()

    # Before threads are shut down: a connection that is still being made needs one to look up its host. What runs
    # later can only use what is there. The hook is concurrent.futures' own; without it the second one has to do.
    register: Callable[..., None] | None = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(own, connections.flush)
        except RuntimeError:
            connections.ending = True  # It is too late, and may be for the second one.
    atexit.register(own, connections.end)


def _tell_broker(receivers: Receivers, started: set[str], broker: Broker) -> None:
    """On the event loop: a broker's state has changed."""
    arguments: dict[str, Any] = {"alias": broker.alias, "address": broker.backend.address}
    if broker.state == "up" and broker.alias not in started:
        started.add(broker.alias)
        receivers.post(partial(send, broker_started, type(broker.backend), **arguments))
    elif broker.state == "stopped" and broker.alias in started:
        started.discard(broker.alias)
        receivers.post(partial(send, broker_stopped, type(broker.backend), abandoned=broker.abandoned, **arguments))


def _settle(receivers: Receivers, left: LeftMessage, error: Exception | None) -> None:
    """On the event loop: a message of a commit was confirmed, or was not."""
    if error is None and not event_emitted.has_listeners(type(left.message.event)):
        return
    receivers.post(partial(tell_after_commit, left, error), left.context)


def tell_after_commit(left: LeftMessage, error: Exception | None) -> None:
    """Report what became of a message whose transaction was committed. Raises nothing that concerns the request."""
    message, event = left.message, left.message.event
    arguments = {"event": event, "message": message, "alias": message.broker, "after_commit": True}
    if error is None:
        send(event_emitted, type(event), **arguments)
        return
    logger.error(
        "%s (id %s, to %s:%s) was not delivered after its transaction was committed: %s",
        message.type,
        message.id,
        message.broker,
        message.destination,
        error,
        extra={"event_type": message.type, "event_id": message.id, "broker": message.broker},
    )
    send(event_failed, type(event), error=error, **arguments)
