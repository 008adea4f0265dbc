"""What `make demo` runs: a broker, the app, and a first visitor. Nothing here is needed in an app of yours."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from example_projects.fastapi_orders.settings import Settings
from example_projects.shop_demo.brokers import DemoBroker
from example_projects.shop_demo.run import Demo, Directions, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code: 0, or 1 when something did not go as promised (told on stderr)."""
    return run(_DEMO, arguments)


def _directions(address: str) -> Directions:
    outbox = Settings.from_environment().outbox
    return [
        ("Cancel", f"curl -X POST {address}/orders/{1 if outbox else 1001}/cancellation"),
        ("API", f"{address}/docs"),
        *([("Try", "stop the relay on the page, and place an order: its event waits in the outbox")] if outbox else []),
    ]


@contextmanager
def _prepared(broker: DemoBroker) -> Generator[None, None, None]:
    """With the outbox, a database that goes with the demo, unless DATABASE_URL names one."""
    if not Settings.from_environment().outbox or os.environ.get("DATABASE_URL"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dispytch-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["DATABASE_URL"] = f"sqlite:///{Path(folder) / 'orders.db'}"
        yield


_DEMO = Demo(
    package="example_projects.fastapi_orders",
    app="example_projects.fastapi_orders.app:create_app",
    factory=True,
    directions=_directions,
    prepared=_prepared,
)
