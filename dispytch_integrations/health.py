"""Is the app fit to serve? The state of its brokers and its outbox, for load balancers and for people.

    health = await check_health(emitter)            # of connect(), EmitterDep, get_emitter(request)
    health.ready                                    # bool
    health.as_dict()                                # for JSON

FastAPI has `health_router()`, Starlette `health_routes()`, Django `health_urls()`; all of them answer `/health/live`
and `/health/ready`. Synchronous code calls `check_health_blocking(brokers)` with what `connect_blocking` returned.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from dispytch_integrations._broker import Broker
from dispytch_integrations.blocking import BlockingBrokers, BlockingEmitter
from dispytch_integrations.brokers import Brokers, brokers_of
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import ConfigurationError, DispytchError, NotStartedError, WrongLoopError
from dispytch_integrations.outbox.store import OutboxStore

__all__ = [
    "BrokerHealth",
    "Health",
    "HealthCheck",
    "OutboxHealth",
    "ReadyOn",
    "check_health",
    "check_health_blocking",
]

logger = logging.getLogger(__name__)

ReadyOn = Literal["started", "broker"]
"""What readiness means: "started": the brokers were opened, and an outage later takes no process out of service;
"broker": each of them answers now."""

BrokerState = Literal["idle", "starting", "up", "degraded", "down", "elsewhere"]

_SILENT = 60.0
"""Seconds without a heartbeat of a relay after which waiting events are said to be nobody's."""
_GIVE_OUTBOX = "write connect(..., outbox=SQLAlchemyOutbox(engine))"
_OUTBOX_EVERY = 10.0
"""Seconds that an outbox's counts are used again: they read its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerHealth:
    """One broker.

    `state`: "idle" (opened at the first emit, which has not been), "starting" (the first connection is being made),
    "up" (answers), "degraded" (was up, and does not answer: emits fail at once, it is tried again), "down" (never
    reached since the start, or closed), "elsewhere" (another process relays the outbox, and this one is not connected).
    `since`: when it came into this state, as far as anybody has noticed. `last_error`: what happened last, without
    secrets; None: nothing yet, or it is up.
    """

    state: BrokerState
    transport: str
    address: str
    since: datetime
    last_error: str | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxHealth:
    """One outbox. `state`: "up"; "degraded": its database does not answer, or events wait and nobody relays them, or
    the oldest has waited longer than `max_age`.

    `oldest`: seconds that the oldest waiting event has waited; `heartbeat`: seconds since a relay last renewed its
    leases. None: there is none, or it is not known.
    """

    state: Literal["up", "degraded"]
    last_error: str | None = None
    waiting: int | None = None
    dead: int | None = None
    oldest: float | None = None
    heartbeat: float | None = None
    relays: int | None = None
    """How many relays hold leases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The answer. `status`: "up"; "degraded": the app serves, and something does not answer; "down": it is not ready.

    `brokers`: by alias; of several emitters "name.alias". `outboxes`: by the name of their database.
    """

    status: Literal["up", "degraded", "down"]
    brokers: Mapping[str, BrokerHealth] = field(default_factory=dict[str, BrokerHealth])
    outboxes: Mapping[str, OutboxHealth] = field(default_factory=dict[str, OutboxHealth])
    error: str | None = None
    """Why there is nobody to ask, as where no lifespan has run, or no outbox; None: there is."""

    @property
    def ready(self) -> bool:
        """May requests be sent to this process?"""
        return self.status != "down"

    def as_dict(self, *, details: bool = True) -> dict[str, Any]:
        """For JSON; without `details` the status alone: addresses and errors are not for strangers."""
        if not details:
            return {"status": self.status}
        told: dict[str, Any] = {"status": self.status}
        if self.error is not None:
            told["error"] = self.error
        told["brokers"] = {alias: _fields(broker) for alias, broker in self.brokers.items()}
        if self.outboxes:
            told["outboxes"] = {name: _fields(outbox) for name, outbox in self.outboxes.items()}
        return told


def _fields(part: BrokerHealth | OutboxHealth) -> dict[str, Any]:
    values = {name: getattr(part, name) for name in part.__dataclass_fields__}
    return {
        name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
        for name, value in values.items()
    }


Stores = Mapping[str, Callable[[], OutboxStore]]
"""By a name, what makes the store of an outbox."""


class _Seen(NamedTuple):
    """What a broker's state was found to be, since when, and when that was asked: seconds of `time.time()`."""

    state: str
    since: float
    asked: float


class HealthCheck:
    """Asks brokers and outboxes; one object for all requests, so that they share what is under way.

        check = HealthCheck(ready_on="broker")
        health = await check(emitter)

    `ready_on`: see ReadyOn. `timeout`: seconds for all of it: what has not answered by then does not answer.
    With "broker", a connection that is still being made is waited for, too.
    `outbox`: ask the outbox of the emitters' brokers as well, at most each ten seconds. It makes no process unready,
    which could do nothing about it; where there is none the answer's `error` says so. `max_age`: seconds after which a
    waiting event is late; None: it may wait.

    Raises ConfigurationError for options that are none.
    """

    def __init__(
        self,
        *,
        ready_on: ReadyOn = "started",
        timeout: float = 1.0,
        outbox: bool = False,
        max_age: float | None = None,
    ) -> None:
        if ready_on not in ("started", "broker"):
            raise ConfigurationError(f"ready_on={ready_on!r}: write ready_on='started' or ready_on='broker'")
        given: Any
        for name, given in (("timeout", timeout), ("max_age", max_age)):
            is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
            if not (is_number and given > 0) and not (given is None and name == "max_age"):
                raise ConfigurationError(f"{name}={given!r}: write a number of seconds above 0")
        if max_age is not None and not outbox:
            raise ConfigurationError(f"max_age={max_age!r} is about the outbox; write outbox=True, max_age={max_age!r}")
        self.ready_on: ReadyOn = ready_on
        self.timeout = timeout
        self.outbox = outbox
        self.max_age = max_age
        self._told = False
        self._pings: WeakKeyDictionary[Broker, asyncio.Task[str | None]] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[Broker, _Seen] = WeakKeyDictionary()
        self._counting: dict[str, asyncio.Task[OutboxHealth]] = {}
        self._counted: dict[str, tuple[float, OutboxHealth]] = {}

    async def __call__(self, *emitters: EventEmitter | Brokers) -> Health:
        """Ask the brokers of these emitters, or what `connect` returned, on their event loop.

        Raises ConfigurationError for no emitter at all, for what is none, and for one over a producer of yours, whose
        connection we do not manage.
        """
        return await self.of({str(number): emitter for number, emitter in enumerate(emitters)})

    async def of(self, emitters: Mapping[str, EventEmitter | Brokers]) -> Health:
        """The same for emitters that have names: of several, a broker is called "name.alias"."""
        if not emitters:
            raise ConfigurationError(
                "nothing was given whose health could be told; write check_health(emitter), with the emitter of "
                "connect(), EmitterDep or get_emitter(request)"
            )
        found = {name: _brokers(emitter) for name, emitter in emitters.items()}
        brokers = {
            alias if len(found) == 1 else f"{name}.{alias}": broker
            for name, one in found.items()
            for alias, broker in one.brokers.items()
        }
        stores: dict[str, Callable[[], OutboxStore]] = {}
        for one in found.values() if self.outbox else ():
            outbox: Any = one.outbox
            if hasattr(outbox, "store"):
                stores[outbox.store().address] = outbox.store
        return await self.ask(brokers, stores, opened=all(one.started for one in found.values()))

    async def ask(
        self, brokers: Mapping[str, Broker], stores: Stores, *, opened: bool = True, advice: str = _GIVE_OUTBOX
    ) -> Health:
        """For integrations: ask these. `opened`: were the brokers started, and not stopped? `advice`: what to write
        where the outbox is asked for and there is none."""
        if not opened:
            return Health(status="down", error="the brokers were not opened, or are closed")
        states, counts = await asyncio.gather(
            asyncio.gather(*(self._state(broker) for broker in brokers.values())),
            asyncio.gather(*(self._count(name, make) for name, make in stores.items())),
        )
        return Health(
            status=self._status(states, counts),
            brokers=dict(zip(brokers, states, strict=True)),
            outboxes=dict(zip(stores, counts, strict=True)),
            error=self._no_outbox(advice) if self.outbox and not stores else None,
        )

    def _no_outbox(self, advice: str) -> str:
        """A mistake and no outage: the status stays as it is. Logged, too, for those who see the status alone."""
        told = f"outbox=True, and there is no outbox to ask; {advice}, or leave outbox=True away"
        if not self._told:
            self._told = True
            logger.warning("%s", told)
        return told

    def _status(
        self, brokers: Iterable[BrokerHealth], outboxes: Iterable[OutboxHealth]
    ) -> Literal["up", "degraded", "down"]:
        states = {broker.state for broker in brokers}
        if self.ready_on == "broker" and not states <= {"up", "elsewhere"}:
            return "down"
        fine = states <= {"up", "idle", "elsewhere"} and all(outbox.state == "up" for outbox in outboxes)
        return "up" if fine else "degraded"

    # -- brokers -------------------------------------------------------------------------------------------------

    async def _state(self, broker: Broker) -> BrokerHealth:
        error: str | None = None
        state = _STATES[broker.state]
        if broker.elsewhere:
            state = "elsewhere"
        elif state == "up" or (state == "starting" and self.ready_on == "broker"):
            error = await self._ping(broker)  # It waits for the start.
            if error is None:
                state = "up"
            elif broker.was_up:
                state = "degraded"
            else:
                state, error = _STATES[broker.state], broker.last_error or error
        elif broker.state == "down":
            state, error = ("degraded" if broker.was_up else "down"), broker.last_error
        elif state != "idle":
            error = broker.last_error
        return BrokerHealth(
            state=state,
            transport=broker.backend.transport,
            address=broker.backend.address,
            since=datetime.fromtimestamp(self._since(broker, state), UTC),
            last_error=error,
            in_flight=broker.in_flight,
        )

    def _since(self, broker: Broker, state: str) -> float:
        """When the broker came into this state: a ping may tell of an outage, or of its end, before the broker has
        noticed it itself."""
        now, known = time.time(), self._seen.get(broker)
        noticed = broker.elsewhere or broker.state == "down" or _STATES[broker.state] == state
        if noticed and (known is None or broker.since > known.asked):
            since = broker.since
        else:
            since = known.since if known is not None and known.state == state else now
        self._seen[broker] = _Seen(state, since, now)
        return since

    async def _ping(self, broker: Broker) -> str | None:
        """What is wrong; None: it answers. Whoever asks meanwhile waits for the same answer."""
        task = self._pings.get(broker)
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._pings[broker] = asyncio.create_task(_answer(broker, self.timeout), name="dispytch health")
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.shield(task)
        except TimeoutError:
            return f"did not answer within {self.timeout:g} s"

    # -- outboxes ------------------------------------------------------------------------------------------------

    async def _count(self, name: str, make: Callable[[], OutboxStore]) -> OutboxHealth:
        when, counted = self._counted.get(name, (0.0, None))
        if counted is not None and monotonic() - when < _OUTBOX_EVERY:
            return counted
        task = self._counting.get(name)
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._counting[name] = asyncio.create_task(self._look(name, make()), name="dispytch health: outbox")
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.shield(task)
        except TimeoutError:
            return OutboxHealth(state="degraded", last_error=f"did not answer within {self.timeout:g} s")

    async def _look(self, name: str, store: OutboxStore) -> OutboxHealth:
        counted = await self._health_of(store)
        self._counted[name] = monotonic(), counted
        return counted

    async def _health_of(self, store: OutboxStore) -> OutboxHealth:
        try:
            # Longer than anybody waits for it: the next one who asks may find the answer.
            async with asyncio.timeout(max(self.timeout, _OUTBOX_EVERY)):
                try:
                    await store.open()
                    stats = await store.stats()
                finally:
                    await store.close()
        except DispytchError as exc:
            return OutboxHealth(state="degraded", last_error=str(exc))
        except Exception as exc:
            # Its text may hold what a database driver was given.
            return OutboxHealth(state="degraded", last_error=f"the database does not answer: {type(exc).__name__}")
        error: str | None = None
        if stats.waiting and (stats.heartbeat is None or stats.heartbeat > _SILENT):
            error = "events wait, and no relay runs"
        elif self.max_age is not None and stats.oldest is not None and stats.oldest > self.max_age:
            error = f"the oldest event has waited for {stats.oldest:.0f} s"
        return OutboxHealth(
            state="up" if error is None else "degraded",
            last_error=error,
            waiting=stats.waiting,
            dead=stats.dead,
            oldest=stats.oldest,
            heartbeat=stats.heartbeat,
            relays=len(stats.relays),
        )


_STATES: Mapping[str, BrokerState] = {
    "new": "idle",
    "starting": "starting",
    "up": "up",
    "down": "down",
    "stopping": "down",
    "stopped": "down",
}


async def _answer(broker: Broker, timeout: float) -> str | None:
    try:
        await broker.ping(timeout)
    except DispytchError as exc:
        return str(exc)
    return None


def _brokers(emitter: object) -> Brokers:
    if isinstance(emitter, EventEmitter):
        found = brokers_of(emitter)
        if found is None:
            raise ConfigurationError(
                "an EventEmitter over a producer does not manage its connection, whose health is not known; "
                "use connect()"
            )
        return found
    if isinstance(emitter, Brokers):
        return emitter
    if isinstance(emitter, (BlockingBrokers, BlockingEmitter)):
        raise ConfigurationError(
            "check_health asks on the event loop of an async emitter; for that of connect_blocking() write "
            "check_health_blocking(emitter)"
        )
    raise ConfigurationError(
        f"check_health asks an emitter that is open, not a {type(emitter).__name__}; write "
        f"`async with connect(...) as emitter: await check_health(emitter)`"
    )


async def check_health(
    *emitters: EventEmitter | Brokers,
    ready_on: ReadyOn = "started",
    timeout: float = 1.0,
    outbox: bool = False,
    max_age: float | None = None,
) -> Health:
    """Ask once; see HealthCheck, which many requests can share. Raises ConfigurationError."""
    return await HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age)(*emitters)


def check_health_blocking(
    brokers: BlockingBrokers | BlockingEmitter,
    *,
    ready_on: ReadyOn = "started",
    timeout: float = 1.0,
    outbox: bool = False,
    max_age: float | None = None,
) -> Health:
    """The same for what `connect_blocking` returned, or its emitter, from any thread where no event loop runs.

    Raises ConfigurationError, and WrongLoopError where an event loop runs.
    """
    check = HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age)
    if not isinstance(brokers, (BlockingBrokers, BlockingEmitter)):
        raise ConfigurationError(
            f"check_health_blocking asks what connect_blocking() returned, or its emitter, not a "
            f"{type(brokers).__name__}; for that of connect() write `await check_health(emitter)`"
        )
    _refuse_running_loop()
    try:
        if isinstance(brokers, BlockingBrokers):
            return brokers.ask(check, limit=timeout)
        emitter, calls = brokers._reach("check_health_blocking")
        return calls.run(lambda: check(emitter), limit=timeout)
    except NotStartedError as exc:
        return Health(status="down", error=str(exc))


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise WrongLoopError(
        "check_health_blocking() was called where an event loop is running, and would block it: write "
        "`await check_health(emitter)` with the emitter of connect(), or go to a thread: "
        "`await asyncio.to_thread(check_health_blocking, brokers)`"
    )
