"""Relays as a process: started, watched, stopped by a signal. Both command lines run it, and so may a script.

    outbox = SQLAlchemyOutbox(engine)
    runner = Runner(connect("kafka://localhost:9092"), {"default": outbox.store})
    sys.exit(runner.main())

What goes away is waited for: a broker or a database that does not answer never ends the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dispytch_integrations._broker import Broker
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._counted import counted
from dispytch_integrations.outbox._signals import on_signals
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import SHARDS
from dispytch_integrations.outbox.relay import Counts, Relay
from dispytch_integrations.outbox.store import OutboxStore, Selection, State, Stats

__all__ = ["AWAY", "DONE", "LEFT", "WRONG", "DatabaseAwayError", "Progress", "Runner"]

logger = logging.getLogger("dispytch_integrations.outbox")

DONE = 0
"""Exit code: stopped as asked; with `once`: all that was there is delivered."""
LEFT = 1
"""Exit code of `once`: something waits still (a broker is down, a retry, another relay's), or has died."""
WRONG = 2
"""Exit code: a wrong option or setting, tables that are missing, a broker that refuses the user."""
AWAY = 3
"""Exit code of `once`: the database does not answer."""

_CLOSING = 5.0
"""Seconds that a relay gets for its last statements, after what was under way."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_COUNTING = 60.0
"""Seconds after which a database that counts is given up: a connection may be dead without a word."""
_SHARE = 20
"""Counting the rows may take one part in so many of the time."""


_WRAPPED = re.compile(r"^\([\w.]+\) (?:<class '[\w.]+'>: )?")
"""How SQLAlchemy begins what a driver says: with its classes."""


class DatabaseAwayError(ConnectionError):
    """The database of an outbox does not answer; the message names it, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the relays of a process have done, and what is left in their databases.

    `sent`: events confirmed since the start; `rate`: of them, per second, since the last report; `failed`: attempts
    that a broker refused or did not confirm; `died`: events given up since the start. `shards` of `all_shards` are
    held. `outages`: aliases of brokers that are waited for; `away`: databases that do not answer.
    `waiting`, `retrying`, `dead`: rows in the tables; `oldest`: seconds that the oldest one has waited. None: not
    known, or nothing waits. `workers`: processes; `seconds`: since the start. `ended`: it is the last report, and
    `rate` is since the start; `left`: of `drain`, how many of the events that were there wait still.
    """

    sent: int
    rate: float
    failed: int
    died: int
    shards: int
    all_shards: int
    outages: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    waiting: int | None = None
    retrying: int | None = None
    dead: int | None = None
    oldest: float | None = None
    workers: int = 1
    seconds: float = 0.0
    ended: bool = False
    left: int | None = None


class Runner:
    """Runs one relay for each outbox, all to the same brokers, until it is stopped.

    `brokers`: made by `connect`, not started; its own outbox does not matter here. `stores`: by a name for logs, a
    function that makes the outbox's store (`SQLAlchemyOutbox.store`); each is called for the relay, and once more for
    the counts of `on_progress`. `options`: of the relays; None: the defaults.
    `liveness_file`: touched whenever all relays have renewed their leases, which they do each quarter of
    `options.lease`; removed at the end; None: none. A file older than the lease tells of a process that hangs, or of a
    database that is away.
    `on_progress`: called with a Progress every `every` seconds, and at the end; None: nothing is counted.
    `on_beat`: called whenever the liveness file is touched. `on_end`: awaited at the end, to close what is the
    caller's.
    """

    def __init__(
        self,
        brokers: Brokers,
        stores: Mapping[str, Callable[[], OutboxStore]],
        options: RelayOptions | None = None,
        *,
        liveness_file: str | os.PathLike[str] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        every: float = 10.0,
        on_beat: Callable[[], None] | None = None,
        on_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if not stores:
            raise ConfigurationError("there is no outbox to relay: give a store for each, {'default': outbox.store}")
        self.brokers = brokers if brokers.outbox is None else brokers.for_relay()
        self._on_change = brokers.on_change
        self.stores = dict(stores)
        self.options = options or RelayOptions()
        self.liveness_file = None if liveness_file is None else Path(liveness_file)
        self.on_progress = on_progress
        self.every = every
        self.on_beat = on_beat
        self.on_end = on_end
        self.counting = True
        """Are the rows counted for `on_progress`? Of several workers one is enough."""
        self._relays: dict[str, Relay] = {}
        self._ended = Counts()
        self._beaten: set[str] = set()
        self._stats: dict[str, Stats | None] = {}
        self._left: int | None = None
        self._connected: set[str] = set()
        self._stopping = False
        self._stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = time.monotonic()
        self._reported = (self._started, 0)

    # -- from outside ----------------------------------------------------------------------------------------------

    def main(self, *, once: bool = False) -> int:
        """Run until SIGTERM, SIGINT or SIGHUP, or with `once` until nothing is left to do; return the exit code.

        0: done; 1: with `once`: something is left; 2: raised as ConfigurationError instead, for the caller to tell;
        3: with `once`, raised as DatabaseAwayError. The first signal lets what is under way be settled; the second one
        ends the process at once, with 128 and the signal's number: what was sent meanwhile is sent again.
        """
        with on_signals(self.stop, self._at_once):
            if not once:
                asyncio.run(self.run())
                return DONE
            left = asyncio.run(self.drain())
            return LEFT if left or self.counts.dead else DONE

    def stop(self) -> None:
        """Send nothing new; `run` returns once what is under way is settled. From any thread, and before the start."""
        self._stopping = True
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._stopped.set)
            except RuntimeError:
                pass  # It has ended.

    async def run(self) -> None:
        """Relay until `stop`. Raises ConfigurationError for settings and tables that are wrong."""
        await self._run(self._relay_on)

    async def drain(self) -> int:
        """Relay what can be relayed now; return how many of the events that were there wait still.

        Raises ConfigurationError as `run`, DatabaseAwayError when a database does not answer.
        """
        await self._run(self._drain)
        return self._left or 0

    @property
    def counts(self) -> Counts:
        """What all relays have done since the start."""
        total = Counts()
        for counts in (self._ended, *(relay.counts for relay in self._relays.values())):
            _add(total, counts)
        return total

    @property
    def relays(self) -> Mapping[str, Relay]:
        """The relays that run, by the name of their outbox."""
        return self._relays

    # -- the life of the process -------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        if self._stopping:
            self._stopped.set()
        self._started = time.monotonic()
        self._reported = (self._started, 0)
        self._ready_liveness()
        self.brokers.on_change = self._tell_connected
        beside: list[asyncio.Task[None]] = []
        try:
            # Not waited for: what a broker that is down should get waits in the outbox.
            await self.brokers.start(wait=False)
            try:
                if self.on_progress is not None:
                    if self.counting:
                        beside += [asyncio.create_task(self._count(name)) for name in self.stores]
                    beside.append(asyncio.create_task(self._report()))
                await work()
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
                await self.brokers.stop()
        finally:
            self._remove_liveness()
            if self.on_end is not None:
                await self.on_end()
            self._loop = None
        self._tell_progress(at_the_end=True)

    async def _relay_on(self) -> None:
        relaying = {asyncio.create_task(self._keep(name), name=f"dispytch relay {name}") for name in self.stores}
        watching = asyncio.create_task(self._watch_brokers())
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            done, _ = await asyncio.wait({*relaying, watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped in done:
                logger.info("stopping: what is under way is settled first")
        finally:
            self._stopping = True
            await self._end(relaying)
            for task in (watching, stopped):
                task.cancel()
            await asyncio.gather(watching, stopped, return_exceptions=True)
        for task in (*relaying, watching):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _end(self, relaying: set[asyncio.Task[None]]) -> None:
        """Stop the relays; one whose database hangs is left behind."""
        longest = max((broker.timeout or 0.0 for broker in self.brokers.brokers.values()), default=0.0)
        end = time.monotonic() + longest + _CLOSING
        pending = {task for task in relaying if not task.done()}
        while pending and time.monotonic() < end:
            for relay in self._relays.values():
                relay.stop()
            _, pending = await asyncio.wait(pending, timeout=0.2)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=1.0)

    async def _keep(self, name: str) -> None:
        """Run a relay until the end, another one where it fails for a reason that nobody has thought of."""
        pause = _FIRST_PAUSE
        while not self._stopping:
            started = time.monotonic()
            relay = self._make(name)
            try:
                await relay.run()
            except ConfigurationError:
                raise
            except Exception:
                logger.exception("the relay of %s failed; another one starts in about %.0f s", name, pause)
            _add(self._ended, self._relays.pop(name).counts)
            if not self._stopping:
                await self._sleep(pause * random.uniform(0.75, 1.25))
                pause = _FIRST_PAUSE if time.monotonic() - started > 60 else min(pause * 2, _LONGEST_PAUSE)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass

    def _make(self, name: str) -> Relay:
        relay = Relay(
            self.stores[name](), self.brokers.brokers, self.options, on_beat=lambda relay: self._beaten_by(name)
        )
        self._relays[name] = relay
        return relay

    async def _drain(self) -> None:
        stopping = asyncio.create_task(self._stop_draining())
        try:
            outcomes = await asyncio.gather(*(self._drain_one(name) for name in self.stores), return_exceptions=True)
        finally:
            stopping.cancel()
        errors = [error for error in outcomes if isinstance(error, BaseException)]
        errors += [error for broker in self.brokers.brokers.values() if (error := _mistake(broker)) is not None]
        errors.sort(key=lambda error: not isinstance(error, ConfigurationError))
        if errors:
            raise errors[0]
        self._left = sum(count for count in outcomes if isinstance(count, int))

    async def _stop_draining(self) -> None:
        await self._stopped.wait()
        while True:
            for relay in self._relays.values():
                relay.stop()
            await asyncio.sleep(0.2)

    async def _drain_one(self, name: str) -> int:
        """How many of the rows that were there at the start wait still."""
        relay = self._make(name)
        store = relay.store
        try:
            await relay.drain()
            await store.open()
            try:
                if self.on_progress is not None:
                    self._stats[name] = await store.stats()
                waited = time.monotonic() - self._started
                return await store.count(Selection(states=(State.WAITING,), older_than=waited))
            finally:
                await store.close()
        except ConfigurationError:
            raise
        except Exception as exc:
            raise DatabaseAwayError(f"{store.address} does not answer: {told(exc)}") from exc

    # -- brokers -----------------------------------------------------------------------------------------------------

    async def _watch_brokers(self) -> None:
        """Raise the ConfigurationError of a broker that would refuse us for ever."""
        connecting = {broker._connecting for broker in self.brokers.brokers.values() if broker._connecting is not None}
        while connecting:
            _, connecting = await asyncio.wait(connecting, return_when=asyncio.FIRST_COMPLETED)
            for broker in self.brokers.brokers.values():
                error = _mistake(broker)
                if error is not None:
                    raise error
        await self._stopped.wait()

    def _tell_connected(self, broker: Broker) -> None:
        """Until it is connected: then the broker itself tells of outages."""
        if self._on_change is not None:
            self._on_change(broker)
        if broker.alias in self._connected:
            return
        if broker.state == "up":
            self._connected.add(broker.alias)
            logger.info("connected to broker %r (%s)", broker.alias, broker.backend.address)
        elif broker.state == "down":
            logger.warning(
                "broker %r (%s) is down, its events wait in the outbox: %s",
                *(broker.alias, broker.backend.address, broker.last_error),
            )

    # -- alive, and what it does -------------------------------------------------------------------------------------

    def _ready_liveness(self) -> None:
        if self.liveness_file is None:
            return
        try:
            self.liveness_file.unlink(missing_ok=True)  # That of a process that was killed.
            with self.liveness_file.open("x"):
                pass
            self.liveness_file.unlink()
        except OSError as exc:
            raise ConfigurationError(
                f"the liveness file {self.liveness_file} cannot be written: {exc.strerror}; give a path in a directory "
                f"that is there"
            ) from exc

    def _beaten_by(self, name: str) -> None:
        self._beaten.add(name)
        if len(self._beaten) < len(self.stores):
            return
        self._beaten.clear()
        if self.liveness_file is not None:
            self.liveness_file.touch()
        if self.on_beat is not None:
            self.on_beat()

    def _remove_liveness(self) -> None:
        if self.liveness_file is not None:
            try:
                self.liveness_file.unlink(missing_ok=True)
            except OSError as exc:
                logger.warning("the liveness file %s was not removed: %s", self.liveness_file, exc.strerror)

    def _at_once(self) -> None:
        self._remove_liveness()

    async def _count(self, name: str) -> None:
        """Count the rows now and then, over a connection of its own: the relay need not wait for it."""
        store = self.stores[name]()
        try:
            while True:
                started = time.monotonic()
                try:
                    async with asyncio.timeout(_COUNTING):
                        self._stats[name] = counted[name] = await store.stats()
                except Exception:
                    self._stats[name] = None  # The relay tells why.
                    counted.pop(name, None)
                await asyncio.sleep(max(self.every, (time.monotonic() - started) * _SHARE))
        finally:
            counted.pop(name, None)
            with suppress(Exception):  # The database is gone, and so is the connection.
                async with asyncio.timeout(1.0):
                    await store.close()

    async def _report(self) -> None:
        await asyncio.sleep(min(self.every, 0.5))
        while True:
            self._tell_progress()
            await asyncio.sleep(self.every)

    def _tell_progress(self, *, at_the_end: bool = False) -> None:
        if self.on_progress is None:
            return
        now, counts = time.monotonic(), self.counts
        since, before = (self._started, 0) if at_the_end else self._reported
        known = [stats for stats in self._stats.values() if stats is not None]
        complete = len(known) == len(self.stores)
        self._reported = (now, counts.sent)
        self._show(
            Progress(
                sent=counts.sent,
                rate=(counts.sent - before) / max(now - since, 0.001),
                failed=counts.attempts_failed,
                died=counts.dead,
                shards=sum(relay.shards for relay in self._relays.values()),
                all_shards=SHARDS * len(self.stores),
                outages=tuple(sorted({alias for relay in self._relays.values() for alias in relay.outages})),
                away=tuple(name for name, relay in self._relays.items() if relay.last_error is not None),
                waiting=sum(stats.waiting for stats in known) if complete else None,
                retrying=sum(stats.retrying for stats in known) if complete else None,
                dead=sum(stats.dead for stats in known) if complete else None,
                oldest=max((stats.oldest for stats in known if stats.oldest is not None), default=None),
                seconds=now - self._started,
                ended=at_the_end,
                left=self._left,
            )
        )

    def _show(self, progress: Progress) -> None:
        """A terminal that was closed, or who no longer reads us, does not end the relay."""
        if self.on_progress is not None:
            try:
                self.on_progress(progress)
            except Exception:
                self.on_progress = None
                logger.exception("progress is shown no more")


def told(error: BaseException) -> str:
    """What a driver says, on one line. Its statements and their parameters, which may be a payload, come after it."""
    first = _WRAPPED.sub("", (str(error).splitlines() or [""])[0])[:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _mistake(broker: Broker) -> ConfigurationError | None:
    task = broker._connecting
    if task is None or not task.done() or task.cancelled():
        return None
    error = task.exception()
    if not isinstance(error, ConfigurationError):
        return None
    return ConfigurationError([f"broker {broker.alias!r}: {problem}" for problem in error.problems])


def _add(total: Counts, counts: Counts) -> None:
    total.sent += counts.sent
    total.attempts_failed += counts.attempts_failed
    total.dead += counts.dead
    total.fetches += counts.fetches
    total.settles += counts.settles
