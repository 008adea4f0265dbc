"""What a process of relays does when it is told to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["on_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


@contextmanager
def on_signals(stop: Callable[[], None], at_once: Callable[[], None]) -> Generator[None, None, None]:
    """Call `stop` at the first SIGTERM, SIGINT or SIGHUP; at the second one `at_once`, and end the process.

    Elsewhere than in the main thread, which alone may do so, signals are left to whoever handles them; so is one that
    is ignored, as nohup and shells do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def caught(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1:
            stop()
            return
        at_once()
        with suppress(OSError):  # Its terminal was closed.
            os.write(2, b"stopped at once: what was under way may be sent again\n")
        os._exit(128 + number)

    numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, caught) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
