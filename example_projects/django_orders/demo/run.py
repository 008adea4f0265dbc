"""The demo: a database that goes with it, a user for the admin, and a Celery worker beside the server."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from example_projects.shop_demo.brokers import DemoBroker, background
from example_projects.shop_demo.run import Demo, Directions, run

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[3]
_USER = _PASSWORD = "admin"  # noqa: S105 - of a database that is gone when the demo ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code: 0, or 1 when something did not go as promised (told on stderr)."""
    return run(_DEMO, arguments)


def _directions(address: str) -> Directions:
    outbox = "admin/dispytch_outbox/outboxevent/" if os.environ.get("OUTBOX") else ""
    return [
        ("Cancel", f"curl -X POST {address}/orders/1/cancellation"),
        ("Admin", f"{address}/admin/  (user {_USER}, password {_PASSWORD})"),
        *([("Outbox", f"{address}/{outbox}")] if outbox else []),
    ]


@contextmanager
def _prepared(broker: DemoBroker) -> Generator[None, None, None]:
    with tempfile.TemporaryDirectory(prefix="dispytch-demo-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ.update(
            DJANGO_SETTINGS_MODULE="example_projects.django_orders.demo.settings",
            DEMO_FOLDER=name,
            # In another process the worker's events would stay in its own memory: there tasks run in the server.
            CELERY_BROKER_URL="" if broker.transport == "memory" else "filesystem://",
        )
        with nullcontext() if broker.transport == "memory" else _worker(folder):
            _make_database()
            yield


def _make_database() -> None:
    """Tables, and a user for the admin."""
    import django

    django.setup()
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0)
    User.objects.create_superuser(_USER, password=_PASSWORD)
    connections.close_all()


@contextmanager
def _worker(folder: Path) -> Generator[None, None, None]:
    for each in ("queue", "control"):
        (folder / each).mkdir()
    command = [
        sys.executable, "-m", "celery", "--app", "example_projects.django_orders.shop", "worker",
        "--pool", "solo", "--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat",
    ]  # fmt: skip
    log = folder / "worker.log"
    # No patience: it looks every two seconds whether it is to end, and what it leaves goes with the folder.
    with background(command, log, patience=0, PYTHONPATH=str(_ROOT)) as process:
        yield
        if process.poll() is not None:
            print(f"  The Celery worker ended. It said:\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)


_DEMO = Demo(
    package="example_projects.django_orders",
    app="example_projects.django_orders.shop.asgi:application",
    follow_ups=("orders.packed",),
    directions=_directions,
    prepared=_prepared,
)
