"""What a relay shows while it runs: on a terminal one line that is updated, elsewhere a line now and then.

Lines are `name=value`, or JSON objects. Fields of progress, in JSON: `time`, `level`, `event` ("progress", and "end"
for the last one), `sent`, `rate` (events per second since the last line, in the last one since the start), `failed`,
`died`, `waiting`, `retrying`, `dead`, `oldest_seconds`, `shards`, `all_shards`, `outages` (aliases of brokers), `away`
(names of databases), `workers`, `seconds`, and in the last one of `--once` `left`. What is logged has `event` "log",
with `logger` and `message`.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from dispytch_integrations.outbox.runner import Progress

__all__ = ["Console", "Stream", "age"]

_EXTRAS = ("event_type", "event_id", "broker", "destination", "traceparent", "correlation_id")
"""What the relay's log records carry beside their text."""
_RED, _YELLOW, _DIM, _BOLD = "31", "33", "2", "1"


class Stream(Protocol):
    """Where it is written: a text file, or Django's `self.stdout._out`."""

    def write(self, text: str, /) -> object:
        """Write as a file does."""
        ...

    def flush(self) -> object:
        """Flush as a file does."""
        ...


class Console(logging.Handler):
    """Writes progress and log records to a stream.

    `terminal`: is it one? Then progress is one line, updated, below the log. `as_json`: lines of JSON, on a terminal
    too. `color`: colours on a terminal.
    """

    def __init__(self, stream: Stream, *, terminal: bool, as_json: bool = False, color: bool = True) -> None:
        super().__init__()
        self._stream = stream
        self._json = as_json
        self._live = terminal and not as_json
        self._color = color and self._live
        self._line = ""
        self._writing = threading.RLock()

    @property
    def every(self) -> float:
        """Seconds between two reports, unless somebody says else: 1 on a terminal, else 10."""
        return 1.0 if self._live else 10.0

    # -- progress ----------------------------------------------------------------------------------------------------

    def progress(self, progress: Progress) -> None:
        """Show how far it is."""
        if not self._live:
            self._write(self._structured("info", "end" if progress.ended else "progress", _fields(progress)))
        elif progress.ended:
            self.clear()
            self._write(self._summary(progress))
        else:
            self._update(self._status(progress))

    def clear(self) -> None:
        """Take the line of progress away."""
        self._update("")

    def make_room(self, record: logging.LogRecord) -> bool:
        """A filter for somebody else's handler that writes to the same terminal: it begins on a line of its own."""
        self.clear()
        return True

    def _summary(self, progress: Progress) -> str:
        parts = [f"{_events(progress.sent)} sent in {age(progress.seconds)}"]
        if progress.sent and progress.left is not None:  # Over days a rate says nothing.
            parts.append(f"{progress.rate:,.0f}/s")
        if progress.failed:
            parts.append(f"{progress.failed:,} attempts failed")
        if progress.died:
            parts.append(self._paint(_RED, f"{_events(progress.died)} given up (see `outbox list --state dead`)"))
        if progress.left is not None:
            left = self._paint(_YELLOW, f"{_events(progress.left)} left") if progress.left else "nothing left"
            parts.append(left)
        return ", ".join(parts)

    def _status(self, progress: Progress) -> str:
        parts = [f"{progress.sent:,} sent", f"{progress.rate:,.0f}/s"]
        if progress.waiting is not None:
            oldest = f" (oldest {age(progress.oldest)})" if progress.oldest is not None else ""
            parts.append(f"{progress.waiting:,} waiting{oldest}")
        if progress.retrying:
            parts.append(self._paint(_YELLOW, f"{progress.retrying:,} to retry"))
        if progress.dead:
            parts.append(self._paint(_RED, f"{progress.dead:,} dead"))
        held = f"{progress.shards}/{progress.all_shards} shards"
        parts.append(held if progress.workers == 1 else f"{held}, {progress.workers} workers")
        if progress.outages:
            parts.append(self._paint(_RED, f"broker down: {', '.join(progress.outages)}"))
        if progress.away:
            parts.append(self._paint(_RED, f"database away: {', '.join(progress.away)}"))
        return self._fitting(parts)

    def _fitting(self, parts: Sequence[str]) -> str:
        """As many of the parts as the terminal is wide: a line that wraps cannot be updated."""
        room = shutil.get_terminal_size().columns - 1
        line, length = "", 0
        for part in parts:
            more = len(_plain(part)) + (3 if line else 0)
            if length + more > room:
                break
            line += (self._paint(_DIM, " | ") if line else "") + part
            length += more
        return line

    # -- log ---------------------------------------------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record, above the line of progress."""
        try:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            level = record.levelname.lower()
            if self._live:
                shown = {"warning": self._paint(_YELLOW, "warning "), "error": self._paint(_RED, "error ")}.get(
                    level, ""
                )
                clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
                self._write(f"{self._paint(_DIM, clock)} {shown}{text}")
                return
            extras = {name: getattr(record, name) for name in _EXTRAS if hasattr(record, name)}
            fields = {"logger": record.name, "message": text, **extras}
            self._write(self._structured(level, "log", fields, record.created))
        except Exception:
            self.handleError(record)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _structured(self, level: str, event: str, fields: Mapping[str, Any], when: float | None = None) -> str:
        time = datetime.now(UTC) if when is None else datetime.fromtimestamp(when, UTC)
        told = {"time": time.isoformat(timespec="milliseconds"), "level": level, "event": event, **fields}
        if self._json:
            return json.dumps(told, default=str)
        return " ".join(f"{name}={_value(value)}" for name, value in told.items())

    def _write(self, text: str) -> None:
        with self._writing:
            line = self._line
            # In one piece: what another process prints does not come in between.
            self._stream.write(f"{_CLEAR if line else ''}{text}\n{line}")
            self._stream.flush()

    def _update(self, line: str) -> None:
        with self._writing:
            if line or self._line:
                self._stream.write(f"{_CLEAR}{line}")
                self._stream.flush()
            self._line = line

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text


_CLEAR = "\r\x1b[2K"


def _plain(text: str) -> str:
    for code in (_RED, _YELLOW, _DIM, _BOLD, "0"):
        text = text.replace(f"\x1b[{code}m", "")
    return text


def age(seconds: float | None) -> str:
    """An age in words: "0.4 s", "21 s", "3 min", "5 h", "2 d"; None: "-"."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def _events(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def _fields(progress: Progress) -> dict[str, Any]:
    return {
        "sent": progress.sent,
        "rate": round(progress.rate, 1),
        "failed": progress.failed,
        "died": progress.died,
        "waiting": progress.waiting,
        "retrying": progress.retrying,
        "dead": progress.dead,
        "oldest_seconds": None if progress.oldest is None else round(progress.oldest, 3),
        "shards": progress.shards,
        "all_shards": progress.all_shards,
        "outages": list(progress.outages),
        "away": list(progress.away),
        "workers": progress.workers,
        "seconds": round(progress.seconds, 1),
        **({} if progress.left is None else {"left": progress.left}),
    }


def _value(value: object) -> str:
    """As logfmt has it: text with white space or quotes in quotes."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(str(each) for each in value) or "-"  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    text = str(value)
    return json.dumps(text) if not text or any(mark in text for mark in ' "=\n\t\\') else text
