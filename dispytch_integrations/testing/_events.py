"""What a test has emitted, and assertions that say what was there instead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, overload

from dispytch_integrations._overriding import AfterCommit, CommitState, overriding
from dispytch_integrations._templates import nearest
from dispytch_integrations.errors import BrokerUnavailableError, ProducerTimeout
from dispytch_integrations.events import EventBase
from dispytch_integrations.message import Message

__all__ = ["EmittedEvents"]

_E = TypeVar("_E", bound=EventBase)

_PENDING = ("pending", "stored")


@dataclass(slots=True)
class _Planned:
    """Failures that a test wants."""

    error: Exception | type[Exception]
    event_type: type[EventBase] | None
    times: int


class EmittedEvents(Sequence[EventBase]):
    """What a test has emitted, in order: a sequence of events, with assertions that say what was there instead.

    The fixture `emitted_events`, or what `capture_events()` gives. It waits for events that were handed over after a
    commit. Emits may come from any thread.
    """

    def __init__(self, flushes: Sequence[Callable[[], object]] = ()) -> None:
        self._flushes = flushes
        self._sent: list[Message] = []
        self._failed: list[tuple[Message, Exception]] = []
        self._after_commit: list[AfterCommit] = []
        self._cleared: set[int] = set()
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[Message]:
        """What a broker would have got, with headers, destinations and payloads."""
        self._flush()
        messages = list(self._sent)
        # Perhaps it is left to the very event loop that waits for us now.
        there = {id(message) for message in messages} | {id(message) for message, _ in self._failed} | self._cleared
        messages += [message for message in self._in_state("under way") if id(message) not in there]
        self._remember_events(messages)
        return messages

    @property
    def emitted(self) -> list[EventBase]:
        """The events of `messages`; the sequence itself holds the same."""
        return _events(self.messages)

    @property
    def failed(self) -> list[tuple[EventBase, Exception]]:
        """The events that were not confirmed, as `fail_next` wanted or for another reason, each with its error."""
        self._flush()
        return [(message.event, error) for message, error in self._failed if message.event is not None]

    @property
    def pending(self) -> list[EventBase]:
        """The events that wait for their transaction to be committed."""
        sent = {message.id for message in self.messages}
        stored = [message for message in self._in_state("stored") if message.id not in sent]
        return _events([*self._in_state("pending"), *stored])

    @property
    def rolled_back(self) -> list[EventBase]:
        """The events whose transaction, or savepoint, was rolled back."""
        return _events(self._in_state("rolled back"))

    def clear(self) -> None:
        """Forget all of it, planned failures as well; what is pending may still be emitted."""
        self._cleared = {id(message) for message in self.messages}
        self._kept = self._sent, self._failed  # So that no other message gets an id that was cleared.
        self._sent, self._failed, self._planned = [], [], []
        self._after_commit[:] = [
            waiting for waiting in self._after_commit if any(state in _PENDING for _, state in waiting.states())
        ]

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

    # -- failures --------------------------------------------------------------------------------------------------

    def fail_next(
        self,
        error: Exception | type[Exception] = BrokerUnavailableError,
        *,
        event_type: type[EventBase] | None = None,
        times: int = 1,
    ) -> None:
        """Let the next event fail, as if the broker had not confirmed it; nothing of it is sent.

            emitted_events.fail_next(ProducerTimeout)
            with pytest.raises(ProducerTimeout):
                await emitter.emit(OrderPlaced(order_id=1))

        `error`: what its emit raises, an exception or its class; by default the broker is down. `event_type`: the next
        event of this class; None: of any. `times`: so many of them. What has failed is in `failed`.

        Raises TypeError for what is no exception.
        """
        given: Any = error
        if not (isinstance(given, Exception) or (isinstance(given, type) and issubclass(given, Exception))):
            raise TypeError(
                f"fail_next takes an exception or its class, not {given!r}; write fail_next(ProducerTimeout)"
            )
        self._planned.append(_Planned(error, event_type, times))

    def time_out_next(self, *, event_type: type[EventBase] | None = None, times: int = 1) -> None:
        """`fail_next(ProducerTimeout)`: the next event is not confirmed in time, at once."""
        self.fail_next(ProducerTimeout, event_type=event_type, times=times)

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
        _check_fields("assert_not_emitted", event_type, fields)
        for told, events in (("emitted", self.emitted), ("pending", self.pending)):
            found = [event for event in events if _matches(event, event_type, fields)]
            if found:
                raise AssertionError(f"{_wanted(event_type, fields)} was {told}:\n{_lines(found)}")

    def _assert_in(self, events: list[EventBase], told: str, event_type: type[_E], fields: dict[str, Any]) -> _E:
        __tracebackhide__ = True
        _check_fields(f"assert_{told.replace(' ', '_')}", event_type, fields)
        for event in events:
            if _matches(event, event_type, fields):
                return cast("_E", event)
        lines = [f"{_wanted(event_type, fields)} was not {told}."]
        for name, there in (
            ("Emitted were", self.emitted),
            (f"Pending were (not committed; {self._advice()})", self.pending),
            ("Rolled back were", self.rolled_back),
            ("Failed were", [event for event, _ in self.failed]),
        ):
            if there:
                lines.append(f"{name}:\n{_lines(there, event_type, fields)}")
        if len(lines) == 1:
            lines.append("Nothing was emitted, and nothing waits for a commit.")
            lines += _hints()
        raise AssertionError("\n".join(lines))

    # -- from outside ----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        for flush in self._flushes:
            flush()

    def _was_sent(self, message: Message) -> None:
        self._sent.append(message)

    def _has_failed(self, message: Message, error: Exception) -> None:
        self._failed.append((message, error))

    def _waits(self, waiting: AfterCommit) -> None:
        self._after_commit.append(waiting)

    def _failure_of(self, message: Message) -> Exception | None:
        with self._lock:
            for planned in self._planned:
                if planned.event_type is None or isinstance(message.event, planned.event_type):
                    planned.times -= 1
                    if planned.times <= 0:
                        self._planned.remove(planned)
                    if isinstance(planned.error, Exception):
                        return planned.error
                    return planned.error(f"{message!r} was not confirmed: fail_next({planned.error.__name__})")
        return None

    def _in_state(self, wanted: CommitState) -> list[Message]:
        return [message for waiting in self._after_commit for message, state in waiting.states() if state == wanted]

    def _advice(self) -> str:
        """What to write so that what is pending is committed."""
        pending = (each for each in self._after_commit if any(state in _PENDING for _, state in each.states()))
        return "; ".join(dict.fromkeys(each.advice for each in pending))

    def _remember_events(self, messages: Sequence[Message]) -> None:
        """Give the events back to messages that a relay has read from an outbox."""
        if all(message.event is not None for message in messages):
            return
        events = {message.id: message.event for waiting in self._after_commit for message, _ in waiting.states()}
        for message in messages:
            if message.event is None:
                message.event = events.get(message.id)


def _hints() -> list[str]:
    """Why there may be nothing: what was open before the capture began is not seen."""
    open_before = {
        broker.backend.address
        for brokers in list(overriding.opened)
        for broker in brokers.brokers.values()
        if broker.state == "up" and broker.backend.transport != "memory"
    }
    if not open_before:
        return []
    told = f"Open since before the capture began, and not seen by it: {', '.join(sorted(open_before))}."
    return [f"{told} Enter override_brokers('memory') before the app starts, in a fixture of the same scope."]


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


def _check_fields(assertion: str, event_type: type[EventBase], fields: dict[str, Any]) -> None:
    """Raise TypeError for what is no event class, or has no such fields."""
    given: object = event_type
    if isinstance(given, EventBase):
        names = [name for name in type(given).model_fields if name in given.model_fields_set]
        told = "".join(f", {name}={getattr(given, name)!r}" for name in names)
        cls = type(given).__qualname__
        raise TypeError(f"{assertion} takes the class and the values, not an event: write {assertion}({cls}{told})")
    if not isinstance(given, type):
        raise TypeError(f"{assertion} takes a class of events, not {given!r}")
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
