"""Fixtures of the tests of the Django integration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_brokers_left() -> Iterator[None]:
    """Each test opens the project's brokers anew: what it left open, or closed for good, is no matter of the next."""
    yield
    from dispytch_integrations.django._connections import connections

    connections.override = None
    connections.reset()
