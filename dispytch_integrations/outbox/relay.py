"""The relay: from the rows of an outbox to the broker, at least once and in order per key.

One loop reads the oldest rows of the shards it has leases on, hands them to the producers, and deletes what was
confirmed. While one batch is on its way the next one is read. No transaction is open meanwhile.

    held up         what follows a message that failed, in its lane (broker, destination, key), waits for its next try
                    (_lanes.py)
    outage          the broker does not answer: no attempt is counted, its rows are left alone until it does
                    (_outages.py)
    suspect         it answers, but the connection broke: what was under way travels apart (_suspects.py)
    dead            refused for good, or `max_attempts` times: its lane goes on without it

One class, and longer than most, since one loop changes all that it holds: rows, deliveries, what is to be settled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
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
from dispytch_integrations.outbox._deliveries import SLOW, Delivery, Item, full_brokers, next_deliveries, slow_lanes
from dispytch_integrations.outbox._housekeeping import Housekeeping
from dispytch_integrations.outbox._lanes import Lanes
from dispytch_integrations.outbox._listening import goes_on, listen
from dispytch_integrations.outbox._outages import Outages
from dispytch_integrations.outbox._suspects import Suspects, Verdict, hints_at_outage
from dispytch_integrations.outbox._waking import Waking
from dispytch_integrations.outbox._words import extra, first_line, told
from dispytch_integrations.outbox.leases import Leases
from dispytch_integrations.outbox.options import RelayOptions, needed_time
from dispytch_integrations.outbox.record import ENCODED, FORMAT, Record, message_of
from dispytch_integrations.outbox.store import Failure, OutboxStore, Query

__all__ = ["Counts", "Relay"]

logger = logging.getLogger("dispytch_integrations.outbox")

_T = TypeVar("_T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two attempts of which the first has failed: at the database, or at a message that takes nothing."""
_FIRST_POLL = 0.02
_SETTLED_AT_ONCE = 500
"""Failures noted by one call: what it has noted stays noted, and leases are renewed in between."""
_GRACE = 1.0
"""Seconds beyond its timeout after which a delivery is cut that does not end."""


@dataclass(slots=True)
class Counts:
    """What a relay has done since it was made. `attempts_failed`: those a broker refused or did not confirm."""

    sent: int = 0
    attempts_failed: int = 0
    dead: int = 0
    fetches: int = 0
    settles: int = 0


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
        self._pending: list[Item] = []
        self._deliveries: set[Delivery] = set()
        self._sent: list[int] = []
        self._failed: list[Failure] = []
        self._held_ids: set[int] = set()  # pending, under way, or confirmed and not yet deleted
        self._lanes = Lanes()
        self._outages = Outages(brokers, self.wake)
        self._suspects = Suspects(self._need * 2)
        self._housekeeping = Housekeeping(store, brokers, self.options)
        self._stopping = False
        self._waking = Waking()
        self._over = asyncio.Event()  # what runs beside the loop ends

    # -- from outside --------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to relay: look now. From any thread; harmless when the relay does not run."""
        self._waking.wake()

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
        return self._outages.aliases

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
        self._over = asyncio.Event()
        self._waking.begin()
        self._lanes.ask_now()
        self._outages.forget()
        try:
            await self._open(until_empty)
        except BaseException:
            await self._close()
            self._waking.end()
            self._stopping = False
            raise
        beside = {asyncio.create_task(self._beat(), name="dispytch relay leases")}
        if self.options.notify:
            beside.add(asyncio.create_task(listen(self.store, self.wake, self._over), name="dispytch relay listens"))
        try:
            await self._relay(until_empty)
        finally:
            self._over.set()
            await asyncio.wait(beside)
            await self._end()
            self._waking.end()
            self._stopping = False

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
        while await goes_on(self._over, self._leases.interval * random.uniform(0.8, 1.0)):
            try:
                await self._in_time(self._leases.renew())
            except Exception as exc:
                self._note_database(exc)
            else:
                if not self._leases.held:  # Else the next rows that are read say so.
                    self.last_error = None
                self._beat_now()
                if self._leases.is_asked:
                    self._waking.event.set()

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
                self._waking.event.clear()
                self._collect()
                self._forget_lost()
                self._start_pending()
                await self._settle()
                await self._look_for_held_up()
                found, room = await self._in_time(self._fetch())
                await self._in_time(self._give_away())
                await self._in_time(self._housekeeping.keep(self._format))
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
        limit = poll if not self._deliveries else min(max(poll, 0.05), SLOW)
        limit = self._lanes.wait(limit, now)
        waking = asyncio.ensure_future(self._waking.event.wait())
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
                    self._waking.event.clear()
                    await self._waking.event.wait()
        except TimeoutError:
            pass

    # -- rows ----------------------------------------------------------------------------------------------------

    async def _look_for_held_up(self) -> None:
        now = time.monotonic()
        if self._lanes.to_be_asked(now):
            self._lanes.learn(await self._in_time(self.store.held_up(sorted(self._leases.held))), now)

    async def _fetch(self) -> tuple[int, int]:
        """Read the next rows; return how many came, and for how many there was room."""
        now = time.monotonic()
        self._lanes.free(now)
        slow = slow_lanes(self._deliveries, now)
        if slow:
            self._forget(lambda record: record.lane in slow)
        # What a slow broker cannot take yet must not fill the batch of the others.
        full = full_brokers(self._deliveries)
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
            not_lanes=self._lanes.left_alone(slow),
        )
        fetched = await self.store.fetch(query)
        self.last_error = None
        self.counts.fetches += 1
        for record in fetched.records:
            if record.lane in self._lanes.blocked:
                continue
            if record.next_try_ms > fetched.now_ms:
                self._lanes.block(record.lane, (record.next_try_ms - fetched.now_ms) / 1000)
                self._lanes.ask_soon()
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
        """Send what waits and whose lane is free."""
        if not self._pending:
            return
        usable = self._leases.usable(self._need)
        started, self._pending = next_deliveries(self._pending, self._deliveries, usable, self._suspects)
        for delivery in started:
            delivery.task = asyncio.create_task(self._deliver(delivery), name=f"dispytch relay to {delivery.alias}")
            self._deliveries.add(delivery)

    async def _deliver(self, delivery: Delivery) -> None:
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
            if await self._outages.answers(delivery.alias):
                delivery.verdicts = self._suspects.judge(delivery.records, delivery.outcomes)
            else:
                self._pause(delivery)
                delivery.outcomes = [
                    NotAttemptedError() if hints_at_outage(error) else error for error in delivery.outcomes
                ]
        self._waking.event.set()

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
                self._lanes.block(record.lane, pause * random.uniform(0.75, 1.25))
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
            self._lanes.block(record.lane, delay)
            self._lanes.ask_soon()
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

    def _forget_lane(self, lane: int) -> None:
        """What follows a message that failed is read again, behind it."""
        self._forget(lambda record: record.lane == lane)

    def _forget_lost(self) -> None:
        new, held = self._leases.take_new(), self._leases.held
        if new:
            self._lanes.ask_now()
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

    def _pause(self, delivery: Delivery) -> None:
        """Leave the rows of a broker alone that does not answer."""
        error = next(error for error in delivery.outcomes if hints_at_outage(error))
        if self._outages.begin(delivery.alias, error):
            self._forget(lambda record: record.broker == delivery.alias)

    # -- leases, the end -------------------------------------------------------------------------------------------

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

    async def _end(self) -> None:
        """Wait for what is under way, settle it, give the leases back."""
        waits = self._outages.cancel()
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
