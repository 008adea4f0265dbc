"""Several relays as processes: spawned, started again when they die, stopped together.

They share the shards of the outbox as relays on different machines do. What they log and report comes over a pipe,
so that one process writes to the terminal. When this one is killed the pipe ends, and they stop as after SIGTERM.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._signals import on_signals
from dispytch_integrations.outbox.runner import DONE, WRONG, Progress, Runner

__all__ = ["Workers"]

logger = logging.getLogger("dispytch_integrations.outbox")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a worker that died is started again."""
_STEADY = 60.0
"""Seconds after which a worker's death is the first one again."""
_GRACE = 60.0
"""Seconds that workers get to stop; each has its own, shorter limits."""
_OURS = "dispytch_integrations"


class _Worker:
    """One process, those that came before it in its place, and what they said."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: SpawnProcess | None = None
        self.pipe: Connection | None = None
        self.started = 0.0
        self.pause = _FIRST_PAUSE
        self.start_at = 0.0
        self.beaten = False
        self.progress: Progress | None = None
        self.before: tuple[int, int, int] = (0, 0, 0)  # sent, failed, died: of those that have ended

    def sums(self) -> tuple[int, int, int]:
        now = self.progress
        sent, failed, died = self.before
        return (sent, failed, died) if now is None else (sent + now.sent, failed + now.failed, died + now.died)


class Workers:
    """Runs `count` processes, each with the Runner that `make` returns.

        def make() -> Runner: ...               # of a module: the new processes import it
        if __name__ == "__main__":
            sys.exit(Workers(make, 2).main())

    `make`: a function that pickle can name (functools.partial with plain arguments is one). `liveness_file`: touched
    whenever all workers have renewed their leases. `on_progress`, `every`: as Runner's, with the sums of all.
    """

    def __init__(
        self,
        make: Callable[[], Runner],
        count: int,
        *,
        liveness_file: str | os.PathLike[str] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        every: float = 10.0,
    ) -> None:
        if count < 1:
            raise ConfigurationError(f"{count} workers relay nothing; write 1 or more")
        self.liveness_file = None if liveness_file is None else Path(liveness_file)
        self._make = make
        self._on_progress = on_progress
        self._every = every
        self._workers = [_Worker(number) for number in range(1, count + 1)]
        self._context = multiprocessing.get_context("spawn")
        self._stopping = False
        self._wrong: str | None = None
        self._waked, self._wake = self._context.Pipe(duplex=False)
        self._started = time.monotonic()
        self._reported = (self._started, 0)

    def main(self) -> int:
        """Run until SIGTERM, SIGINT or SIGHUP; return the exit code. The second signal kills the workers.

        Raises ConfigurationError when a worker finds that its settings are wrong.
        """
        self._remove_liveness()
        with on_signals(self.stop, self._at_once):
            try:
                self._run()
            finally:
                self._end()
                self._remove_liveness()
        self._report(at_the_end=True)
        if self._wrong is not None:
            raise ConfigurationError(self._wrong)
        return DONE

    def stop(self) -> None:
        """Let all workers settle what is under way, and end. From any thread, and from a signal's handler."""
        self._stopping = True
        self._wake.send_bytes(b"stop")

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        report_at = time.monotonic() + 0.5
        while not self._stopping:
            now = time.monotonic()
            for worker in self._workers:
                if worker.process is None and worker.start_at <= now:
                    self._start(worker)
            if now >= report_at:
                self._report()
                report_at = now + self._every
            limit = min([report_at, *(worker.start_at for worker in self._workers if worker.process is None)])
            self._listen(max(limit - now, 0.01))

    def _start(self, worker: _Worker) -> None:
        ours, theirs = self._context.Pipe()
        worker.pipe, worker.started, worker.beaten = ours, time.monotonic(), False
        worker.process = self._context.Process(
            target=_work,
            args=(self._make, theirs, worker.number, self._every, self._on_progress is not None),
            name=f"dispytch relay {worker.number}",
            daemon=True,
        )
        worker.process.start()
        theirs.close()

    def _listen(self, seconds: float) -> None:
        """Wait for what workers say, for the end of one, or a signal."""
        pipes = {worker.pipe: worker for worker in self._workers if worker.pipe is not None}
        ends = {worker.process.sentinel: worker for worker in self._workers if worker.process is not None}
        for ready in wait([self._waked, *pipes, *ends], timeout=seconds):
            if ready is self._waked:
                self._waked.recv_bytes()
            elif isinstance(ready, Connection) and ready in pipes:
                self._hear(pipes[ready])
            elif isinstance(ready, int) and ready in ends:
                self._ended(ends[ready])

    def _hear(self, worker: _Worker) -> None:
        """All that a worker has said; nothing more comes when it has ended."""
        pipe = worker.pipe
        try:
            while pipe is not None and pipe.poll():
                said = json.loads(pipe.recv_bytes())
                self._take(worker, said["kind"], said["value"])
        except (EOFError, OSError):
            worker.pipe = None

    def _take(self, worker: _Worker, kind: str, value: Any) -> None:
        if kind == "log":
            record = logging.makeLogRecord(value)
            record.msg = f"worker {worker.number}: {record.msg}" if len(self._workers) > 1 else record.msg
            logging.getLogger(record.name).handle(record)
        elif kind == "progress":
            worker.progress = Progress(**value)
        elif kind == "wrong":
            self._wrong = value
        elif kind == "beat":
            worker.beaten = True
            if all(each.beaten for each in self._workers):
                for each in self._workers:
                    each.beaten = False
                if self.liveness_file is not None:
                    self.liveness_file.touch()

    def _ended(self, worker: _Worker) -> None:
        process = worker.process
        if process is None:
            return
        self._hear(worker)
        process.join()
        code = process.exitcode
        worker.before, worker.progress = worker.sums(), None
        worker.process = worker.pipe = None
        worker.beaten = False
        if code == WRONG:
            self._wrong = self._wrong or "a worker ended with exit code 2; see what it said"
            self._stopping = True
        elif not self._stopping:
            steady = time.monotonic() - worker.started > _STEADY
            pause = worker.pause = _FIRST_PAUSE if steady else worker.pause
            worker.start_at, worker.pause = time.monotonic() + pause, min(pause * 2, _LONGEST_PAUSE)
            logger.error("worker %d ended (%s); another one starts in %.1f s", worker.number, _how(code), pause)

    def _end(self) -> None:
        """Stop all of them; one that does not within _GRACE is killed."""
        if any(worker.process is not None for worker in self._workers):
            logger.info("stopping: what is under way is settled first")
        self._stopping = True
        for worker in self._workers:
            if worker.pipe is not None:
                try:
                    worker.pipe.send_bytes(b"stop")
                except OSError:
                    pass  # It has ended.
        end = time.monotonic() + _GRACE
        while any(worker.process is not None for worker in self._workers) and time.monotonic() < end:
            self._listen(0.5)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()

    def _at_once(self) -> None:
        self._kill()
        self._remove_liveness()

    def _remove_liveness(self) -> None:
        if self.liveness_file is None:
            return
        try:
            self.liveness_file.touch()
            self.liveness_file.unlink()
        except OSError as exc:
            raise ConfigurationError(
                f"the liveness file {self.liveness_file} cannot be written: {exc.strerror}; give a path in a directory "
                f"that is there"
            ) from exc

    def _report(self, *, at_the_end: bool = False) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        sent, failed, died = (sum(parts) for parts in zip(*(each.sums() for each in self._workers), strict=True))
        said = [worker.progress for worker in self._workers if worker.progress is not None]
        counted = next((progress for progress in said if progress.waiting is not None), None)
        since, before = (self._started, 0) if at_the_end else self._reported
        self._reported = (now, sent)
        self._on_progress(
            Progress(
                sent=sent,
                rate=(sent - before) / max(now - since, 0.001),
                failed=failed,
                died=died,
                shards=sum(progress.shards for progress in said),
                all_shards=max((progress.all_shards for progress in said), default=0),
                outages=tuple(sorted({alias for progress in said for alias in progress.outages})),
                away=tuple(sorted({name for progress in said for name in progress.away})),
                waiting=None if counted is None else counted.waiting,
                retrying=None if counted is None else counted.retrying,
                dead=None if counted is None else counted.dead,
                oldest=None if counted is None else counted.oldest,
                workers=sum(worker.process is not None for worker in self._workers),
                seconds=now - self._started,
                ended=at_the_end,
            )
        )


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            pass
    return f"exit code {code}"


# -- in the worker's process ---------------------------------------------------------------------------------------


class _Pipe(logging.Handler):
    """What a worker says, one JSON text each. A pipe whose other end is gone takes it all."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe
        self._said = threading.Lock()

    def say(self, kind: str, value: Any) -> None:
        try:
            with self._said:
                self._pipe.send_bytes(json.dumps({"kind": kind, "value": value}, default=str).encode())
        except OSError:
            pass

    def say_progress(self, progress: Progress) -> None:
        self.say("progress", asdict(progress))

    def emit(self, record: logging.LogRecord) -> None:
        told = {
            name: value
            for name, value in vars(record).items()
            if isinstance(value, (str, int, float, bool)) and name not in ("args", "exc_text")
        }
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self.say("log", {**told, "msg": text})


def _work(make: Callable[[], Runner], pipe: Connection, number: int, every: float, reports: bool) -> None:
    """A worker's process. Ctrl-C and the end of a terminal go to the first process, which tells us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    said = _Pipe(pipe)
    _log_to(said)
    try:
        runner = make()
        _log_to(said)  # It may have set up the project's own logging, which is the first process's work.
        runner.liveness_file, runner.on_beat = None, lambda: said.say("beat", None)
        runner.counting, runner.every = number == 1, every
        if reports:
            runner.on_progress = said.say_progress
        threading.Thread(target=_await_stop, args=(pipe, runner), name="dispytch stop", daemon=True).start()
        code = runner.main()
    except ConfigurationError as exc:
        said.say("wrong", str(exc))
        code = WRONG
    sys.exit(code)


def _log_to(said: _Pipe) -> None:
    ours = logging.getLogger(_OURS)
    ours.handlers[:] = [said]
    ours.setLevel(logging.INFO)
    ours.propagate = ours.disabled = False


def _await_stop(pipe: Connection, runner: Runner) -> None:
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):
        pass  # The first process was killed.
    runner.stop()
