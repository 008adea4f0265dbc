"""The project's brokers on memory, or its own again, as long as a test overrides them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from dispytch_integrations._overriding import overriding
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.django._connections import connections
from dispytch_integrations.settings import transport_of
from dispytch_integrations.testing._brokers import KEPT

__all__ = ["on_memory"]


@contextmanager
def on_memory() -> Generator[Callable[[], object], None, None]:
    """Put them on memory, or back where the override is `None`.

    Gives what waits until all that was left to the event loop is delivered.
    """
    before = connections.override
    connections.override = _replaced if overriding.active else None
    connections.reset()
    try:
        yield connections.flush
    finally:
        connections.override = before
        connections.reset()


def _replaced(config: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    return {alias: _alias_replaced(options) for alias, options in config.items()}


def _alias_replaced(options: Mapping[str, Any]) -> Mapping[str, Any]:
    url: Any = options.get("url")
    memory = "memory://"
    if isinstance(url, BrokerURL):
        url = str(url)
    if isinstance(url, str):
        transport = transport_of(url)
        memory = url if transport == "memory" else f"memory://{transport}"
    return {"url": memory, **{name: options[name] for name in KEPT if name in options}}
