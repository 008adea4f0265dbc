"""`@emits`: a Django signal becomes an event."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, cast

from django.dispatch import Signal

from dispytch_integrations.django._emitter import Emitter
from dispytch_integrations.events import EventBase

__all__ = ["emits"]

_F = TypeVar("_F", bound=Callable[..., Any])


def emits(signal: Signal | Iterable[Signal], *, sender: Any = None, outbox: bool = True) -> Callable[[_F], _F]:
    """Turn a Django signal into events that go out after the commit. Decorates a function that returns them.

        @emits(post_save, sender=Order)
        def order_saved(instance, created, **kwargs):
            return OrderPlaced(order_id=instance.pk) if created else None

    `signal`: post_save, post_delete, m2m_changed, user_logged_in, one of your own; or several of them.
    `sender`: whose signals; a model signal also takes "app.Model"; a list means each of its members. None: everybody's.
    `outbox`: False: send after the commit, though the outbox is installed: for models of a database that has none.

    The function gets the signal's arguments, those that it names or all with `**kwargs`, and returns an event, a list,
    or None. It stays an ordinary function, to be called in a test. Events wait for the transaction on the
    database of the signal (`using`), as `emit_on_commit` does. What loads fixtures (`raw=True`) and the historical
    models of migrations are skipped. Querysets' `update()`, `bulk_create()` and `bulk_update()` send no signals.

    Raises TypeError for a coroutine function, and for arguments that are no signal.
    """
    signals = list(signal) if isinstance(signal, Iterable) else [signal]
    senders = list(cast("list[Any]", sender)) if isinstance(sender, (list, tuple, set)) else [sender]
    if not signals or not all(isinstance(each, Signal) for each in signals):
        raise TypeError("emits() takes a Django signal, or several: @emits(post_save, sender=Order)")

    def decorate(function: _F) -> _F:
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{function.__qualname__} is a coroutine function; write `def`: it returns events, and the emitter "
                f"sends them"
            )
        receive = partial(_receive, function, _accepted(function), outbox)
        uid = f"dispytch {function.__module__}.{function.__qualname__}"
        for each in signals:
            for one in senders:
                # A module that is loaded again replaces its functions; Django would keep the first and say nothing.
                each.disconnect(sender=one, dispatch_uid=uid)
                each.connect(receive, sender=one, weak=False, dispatch_uid=uid)
        return function

    return decorate


def _accepted(function: Callable[..., Any]) -> frozenset[str] | None:
    """The arguments that a function names; None: it takes all."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


_emitter = Emitter()


def _receive(function: Callable[..., Any], accepted: frozenset[str] | None, outbox: bool, /, **arguments: Any) -> None:
    if arguments.get("raw") or getattr(arguments.get("sender"), "__module__", None) == "__fake__":
        return
    using = arguments.get("using")
    given = arguments if accepted is None else {name: value for name, value in arguments.items() if name in accepted}
    events = function(**given)
    if events is None:
        return
    if using is None:
        _emitter.emit_on_commit(events, outbox=outbox)
    else:
        several = isinstance(events, Iterable) and not isinstance(events, EventBase)
        listed = list(cast("Iterable[EventBase]", events)) if several else [cast("EventBase", events)]
        _emitter._emit_after_write(listed, using, outbox)
