"""The fixture `emitted_events` of pytest, which finds it through the entry point "pytest11"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dispytch_integrations.django.testing import EmittedEvents

__all__ = ["emitted_events"]


@pytest.fixture
def emitted_events() -> Iterator[EmittedEvents]:
    """The events that the test has emitted: `emitted_events.assert_emitted(OrderPlaced, order_id=1)`.

    For Django projects: brokers of every alias are memory meanwhile. With the database fixtures of pytest-django, what
    waits for a commit is `pending`; run it with `django_capture_on_commit_callbacks(execute=True)`.
    """
    from django.conf import settings

    if not settings.configured:
        pytest.fail("emitted_events needs Django's settings: install pytest-django, set DJANGO_SETTINGS_MODULE")
    from dispytch_integrations.django.testing import emitted_events as collecting

    with collecting() as events:
        yield events
