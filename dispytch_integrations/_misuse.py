"""Brokers that are used as what they are not: Python's own errors would not say what to write.

Type checkers see nothing of it, and report the mistake themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from dispytch_integrations.errors import NotStartedError

__all__ = ["AsyncBlock", "SyncBlock"]

_EMITTERS = frozenset({"emit", "emit_many", "on_timeout", "prepare", "prepare_many"})
"""What an emitter has."""


class _NoEmitterError(NotStartedError, AttributeError):
    """An AttributeError, since `hasattr` has to say no."""


class _Block:
    """Says what to write where somebody takes the brokers for their emitter."""

    _made_by = ""
    """The function that the user has called."""
    _write = ""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Called for what is not there, and for nothing else.
            if name not in _EMITTERS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            told = f"{self._made_by}() returns no emitter, its block gives one: write `{self._write}`"
            raise _NoEmitterError(told)

        def __await__(self) -> NoReturn:
            raise TypeError(f"{self._made_by}() is not awaited: write `{self._write}`")

        def __call__(self, *args: object, **keywords: object) -> NoReturn:
            raise TypeError(
                f"what {self._made_by}() returns is no function. As an app's lifespan write "
                f"lifespan=emitter_lifespan(...), from dispytch_integrations.fastapi or .starlette; elsewhere "
                f"`{self._write}`"
            )


class AsyncBlock(_Block):
    """For `async with`."""

    _made_by, _write = "connect", "async with connect(...) as emitter:"

    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            raise TypeError(
                "connect() is for `async with`, not for `with`; in synchronous code write "
                "`with connect_blocking(...) as emitter:`, from dispytch_integrations.blocking"
            )

        def __exit__(self, *exc_info: object) -> None:
            """Python looks for it before it enters."""


class SyncBlock(_Block):
    """For `with`."""

    _made_by, _write = "connect_blocking", "with connect_blocking(...) as emitter:"

    if not TYPE_CHECKING:

        async def __aenter__(self) -> NoReturn:
            raise TypeError(
                "connect_blocking() is for `with`, not for `async with`; in a coroutine write "
                "`async with connect(...) as emitter:`"
            )

        async def __aexit__(self, *exc_info: object) -> None:
            """Python looks for it before it enters."""
