"""`tail`: how an event looks, and how the command ends: at once, whatever the terminal or the broker does."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import select
import signal
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO, cast

from dispytch_integrations._cli_look import Look, Role, cleaned, json_line
from dispytch_integrations._tail import Request, follow, source_of
from dispytch_integrations._tail_arrival import Arrival, Filter
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.settings import BrokerSpec

__all__ = ["AWAY", "STOPPED", "quiet_clients", "rendered", "request_of", "tail"]

STOPPED, AWAY = 0, 3

_END_SECONDS = 1.5
_GONE_SECONDS = 0.5
_HEX_BYTES = 48
_CLIENTS = ("aiokafka", "aiormq", "aio_pika", "redis", "asyncio")
_FOLDED = 78
"""Columns of what is no terminal."""


def request_of(given: Mapping[str, Any]) -> Request:
    """What is to be shown, as the options say. Raises ConfigurationError."""
    if given.get("stream") and given.get("channel"):
        raise ConfigurationError("--stream and --channel exclude each other; write one of them")
    kind = "stream" if given.get("stream") else "channel" if given.get("channel") else None
    return Request(given["name"], bool(given.get("from_beginning")), given.get("routing_key"), kind)


def tail(spec: BrokerSpec, given: Mapping[str, Any], look: Look) -> int:
    """Show what arrives, until told to end; return the exit code.

    Raises ConfigurationError; BrokerUnavailableError when the broker does not answer at the start.
    """
    source = source_of(spec.backend, request_of(given), spec.options.prefix)
    filters = [Filter(name, value) for name, value in given.get("filter") or ()]
    as_json, left = bool(given.get("json")), given.get("count")
    output = _Output(look.out, "utf-8" if as_json else None)

    async def show(arrivals: Sequence[Arrival]) -> bool:
        nonlocal left
        chosen = [arrival for arrival in arrivals if all(each(arrival) for each in filters)][:left]
        if chosen:
            texts = [_line(arrival) if as_json else rendered(arrival, look.paint, look.columns) for arrival in chosen]
            await output.write("".join(texts))
        if left is not None:
            left -= len(chosen)
        return left != 0

    def tell(text: str) -> None:
        good = text.startswith("listening")
        told = f"{text} of {spec.backend.address}; Ctrl-C ends" if good else text
        look.aside(cleaned(told), "" if good else "bad")

    async def run() -> None:
        await _until_told(follow(source, show, tell, wait=bool(given.get("wait"))), output)

    try:
        with quiet_clients():
            asyncio.run(run())
    except (BrokenPipeError, KeyboardInterrupt):
        return STOPPED
    return STOPPED


# -- ending ----------------------------------------------------------------------------------------------------------


async def _until_told(following: Coroutine[Any, Any, None], output: _Output) -> None:
    """Run until it ends, a signal comes, or nobody reads the output any more. Raises what it raises."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def stopped() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    numbers: list[int] = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    caught: list[int] = []
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stopped)
                caught.append(number)
    except (NotImplementedError, RuntimeError, ValueError):
        pass  # Not the main thread, or Windows: KeyboardInterrupt ends it.
    main = asyncio.create_task(following, name="dispytch tail")
    others = [asyncio.create_task(stop.wait()), asyncio.create_task(output.gone())]
    try:
        await asyncio.wait({main, *others}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (main, *others):
            task.cancel()
        await asyncio.wait({main, *others}, timeout=_END_SECONDS)
        for number in caught:
            loop.remove_signal_handler(number)
    if main.done() and not main.cancelled() and (error := main.exception()) is not None:
        raise error


class _Output:
    """Writes in a thread of its own: a terminal that is stopped stops neither heartbeats nor the end.

    One text at a time: who writes faster waits, and nothing piles up.
    """

    def __init__(self, stream: TextIO, encoding: str | None = None) -> None:
        self._stream = stream
        self._encoding: str = encoding or stream.encoding or "utf-8"
        self._texts: queue.SimpleQueue[tuple[str, asyncio.Future[None], asyncio.AbstractEventLoop]] = (
            queue.SimpleQueue()
        )
        self._started = False
        try:
            stream.flush()
            self._fd: int | None = stream.fileno()
        except (AttributeError, OSError, ValueError):
            self._fd = None  # Not a file: a test's.

    async def write(self, text: str) -> None:
        """Write it all. Raises BrokenPipeError when nobody reads any more."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="dispytch tail output", daemon=True).start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._texts.put((text, done, loop))
        await done

    def _run(self) -> None:
        while True:
            text, done, loop = self._texts.get()
            error: OSError | None = None
            try:
                self._write(text)
            except OSError as exc:
                error = exc if isinstance(exc, BrokenPipeError) else BrokenPipeError(*exc.args)
            try:
                loop.call_soon_threadsafe(_settle, done, error)
            except RuntimeError:
                return  # The command has ended meanwhile.

    def _write(self, text: str) -> None:
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # Past the stream's own buffer, whose lock the interpreter would wait for at its end.
        data = memoryview(text.encode(self._encoding, "backslashreplace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                select.select([], [self._fd], [])

    async def gone(self) -> None:
        """Return when nobody reads any more: the other end of a pipe is closed, or a terminal."""
        poller = None
        if self._fd is not None and hasattr(select, "poll"):
            poller = select.poll()
            poller.register(self._fd, 0)
        while True:
            await asyncio.sleep(_GONE_SECONDS)
            if poller is not None and poller.poll(0):
                return


def _settle(done: asyncio.Future[None], error: OSError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


@contextmanager
def quiet_clients() -> Generator[None]:
    """Let client libraries log nothing, unless somebody has set up logging: what they say is told in our words."""
    loggers = [logging.getLogger(name) for name in (*_CLIENTS, "dispytch_integrations")]
    ours = [logger for logger in loggers if not logger.hasHandlers()]
    silent = logging.NullHandler()
    for logger in ours:
        logger.addHandler(silent)
    try:
        yield
    finally:
        for logger in ours:
            logger.removeHandler(silent)


# -- how an event looks ----------------------------------------------------------------------------------------------

Paint = Callable[[str, Role], str]


def _line(arrival: Arrival) -> str:
    return json_line(arrival.as_json()) + "\n"


def rendered(arrival: Arrival, paint: Paint, columns: int | None) -> str:
    """An event for a person: when, which one, from where, with which headers; then its body."""
    width = columns or _FOLDED
    at, kind, id_ = _local(arrival.time), arrival.attribute("type"), arrival.attribute("id")
    head = [(at, "time"), (cleaned(kind), "type") if kind else ("(no type)", "faint")]
    facts: list[tuple[str, str]] = []
    if id_ is not None and len(at) + len(head[1][0]) + len(id_) + 4 <= width:
        head.append((cleaned(id_), "faint"))
    elif id_ is not None:
        facts.append(("id", id_))
    place = " ".join(f"{name} {value}" for name, value in arrival.position.items() if value != "")
    facts.append((arrival.destination, place))
    facts += [(name, value) for name, value in (("key", arrival.key), ("source", arrival.attribute("source"))) if value]
    facts += [(f"{name}:", _plain(value)) for name, value in arrival.own_headers.items()]
    first = "  ".join(paint(text, cast("Role", role)) for text, role in head)
    return "\n".join([first, *_facts(facts, paint, width), *_body(arrival, paint, width), "", ""])


def _facts(facts: Sequence[tuple[str, str]], paint: Paint, width: int) -> list[str]:
    """As many on a line as fit."""
    lines: list[str] = []
    line, used = "", 0
    for name, value in facts:
        name, value = cleaned(name), cleaned(value)
        size = len(name) + len(value) + 1
        if line and used + 2 + size > width:
            lines.append(line)
            line, used = "", 0
        line += f"  {paint(name, 'name' if name.endswith(':') else 'faint')} {value}".rstrip()
        used += 2 + size
    return [*lines, line] if line else lines


def _body(arrival: Arrival, paint: Paint, width: int) -> list[str]:
    encoding, value = arrival.decoded
    payload = arrival.payload
    if payload is None:
        return [paint("  (a tombstone: its key is deleted)", "word")]
    if encoding in ("json", "msgpack"):
        short = json_line(value)
        text = short if len(short) + 2 <= width else json_line(value, indent=2)
        lines = [f"  {_painted(line, paint)}" for line in text.split("\n")]
        return [*lines, paint("  (MessagePack)", "faint")] if encoding == "msgpack" else lines
    if not payload:
        return [paint("  (an empty body)", "faint")]
    if encoding == "text":
        return [f"  {cleaned(line)}" for line in str(value).split("\n")]
    shown = payload[:_HEX_BYTES]
    dots = " ..." if len(payload) > len(shown) else ""
    kind = f", {cleaned(arrival.media_type)}" if arrival.media_type else ""
    lines = [shown[start : start + 24].hex(" ") for start in range(0, len(shown), 24)]
    return [paint(f"  ({len(payload):,} bytes{kind})", "faint"), *(f"  {line}" for line in lines[:-1]),
            f"  {lines[-1]}{dots}"]  # fmt: skip


_TOKENS = re.compile(
    r'(?P<name>"(?:[^"\\]|\\.)*")(?=:)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>\b(?:true|false|null|NaN|Infinity)\b)'
    r"|(?P<number>-?\d[\d.eE+-]*)"
)


def _painted(line: str, paint: Paint) -> str:
    return _TOKENS.sub(lambda found: paint(found[0], cast("Role", found.lastgroup)), line)


def _local(text: str) -> str:
    """The time by this machine's clock; with its date, unless that is today."""
    try:
        at = datetime.fromisoformat(text)
        at = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone()
    except (OverflowError, OSError, ValueError):  # No time, or one at the ends of the calendar.
        return cleaned(text)
    time = f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}"
    return time if at.date() == datetime.now(UTC).astimezone().date() else f"{at:%Y-%m-%d} {time}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json_line(value)
