"""The emitter of a Django project: the blocking emitter, with async twins, signals, and emits after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, cast, overload

from asgiref.sync import iscoroutinefunction, sync_to_async
from pydantic import BaseModel

from dispytch_integrations._blocking_way import PING_SECONDS, Failed, Prepared, Way, confirmed_of, longest_timeout
from dispytch_integrations._outlet import Outlet
from dispytch_integrations.blocking import BlockingEmitter
from dispytch_integrations.django._after_commit import after_commit, after_write
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._receivers import send
from dispytch_integrations.django._storing import store_after_write, store_on_commit
from dispytch_integrations.django._suppress import held_back
from dispytch_integrations.django.signals import event_emitted, event_failed
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import DispytchError, ProducerTimeout, WrongLoopError
from dispytch_integrations.events import EventBase, event_id
from dispytch_integrations.message import Message

__all__ = ["Emitter"]


class Emitter(BlockingEmitter):
    """Emits events to the brokers of DISPYTCH. `get_emitter()` and `request.emitter` give you one.

    `alias`: the broker that takes all its events; None: each event's own, by its route and `__broker__`.

    Methods with an `a` are for async code. Any thread and task may use one emitter; it is connected at its first use
    in each process.
    """

    def __init__(self, alias: str | None = None) -> None:
        self.alias = alias
        self._on_timeout = None

    # -- sync ----------------------------------------------------------------------------------------------------

    def emit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        """Send one event; return when the broker has confirmed it.

        `headers`: metadata beside the payload, str to str (numbers, UUIDs, dates, dicts become text).

        Raises ProducerTimeout when the confirmation does not come in time (the event may have been delivered),
        UnroutableError when nobody takes it, BrokerUnavailableError during an outage, RouteError or HeaderError for a
        value that cannot be sent, SettingsError when DISPYTCH is wrong, WrongLoopError where an event loop runs.
        """
        held = held_back()
        if held is not None:
            held.add(event)
            return
        super().emit(event, headers=headers)

    def emit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """Send many events at once; return when the broker has confirmed them all.

        Events of one ordering key keep their order. All are prepared before the first is sent: when one cannot be
        prepared, none is sent. `headers` go with each.

        Raises one ExceptionGroup with the error of each event that failed; each has a note that names its event.
        """
        held = held_back()
        if held is not None:
            for event in events:
                held.add(event)
            return
        super().emit_many(events, headers=headers)

    # -- async ---------------------------------------------------------------------------------------------------

    async def aemit(self, event: EventBase, *, headers: Mapping[str, Any] | None = None) -> None:
        """`emit` for async code: the event loop goes on meanwhile. Raises what `emit` raises."""
        held = held_back()
        if held is not None:
            held.add(event)
            return
        way = await self._areach()
        prepared = [way.emitter.prepare(event, headers)]
        failed = await self._adeliver(way, prepared)
        for outlet, message, error in failed:
            await self._areport(way, outlet, message, error)

    async def aemit_many(self, events: Iterable[EventBase], *, headers: Mapping[str, Any] | None = None) -> None:
        """`emit_many` for async code. Raises what `emit_many` raises."""
        held = held_back()
        if held is not None:
            for event in events:
                held.add(event)
            return
        way = await self._areach()
        prepared = way.emitter.prepare_many(events, headers)
        if not prepared:
            return
        failures: list[Exception] = []
        for outlet, message, error in await self._adeliver(way, prepared):
            try:
                await self._areport(way, outlet, message, error)
            except Exception as exc:
                exc.add_note(repr(message))
                failures.append(exc)
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(prepared)} events were not confirmed", failures)

    async def aping(self, *, timeout: float | None = None) -> dict[str, DispytchError | None]:
        """`ping` for async code."""
        way = await self._areach()
        return await way.calls.arun(lambda: way.emitter.ping(timeout=timeout), limit=timeout or PING_SECONDS)

    # -- after the commit ----------------------------------------------------------------------------------------

    @overload
    def emit_on_commit(
        self,
        event: EventBase,
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> str: ...

    @overload
    def emit_on_commit(
        self,
        event: Iterable[EventBase],
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> list[str]: ...

    def emit_on_commit(
        self,
        event: Any,
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> str | list[str]:
        """Send an event, or several in their order, once the open transaction is committed; return its id, or theirs.

        The message is made now, so that later changes of the event do not matter. Rolled back (a savepoint, too),
        nothing is sent.

        With the outbox (`dispytch_integrations.django.outbox` in INSTALLED_APPS) it is stored now, by one statement in
        the open transaction; a relay sends it, whatever becomes of this process. Without a transaction it is stored
        in autocommit, and is safe when this returns: on `using`, else in the database that your router gives for
        OutboxEvent. An event id that is stored already is not stored again. What becomes of it is told where the relay
        runs (here with EMBEDDED), by the signals `event_emitted` and `event_failed`. `outbox`: False: send as without.

        Without the outbox the message is handed to the event loop after the commit, and the request goes on; other
        callbacks of `transaction.on_commit` run after that: one that raises takes no event away. Without a transaction
        it is handed over at once. A failure after the commit is logged and sent as the signal `event_failed`, and
        raises nothing: the request is committed. A process that is killed between the commit and the
        confirmation loses the event.

        `using`: alias of the *database*; None: the one with an open transaction. `require_transaction`: raise when no
        transaction is open; None: the setting DISPYTCH_REQUIRE_TRANSACTION, by default no.

        Raises TransactionError when several databases have a transaction open and none is named, or a named one has
        none while another has, or autocommit is off outside of an atomic block, or the database has no outbox;
        RouteError, HeaderError, SettingsError as `emit`, WrongLoopError in async code, and NotStartedError with
        `outbox=False` where another process relays and DIRECT_EMITS is not set.
        """
        if _several(event):
            return self._many_on_commit(cast("Iterable[EventBase]", event), using, require_transaction, headers, outbox)
        held = held_back()
        if held is not None:
            held.add(event)
            return event_id(event)
        emitter, stores = self._prepares(outbox)
        prepared = emitter.prepare(event, headers)
        (store_on_commit if stores else after_commit)([prepared], using, require_transaction)
        return prepared[1].id

    def _many_on_commit(
        self,
        events: Iterable[EventBase],
        using: str | None,
        require_transaction: bool | None,
        headers: Mapping[str, Any] | None,
        outbox: bool,
    ) -> list[str]:
        held = held_back()
        if held is not None:
            listed = list(events)
            for event in listed:
                held.add(event)
            return [event_id(event) for event in listed]
        emitter, stores = self._prepares(outbox)
        prepared = emitter.prepare_many(events, headers)
        if prepared:
            (store_on_commit if stores else after_commit)(prepared, using, require_transaction)
        return [message.id for _, message in prepared]

    def _emit_after_write(self, events: Sequence[EventBase], database: str, outbox: bool) -> None:
        """`emit_on_commit` of what a signal tells: the write was made on this database, in a transaction or without."""
        held = held_back()
        if held is not None:
            for event in events:
                held.add(event)
            return
        emitter, stores = self._prepares(outbox)
        prepared = [emitter.prepare(event) for event in events]
        if prepared:
            (store_after_write if stores else after_write)(prepared, database)

    @overload
    async def aemit_on_commit(
        self,
        event: EventBase,
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> str: ...

    @overload
    async def aemit_on_commit(
        self,
        event: Iterable[EventBase],
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> list[str]: ...

    async def aemit_on_commit(
        self,
        event: Any,
        using: str | None = None,
        require_transaction: bool | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        outbox: bool = True,
    ) -> str | list[str]:
        """`emit_on_commit` for async code: it runs in the thread where Django's connections live."""
        emit = cast("Callable[..., str | list[str]]", self.emit_on_commit)
        return await sync_to_async(emit)(event, using, require_transaction, headers=headers, outbox=outbox)

    # -- what becomes of them ------------------------------------------------------------------------------------

    def _observe(self, confirmed: Sequence[Prepared], failed: Sequence[Failed]) -> None:
        for _, message in confirmed:
            send(event_emitted, type(message.event), **_arguments(message))
        for _, message, error in failed:
            send(event_failed, type(message.event), error=error, **_arguments(message))

    async def _adeliver(self, way: Way, prepared: Sequence[Prepared]) -> Sequence[Failed]:
        failed = await way.calls.arun(lambda: way.emitter.attempt_many(prepared), limit=longest_timeout(prepared))
        for _, message in confirmed_of(prepared, failed):
            if event_emitted.has_listeners(type(message.event)):
                await event_emitted.asend_robust(type(message.event), **_arguments(message))
        for _, message, error in failed:
            await event_failed.asend_robust(type(message.event), error=error, **_arguments(message))
        return failed

    async def _areport(self, way: Way, outlet: Outlet, message: Message, error: Exception) -> None:
        callback = self._on_timeout or way.emitter.timeout_callback(outlet)
        if callback is None or message.event is None or not isinstance(error, ProducerTimeout):
            raise error
        if iscoroutinefunction(callback):  # pyright: ignore[reportDeprecated]  # before 3.12 it alone knows Django's mark
            await callback(message.event)
            return
        # It may use the ORM, which is not for the event loop's thread.
        result = await sync_to_async(callback)(message.event)
        if isawaitable(result):
            await result

    # -- where they go -------------------------------------------------------------------------------------------

    def _prepares(self, outbox: bool) -> tuple[EventEmitter, bool]:
        """What prepares an event that waits for a commit, and whether it is stored; that needs no connection."""
        if not outbox or connections.outbox() is None:
            return self._reach("emit_on_commit").emitter, False
        _refuse_loop("emit_on_commit")
        brokers = connections.loaded()
        return (brokers.emitter if self.alias is None else brokers.emitter_to(self.alias)), True

    def _reach(self, method: str) -> Way:
        _refuse_loop(method)
        return self._open_way()

    async def _areach(self) -> Way:
        if connections.session is None:
            # The first use in this process imports the client library and reads the settings.
            return await sync_to_async(self._open_way, thread_sensitive=False)()
        return self._open_way()

    def _open_way(self) -> Way:
        session = connections.reach()
        emitter = session.brokers.emitter if self.alias is None else session.brokers.emitter_to(self.alias)
        return Way(emitter, session.calls)


def _refuse_loop(method: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise WrongLoopError(
        f"{method}() was called where an event loop is running, and would block it: write `await a{method}(...)`"
    )


def _several(event: Any) -> bool:
    # Iterable, and yet one thing: an event, or a mistake that is told as such.
    return isinstance(event, Iterable) and not isinstance(event, (BaseModel, str, bytes, Mapping))


def _arguments(message: Message) -> dict[str, Any]:
    return {"event": message.event, "message": message, "alias": message.broker, "after_commit": False}
