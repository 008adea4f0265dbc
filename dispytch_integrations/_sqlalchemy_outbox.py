"""The outbox of an app that uses SQLAlchemy: where its events are stored, and whether it relays them itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from dispytch_integrations._overriding import overriding
from dispytch_integrations._sqlalchemy_store import (
    AsyncStore,
    OnSQLAlchemy,
    SyncStore,
    address_of,
    check,
    insert_of,
    require_room,
    store_of,
)
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import ConfigurationError, NotStartedError
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import Record, record_of
from dispytch_integrations.outbox.relay import Relay

__all__ = ["SQLAlchemyOutbox"]

logger = logging.getLogger("dispytch_integrations.outbox")

_PATIENCE = 10.0
"""Seconds that a start waits for the database's answer."""


@dataclass(slots=True)
class _Attached:
    brokers: Brokers
    relay: Relay | None = None
    running: asyncio.Task[None] | None = None


class SQLAlchemyOutbox:
    """Stores events in the transaction that made them true, and relays them to the broker.

        outbox = SQLAlchemyOutbox(engine)
        bind(Session, outbox)
        app = FastAPI(lifespan=emitter_lifespan("kafka://localhost:9092", outbox=outbox))

    `engine`: an Engine or AsyncEngine of PostgreSQL, MySQL, MariaDB or SQLite, in whose database `outbox_tables` are.
    `relay`: "embedded": this process relays, woken by its commits; it keeps one connection of an AsyncEngine's pool
    (with `notify` two), or beside an Engine's.
    "external": another process does (`dispytch-integrations relay`), and this one opens no broker connection.
    `schema`: that of the tables; None: the connection's default. `options`: of the relay; its `codec` and `notify` are
    the writer's, too.

    Raises ConfigurationError for a database that cannot hold an outbox, and for a pool that the embedded relay would
    use up.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        relay: Literal["embedded", "external"] = "embedded",
        *,
        schema: str | None = None,
        options: RelayOptions | None = None,
    ) -> None:
        if not isinstance(engine, (Engine, AsyncEngine)):
            raise ConfigurationError(
                f"SQLAlchemyOutbox takes an engine, not a {type(engine).__name__}; write "
                f"SQLAlchemyOutbox(create_async_engine('postgresql+asyncpg://...'))"
            )
        if options is not None and not isinstance(options, RelayOptions):
            raise ConfigurationError(
                f"options= takes RelayOptions, not a {type(options).__name__}; write options=RelayOptions(...)"
            )
        if relay not in ("embedded", "external"):
            raise ConfigurationError(f"relay={relay!r}: write relay='embedded' or relay='external'")
        self.engine = engine
        self.schema = schema
        self.options = options or RelayOptions()
        self.external = relay == "external"
        self._insert = insert_of(engine, schema, notify=self.options.notify)
        self._attached: list[_Attached] = []
        if not self.external:
            self.store()  # Says now what it could not do later.
            require_room(engine, 2 if self.options.notify else 1)

    def store(self) -> AsyncStore | SyncStore:
        """A store in this outbox's database, for counts and operations: `open` it, and `close` it."""
        return store_of(self.engine, self.schema)

    # -- with the brokers ----------------------------------------------------------------------------------------

    async def start(self, brokers: Brokers) -> None:
        """Take messages made for these brokers; embedded: relay to them. Called by `connect(..., outbox=...)`.

        Raises ConfigurationError when the tables are missing or a broker's timeout does not fit the lease.
        """
        attached = _Attached(brokers)
        if overriding.active:  # In a test nothing is relayed.
            self._attached.append(attached)
            return
        relay = None if self.external else Relay(self.store(), brokers.brokers, self.options)
        try:
            async with asyncio.timeout(_PATIENCE):
                await check(self.engine, self.schema)
        except ConfigurationError:
            raise
        except Exception as exc:
            # The relay tries again; the app itself will say what it thinks of a database that is away.
            logger.warning("the outbox in %s does not answer yet: %s", address_of(self.engine), type(exc).__name__)
        if relay is not None:
            attached.relay = relay
            attached.running = asyncio.create_task(relay.run(), name="dispytch embedded relay")
            attached.running.add_done_callback(_log_end)
        self._attached.append(attached)

    async def stop(self, brokers: Brokers) -> None:
        """End the relay to these brokers: what is under way is settled, its leases are given back."""
        for attached in [each for each in self._attached if each.brokers is brokers]:
            self._attached.remove(attached)
            if attached.relay is not None and attached.running is not None:
                attached.relay.stop()
                await asyncio.wait({attached.running})

    @property
    def relays(self) -> Sequence[Relay]:
        """The embedded relays that run in this process: one, or one for each event loop that runs the app."""
        return [each.relay for each in self._attached if each.relay is not None]

    # -- for sessions --------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Do brokers run in this process that it was given to?"""
        return bool(self._attached)

    @property
    def emitter(self) -> EventEmitter:
        """The emitter that prepares its messages. Raises NotStartedError before the start."""
        last = self._attached[-1:]  # In one step: another thread may stop it.
        if not last:
            raise NotStartedError(
                "this SQLAlchemyOutbox knows no brokers: give it to emitter_lifespan(..., outbox=outbox) or "
                "connect(..., outbox=outbox), and emit after its start (a TestClient needs `with TestClient(app)`); "
                "where another process relays, emit_on_commit(session, event, emitter=emitter) knows them, too"
            )
        return last[0].brokers.emitter

    def record_of(self, message: Message) -> Record:
        """A message as it is stored. Raises HeaderError, RouteError, SerializationError for what cannot be."""
        return record_of(message, self.options.codec)

    def insert(self, connection: Connection, records: Sequence[Record]) -> None:
        """Store records over a connection, in its transaction; an event id that is there stays as it is."""
        on = OnSQLAlchemy(connection)
        for sql, parameters in self._insert(records):
            on.run(sql, parameters)

    def take_out(self, connection: Connection, records: Sequence[Record]) -> None:
        """For tests: delete the rows of records again, over the same connection."""
        on = OnSQLAlchemy(connection)
        for record in records:
            sql = f"delete from {self._insert.table} where event_id = :event_id"  # noqa: S608 - a name of ours
            on.run(sql, {"event_id": record.event_id})

    def committed(self) -> None:
        """Records were committed: wake the embedded relay. From any thread."""
        for attached in tuple(self._attached):
            if attached.relay is not None:
                attached.relay.wake()


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the embedded relay has ended: %s", error, exc_info=error)
