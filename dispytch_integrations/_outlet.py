"""One broker as the emitter sees it: prepares messages for it and delivers them, hooks included."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from inspect import iscoroutinefunction
from typing import Any, Literal

from dispytch_integrations._prepare import MessageSettings, Prepare, compile_prepare
from dispytch_integrations.errors import ConfigurationError, RouteError
from dispytch_integrations.events import EventBase
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.serialization import JSONSerializer, Serializer

__all__ = ["OnTimeout", "Outlet"]

logger = logging.getLogger(__name__)

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
    ) -> None:
        _check_parts(producer, serializer, hooks)
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
            wants_route=type(producer).deliver is Producer.deliver,
        )
        self.on_timeout: OnTimeout | None = None
        if on_timeout == "log":
            self.on_timeout = _log_timeout
        elif on_timeout != "raise":
            self.on_timeout = on_timeout
        self._sent_hooks = tuple(hook.sent for hook in hooks if _overrides(hook, "sent"))
        self._failed_hooks = tuple(hook.failed for hook in hooks if _overrides(hook, "failed"))
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
        outcomes = await self.producer.deliver(messages, timeout=self.timeout)
        if self.has_hooks:
            self.call_hooks(messages, outcomes)
        return outcomes

    def call_hooks(self, messages: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Tell the hooks what became of the messages."""
        for message, error in zip(messages, outcomes, strict=True):
            if error is None:
                for sent in self._sent_hooks:
                    _guarded(sent, message)
            else:
                for failed in self._failed_hooks:
                    _guarded(failed, message, error)


def _log_timeout(event: EventBase) -> None:
    logger.warning("%s was not confirmed in time; it may have been delivered", type(event).__qualname__)


_MOMENTS = ("before_send", "sent", "failed")


def _check_parts(producer: object, serializer: object, hooks: Sequence[object]) -> None:
    """Raise ConfigurationError for what cannot work, each with what to write."""
    if not isinstance(producer, Producer):
        given = f"the class {producer.__name__}" if isinstance(producer, type) else f"a {type(producer).__name__}"
        raise ConfigurationError(
            f"an EventEmitter sends through a Producer, not through {given}; write "
            f"EventEmitter(KafkaProducer(client)), or `async with connect('kafka://...') as emitter:`"
        )
    if serializer is not None and (isinstance(serializer, type) or not hasattr(serializer, "serialize")):
        raise ConfigurationError("the serializer is an object with `serialize`, such as MessagePackSerializer()")
    for hook in hooks:
        if isinstance(hook, type):
            raise ConfigurationError(f"a hook is an object, not the class {hook.__name__}; write {hook.__name__}()")
        moments = [moment for moment in _MOMENTS if callable(getattr(hook, moment, None))]
        if not moments:
            raise ConfigurationError(
                f"a hook has before_send, sent or failed, and a {type(hook).__name__} has none of them; "
                f"derive it from Hook"
            )
        for moment in moments:
            if iscoroutinefunction(getattr(hook, moment)):
                raise ConfigurationError(
                    f"{type(hook).__name__}.{moment} is a coroutine function, and nobody would await it; write `def`"
                )


def _overrides(hook: object, name: str) -> bool:
    return callable(getattr(hook, name, None)) and getattr(type(hook), name, None) is not getattr(Hook, name)


def _guarded(callback: Callable[..., None], *args: object) -> None:
    try:
        callback(*args)
    except Exception:
        logger.exception("the hook %r failed", callback)
