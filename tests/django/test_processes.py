"""Processes with a Django project: forks, ends of every kind, commands that must connect to nothing.

Each test runs programs of its own, against real brokers; the broker's host is `localhost`, which has to be looked up.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.arrivals import SECONDS, RedisArrivals
from tests.support.brokers import Redis
from tests.support.servers import ROOT

PREAMBLE = """
import os, signal, sys, threading, time
import django
django.setup()
from django.db import transaction
from dispytch_integrations.django import aemit, aemit_on_commit, emit, emit_many, emit_on_commit
from tests.django.project.shop.events import OrderPlaced

def commit(count, first=0):
    with transaction.atomic():
        for number in range(first, first + count):
            emit_on_commit(OrderPlaced(number=number))
"""


class Program:
    """Runs programs of a project in `folder`, whose broker is at `url` and whose events go to the stream `name`."""

    def __init__(self, folder: Path, url: str, name: str) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore::DeprecationWarning",  # Python 3.12's, of a fork beside threads.
            "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
            "TEST_FOLDER": str(folder),
            "TEST_BROKER": url,
            "TEST_NAME": name,
        }

    def command(self, code: str) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code)]

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run a program; `commit` and the like are imported."""
        return self.call(self.command(code))

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a management command."""
        return self.call([sys.executable, "-m", "django", *arguments])

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    @contextmanager
    def started(self, code: str) -> Generator[subprocess.Popen[str], None, None]:
        """A program that is talked to over its standard streams."""
        with subprocess.Popen(
            self.command(code),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def place(redis_url: str, unique: str) -> Iterator[RedisArrivals]:
    """A stream of the shared Redis."""
    arrivals = RedisArrivals(redis_url.replace("127.0.0.1", "localhost"), unique)
    yield arrivals
    arrivals.close()


@pytest.fixture
def program(place: RedisArrivals, tmp_path: Path) -> Program:
    return Program(tmp_path, place.url, place.place)


# -- the end of a process ------------------------------------------------------------------------------------------

ENDS = {
    "falls off the end": ("commit(1000)", 0),
    "sys.exit": ("commit(1000); sys.exit(3)", 3),
    "Ctrl-C": ("commit(1000); os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", -2),
    "sys.exit in a callback": (
        """
        with transaction.atomic():
            transaction.on_commit(lambda: sys.exit(3))
            emit_on_commit(OrderPlaced(number=number) for number in range(1000))
        """,
        3,
    ),
    "a thread that outlives the main one": (
        "threading.Thread(target=lambda: [threading.main_thread().join(), commit(1000)]).start()",
        0,
    ),
    "a thread that outlives the main one, connected": (
        "commit(1); threading.Thread(target=lambda: [threading.main_thread().join(), commit(999, 1)]).start()",
        0,
    ),
    "a pool that outlives the main thread": (
        """
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2)
        for first in (0, 500):
            pool.submit(lambda first: [threading.main_thread().join(0.3), commit(500, first)], first)
        """,
        0,
    ),
    "an exit function, the first use": ("import atexit; atexit.register(commit, 1000)", 0),
    "an exit function, a later use": ("import atexit; commit(500); atexit.register(commit, 500, 500)", 0),
    "asyncio.run": (
        """
        import asyncio
        asyncio.run(aemit_on_commit(OrderPlaced(number=number) for number in range(1000)))
        """,
        0,
    ),
}


@pytest.mark.parametrize(("code", "code_of_exit"), ENDS.values(), ids=ENDS)
def test_what_was_handed_over_before_the_end_arrives(
    program: Program, place: RedisArrivals, code: str, code_of_exit: int
) -> None:
    """A script that imports orders and ends: thousands are on their way, and the connection is not even made yet."""
    done = program.run(code)
    assert done.returncode == code_of_exit, done.stderr
    assert len(place.numbers(1000)) == 1000
    assert sorted(place.numbers(1000)) == list(range(1000))
    assert "not delivered" not in done.stderr


def test_a_management_command_that_emits_as_its_last_act(program: Program, place: RedisArrivals) -> None:
    """A nightly command: what it tells is not lost with its process."""
    done = program.manage(
        "shell", "--verbosity", "0", "-c",
        "from dispytch_integrations.django import emit_on_commit\n"
        "from tests.django.project.shop.events import OrderPlaced\n"
        "emit_on_commit(OrderPlaced(number=number) for number in range(100))",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert place.numbers(100) == list(range(100))


def test_what_is_in_flight_at_the_end_is_waited_for(
    own_redis: Callable[..., Redis], unique: str, tmp_path: Path
) -> None:
    """The broker is slow at that moment: the process ends when it has confirmed."""
    broker = own_redis()
    place = RedisArrivals(broker.url, unique)
    with Program(tmp_path, broker.url, unique).started(
        """
        emit(OrderPlaced(number=0))
        print("connected", flush=True)
        sys.stdin.readline()
        commit(100, first=1)
        print("ends", flush=True)
        """
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        broker.pause()
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ends\n"
        assert process.poll() is None
        broker.resume()
        _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert place.numbers(101) == list(range(101))
    place.close()


def test_a_process_that_ends_while_it_connects(own_redis: Callable[..., Redis], unique: str, tmp_path: Path) -> None:
    """The broker comes up while the process waits at its end: the events arrive."""
    broker = own_redis()
    broker.stop()
    url = broker.url.replace("127.0.0.1", "localhost")
    with Program(tmp_path, url, unique).started('commit(100); print("ends", flush=True)') as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ends\n"
        broker.start()
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert [line for line in errors.splitlines() if "does not answer yet" not in line] == []
    place = RedisArrivals(broker.url, unique)
    assert place.numbers(100) == list(range(100))
    place.close()


@contextmanager
def listener() -> Generator[tuple[str, list[socket.socket]], None, None]:
    """A broker that accepts and says nothing: its URL, and the connections that were made."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"redis://localhost:{server.getsockname()[1]}/0", accepted
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in accepted:
        connection.close()


def test_a_broker_that_hangs_does_not_keep_a_process_from_ending(tmp_path: Path, unique: str) -> None:
    """It ends within its deadlines, and tells of each event that was not confirmed."""
    with listener() as (url, _):
        program = Program(tmp_path, url, unique)
        done = program.run(
            """
            from django.conf import settings
            settings.DISPYTCH["default"].update(TIMEOUT=0.5, SHUTDOWN_TIMEOUT=1)
            commit(20)
            """
        )
    assert done.returncode == 0
    assert done.stderr.count("was not delivered after its transaction was committed") == 20, done.stderr


# -- forks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["sys.exit(0)", "flush_events(20); os._exit(0)"])
def test_parent_and_child_of_a_fork_both_go_on(program: Program, place: RedisArrivals, ends: str) -> None:
    """Preloading servers and Celery fork after the first event: nobody uses the other's connection."""
    done = program.run(
        f"""
        from dispytch_integrations.django.lifecycle import flush_events
        emit(OrderPlaced(number=0))
        commit(100, first=1)
        pid = os.fork()
        if pid == 0:
            commit(100, first=1000)
            emit(OrderPlaced(number=1100))
            {ends}
        for number in range(101, 201):
            emit_on_commit(OrderPlaced(number=number))
        emit(OrderPlaced(number=201))
        _, status = os.waitpid(pid, 0)
        commit(10, first=202)
        print("status", status)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "status 0\n", "")
    assert sorted(place.numbers(313)) == [*range(212), *range(1000, 1101)]


def test_a_child_that_emits_nothing_does_the_parent_no_harm(program: Program, place: RedisArrivals) -> None:
    """What dies with the child must not take the parent's sockets out of the parent's epoll."""
    done = program.run(
        """
        import gc
        emit(OrderPlaced(number=0))
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                gc.collect()
                sys.exit(0)
            os.waitpid(pid, 0)
            commit(3)
            emit(OrderPlaced(number=0))
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(place.numbers(13)) == 13


def test_a_fork_in_the_middle_of_the_load_hangs_nobody(program: Program, place: RedisArrivals) -> None:
    """Other threads hold locks at that moment: they stay locked in the child, which must not need them."""
    done = program.run(
        """
        from dispytch_integrations.django.lifecycle import flush_events
        from dispytch_integrations.django.signals import event_emitted
        event_emitted.connect(lambda **kwargs: None, weak=False)
        emit(OrderPlaced(number=0))  # Python itself does not survive a fork while another thread imports the client.
        stop = threading.Event()
        counts = [0] * 4

        def work(thread):
            while not stop.is_set():
                emit_on_commit(OrderPlaced(number=thread))
                counts[thread] += 1
                time.sleep(0.0005)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        children = []
        for number in range(8):
            time.sleep(0.01)
            event_emitted.lock.acquire()
            pid = os.fork()
            if pid == 0:
                commit(5, first=1000)
                os._exit(0 if flush_events(20) else 1)
            event_emitted.lock.release()
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        stop.set()
        for thread in threads:
            thread.join()
        print(sum(counts), codes)
        """
    )
    assert done.returncode == 0, done.stderr
    count, _, codes = done.stdout.partition(" ")
    assert codes.strip() == str([0] * 8), done.stderr
    arrived = place.numbers(1 + int(count) + 40)
    assert len(arrived) == 1 + int(count) + 40
    assert sum(number >= 1000 for number in arrived) == 40


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_lose_nothing(program: Program, place: RedisArrivals, method: str) -> None:
    """They run no exit functions: pools of a management command end like that."""
    (program.folder / "work.py").write_text(
        textwrap.dedent(PREAMBLE)
        + textwrap.dedent(
            """
            def main(method):
                import multiprocessing
                emit(OrderPlaced(number=0))
                context = multiprocessing.get_context(method)
                children = [context.Process(target=commit, args=(500, 1 + 500 * child)) for child in range(2)]
                for child in children:
                    child.start()
                for child in children:
                    child.join()
                print([child.exitcode for child in children])

            if __name__ == "__main__":
                main(sys.argv[1])
            """
        )
    )
    done = program.call([sys.executable, "work.py", method])
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n"), done.stderr
    assert sorted(place.numbers(1001)) == list(range(1001))


# -- what must not connect -----------------------------------------------------------------------------------------


def test_commands_that_emit_nothing_connect_to_nothing(tmp_path: Path, unique: str) -> None:
    """A migration job has no access to the broker, and a test run must not find the real one."""
    (tmp_path / "ordinary_tests.py").write_text(
        "from django.test import TestCase\n"
        "from tests.django.project.shop.models import Order\n"
        "class OrdinaryTest(TestCase):\n"
        "    def test(self):\n"
        "        Order.objects.create(customer='one')\n"
    )
    with listener() as (url, accepted):
        done = Program(tmp_path, url, unique).run(
            """
            from django.core.management import call_command
            call_command("migrate")
            call_command("check", deploy=True)
            call_command("makemigrations", check_changes=True)
            call_command("shell", command="from tests.django.project.shop.models import Order; Order.objects.create()")
            call_command("test", "ordinary_tests")
            call_command("dispytch", "events")
            print([thread.name for thread in threading.enumerate()])
            """
        )
        assert accepted == []
    assert done.returncode == 0, done.stderr
    assert "Ran 1 test" in done.stderr
    assert "OrderPlaced" in done.stdout
    assert done.stdout.endswith("['MainThread']\n"), done.stdout


def test_import_and_setup_start_no_thread_and_load_no_client(program: Program) -> None:
    """A server forks after them: a thread would be gone in the child, and the memory of clients is paid per process."""
    done = program.run(
        """
        from dispytch_integrations.django import get_emitter
        from dispytch_integrations.django.asgi import get_asgi_application
        get_emitter("default"), get_asgi_application()
        print([thread.name for thread in threading.enumerate()])
        print([name for name in ("aiokafka", "aio_pika") if name in sys.modules])
        """
    )
    assert done.stdout == "['MainThread']\n[]\n", done.stderr


def test_a_process_patched_by_gevent_is_refused_clearly(program: Program, place: RedisArrivals) -> None:
    """The loop's thread would be a greenlet, in which every ORM call fails with a riddle; the error names ways out."""
    done = program.call(
        [
            sys.executable,
            "-c",
            "import gevent.monkey; gevent.monkey.patch_all()\n"
            + textwrap.dedent(PREAMBLE)
            + textwrap.dedent(
                """
                from dispytch_integrations.django.lifecycle import close_brokers, flush_events, open_brokers
                from dispytch_integrations.errors import ConfigurationError
                event = OrderPlaced(number=1)
                for call in (lambda: emit(event), lambda: emit_on_commit(event), open_brokers):
                    try:
                        call()
                    except ConfigurationError as exc:
                        print(exc)
                print(flush_events(), close_brokers())
                """
            ),
        ]
    )
    assert done.returncode == 0, done.stderr
    *refusals, last = done.stdout.splitlines()
    assert len(refusals) == 3
    for refusal in refusals:
        assert "threads are patched by gevent" in refusal
        assert "gthread" in refusal
    assert last == "True None"


# -- memory --------------------------------------------------------------------------------------------------------


def test_a_process_that_emits_for_long_does_not_grow(program: Program, place: RedisArrivals) -> None:
    """Contexts, callbacks, lanes, errors: nothing of an event stays, whatever became of it."""
    done = program.run(
        """
        import resource
        from django.conf import settings
        from dispytch_integrations.django.lifecycle import flush_events
        settings.DEBUG = False  # Else Django keeps the queries.

        def turn():
            for number in range(40):
                commit(50)
                with transaction.atomic():
                    commit(10)
                    transaction.set_rollback(True)
            assert flush_events(20)

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        turn()
        turn()
        before = peak()
        for _ in range(5):
            turn()
        print(peak() - before)
        """
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown <= 8, f"{grown} MiB more after 10000 events; kept, they would be 30"
    length: Any = place.client.xlen(place.place)
    assert length == 7 * 2000
