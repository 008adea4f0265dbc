"""A process that forks while its other threads are at work: each test runs a program of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import asyncio, os, threading, time
from dispytch_integrations.outbox.threads import OneThread

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
thread = OneThread("a store's")
began, done = threading.Event(), threading.Event()

def work(seconds):
    began.set()
    time.sleep(seconds)
    done.set()

def start(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop)

def fork(child=lambda: 0):
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code: str) -> str:
    """What a program prints that has a thread of an outbox, and forks."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fork_waits_for_what_a_thread_does_in_a_database() -> None:
    """SQLite's locks are the process's: one that is held in a fork stays locked in the child, whose queries hang."""
    printed = run(
        """
        working = start(thread.run(lambda: work(0.4)))
        began.wait()
        print(fork(lambda: int(done.is_set())))
        working.result(5)
        start(thread.run(lambda: print("goes on"))).result(5)
        """
    )
    assert printed == "1\ngoes on\n"


def test_nothing_begins_in_a_database_while_a_process_is_forked() -> None:
    """Between the wait and the fork itself a new thread could take the lock."""
    printed = run(
        """
        begun = []
        def look():
            start(thread.run(lambda: work(0)))
            begun.append(began.wait(0.2))
        from dispytch_integrations.outbox import _forks
        _forks._gate.before_fork()
        look()
        _forks._gate.after_fork()
        print(begun, began.wait(5))
        """
    )
    assert printed == "[False] True\n"


def test_a_fork_does_not_wait_for_a_thread_that_listens_or_hangs() -> None:
    """A server that reloads its workers must not stand still because a database does not answer."""
    printed = run(
        """
        listening = start(OneThread("listens").wait(lambda: work(20)))
        began.wait()
        started = time.monotonic()
        fork()
        print(time.monotonic() - started < 0.5)
        began.clear()
        start(thread.run(lambda: work(20)))
        began.wait()
        started = time.monotonic()
        fork()
        print(0.9 < time.monotonic() - started < 3)
        """
    )
    assert printed == "True\nTrue\n"


def test_a_child_of_a_fork_beside_work_can_work_itself() -> None:
    """What the parent's threads were doing is none of its business."""
    printed = run(
        """
        start(thread.run(lambda: work(20)))
        began.wait()
        def child():
            return asyncio.run(OneThread("the child's").run(lambda: 7))
        print(fork(child))
        """
    )
    assert printed == "7\n"


LATE = """
import sys, threading, time
from dispytch_integrations.blocking import connect_blocking

late = []

class Watched:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            late.append(name)

brokers = connect_blocking(sys.argv[1], required=False)
brokers.start()
sys.meta_path.insert(0, Watched)
while brokers.emitter.ping(timeout=5)["default"] is not None:
    time.sleep(0.05)
time.sleep(0.3)
print(late)
"""


@pytest.mark.parametrize("transport", ["kafka", "rabbitmq", "redis"])
def test_no_thread_imports_anything_once_the_start_has_returned(transport: str, request: pytest.FixtureRequest) -> None:
    """A process that forks meanwhile leaves the module locked in the child, which hangs in its first import of it."""
    url: str = request.getfixturevalue(f"{transport}_url")
    done = subprocess.run(
        [sys.executable, "-c", LATE, url.replace("127.0.0.1", "localhost")],  # A name has to be looked up.
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
