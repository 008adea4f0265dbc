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
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar, cast, overload
from unittest import TestCase, TestResult

from django.test.runner import DiscoverRunner, ParallelTestSuite

from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.django import _after_commit
from dispytch_integrations.django._after_commit import Waiting
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._decorating import Decorating
from dispytch_integrations.django._storing import Stored
from dispytch_integrations.django._testing_outbox import relay_outbox
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.settings import transport_of

__all__ = [
    "EmittedEvents",
    "EmittedEventsMixin",
    "MemoryBrokersRunner",
    "emitted_events",
    "override_brokers",
    "relay_outbox",
]

_E = TypeVar("_E", bound=EventBase)
_Config = Mapping[str, Mapping[str, Any]]


class override_brokers(Decorating[None]):  # noqa: N801 - as Django's override_settings
    """Put every broker of DISPYTCH on memory: in a block, for a test, or for a whole run.

        with override_brokers("memory"): ...

        @override_brokers("memory")
        def test_something(): ...

        # conftest.py: the whole run
        @pytest.fixture(autouse=True, scope="session")
        def no_broker():
            with override_brokers("memory"):
                yield

    Each alias keeps its options, and takes the routes that its own broker takes. No client library is needed. With
    `manage.py test`: `TEST_RUNNER = "dispytch_integrations.django.testing.MemoryBrokersRunner"`.
    """

    def __init__(self, brokers: Literal["memory"] = "memory") -> None:
        if brokers != "memory":
            raise ValueError(f"override_brokers({brokers!r}): write 'memory', there is nothing else yet")
        self._put = partial(_on_memory, hooks=())
        self._before: list[Callable[[_Config], _Config] | None] = []

    def __enter__(self) -> None:
        self._before.append(connections.override)
        connections.override = self._put
        connections.reset()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connections.override = self._before.pop()
        connections.reset()


_KEPT = ("timeout", "startup_timeout", "shutdown_timeout", "on_timeout", "source", "cloudevents", "prefix", "hooks",
         "serializer")  # fmt: skip
"""Options that mean the same in memory."""


def _on_memory(config: _Config, hooks: Sequence[Hook]) -> _Config:
    return {alias: _alias_on_memory(options, hooks) for alias, options in config.items()}


def _alias_on_memory(options: Mapping[str, Any], hooks: Sequence[Hook]) -> Mapping[str, Any]:
    url: Any = options.get("url")
    memory = "memory://"
    if isinstance(url, BrokerURL):
        url = str(url)
    if isinstance(url, str):
        transport = transport_of(url)
        memory = url if transport == "memory" else f"memory://{transport}"
    kept = {name: options[name] for name in _KEPT if name in options}
    return {"url": memory, **kept, "hooks": [*kept.get("hooks", ()), *hooks]}


class _Recorder(Hook):
    """Keeps what was confirmed, over all brokers, in its order."""

    def __init__(self) -> None:
        self.sent_messages: list[Message] = []

    def sent(self, message: Message) -> None:
        self.sent_messages.append(message)


class EmittedEvents(Sequence[EventBase]):
    """What a test has emitted, in order: a sequence of events, with assertions that say what was there instead.

    Made by `emitted_events`. It waits for events that were handed over after a commit.
    """

    def __init__(self) -> None:
        self._recorder = _Recorder()
        self._waiting: list[Waiting] = []

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[Message]:
        """What a broker would have got, with headers, destinations and payloads."""
        connections.flush()
        messages = list(self._recorder.sent_messages)
        self._remember_events(messages)
        return messages

    @property
    def emitted(self) -> list[EventBase]:
        """The events of `messages`; the sequence itself holds the same."""
        return _events(self.messages)

    @property
    def pending(self) -> list[EventBase]:
        """The events that wait for their transaction to be committed."""
        sent = {message.id for message in self.messages}
        return _events(
            message
            for waiting in self._waiting
            if waiting.registered and not waiting.done
            for _, message in waiting.prepared
            # By relay_outbox(), which needs no commit.
            if not (isinstance(waiting, Stored) and message.id in sent)
        )

    @property
    def rolled_back(self) -> list[EventBase]:
        """The events whose transaction, or savepoint, was rolled back."""
        rolled_back = [waiting for waiting in self._waiting if not waiting.registered and not waiting.done]
        return _events(message for waiting in rolled_back for _, message in waiting.prepared)

    def clear(self) -> None:
        """Forget all of it; what is pending may still be emitted."""
        connections.flush()
        self._recorder.sent_messages.clear()
        self._waiting[:] = [waiting for waiting in self._waiting if waiting.registered and not waiting.done]

    @overload
    def __getitem__(self, index: int) -> EventBase: ...

    @overload
    def __getitem__(self, index: slice) -> list[EventBase]: ...

    def __getitem__(self, index: int | slice) -> EventBase | list[EventBase]:
        return self.emitted[index]

    def __len__(self) -> int:
        return len(self.emitted)

    def __repr__(self) -> str:
        return f"<EmittedEvents {self.emitted!r}, {len(self.pending)} pending>"

    # -- assertions ------------------------------------------------------------------------------------------------

    def assert_emitted(self, event_type: type[_E], **fields: Any) -> _E:
        """Fail unless an event of this class with these values was emitted; returns the first one."""
        __tracebackhide__ = True
        return self._assert_in(self.emitted, "emitted", event_type, fields)

    def assert_pending(self, event_type: type[_E], **fields: Any) -> _E:
        """Fail unless such an event waits for a commit; returns the first one."""
        __tracebackhide__ = True
        return self._assert_in(self.pending, "pending", event_type, fields)

    def assert_rolled_back(self, event_type: type[_E], **fields: Any) -> _E:
        """Fail unless such an event's transaction was rolled back; returns the first one."""
        __tracebackhide__ = True
        return self._assert_in(self.rolled_back, "rolled back", event_type, fields)

    def assert_not_emitted(self, event_type: type[EventBase], **fields: Any) -> None:
        """Fail if an event of this class with these values was emitted, or waits for a commit."""
        __tracebackhide__ = True
        _check_fields(event_type, fields)
        for told, events in (("emitted", self.emitted), ("pending", self.pending)):
            found = [event for event in events if _matches(event, event_type, fields)]
            if found:
                raise AssertionError(f"{_wanted(event_type, fields)} was {told}:\n{_lines(found)}")

    def _assert_in(self, events: list[EventBase], told: str, event_type: type[_E], fields: dict[str, Any]) -> _E:
        __tracebackhide__ = True
        _check_fields(event_type, fields)
        for event in events:
            if _matches(event, event_type, fields):
                return cast("_E", event)
        lines = [f"{_wanted(event_type, fields)} was not {told}."]
        for name, there, advice in (
            ("Emitted", self.emitted, ""),
            (
                "Pending",
                self.pending,
                " (not committed; in a TestCase emit inside `with self.captureOnCommitCallbacks(execute=True):`)",
            ),
            ("Rolled back", self.rolled_back, ""),
        ):
            if there:
                lines.append(f"{name} were{advice}:\n{_lines(there, event_type, fields)}")
        if len(lines) == 1:
            lines.append("Nothing was emitted, and nothing waits for a commit.")
        raise AssertionError("\n".join(lines))

    def _remember_events(self, messages: Sequence[Message]) -> None:
        """Give the events back to messages that a relay has read from the outbox."""
        if all(message.event is not None for message in messages):
            return
        events = {message.id: message.event for waiting in self._waiting for _, message in waiting.prepared}
        for message in messages:
            if message.event is None:
                message.event = events.get(message.id)


def _events(messages: Iterable[Message]) -> list[EventBase]:
    return [message.event for message in messages if message.event is not None]


def _matches(event: EventBase, event_type: type[EventBase], fields: dict[str, Any]) -> bool:
    return isinstance(event, event_type) and not _differences(event, fields)


def _differences(event: EventBase, fields: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {getattr(event, name)!r}, not {value!r}"
        for name, value in fields.items()
        if getattr(event, name) != value
    ]


def _check_fields(event_type: type[EventBase], fields: dict[str, Any]) -> None:
    for name in fields:
        if not hasattr(event_type, name) and name not in event_type.model_fields:
            raise TypeError(
                f"{event_type.__qualname__} has no field {name!r}{nearest(name, list(event_type.model_fields))}"
            )


def _wanted(event_type: type[EventBase], fields: dict[str, Any]) -> str:
    return f"{event_type.__qualname__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def _lines(
    events: Sequence[EventBase], event_type: type[EventBase] | None = None, fields: dict[str, Any] | None = None
) -> str:
    """One line for each event; behind those of the right class, what differs."""
    lines: list[str] = []
    for event in events:
        why = ""
        if event_type is not None and isinstance(event, event_type):
            why = "; ".join(_differences(event, fields or {}))
        lines.append(f"  {event!r}" + (f"    <- {why}" if why else ""))
    return "\n".join(lines)


@contextmanager
def emitted_events() -> Generator[EmittedEvents, None, None]:
    """Collect the events that are emitted inside the block; every broker is memory meanwhile.

    with emitted_events() as events:
        place_order()
    events.assert_emitted(OrderPlaced, order_id=1)
    """
    events = EmittedEvents()
    before = connections.override
    connections.override = partial(_on_memory, hooks=(events._recorder,))
    connections.reset()
    _after_commit.observers.append(events._waiting)
    try:
        yield events
    finally:
        connections.flush()
        _after_commit.observers.remove(events._waiting)
        connections.override = before
        connections.reset()


class EmittedEventsMixin(TestCase):
    """For `TestCase`, `TransactionTestCase` and `SimpleTestCase`: `self.emitted_events`, new for each test.

    class OrderTests(EmittedEventsMixin, TestCase): ...
    """

    emitted_events: EmittedEvents
    """What the test has emitted."""

    def run(self, result: TestResult | None = None) -> TestResult | None:
        """Run the test inside `emitted_events()`."""
        with emitted_events() as self.emitted_events:
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
