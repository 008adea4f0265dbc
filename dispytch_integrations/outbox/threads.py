"""One thread for a synchronous database: neither the event loop nor the app's threads wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["OneThread"]

_T = TypeVar("_T")


class OneThread:
    """Runs functions one after the other on a thread that starts with the first and ends with `end`.

    A database connection that is opened in one of them may be used in all.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[[], _T]) -> _T:
        """What the function returns, or raises. A cancelled wait does not end it: what follows runs after it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def end(self) -> None:
        """Let the thread end once it has run what it was given."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
