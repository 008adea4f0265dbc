"""One broker as the emitter sees it: prepares messages for it and delivers them, hooks included."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from inspect import iscoroutinefunction, unwrap
from typing import Any, Literal, TypeVar

from dispytch_integrations._identity import event_id
from dispytch_integrations._overriding import overriding
from dispytch_integrations._parts import of_dispytch, wrong_hooks, wrong_serializer
from dispytch_integrations._prepare import MessageSettings, Prepare, compile_prepare
from dispytch_integrations.errors import ConfigurationError, NotAttemptedError, RouteError
from dispytch_integrations.events import EventBase, event_type
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import JSONSerializer, Serializer

__all__ = ["OnTimeout", "Outlet", "observed"]

logger = logging.getLogger("dispytch_integrations.emitter")

_T = TypeVar("_T")

_End = Callable[[Sequence[Exception | None]], object]

OnTimeout = Callable[[Any], "Awaitable[object] | object"]
"""Called with the event that was not confirmed in time; may be async."""


class Outlet:
    """A producer with its settings. Brokers that are managed derive from it."""

    def __init__(
        self,
        producer: Producer,
        *,
        alias: str = "default",
        serializer: Serializer | None = None,
        timeout: float | None,
        prefix: str = "",
        cloudevents: bool | str = False,
        source: str | None = None,
        hooks: Sequence[Hook] = (),
        on_timeout: Literal["raise", "log"] | OnTimeout = "raise",
        max_size: int | None = None,
    ) -> None:
        _check_parts(producer, serializer, hooks)
        # Some hooks have a part of their own for each outlet.
        hooks = [_bound(hook, self) for hook in (*hooks, *overriding.hooks)]
        self.alias = alias
        self.producer = producer
        self.timeout = timeout
        self.settings = MessageSettings(
            alias=alias,
            serializer=serializer or JSONSerializer(),
            prefix=prefix,
            cloudevents=cloudevents,
            source=source,
            before_send=tuple(hook.before_send for hook in hooks if _overrides(hook, "before_send")),
            foreign_hooks=any(not type(hook).__module__.startswith("dispytch_integrations.") for hook in hooks),
            wants_route=type(producer).deliver is Producer.deliver,
            max_size=max_size,
        )
        self.on_timeout: OnTimeout | None = None
        if on_timeout == "log":
            self.on_timeout = _log_timeout
        elif on_timeout != "raise":
            self.on_timeout = on_timeout
        self._sent_hooks = tuple(hook.sent for hook in hooks if _overrides(hook, "sent"))
        self._failed_hooks = tuple(hook.failed for hook in hooks if _overrides(hook, "failed"))
        self._held_hooks = tuple(hook.held for hook in hooks if _overrides(hook, "held"))
        self._delivering_hooks = tuple(hook.delivering for hook in hooks if _overrides(hook, "delivering"))
        self.has_hooks = bool(self._sent_hooks or self._failed_hooks)

    def takes(self, cls: type[EventBase]) -> bool:
        """Can events of `cls` go here, by the type of their route?"""
        return isinstance(cls.__route__, self.producer.routes)

    def compile(self, cls: type[EventBase]) -> Prepare:
        """A function that makes messages from events of `cls`. Raises RouteError when they cannot go here."""
        if not self.takes(cls):
            taken = " or ".join(route.__name__ for route in self.producer.routes)
            name = type(self.producer).__name__
            who = f"broker {self.alias!r}" if name.startswith("_") else name
            raise RouteError(f"{cls.__qualname__} has a {type(cls.__route__).__name__}, but {who} takes a {taken}")
        return compile_prepare(cls, self.settings)

    async def deliver(self, messages: Sequence[Message]) -> list[Exception | None]:
        """Send messages; one outcome each: None, or its error. Raises NotStartedError, WrongLoopError."""
        delivered = self.producer.deliver(messages, timeout=self.timeout)
        ends = self._begin(messages) if self._delivering_hooks else ()
        outcomes = await (observed(messages, delivered, ends) if ends else delivered)
        if self.has_hooks:
            self.call_hooks(messages, outcomes)
        return outcomes

    def _begin(self, messages: Sequence[Message]) -> Sequence[_End]:
        """Tell the hooks `delivering` that a delivery begins; what they want to be called with at its end."""
        return [end for begin in self._delivering_hooks if (end := _guarded(begin, messages)) is not None]

    def held(self, message: Message) -> None:
        """Tell the hooks that a message waits for a commit, or is in an outbox."""
        for held in self._held_hooks:
            _guarded(held, message)

    def call_hooks(self, messages: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Tell the hooks what became of the messages."""
        for message, error in zip(messages, outcomes, strict=True):
            if error is None:
                for sent in self._sent_hooks:
                    _guarded(sent, message)
            else:
                for failed in self._failed_hooks:
                    _guarded(failed, message, error)


async def observed(
    messages: Sequence[Message], delivered: Awaitable[list[Exception | None]], ends: Sequence[_End]
) -> list[Exception | None]:
    """Await a delivery, and tell its end."""
    outcomes: Sequence[Exception | None] = ()
    try:
        outcomes = made = await delivered
    except BaseException as exc:
        outcomes = [exc if isinstance(exc, Exception) else _cancelled(exc)] * len(messages)
        raise
    finally:
        for end in ends:
            _guarded(end, outcomes)
    return made


def _log_timeout(event: EventBase) -> None:
    logger.warning(
        "%s was not confirmed in time; it may have been delivered",
        type(event).__qualname__,
        extra={"event_type": event_type(type(event)), "event_id": event_id(event)},
    )


def _check_parts(producer: object, serializer: object, hooks: object) -> None:
    """Raise ConfigurationError for what cannot work, each with what to write."""
    problems = [*wrong_serializer(serializer), *wrong_hooks(hooks)]
    if not isinstance(producer, Producer):
        given = f"the class {producer.__name__}" if isinstance(producer, type) else f"a {type(producer).__name__}"
        write = of_dispytch(producer) or (
            "write EventEmitter(KafkaProducer(client)), or `async with connect('kafka://...') as emitter:`"
        )
        problems.insert(0, f"an EventEmitter sends through a Producer, not through {given}; {write}")
    elif type(producer).deliver is Producer.deliver and not iscoroutinefunction(unwrap(producer.send)):
        problems.append(
            f"{type(producer).__name__}.send is no coroutine function, and would be over before anybody could await "
            f"it; write `async def send`"
        )
    if problems:
        raise ConfigurationError(problems)


def _bound(hook: Any, outlet: Outlet) -> Hook:
    bind: Callable[[Outlet], Hook] | None = getattr(hook, "bound", None)
    return hook if bind is None else bind(outlet)


def _overrides(hook: object, name: str) -> bool:
    return callable(getattr(hook, name, None)) and getattr(type(hook), name, None) is not getattr(Hook, name)


def _guarded(callback: Callable[..., _T], *args: object) -> _T | None:
    try:
        return callback(*args)
    except Exception:
        logger.exception("the hook %r failed", callback)
        return None


def _cancelled(exc: BaseException) -> Exception:
    return NotAttemptedError(f"the delivery was given up: {type(exc).__name__}")
