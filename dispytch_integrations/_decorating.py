"""Context managers that decorate coroutine functions as well: contextlib's would end before the first await."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

__all__ = ["Decorating"]

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


class Decorating(Generic[_T]):
    """A context manager that is a decorator, too. May be entered more than once, also within itself."""

    @abstractmethod
    def __enter__(self) -> _T: ...

    @abstractmethod
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __call__(self, function: _F) -> _F:
        """Run each call of `function` inside the block. Raises TypeError for a class."""
        if isinstance(function, type):
            raise TypeError(
                f"@{type(self).__name__} decorates functions, not the class {function.__name__}; decorate its methods, "
                f"or enter it in setUp: self.enterContext({type(self).__name__}())"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def asynchronous(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast("_F", asynchronous)

        @functools.wraps(function)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast("_F", synchronous)
