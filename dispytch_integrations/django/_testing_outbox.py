"""The outbox in tests: relayed in the test's own thread, over its own connection, where its transaction can be seen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from django.db import connections as databases
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionDoesNotExist

from dispytch_integrations._blocking_way import Prepared
from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import Session, connections
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.outbox.embedded import tables_are_missing
from dispytch_integrations.django.outbox.store import OnDjango, missing_tables
from dispytch_integrations.errors import WrongLoopError
from dispytch_integrations.outbox._sql import EVENTS, INSERTED, Connection, SQLStore
from dispytch_integrations.outbox._sql_store import OutboxInSQL
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import Codec, Record, message_of
from dispytch_integrations.outbox.relay import Relay

__all__ = ["relay_outbox", "taken_out"]

_T = TypeVar("_T")

_MANY = 500


def relay_outbox(using: str | None = None) -> int:
    """Relay what is stored in the outbox, now and here; return how many events the brokers have confirmed.

        with emitted_events() as events:
            place_order()                           # a TestCase commits nothing
            assert relay_outbox() == 1
        events.assert_emitted(OrderPlaced, order_id=1)

    It is a real relay: order, retries and dead events are those of production. It works over the test's own
    connection, so inside a TestCase it finds what a commit would leave, and needs no commit. The brokers are those of
    DISPYTCH, in `override_brokers` and `emitted_events` memory.

    `using`: alias of one database; None: each of DISPYTCH_OUTBOX. In async code: `await sync_to_async(relay_outbox)()`.

    Raises SettingsError where the outbox is not installed or its tables are missing, WrongLoopError in async code.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise WrongLoopError(
            "relay_outbox() was called where an event loop is running: write `await sync_to_async(relay_outbox)()`"
        )
    settings = connections.outbox()
    if settings is None:
        raise SettingsError(
            "there is no outbox to relay: write INSTALLED_APPS += ['dispytch_integrations.django.outbox']"
        )
    conf.require(connections.settings().problems)
    session = connections.reach(direct=False)
    return sum(_relay(session, alias, settings.options) for alias in ([using] if using else settings.databases))


def _relay(session: Session, alias: str, options: RelayOptions) -> int:
    jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    relay = Relay(_StoreHere(alias, jobs), session.brokers.brokers, options)
    done = asyncio.run_coroutine_threadsafe(relay.drain(), session.opened.thread.loop)
    done.add_done_callback(lambda _: jobs.put(None))
    while (job := jobs.get()) is not None:
        job()
    done.result()
    return relay.counts.sent


class _StoreHere(OutboxInSQL):
    """A store whose relay runs on the brokers' event loop, and whose connection is that of the thread that waits."""

    def __init__(self, alias: str, jobs: SimpleQueue[Callable[[], None] | None]) -> None:
        try:
            self._connection = databases[alias]
        except ConnectionDoesNotExist:
            known = ", ".join(repr(each) for each in databases)
            raise SettingsError(f"there is no database {alias!r}; DATABASES has {known}") from None
        super().__init__(SQLStore(self._connection.vendor))
        self._jobs = jobs

    @property
    def address(self) -> str:
        return f"the test's database {self._connection.alias!r}"

    async def open(self) -> None:
        missing = await self._run(lambda: missing_tables(self._connection))
        if missing:
            raise SettingsError(tables_are_missing(self._connection.alias, missing))

    async def close(self) -> None:
        """It is the test's."""

    async def on_connection(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(lambda: function(OnDjango(self._connection)))

    async def _run(self, function: Callable[[], _T]) -> _T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except Exception as exc:
                loop.call_soon_threadsafe(partial(_settle, future, None, exc))
            else:
                loop.call_soon_threadsafe(partial(_settle, future, result))

        self._jobs.put(job)
        return await future


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None = None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def taken_out(connection: BaseDatabaseWrapper, prepared: Sequence[Prepared], codec: Codec | None) -> list[Prepared]:
    """Delete the rows of these messages, and return what a relay would send, with their events.

    What is not there any more was relayed, or is the same event a second time. The statements are not among those that
    a test counts (`assertNumQueries`): in production they are the relay's.
    """
    by_id = {message.id: (outlet, message) for outlet, message in prepared}
    ids, counted = list(by_id), len(connection.queries_log)
    on = OnDjango(connection)
    taken: list[Prepared] = []
    for start in range(0, len(ids), _MANY):
        some = {f"id_{number}": id_ for number, id_ in enumerate(ids[start : start + _MANY])}
        where = f"where event_id in ({', '.join(f':{name}' for name in some)})"
        rows = on.query(f"select {', '.join(INSERTED)} from {EVENTS} {where} order by id", some)  # noqa: S608
        for row in rows:
            columns: dict[str, Any] = dict(zip(INSERTED, row, strict=True))
            if columns["payload"] is not None:
                columns["payload"] = bytes(columns["payload"])
            outlet, stored = by_id[columns["event_id"]]
            message = message_of(Record(**columns), codec)
            message.event = stored.event
            taken.append((outlet, message))
        on.run(f"delete from {EVENTS} {where}", some)  # noqa: S608
    while len(connection.queries_log) > counted:
        connection.queries_log.pop()
    return taken
