"""What `make demo` runs: a broker, the app, and a first visitor. Nothing here is needed in an app of yours."""

from __future__ import annotations

from collections.abc import Sequence

from example_projects.shop_demo.run import Demo, Directions, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code: 0, or 1 when something did not go as promised (told on stderr)."""
    return run(_DEMO, arguments)


def _directions(address: str) -> Directions:
    return [("Cancel", f"curl -X POST {address}/orders/1001/cancellation"), ("API", f"{address}/docs")]


_DEMO = Demo(
    package="example_projects.fastapi_orders",
    app="example_projects.fastapi_orders.app:create_app",
    factory=True,
    directions=_directions,
)
