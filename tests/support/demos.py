"""The demos and the example projects as processes, and their page's stream."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse

import pytest

from tests.support.brokers import free_port
from tests.support.servers import ROOT

__all__ = ["address_of", "check", "environment", "open_page", "read_until", "running", "switch_relay"]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would choose another broker, port or project."""
    chosen = (
        "BROKER", "URL", "OUTBOX", "CHECK", "PORT", "DISPYTCH_URL", "DATABASE_URL", "CELERY_BROKER_URL",
        "DJANGO_SETTINGS_MODULE",
    )  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}


@contextmanager
def running(*command: str, **variables: str) -> Generator[subprocess.Popen[str], None, None]:
    """A process of ours, ended at the end whatever happens: by itself if it can, so that it leaves nothing behind."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def open_page(host: str, port: int) -> Generator[HTTPResponse, None, None]:
    """The page's stream, open and read as far as the broker's state."""
    deadline = time.monotonic() + 20
    while True:
        connection = HTTPConnection(host, port, timeout=20)
        try:
            connection.request("GET", "/live")
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)
    with closing(connection), connection.getresponse() as response:
        assert response.readline() == b"event: broker\n"
        yield response


def read_until(page: HTTPResponse, text: bytes) -> None:
    """Read the stream up to the line that holds `text`; the connection's timeout is the limit."""
    for line in iter(page.readline, b""):
        if text in line:
            return
    pytest.fail(f"the stream ended before {text.decode()} came")


def switch_relay(address: tuple[str, int], *, on: bool) -> None:
    """What the page's button does."""
    host, port = address
    with closing(HTTPConnection(host, port, timeout=20)) as connection:
        body, headers = json.dumps({"on": on}), {"Content-Type": "application/json"}
        connection.request("POST", "/outbox/relay", body, headers)
        assert connection.getresponse().status == 204


def address_of(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Host and port that the demo prints first."""
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if found := re.search(r"Open\s+http://([\d.]+):(\d+)/", line):
            return found[1], int(found[2])
    pytest.fail(f"the demo printed no address:\n{told}")


def check(module: str, broker: str, url: str | None = None, *, outbox: bool = False) -> None:
    """Run a demo with --check; `url`: of a broker that runs."""
    arguments = ["--check", "--broker", broker, "--port", str(free_port())]
    arguments += ["--url", url] if url else []
    arguments += ["--outbox"] if outbox else []
    with running(sys.executable, "-m", module, *arguments) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output
    assert re.search(r"Checked: (\d+) of \1 events came back", output), output
    assert ("more waited in the outbox while its relay was stopped" in output) is outbox, output
