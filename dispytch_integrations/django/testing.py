"""Tests of a Django project: see the events, without a broker.

    class OrderTests(EmittedEventsMixin, TestCase):
        def test_an_order_is_announced(self):
            with self.captureOnCommitCallbacks(execute=True):
                self.client.post("/orders", {...})
            self.emitted_events.assert_emitted(OrderPlaced, order_id=1)

With pytest it is the fixture `emitted_events`. Brokers of every alias are memory meanwhile, whatever DISPYTCH says.

With the outbox nothing changes: events are stored in the test's transaction, and when that is committed (in a TestCase
by captureOnCommitCallbacks) taken out of the table and sent to memory. No relay runs in a test, unless it calls
`relay_outbox()`.

`EmittedEvents`, `capture_events` and `override_brokers` are those of `dispytch_integrations.testing`.
"""

from __future__ import annotations

from typing import Any
from unittest import TestCase, TestResult

from django.test.runner import DiscoverRunner, ParallelTestSuite

from dispytch_integrations.django._testing_outbox import relay_outbox
from dispytch_integrations.testing import EmittedEvents, capture_events, override_brokers

__all__ = [
    "EmittedEvents",
    "EmittedEventsMixin",
    "MemoryBrokersRunner",
    "capture_events",
    "override_brokers",
    "relay_outbox",
]


class EmittedEventsMixin(TestCase):
    """For `TestCase`, `TransactionTestCase` and `SimpleTestCase`: `self.emitted_events`, new for each test.

    class OrderTests(EmittedEventsMixin, TestCase): ...
    """

    emitted_events: EmittedEvents
    """What the test has emitted."""

    def run(self, result: TestResult | None = None) -> TestResult | None:
        """Run the test inside `capture_events()`."""
        with capture_events() as self.emitted_events:
            return super().run(result)


def _in_a_spawned_process(*arguments: Any) -> None:
    override_brokers("memory").__enter__()


class _ParallelOnMemory(ParallelTestSuite):
    # A forked process has what its parent has set; a spawned one, as on macOS, begins without.
    process_setup = _in_a_spawned_process


class MemoryBrokersRunner(DiscoverRunner):
    """The test runner of `manage.py test`, with every broker on memory: set TEST_RUNNER to its path."""

    parallel_test_suite = _ParallelOnMemory
    _brokers = override_brokers("memory")

    def setup_test_environment(self, **options: Any) -> None:
        """Put the brokers on memory."""
        super().setup_test_environment(**options)
        self._brokers.__enter__()

    def teardown_test_environment(self, **options: Any) -> None:
        """Put them back."""
        self._brokers.__exit__(None, None, None)
        super().teardown_test_environment(**options)
