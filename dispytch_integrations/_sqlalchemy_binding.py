"""Which emitter or outbox a session has: bound to what makes it, or given with the call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dispytch_integrations._broker import Broker
from dispytch_integrations._outlet import Outlet
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_sending import running_loop
from dispytch_integrations.blocking import BlockingBrokers, BlockingEmitter
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.emitter import EventEmitter
from dispytch_integrations.errors import ConfigurationError, NotStartedError, WrongLoopError

__all__ = ["AnyEmitter", "AnySession", "SessionFactory", "Way", "keep", "place_of", "session_class", "way_of"]

AnyEmitter = EventEmitter | BlockingEmitter | Brokers | BlockingBrokers
"""An emitter, or the brokers of connect() and connect_blocking(), whose emitter is looked up at each call."""
AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any] | Connection | AsyncConnection
"""What has a transaction that an event can wait for. SQLModel's sessions are SQLAlchemy's."""
SessionFactory = (
    sessionmaker[Any]
    | async_sessionmaker[Any]
    | scoped_session[Any]
    | async_scoped_session[Any]
    | type[Session]
    | type[AsyncSession]
)
"""What sessions come from."""


class _Binding(NamedTuple):
    target: AnyEmitter | SQLAlchemyOutbox
    wait: bool


_bindings: WeakKeyDictionary[type, _Binding] = WeakKeyDictionary()
_own_classes: WeakSet[type[AsyncSession]] = WeakSet()


class Way(NamedTuple):
    """How a call's messages go.

    `emitter`: prepares them; `outbox`: where they are stored, None: they are sent; `loop`: that of the connections,
    None: each broker's own, or the one that runs at the commit; `wait`: see `bind`.
    """

    emitter: EventEmitter
    outbox: SQLAlchemyOutbox | None
    loop: asyncio.AbstractEventLoop | None
    wait: bool

    def wait_for(self, outlet: Outlet) -> bool:
        """Is the commit to return only when this broker has answered?"""
        # Nobody stops a producer of the user's own, so nobody would wait for it later.
        return self.wait or not isinstance(outlet, Broker)

    def loop_of(self, outlet: Outlet) -> asyncio.AbstractEventLoop | None:
        """The loop of a broker's connection. Raises NotStartedError, WrongProcessError where there is none."""
        if not isinstance(outlet, Broker):
            loop = self.loop or running_loop()
            if loop is None:
                raise NotStartedError(
                    "an EventEmitter over a producer sends on the event loop that runs, and in this thread there is "
                    "none; give the emitter of connect(), of connect_blocking(), or a BlockingEmitterDep"
                )
            return self.loop
        if outlet.foreign:
            raise outlet._wrong_place()
        if outlet.state in ("new", "stopping", "stopped"):
            raise outlet._not_started()
        return outlet._loop


def keep(factory: object, target: object, wait: object) -> None:
    """Remember what a factory's sessions emit to. Raises TypeError for what is none."""
    cls = session_class(factory)
    if not isinstance(target, (EventEmitter, BlockingEmitter, Brokers, BlockingBrokers, SQLAlchemyOutbox)):
        given = f"the class {target.__name__}" if isinstance(target, type) else f"a {type(target).__name__}"
        raise TypeError(
            f"bind() takes an emitter or an outbox, not {given}; write bind(Session, connect('kafka://...')), "
            f"bind(Session, emitter) or bind(Session, SQLAlchemyOutbox(engine))"
        )
    if not isinstance(wait, bool):
        raise TypeError(f"wait= is True or False, not a {type(wait).__name__}")
    _bindings[cls] = _Binding(target, wait)


def session_class(factory: object) -> type[Session] | type[AsyncSession]:
    """The class of the sessions that a factory makes. Raises TypeError."""
    given = made = cast("Any", factory)
    if isinstance(factory, (scoped_session, async_scoped_session)):
        made = cast("Any", factory).session_factory
    if isinstance(cast("object", made), async_sessionmaker):
        made = _class_of_its_own(made)
    elif isinstance(cast("object", made), sessionmaker):
        made = made.class_
    if isinstance(made, type) and issubclass(made, (Session, AsyncSession)):
        return made
    if isinstance(made, (Session, AsyncSession)):
        raise TypeError(
            "bind() takes what makes sessions, and was given a session; write bind(sessionmaker, emitter), or "
            "emit_on_commit(session, event, emitter=emitter)"
        )
    raise TypeError(
        f"bind() takes a sessionmaker, async_sessionmaker, scoped_session, async_scoped_session or a class of sessions "
        f"first, not a {type(given).__name__}; write bind(Session, emitter)"
    )


def _class_of_its_own(factory: async_sessionmaker[Any]) -> type[AsyncSession]:
    """The class of its sessions, which no other factory has: sessionmaker makes one by itself, this one does not."""
    cls: type[AsyncSession] = factory.class_
    if cls not in _own_classes:
        cls = factory.class_ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
        _own_classes.add(cls)
    return cls


def place_of(session: object) -> Session | Connection | None:
    """The synchronous session or connection at the bottom of what was given; None: it is none."""
    if isinstance(session, (scoped_session, async_scoped_session)):
        session = cast("object", session())
    if isinstance(session, AsyncSession):
        return session.sync_session
    if isinstance(session, AsyncConnection):
        if session.sync_connection is None:
            raise NotStartedError(
                "the AsyncConnection is not open: write `async with engine.connect() as connection:` around"
            )
        return session.sync_connection
    return session if isinstance(session, (Session, Connection)) else None


def way_of(place: Session | Connection, emitter: object, outbox: object) -> Way:
    """How messages of this session go, with what was given at the call.

    Raises ConfigurationError when it has no emitter, or two that contradict each other; NotStartedError.
    """
    binding = _binding_of(place) if isinstance(place, Session) else None
    bound = None if binding is None else binding.target
    wait = binding is not None and binding.wait
    if outbox is None:
        outbox = bound if isinstance(bound, SQLAlchemyOutbox) else False
    if isinstance(outbox, SQLAlchemyOutbox):
        # One that no brokers have been given to is relayed elsewhere: any emitter of theirs prepares the messages.
        found = _resolved(emitter)[0] if emitter is not None and not outbox.attached else outbox.emitter
        if emitter is not None and _resolved(emitter)[0] is not found:
            raise ConfigurationError(
                "the emitter given is not the one that this outbox is relayed to; leave out emitter=, or give "
                "outbox=False to send by it after the commit"
            )
        return Way(found, outbox, None, wait)
    if outbox is not False:
        raise TypeError(f"outbox= is a SQLAlchemyOutbox, False or None, not a {type(outbox).__name__}")
    if emitter is None:
        emitter = bound.emitter if isinstance(bound, SQLAlchemyOutbox) else bound
    if emitter is None:
        what, how = (
            ("session", "bind(sessionmaker, emitter) once, or ")
            if isinstance(place, Session)
            else (
                "connection",
                "",
            )
        )
        raise ConfigurationError(
            f"this {what} has no emitter: write {how}emit_on_commit({what}, event, emitter=emitter)"
        )
    return Way(*_resolved(emitter), wait=wait and isinstance(place, Session))


def _resolved(emitter: object) -> tuple[EventEmitter, None, asyncio.AbstractEventLoop | None]:
    if isinstance(emitter, (Brokers, BlockingBrokers)):
        emitter = cast("object", emitter.emitter)
    if isinstance(emitter, EventEmitter):
        return emitter, None, None
    if not isinstance(emitter, BlockingEmitter):
        raise TypeError(f"emitter= is an EventEmitter or a BlockingEmitter, not a {type(emitter).__name__}")
    if running_loop() is not None:
        raise WrongLoopError(
            "a BlockingEmitter is for threads, and here an event loop runs; give emit_on_commit the async emitter: "
            "that of connect(), or an EmitterDep"
        )
    way = emitter._reach("emit_on_commit")
    return way.emitter, None, way.calls._loop


def _binding_of(session: Session) -> _Binding | None:
    for cls in _classes(session):
        found = _bindings.get(cls)
        if found is not None:
            return found
    return None


def _classes(session: Session) -> Iterator[type]:
    # The session of an AsyncSession is known by that one: hooks see the inner one alone.
    outer = async_session(session)
    if outer is not None:
        yield from type(outer).__mro__
    yield from type(session).__mro__
