"""The relay: from the rows of an outbox to the broker, at least once and in order per key.

One loop reads the oldest rows of the shards it has leases on, hands them to the producers, and deletes what was
confirmed. While one batch is on its way the next one is read. No transaction is open meanwhile.

    held up         what follows a message that failed, in its lane (broker, destination, key), waits for its next try;
                    which lanes these are is asked of the store while there are any
    outage          the broker does not answer: no attempt is counted, its rows are left alone until it does
    suspect         it answers, but the connection broke: what was under way travels apart (_suspects.py)
    dead            refused for good, or `max_attempts` times: its lane goes on without it
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dispytch_integrations._broker import Broker
from dispytch_integrations.errors import (
    ConfigurationError,
    DeliveryError,
    DispytchError,
    NotAttemptedError,
    PermanentFailure,
    ProducerTimeout,
    SerializationError,
)
from dispytch_integrations.message import Message
from dispytch_integrations.outbox._suspects import Suspects, Verdict, hints_at_outage
from dispytch_integrations.outbox._words import extra, first_line, told
from dispytch_integrations.outbox.leases import Leases
from dispytch_integrations.outbox.options import RelayOptions, needed_time
from dispytch_integrations.outbox.record import ENCODED, FORMAT, Record, message_of
from dispytch_integrations.outbox.store import Failure, OutboxStore, Query, Selection, State, Waiting

__all__ = ["Counts", "Relay"]

logger = logging.getLogger("dispytch_integrations.outbox")

_T = TypeVar("_T")

_SLOW = 0.25
"""Seconds after which the lanes of a delivery are left alone, so that others need not wait for it."""
_DELIVERIES = 8
"""How many deliveries may be under way to one broker."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two looks at a broker, or a database, that does not answer."""
_FIRST_POLL = 0.02
_FIRST, _RETRY, _SUSPECT = range(3)
"""What travels together: first attempts; later ones; those of which one may break the connection."""
_SETTLED_AT_ONCE = 500
"""Failures noted by one call: what it has noted stays noted, and leases are renewed in between."""
_HELD_UP_SECONDS = 1.0
"""How often the store is asked which lanes are held up."""
_GRACE = 1.0
"""Seconds beyond its timeout after which a delivery is cut that does not end."""
_FOREIGN_SECONDS = 60.0
"""How often rows are counted that are not for this relay, and what has expired is deleted."""


@dataclass(slots=True)
class Counts:
    """What a relay has done since it was made. `attempts_failed`: those a broker refused or did not confirm."""

    sent: int = 0
    attempts_failed: int = 0
    dead: int = 0
    fetches: int = 0
    settles: int = 0


class _Delivery:
    """Messages under way to one broker."""

    __slots__ = ("alias", "apart", "lanes", "messages", "outcomes", "records", "since", "task", "verdicts")

    def __init__(self, alias: str, records: list[Record], messages: list[Message], *, apart: bool) -> None:
        self.alias = alias
        self.records = records
        self.messages = messages
        self.lanes = {record.lane for record in records}
        self.apart = apart
        self.since = time.monotonic()
        self.outcomes: list[Exception | None] = []
        self.verdicts: list[Verdict | None] | None = None
        self.task: asyncio.Task[None]


class Relay:
    """Relays one outbox. `brokers`: by alias, started; `wake()` may be called from any thread.

        relay = Relay(store, brokers.brokers)
        await relay.run()                       # until stop()

    `name`: how it calls itself in leases and logs; default: host, process and a random part. `on_beat`: called after
    each renewal of the leases, with the relay: a liveness file is touched there.

    Raises ConfigurationError for brokers whose timeout does not fit into the lease.
    """

    def __init__(
        self,
        store: OutboxStore,
        brokers: Mapping[str, Broker],
        options: RelayOptions | None = None,
        *,
        name: str | None = None,
        on_beat: Callable[[Relay], None] | None = None,
    ) -> None:
        self.store = store
        self.options = options or RelayOptions()
        self.name = name or f"{socket.gethostname()[:100]}:{os.getpid()}:{os.urandom(4).hex()}"
        self.counts = Counts()
        self.last_error: str | None = None
        """What the database last answered, where it did not do what was asked; None: it does."""
        self._format = FORMAT if self.options.codec is None else ENCODED
        self._brokers = brokers
        self._on_beat = on_beat
        self._need = needed_time(brokers, self.options)
        self._leases = Leases(store, self.name, self.options.lease)
        self._pending: list[tuple[Record, Message]] = []
        self._deliveries: set[_Delivery] = set()
        self._sent: list[int] = []
        self._failed: list[Failure] = []
        self._held_ids: set[int] = set()  # pending, under way, or confirmed and not yet deleted
        self._blocked: dict[int, float] = {}  # lane: until when it is left alone, on the monotonic clock
        self._held_up: frozenset[int] = frozenset()  # lanes, as the store has told
        self._next_held_up: float | None = 0.0  # when it is asked again; None: there was none, and nothing has failed
        self._outages: dict[str, asyncio.Task[None]] = {}
        self._suspects = Suspects(self._need * 2)
        self._told: Waiting | None = None
        self._next_housekeeping = 0.0
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._woken = asyncio.Event()
        self._over = asyncio.Event()  # what runs beside the loop ends

    # -- from outside --------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to relay: look now. From any thread; harmless when the relay does not run."""
        loop = self._loop
        if loop is None or self._pid != os.getpid():  # A forked child has a copy of the loop, which never runs.
            return
        try:
            if asyncio.get_running_loop() is loop:
                self._woken.set()
                return
        except RuntimeError:
            pass
        try:
            loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            pass  # The loop is closed: another relay will find it.

    def stop(self) -> None:
        """Send nothing new; `run` returns when what is under way is settled and the leases are given back.

        Called before `run`, that returns at once.
        """
        self._stopping = True
        self.wake()

    @property
    def shards(self) -> int:
        """How many shards it holds a lease on."""
        return len(self._leases.held)

    @property
    def outages(self) -> Sequence[str]:
        """Aliases of the brokers that are waited for."""
        return sorted(self._outages)

    async def run(self) -> None:
        """Relay until `stop` is called. A database that does not answer is tried again, without end.

        Raises ConfigurationError at once when the tables are missing or the database cannot lease.
        """
        await self._run(until_empty=False)

    async def drain(self) -> None:
        """Relay what can be relayed now, and return: nothing is left, or what is left waits for its next try, for a
        broker that is down, or belongs to another relay. Raises as `run`, and what the database raises.
        """
        await self._run(until_empty=True)

    # -- the loop ------------------------------------------------------------------------------------------------

    async def _run(self, *, until_empty: bool) -> None:
        self._loop, self._pid, self._over = asyncio.get_running_loop(), os.getpid(), asyncio.Event()
        self._next_held_up = 0.0
        self._woken = asyncio.Event()
        self._outages.clear()
        try:
            await self._open(until_empty)
        except BaseException:
            await self._close()
            self._loop, self._stopping = None, False
            raise
        beside = {asyncio.create_task(self._beat(), name="dispytch relay leases")}
        if self.options.notify:
            beside.add(asyncio.create_task(self._listen(), name="dispytch relay listens"))
        try:
            await self._relay(until_empty)
        finally:
            self._over.set()
            await asyncio.wait(beside)
            await self._end()
            self._loop, self._stopping = None, False

    async def _open(self, once: bool) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._in_time(self.store.open())
                await self._in_time(self._leases.renew())
            except ConfigurationError:
                raise
            except Exception as exc:
                if once:
                    raise
                self._note_database(exc)
                await self._sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                if self._stopping:
                    return
            else:
                self._beat_now()
                return

    async def _beat(self) -> None:
        """Keep the leases, beside the loop."""
        while await self._goes_on(self._leases.interval * random.uniform(0.8, 1.0)):
            try:
                await self._in_time(self._leases.renew())
            except Exception as exc:
                self._note_database(exc)
            else:
                if not self._leases.held:  # Else the next rows that are read say so.
                    self.last_error = None
                self._beat_now()
                if self._leases.is_asked:
                    self._woken.set()

    async def _listen(self) -> None:
        """Be woken by the database. What is missed meanwhile is found by looking, as ever."""
        pause = 0.0
        while await self._goes_on(pause):
            started = time.monotonic()
            listening = asyncio.ensure_future(self.store.listen(self.wake))
            ending = asyncio.ensure_future(self._over.wait())
            try:
                await asyncio.wait({listening, ending}, return_when=asyncio.FIRST_COMPLETED)
                if self._over.is_set():
                    return
                await listening
            except ConfigurationError as exc:
                logger.error("the relay is not woken by the database: %s", exc)
                return
            except Exception as exc:
                logger.warning("the connection that listens is lost; trying again: %s", type(exc).__name__)
            finally:
                listening.cancel()
                ending.cancel()
                await asyncio.wait({listening, ending})
            lasted = time.monotonic() - started > _LONGEST_PAUSE
            pause = _FIRST_PAUSE if lasted else min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)

    async def _goes_on(self, seconds: float) -> bool:
        """Wait; False: the end has come meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return True
        return False

    async def _in_time(self, asked: Awaitable[_T]) -> _T:
        """What the database answers. Raises TimeoutError when that takes as long as a lease, after which it is of no
        use: the other end of the connection may be gone without a word.
        """
        async with asyncio.timeout(self.options.lease):
            return await asked

    def _beat_now(self) -> None:
        if self._on_beat is not None:
            try:
                self._on_beat(self)
            except Exception:
                logger.exception("on_beat failed")

    async def _relay(self, until_empty: bool) -> None:
        poll, pause = _FIRST_POLL, _FIRST_PAUSE
        while not self._stopping:
            try:
                self._woken.clear()
                self._collect()
                self._forget_lost()
                self._start_pending()
                await self._settle()
                await self._look_for_held_up()
                found, room = await self._in_time(self._fetch())
                await self._in_time(self._give_away())
                await self._in_time(self._keep_house())
                pause = _FIRST_PAUSE
            except Exception as exc:
                if until_empty:
                    raise
                self._note_database(exc)
                await self._sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            self._start_pending()
            if found:
                poll = _FIRST_POLL
                if found >= room and len(self._pending) < self.options.batch_size:
                    await asyncio.sleep(0)
                    continue
            elif until_empty and not self._deliveries and not self._pending:
                return
            await self._wait(poll)
            if not found:
                poll = min(poll * 1.5, self.options.poll_interval)

    async def _wait(self, poll: float) -> None:
        """Until a delivery is over, somebody wakes us, a lane may go on, or it is time to look."""
        tasks: set[asyncio.Task[Any]] = {delivery.task for delivery in self._deliveries}
        now = time.monotonic()
        limit = poll if not self._deliveries else min(max(poll, 0.05), _SLOW)
        if self._blocked:
            limit = min(limit, max(min(self._blocked.values()) - now, 0.001))
        if self._next_held_up is not None:
            limit = min(limit, max(self._next_held_up - now, 0.001))
        waking = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait({*tasks, waking}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waking.cancel()

    async def _sleep(self, seconds: float) -> None:
        if self._stopping:
            return
        try:
            async with asyncio.timeout(seconds * random.uniform(0.75, 1.25)):
                while not self._stopping:
                    self._woken.clear()
                    await self._woken.wait()
        except TimeoutError:
            pass

    # -- rows ----------------------------------------------------------------------------------------------------

    def _expect_held_up(self) -> None:
        if self._next_held_up is None:
            self._next_held_up = time.monotonic() + _HELD_UP_SECONDS

    async def _look_for_held_up(self) -> None:
        """Ask which lanes wait for a next try: at the start, when shards have come, and while there are any.

        What is read tells as well: this is only so that thousands of them do not fill each batch.
        """
        now = time.monotonic()
        if self._next_held_up is None or now < self._next_held_up:
            return
        told = await self._in_time(self.store.held_up(sorted(self._leases.held)))
        took = time.monotonic() - now
        self._held_up = frozenset(told.lanes)
        pause = 0.0 if told.seconds is None else min(max(told.seconds, 0.001), _HELD_UP_SECONDS)
        # Of a hundred thousand lanes the question takes long, and is not to be all that is done.
        self._next_held_up = None if told.seconds is None else now + took + max(pause, 5 * took)

    async def _fetch(self) -> tuple[int, int]:
        """Read the next rows; return how many came, and for how many there was room."""
        now = time.monotonic()
        for lane in [lane for lane, until in self._blocked.items() if until <= now]:
            del self._blocked[lane]
        slow = set[int]()
        for delivery in self._deliveries:
            if now - delivery.since > _SLOW:
                slow |= delivery.lanes
        if slow:
            self._forget(lambda record: record.lane in slow)
        # What a slow broker cannot take yet must not fill the batch of the others.
        full = {alias for alias, count in self._under_way().items() if count >= _DELIVERIES}
        if full:
            self._forget(lambda record: record.broker in full)
        room = self.options.batch_size - len(self._pending)
        shards = self._leases.usable(self._need)
        brokers = [alias for alias in self._brokers if alias not in self._outages and alias not in full]
        if room <= 0 or not shards or not brokers:
            return 0, 1
        query = Query(
            shards=sorted(shards),
            brokers=brokers,
            format=self._format,
            limit=room,
            not_ids=sorted(self._held_ids),
            not_lanes=sorted(self._held_up.union(slow, self._blocked)),
        )
        fetched = await self.store.fetch(query)
        self.last_error = None
        self.counts.fetches += 1
        for record in fetched.records:
            if record.lane in self._blocked:
                continue
            if record.next_try_ms > fetched.now_ms:
                self._block(record, (record.next_try_ms - fetched.now_ms) / 1000)
                self._expect_held_up()
                continue
            try:
                message = message_of(record, self.options.codec)
            except SerializationError as exc:
                self._give_up(record, exc)
                continue
            self._pending.append((record, message))
            self._held_ids.add(record.id)
        return len(fetched.records), room

    def _start_pending(self) -> None:
        """Send what waits and whose lane is free; retries travel apart, so that they hold up nobody else.

        Suspects travel apart from everything else of their broker.
        """
        if not self._pending:
            return
        busy = set[int]()
        for delivery in self._deliveries:
            busy |= delivery.lanes
        groups: dict[tuple[str, int], list[tuple[Record, Message]]] = {}
        waiting: list[tuple[Record, Message]] = []
        closed = busy  # Behind one that waits, all of its lane wait.
        began: dict[int, int] = {}
        usable = self._leases.usable(self._need)
        suspects = self._suspects
        for item in self._pending:
            record = item[0]
            lane, kind = record.lane, _RETRY if record.attempts > 0 else _FIRST
            if suspects and suspects.group_of(record):
                kind = _SUSPECT
            if lane not in closed and (record.shard not in usable or (lane in began and (kind or began[lane]))):
                closed.add(lane)
            if lane in closed:
                waiting.append(item)
                continue
            began[lane] = kind
            groups.setdefault((record.broker, kind), []).append(item)
        under_way = {delivery.alias: delivery.apart for delivery in self._deliveries}
        counts = self._under_way()
        for (alias, kind), items in groups.items():
            apart = kind == _SUSPECT
            if (
                counts[alias] >= _DELIVERIES
                or under_way.get(alias)
                or (apart and alias in under_way)
                or (not apart and (alias, _SUSPECT) in groups)
            ):
                waiting += items
                continue
            if apart:
                size = suspects.group_of(items[0][0])
                items, rest = items[:size], items[size:]
                waiting += rest
            delivery = _Delivery(alias, [item[0] for item in items], [item[1] for item in items], apart=apart)
            delivery.task = asyncio.create_task(self._deliver(delivery), name=f"dispytch relay to {alias}")
            self._deliveries.add(delivery)
            counts[alias] += 1
        waiting.sort(key=_by_id)
        self._pending = waiting

    def _under_way(self) -> Counter[str]:
        """How many deliveries are under way to which broker."""
        return Counter(delivery.alias for delivery in self._deliveries)

    async def _deliver(self, delivery: _Delivery) -> None:
        broker = self._brokers[delivery.alias]
        try:
            async with asyncio.timeout(self._need + _GRACE):
                delivery.outcomes = await broker.deliver_in_order(delivery.messages)
        except TimeoutError:
            told = f"the producer did not return within {self._need + _GRACE:g} s, which is beyond its timeout"
            delivery.outcomes = [ProducerTimeout(told)] * len(delivery.messages)
        except Exception as exc:
            # What hinders all of them: a client that is closed, or a bug of a producer.
            delivery.outcomes = [exc] * len(delivery.messages)
        if len(delivery.outcomes) != len(delivery.messages):
            told = f"{len(delivery.outcomes)} outcomes for {len(delivery.messages)} messages: a bug of the producer"
            delivery.outcomes = [DeliveryError(told)] * len(delivery.messages)
        if any(hints_at_outage(error) for error in delivery.outcomes):
            if await self._answers(broker):
                delivery.verdicts = self._suspects.judge(delivery.records, delivery.outcomes)
            else:
                self._pause(delivery.alias, delivery.outcomes)
                delivery.outcomes = [
                    NotAttemptedError() if hints_at_outage(error) else error for error in delivery.outcomes
                ]
        self._woken.set()

    def _collect(self) -> None:
        """Note what became of the deliveries that are over."""
        for delivery in [delivery for delivery in self._deliveries if delivery.task.done()]:
            self._deliveries.discard(delivery)
            if delivery.task.cancelled():  # At the end; what is confirmed is settled all the same.
                delivery.outcomes = [NotAttemptedError() if error else None for error in delivery.outcomes]
            if not delivery.outcomes:
                self._held_ids.difference_update(record.id for record in delivery.records)
                continue
            verdicts = delivery.verdicts
            for index, (record, error) in enumerate(zip(delivery.records, delivery.outcomes, strict=True)):
                if error is None:
                    self._sent.append(record.id)
                    if self._suspects:
                        self._suspects.clear(record.id)
                else:
                    self._failed_once(record, error, None if verdicts is None else verdicts[index])

    def _failed_once(self, record: Record, error: Exception, verdict: Verdict | None) -> None:
        if isinstance(error, NotAttemptedError) or verdict in ("again", "later"):
            if verdict == "later":
                pause = min(_FIRST_PAUSE * 2 ** min(self._suspects.strikes(record), 10), _LONGEST_PAUSE)
                self._block(record, pause * random.uniform(0.75, 1.25))
            self._held_ids.discard(record.id)
            self._forget_lane(record.lane)
            return
        self.counts.attempts_failed += 1
        attempts = record.attempts + 1
        if isinstance(error, PermanentFailure) or attempts >= self.options.max_attempts:
            self._give_up(record, error)
            return
        doubled = self.options.backoff * 2.0 ** min(attempts - 1, 1000)  # More no float can hold.
        delay = min(doubled, self.options.max_backoff) * random.uniform(0.75, 1.25)
        logger.warning(
            "%s (id %s, to %s:%s) was not delivered, attempt %d of %d, next one in %.1f s: %s",
            *(record.type, record.event_id, record.broker, record.destination),
            *(attempts, self.options.max_attempts, delay, told(error)),
            extra=extra(record),
        )
        if record.ordering_key is not None:  # What is a lane of its own waits in the table alone.
            self._block(record, delay)
            self._expect_held_up()
        self._forget_lane(record.lane)
        self._failed.append(Failure(record.id, attempts, delay, told(error)))

    def _give_up(self, record: Record, error: Exception) -> None:
        self.counts.dead += 1
        self._suspects.clear(record.id)
        self._held_ids.add(record.id)
        logger.error(
            "%s (id %s, to %s:%s) is dead after %s: %s; see `outbox requeue` and `outbox discard`",
            *(record.type, record.event_id, record.broker, record.destination),
            *("one attempt" if record.attempts == 0 else f"{record.attempts + 1} attempts", told(error)),
            extra=extra(record),
        )
        self._failed.append(Failure(record.id, record.attempts + 1, None, told(error)))

    def _block(self, record: Record, seconds: float) -> None:
        """Leave a lane alone; after a while it is looked at again, since somebody may have requeued it."""
        self._blocked[record.lane] = time.monotonic() + min(seconds, _LONGEST_PAUSE)

    def _forget_lane(self, lane: int) -> None:
        """What follows a message that failed is read again, behind it."""
        self._forget(lambda record: record.lane == lane)

    def _forget_lost(self) -> None:
        new, held = self._leases.take_new(), self._leases.held
        if new:
            self._next_held_up = 0.0
        self._forget(lambda record: record.shard not in held or record.shard in new)

    def _forget(self, wanted: Callable[[Record], bool]) -> None:
        """Drop rows that wait in memory; they are in the table."""
        if not self._pending:
            return
        kept = [item for item in self._pending if not wanted(item[0])]
        if len(kept) < len(self._pending):
            self._held_ids.difference_update(item[0].id for item in self._pending if wanted(item[0]))
            self._pending = kept

    async def _settle(self) -> None:
        action: Literal["delete", "keep"] = "delete" if self.options.keep_sent is None else "keep"
        while self._sent or self._failed:
            sent, failed = self._sent, self._failed[:_SETTLED_AT_ONCE]
            # Kept until the database has done it: what it does not do is neither read again nor forgotten.
            await self._in_time(self.store.settle(sent, failed, action))
            self._sent, self._failed = self._sent[len(sent) :], self._failed[len(failed) :]
            self.counts.sent += len(sent)
            self.counts.settles += 1
            self._held_ids.difference_update(sent)
            self._held_ids.difference_update(failure.id for failure in failed)

    # -- outages -------------------------------------------------------------------------------------------------

    async def _answers(self, broker: Broker) -> bool:
        """Does the broker answer? Then it is the messages that have failed."""
        try:
            await broker.ping()
        except Exception:
            return False
        return True

    def _pause(self, alias: str, outcomes: Sequence[Exception | None]) -> None:
        """Leave a broker's rows alone until it answers."""
        if alias in self._outages:
            return
        error = next(error for error in outcomes if hints_at_outage(error))
        logger.warning(
            "broker %r does not answer; its events wait in the outbox: %s", alias, told(error), extra={"broker": alias}
        )
        self._forget(lambda record: record.broker == alias)
        self._outages[alias] = asyncio.create_task(self._await_broker(alias), name=f"dispytch relay waits for {alias}")

    async def _await_broker(self, alias: str) -> None:
        pause = _FIRST_PAUSE
        broker = self._brokers[alias]
        while not self._stopping:
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            try:
                await broker.ping()
            except Exception:
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                logger.info("broker %r answers again", alias, extra={"broker": alias})
                break
        self._outages.pop(alias, None)
        self._woken.set()

    # -- leases, housekeeping, end -------------------------------------------------------------------------------

    def _busy_shards(self) -> frozenset[int]:
        return frozenset(
            record.shard
            for records in (
                (item[0] for item in self._pending),
                *((record for record in delivery.records) for delivery in self._deliveries),
            )
            for record in records
        )

    async def _give_away(self) -> None:
        if not self._leases.is_asked:
            return
        usable = self._leases.usable(0.0)
        self._forget(lambda record: record.shard not in usable)
        await self._leases.give_away(self._busy_shards())

    async def _keep_house(self) -> None:
        now = time.monotonic()
        if now < self._next_housekeeping:
            return
        self._next_housekeeping = now + _FOREIGN_SECONDS * random.uniform(0.75, 1.25)
        self._tell_foreign(await self.store.waiting(list(self._brokers), self._format))
        for state, seconds in ((State.SENT, self.options.keep_sent), (State.DEAD, self.options.keep_dead)):
            if seconds is not None:
                await self.store.discard(Selection(states=(state,), older_than=seconds))

    def _tell_foreign(self, waiting: Waiting) -> None:
        if waiting == self._told:
            return
        self._told = waiting
        for alias, count in waiting.unknown.items():
            logger.warning(
                "%d events wait for broker %r, which this relay does not have; it has %s",
                *(count, alias, ", ".join(repr(each) for each in self._brokers) or "none"),
            )
        if waiting.newer:
            logger.warning(
                "%d events were stored with a codec that this relay does not have, or by a newer version (format above "
                "%d): start it with the app's own codec (--app, or DISPYTCH_OUTBOX['CODEC']), or update it",
                *(waiting.newer, self._format),
            )

    async def _end(self) -> None:
        """Wait for what is under way, settle it, give the leases back."""
        waits = set(self._outages.values())  # They stay known: who looks at a relay that has ended sees what was down.
        for task in waits:
            task.cancel()
        self._forget(lambda record: True)
        if self._deliveries:
            await asyncio.wait({delivery.task for delivery in self._deliveries}, timeout=self._need)
            for delivery in self._deliveries:
                delivery.task.cancel()
            await asyncio.wait({delivery.task for delivery in self._deliveries}, timeout=1.0)
        if waits:
            await asyncio.wait(waits, timeout=1.0)
        busy = self._busy_shards() if any(not each.task.done() for each in self._deliveries) else frozenset[int]()
        self._collect()
        try:
            await self._settle()
            await self._in_time(self._leases.release(busy))
        except Exception as exc:
            logger.warning(
                "the relay could not give its leases back; they end in %.0f s: %s",
                *(self.options.lease, f"{type(exc).__name__}: {first_line(exc)}"),
            )
        finally:
            await self._close()

    async def _close(self) -> None:
        try:
            await self._in_time(self.store.close())
        except Exception as exc:  # There is nobody left to close it for.
            logger.debug("the outbox's connection did not close: %s", type(exc).__name__)

    def _note_database(self, error: Exception) -> None:
        text = told(error) if isinstance(error, DispytchError) else f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, TimeoutError) and not str(error):
            text = f"no answer within {self.options.lease:g} s"
        if text != self.last_error:
            logger.warning("the outbox in %s does not answer; trying again: %s", self.store.address, text)
        self.last_error = text


def _by_id(item: tuple[Record, Message]) -> int:
    return item[0].id
