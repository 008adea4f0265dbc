"""The project's brokers in this process: opened where events are sent, closed when the process ends.

Nothing is opened at import or in `ready()`. All connections of a process live on one event loop in one daemon thread
(`_blocking_loop`), for sync and async views alike: Django makes event loops come and go.

With an outbox that this process relays (EMBEDDED) the relay runs beside them. With one that another process relays
nothing is opened at all, unless DIRECT_EMITS allows it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
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
from dispytch_integrations.django._relay_signals import RelaySignals
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.outbox import conf as outbox_conf
from dispytch_integrations.django.outbox.embedded import EmbeddedOutbox, require_tables
from dispytch_integrations.django.signals import broker_started, broker_stopped, event_emitted, event_failed
from dispytch_integrations.errors import ConfigurationError, NotStartedError
from dispytch_integrations.message import log_fields

__all__ = ["Connections", "Session", "connections", "tell_after_commit"]

logger = logging.getLogger("dispytch_integrations.django")

_RECEIVERS_SECONDS = 5.0
"""How long the end of a process waits for receivers of signals."""


class Session:
    """What is open in this process: the brokers, the way to their event loop, and what was left to it.

    `outbox`: what is relayed here; None: nothing.
    """

    def __init__(self, read: conf.Read, receivers: Receivers, outbox: EmbeddedOutbox | None) -> None:
        thread = loop_thread()
        brokers = connect(_with_signals(read.config, receivers), outbox=outbox)
        brokers.on_change = partial(_tell_broker, receivers, set[str]())
        self.read = read
        self.outbox = outbox
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
        self._outbox: outbox_conf.OutboxSettings | None = None
        self._loaded: Brokers | None = None
        self.always_direct = False
        """Set by commands that a person runs to emit directly, whatever DIRECT_EMITS says."""
        self.ending = False
        """Does the interpreter end, so that nothing is flushed any more unless who emits waits for it?"""
        self.receivers = Receivers()
        self.override: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Mapping[str, Any]]] | None = None
        """Tests put other brokers in the place of the project's."""

    # -- opening -------------------------------------------------------------------------------------------------

    def reach(self, *, direct: bool = True) -> Session:
        """What is open; at the first use in this process it is opened, in the background.

        `direct`: for an event that does not go through the outbox.

        Raises SettingsError with all that is wrong, NotStartedError after the app's shutdown, or when another process
        relays and this one must not connect.
        """
        if direct and not self.connects:
            raise NotStartedError(
                "this process opens no broker connection, since another one relays its outbox "
                "(DISPYTCH_OUTBOX['EMBEDDED'] is False): write emit_on_commit(...), which stores the event with your "
                "transaction, or DISPYTCH_OUTBOX = {'DIRECT_EMITS': True} to let it connect at its first direct emit"
            )
        session = self._session
        if session is not None and session.usable:
            return session
        with self._lock:
            if self.closed:
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

    @property
    def closed(self) -> bool:
        """Were they closed in this process, so that an emit is refused?"""
        return self._closed and self._pid == os.getpid()

    def open(self) -> None:
        """Connect now, and wait for it, as at a server's start. Counted: `close` as often.

        Raises SettingsError, StartupError when a required broker was not reached within its STARTUP_TIMEOUT.
        """
        outbox = self.outbox()
        if outbox is not None and self.override is None:
            conf.require(self.settings().problems)
            require_tables(outbox.databases)
        with self._lock:
            self._closed = False
            if self._elsewhere:
                conf.require(self.settings().problems)
                self._own_process()
            else:
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
        session = Session(read, self.receivers, self._embedded())
        with _in_settings_words():
            session.opened.open(wait=wait)
        self._own_process()
        self._closed = False
        self._session = session
        return session

    def _own_process(self) -> None:
        """Forget whose a parent's opens were, and close at the end of this process."""
        if self._pid != os.getpid():
            self._pid, self._users = os.getpid(), 0
            _at_exit(self)

    # -- settings ------------------------------------------------------------------------------------------------

    def settings(self) -> conf.Read:
        """DISPYTCH as it was read, with a test's brokers in place of its own; read again when settings change.

        What is wrong with DISPYTCH_OUTBOX is among its problems.
        """
        read = self._read
        if read is None:
            read = conf.read()
            if self.override is not None:
                config = self.override(read.config)
                read = replace(read, config=config, problems=() if config else read.problems)
            self._read = read = replace(read, problems=(*read.problems, *self._outbox_problems(read)))
        return read

    def outbox(self) -> outbox_conf.OutboxSettings | None:
        """DISPYTCH_OUTBOX, where the outbox is installed; None: it is not."""
        if not outbox_conf.installed():
            return None
        read = self._outbox
        if read is None:
            read = self._outbox = outbox_conf.read()
        return read

    def _outbox_problems(self, read: conf.Read) -> Sequence[conf.Problem]:
        outbox = self.outbox()
        if outbox is None:
            return outbox_conf.not_installed()
        if outbox.embedded and self.override is None:
            return (*outbox.problems, *outbox_conf.too_slow(read.specs, outbox.options))
        return outbox.problems

    def _embedded(self) -> EmbeddedOutbox | None:
        outbox = self.outbox()
        # In a test nothing is relayed that the test has not asked for.
        return EmbeddedOutbox(outbox) if outbox is not None and outbox.embedded and self.override is None else None

    @property
    def connects(self) -> bool:
        """May this process open a connection to a broker?"""
        return not self._elsewhere or self._may_connect

    @property
    def _elsewhere(self) -> bool:
        """Does another process relay?"""
        outbox = self.outbox()
        return outbox is not None and not outbox.embedded

    @property
    def _may_connect(self) -> bool:
        outbox = self.outbox()
        return outbox is None or outbox.direct_emits or self.always_direct

    # -- with the outbox -----------------------------------------------------------------------------------------

    def loaded(self) -> Brokers:
        """The brokers with their settings read, connected to nothing: messages for the outbox are prepared by them.

        Raises SettingsError with all that is wrong.
        """
        brokers = self._loaded
        if brokers is None:
            with self._lock:
                brokers = connect(self._config())
                with _in_settings_words():
                    brokers.load()
                self._loaded = brokers
        return brokers

    def for_relay(self) -> Brokers:
        """The brokers as a relay opens them, not started: what becomes of events is sent as signals in its process.

        Raises SettingsError with all that is wrong.
        """
        return connect(_with_signals(self._config(), self.receivers))

    def committed(self) -> None:
        """Events were committed to the outbox: wake the relay of this process, or start it. Raises nothing.

        Where that cannot be they are safe: another relay sends them, or this one's next start.
        """
        try:
            session = self.session
            if session is None:
                if self.ending or self.closed:
                    return
                session = self.reach(direct=False)  # It looks at the table when it starts.
            if session.outbox is not None:
                session.outbox.wake()
        except Exception as exc:
            logger.error("this process does not relay its outbox, where events wait: %s", exc)

    def _config(self) -> Mapping[str, Mapping[str, Any]]:
        read = self.settings()
        conf.require(read.problems)
        outbox = self.outbox()
        if outbox is not None and outbox.embedded:
            refuse_patched_threads()
        return read.config

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Undo one `open`; the last one refuses new emits, flushes within SHUTDOWN_TIMEOUT, and closes."""
        with self._lock:
            self._users = max(self._users - 1, 0)
            if self._users:
                return
            # First: what is committed from now on is left in the outbox, and nobody waits for us to open it again.
            self._closed, self._pid = True, os.getpid()
            self._end()
        # Not under the lock: a receiver that emits waits for it.
        self.receivers.flush(_RECEIVERS_SECONDS)

    def reset(self) -> None:
        """Close, and read the settings again at the next use; nothing is refused meanwhile."""
        with self._lock:
            self._end()
            self._closed = False
            self._users = 0
            self._read = self._outbox = self._loaded = None
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


@contextmanager
def _in_settings_words() -> Generator[None, None, None]:
    """What is found at the start: of a URL that is a function, or by the client itself."""
    try:
        yield
    except SettingsError:
        raise
    except ConfigurationError as exc:
        raise SettingsError([f"DISPYTCH: {problem}" for problem in exc.problems]) from exc


def _with_signals(config: Mapping[str, Mapping[str, Any]], receivers: Receivers) -> Mapping[str, Mapping[str, Any]]:
    """The brokers' settings with a hook that tells Django's signals what becomes of the outbox's events."""
    if not outbox_conf.installed():
        return config
    hook = RelaySignals(receivers)
    return {alias: {**options, "hooks": [*options.get("hooks", ()), hook]} for alias, options in config.items()}


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
        extra=log_fields(message.type, message.id, message.broker, message.destination),
    )
    send(event_failed, type(event), error=error, **arguments)
