"""The fixtures of pytest, which finds them through the entry point "pytest11". Nothing else is imported before use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx

    from dispytch_integrations.testing import EmittedEvents

__all__ = ["asgi_client", "emitted_events", "with_broker"]


@pytest.fixture
def with_broker() -> str | None:
    """Which real broker `emitted_events` uses: "kafka", "rabbitmq", "redis"; None (default): memory.

    Override it, or run a test with several: `@pytest.mark.parametrize("with_broker", [None, "kafka"])`.
    """
    return None


@pytest.fixture
def emitted_events(with_broker: Any) -> Iterator[EmittedEvents]:
    """The events that the test has emitted: `emitted_events.assert_emitted(OrderPlaced, order_id=1)`.

    Brokers are on memory meanwhile, or one is real: see `with_broker`. Where its program is missing the test is
    skipped, with CI=true in the environment it fails. An app that is started by another fixture has to be started after
    this one: let that fixture take it, too. With the database fixtures of pytest-django, what waits for a commit is
    `pending`; run it with `django_capture_on_commit_callbacks(execute=True)`.
    """
    from dispytch_integrations.testing import capture_events
    from dispytch_integrations.testing.brokers import BrokerMissing

    with ExitStack() as stack:
        try:
            events = stack.enter_context(capture_events(with_broker))
        except BrokerMissing as exc:
            if os.environ.get("CI", "").lower() in ("1", "true"):
                pytest.fail(f"{exc} (CI=true: nothing is skipped)", pytrace=False)
            pytest.skip(str(exc))
        yield events


@pytest.fixture
def asgi_client() -> Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]:
    """An httpx client whose app runs its lifespan: `async with asgi_client(app) as client: ...`."""
    from dispytch_integrations.testing import asgi_client

    made: Any = asgi_client
    return made  # type: ignore[no-any-return]
