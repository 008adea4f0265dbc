"""The demo: start a broker, serve the app, send a first visitor, say where to look; end on Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import uvicorn

from dispytch_integrations import connect
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import DispytchError
from example_projects.shop_demo.brokers import (
    BROKERS,
    BrokerMissingError,
    DemoBroker,
    broker_for,
    known_transport,
)
from example_projects.shop_demo.visitor import Visitor, VisitorError

__all__ = ["HOST", "Demo", "Directions", "run"]

HOST = "127.0.0.1"
_CHECK_SECONDS = 60.0
_NAMES = {"kafka": "Kafka", "rabbitmq": "RabbitMQ", "redis": "Redis", "memory": "Memory"}


Directions = list[tuple[str, str]]
"""What the terminal shows: a word, and what is to be known of it."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What differs between the shops."""

    package: str
    """What `python -m` takes."""
    app: str
    """What uvicorn is given, "package.module:name"."""
    factory: bool = False
    """Does the name stand for a function that makes the app?"""
    follow_ups: tuple[str, ...] = ()
    """Topics on which the shop itself tells something of each order that is not cancelled."""
    directions: Callable[[str], Directions]
    """What else there is to see, given the app's address."""
    prepared: Callable[[DemoBroker], AbstractContextManager[object]] = nullcontext
    """Entered before the app is imported; its end comes after the server's. DISPYTCH_URL and OUTBOX are set."""


def run(demo: Demo, arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code: 0, or 1 when something did not go as promised (told on stderr)."""
    try:
        options = _options(demo, arguments)
        _end_as_on_ctrl_c()
        with broker_for(options.broker, options.url) as broker:
            asyncio.run(_reach(broker))
            # Read when the app is imported, which the server does.
            os.environ.update(DISPYTCH_URL=broker.url, OUTBOX="1" if options.outbox else "")
            with demo.prepared(broker):
                return _serve(demo, broker, options)
    except KeyboardInterrupt:
        return 0
    except (BrokerMissingError, DispytchError) as exc:
        print(exc, file=sys.stderr)
        return 1


def _options(demo: Demo, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out comes from the environment: BROKER, URL, OUTBOX, CHECK, PORT."""
    environment = os.environ
    parser = argparse.ArgumentParser(
        prog=f"python -m {demo.package}", description="Watch typed events travel through a broker."
    )
    parser.add_argument("--broker", choices=BROKERS, default=environment.get("BROKER") or None, help="default: kafka")
    parser.add_argument(
        "--url", default=environment.get("URL") or None, help="of a broker that runs; default: one is found or started"
    )
    parser.add_argument(
        "--outbox",
        action="store_true",
        default=_is_set("OUTBOX"),
        help="store events with their orders, in one transaction, and relay them to the broker",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        default=_is_set("CHECK"),
        help="end with code 0 as soon as the first events have come back, with 1 when they do not",
    )
    parser.add_argument(
        "--port", type=int, default=int(environment.get("PORT") or 8000), help="default: 8000; taken: the next free one"
    )
    options = parser.parse_args(arguments)
    if options.broker not in (None, *BROKERS):  # Defaults are not checked by argparse.
        parser.error(f"BROKER is one of {', '.join(BROKERS)}, not {options.broker!r}")
    if options.url is not None:
        named, options.broker = options.broker, known_transport(options.url)
        if named not in (None, options.broker):
            parser.error(f"BROKER={named} does not go with a URL of {options.broker}")
    options.broker = options.broker or "kafka"
    return options


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _end_as_on_ctrl_c() -> None:
    """`kill`, a supervisor and a closed terminal end the demo as Ctrl-C does: the broker goes, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))


async def _reach(broker: DemoBroker) -> None:
    """Raise what hinders the app, before a server wraps it in a traceback."""
    async with connect(broker.url, startup_timeout=8):
        pass


def _serve(demo: Demo, broker: DemoBroker, options: argparse.Namespace) -> int:
    listener = _listen(options.port)
    port: int = listener.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            demo.app,
            factory=demo.factory,
            lifespan="on",
            log_level="warning",
            access_log=False,
            # The app ends its streams by itself; this is for a client that does not read.
            timeout_graceful_shutdown=2,
        )
    )
    address = f"http://{HOST}:{port}"
    directions = _directions(broker, address, demo.directions(address))
    visitor = Visitor(HOST, port, demo.follow_ups)
    check = _Check(visitor, _NAMES[broker.transport], outbox=options.outbox) if options.check else None
    guide = _Guide(server, visitor, directions, check)
    guide.start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # What uvicorn passes on when it has closed.
        pass
    return guide.finish()


def _listen(port: int) -> socket.socket:
    """A socket on this port, or on the next free one."""
    for candidate in (*range(port, min(port + 50, 65536)), 0):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            listener.listen(128)  # Bound alone, another demo could still take it.
        except OSError:
            listener.close()
            continue
        return listener
    raise BrokerMissingError("no port is free on this machine")


@dataclass(frozen=True)
class _Check:
    """What `--check` does, and says."""

    visitor: Visitor
    broker: str
    outbox: bool

    def run(self) -> str:
        """What was found. Raises VisitorError when it is not as promised."""
        count = self.visitor.shop_and_watch(_CHECK_SECONDS)
        held = self.visitor.shop_while_the_relay_is_stopped(_CHECK_SECONDS) if self.outbox else 0
        told = f"Checked: {count} of {count} events came back from {self.broker}"
        return (
            f"{told}; {held} more waited in the outbox while its relay was stopped, and came after."
            if held
            else f"{told}."
        )


class _Guide(threading.Thread):
    """Beside the server: tells the way once it serves, and sends the visitor."""

    def __init__(self, server: uvicorn.Server, visitor: Visitor, directions: str, check: _Check | None) -> None:
        super().__init__(name="demo guide", daemon=True)
        self._server = server
        self._visitor = visitor
        self._directions = directions
        self._check = check
        self._checked = False
        self._problem: str | None = None

    def run(self) -> None:
        while not self._server.started:
            if self._server.should_exit:
                return
            time.sleep(0.02)
        print(self._directions, flush=True)
        try:
            if self._check is not None:
                found = self._check.run()
                self._checked = True
                print(f"  {found}", flush=True)
            else:
                self._visitor.shop()
        except VisitorError as exc:
            self._problem = str(exc)
        if self._server.should_exit:
            self._problem = None  # It was told to end in the middle of it.
        elif self._check is not None:
            signal.raise_signal(signal.SIGINT)
        elif self._problem:
            print(f"  The first orders failed: {self._problem}", file=sys.stderr)

    def finish(self) -> int:
        """The exit code, when the server has ended."""
        if not self._server.started:
            return 1  # It has said why.
        if self._check is not None and not self._checked:
            print(f"  Not checked: {self._problem or 'ended before the events came back'}.", file=sys.stderr)
            return 1
        return 0


def _directions(broker: DemoBroker, address: str, others: Directions) -> str:
    name, where = _NAMES[broker.transport], str(BrokerURL.parse(broker.url))
    order = '{"customer": "Ada", "product": "Stoneware mug"}'
    lines = [
        ("Open", f"{address}/"),
        ("Broker", f"{name}, {where}" + (f" ({broker.told})" if broker.told else "")),
        ("Order", f"curl {address}/orders --json '{order}'"),
        *others,
        ("End", "Ctrl-C"),
    ]
    return "\n" + "\n".join(f"  {what:<8} {text}" for what, text in lines) + "\n"
