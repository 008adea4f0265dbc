"""What a user plugs into a broker (a serializer, hooks): what cannot work is told before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import iscoroutinefunction
from typing import cast

__all__ = ["of_dispytch", "wrong_hooks", "wrong_serializer"]

_MOMENTS = ("before_send", "held", "delivering", "sent", "failed")


def wrong_serializer(serializer: object) -> Iterator[str]:
    """What is wrong with it, and what to write."""
    if serializer is not None and (isinstance(serializer, type) or not hasattr(serializer, "serialize")):
        yield "the serializer is an object with `serialize`, such as MessagePackSerializer()"


def wrong_hooks(hooks: object) -> Iterator[str]:
    """What is wrong with them, and what to write."""
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        yield f"hooks are a list, not a {type(hooks).__name__}; write hooks=[...]"
        return
    for hook in cast("Sequence[object]", hooks):
        yield from _wrong_hook(hook)


def _wrong_hook(hook: object) -> Iterator[str]:
    if isinstance(hook, type):
        yield f"a hook is an object, not the class {hook.__name__}; write {hook.__name__}()"
        return
    moments = [moment for moment in _MOMENTS if callable(getattr(hook, moment, None))]
    if not moments:
        yield (
            f"a hook has {', '.join(_MOMENTS[:-1])} or {_MOMENTS[-1]}, and a {type(hook).__name__} has none of "
            f"them; derive it from Hook"
        )
    for moment in moments:
        if iscoroutinefunction(getattr(hook, moment)):
            yield f"{type(hook).__name__}.{moment} is a coroutine function, and nobody would await it; write `def`"


def of_dispytch(given: object) -> str:
    """What to write for something of the package dispytch, whose names ours are; "": it is not of that."""
    # Of a class of the user's it is one that it is derived from.
    cls = given if isinstance(given, type) else type(given)
    for base in cls.__mro__:
        package, _, module = base.__module__.partition(".")
        if package == "dispytch":
            where = next((name for name in ("kafka", "rabbitmq", "redis") if name in module), "")
            ours = f"dispytch_integrations.{where}" if where else "dispytch_integrations"
            return f"{base.__name__} is dispytch's: import that of {ours}"
    return ""
