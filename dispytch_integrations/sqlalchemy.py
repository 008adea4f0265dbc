"""Events after the commit, for SQLAlchemy and SQLModel: sync and async sessions, and plain connections.

    from dispytch_integrations.sqlalchemy import bind, emit_on_commit

    Session = async_sessionmaker(engine)
    brokers = connect("kafka://localhost:9092")
    bind(Session, brokers)                                      # once; or a SQLAlchemyOutbox
    app = FastAPI(lifespan=emitter_lifespan(brokers))

    async with Session.begin() as session:
        session.add(order)
        emit_on_commit(session, OrderPlaced(order_id=order.id)) # sent if, and when, this block is committed

Without an outbox a process that is killed between the commit and the broker's confirmation loses the event; with
`bind(Session, SQLAlchemyOutbox(engine))` it is stored in the transaction itself, and never lost. The call is the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from contextvars import copy_context
from typing import Any, Literal, TypeVar, cast, overload

from dispytch_integrations._missing import is_missing
from dispytch_integrations.errors import MissingExtraError

try:
    from sqlalchemy import Connection
except ModuleNotFoundError as exc:
    if not is_missing(exc, "sqlalchemy"):
        raise  # present, but one of its own imports is missing
    raise MissingExtraError("dispytch_integrations.sqlalchemy", extra="sqlalchemy") from exc

try:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
except ImportError as exc:
    if "greenlet" not in str(exc):
        raise
    raise MissingExtraError(
        "dispytch_integrations.sqlalchemy", extra="sqlalchemy", package="greenlet, which sqlalchemy[asyncio] brings"
    ) from exc

from pydantic import BaseModel
from sqlalchemy.orm import Session, sessionmaker

from dispytch_integrations._overriding import overriding
from dispytch_integrations._sqlalchemy_binding import (
    AnyEmitter,
    AnySession,
    SessionFactory,
    Way,
    keep,
    place_of,
    way_of,
)
from dispytch_integrations._sqlalchemy_commit import Item, TransactionError, after_connection, after_session, install
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox
from dispytch_integrations._sqlalchemy_sending import Parcel
from dispytch_integrations._sqlalchemy_store import outbox_tables
from dispytch_integrations.events import EventBase

__all__ = [
    "SQLAlchemyOutbox",
    "TransactionError",
    "bind",
    "emit_on_commit",
    "outbox_tables",
    "session_dependency",
]

_S = TypeVar("_S", bound=Session)
_A = TypeVar("_A", bound=AsyncSession)

_MISSING: Any = object()
_DEPENDENCY = "_dispytch_dependency"


def bind(factory: SessionFactory, target: AnyEmitter | SQLAlchemyOutbox, *, wait: bool = False) -> None:
    """Say where the events of a factory's sessions go, once: `emit_on_commit(session, event)` then finds it.

    `factory`: a sessionmaker, async_sessionmaker, scoped_session, async_scoped_session, or a class of sessions (for
    `with sqlmodel.Session(engine)`: `bind(sqlmodel.Session, ...)`). The class nearest to a session's own counts.
    `target`: a SQLAlchemyOutbox, or an emitter: that of `connect()`, for sessions in threads, too; that of
    `connect_blocking()`, for them alone; or what these two return, which need not be open yet. Bound again, the new
    one counts.
    `wait`: False (default): the commit returns at once, and the event loop sends; the broker can change nothing about
    what is committed, so nobody need wait for it. At the brokers' stop, what is under way gets `shutdown_timeout`.
    True: the commit returns when the broker has confirmed, or refused; the connection is back in its pool meanwhile.
    It waits in `await session.commit()` and in threads, not where a synchronous session would block the event
    loop. An `EventEmitter(producer)` is always waited for: nobody else would.

    Raises TypeError for what is no factory, emitter or outbox.
    """
    keep(factory, target, wait)
    install()


@overload
def emit_on_commit(
    session: AnySession,
    event: EventBase,
    *,
    headers: Mapping[str, Any] | None = None,
    emitter: AnyEmitter | None = None,
    outbox: SQLAlchemyOutbox | Literal[False] | None = None,
) -> str: ...


@overload
def emit_on_commit(
    session: AnySession,
    event: Iterable[EventBase],
    *,
    headers: Mapping[str, Any] | None = None,
    emitter: AnyEmitter | None = None,
    outbox: SQLAlchemyOutbox | Literal[False] | None = None,
) -> list[str]: ...


def emit_on_commit(
    session: AnySession,
    event: Any = _MISSING,
    *,
    headers: Mapping[str, Any] | None = None,
    emitter: AnyEmitter | None = None,
    outbox: SQLAlchemyOutbox | Literal[False] | None = None,
) -> str | list[str]:
    """Send an event, or several in their order, once the session's transaction is committed; return its id, or theirs.

    Not awaited, in async code either. The message is made now, so that later changes of the event do not matter. With
    an outbox it is stored in the transaction, by its commit; without one it is sent when the transaction has ended and
    its connection is back in the pool. Rolled back (a savepoint, too), or closed without a commit, nothing is sent.
    A session that has no transaction begins one, as with `session.add`.

    A failure after the commit is logged as an error, told to the hooks' `failed`, and raises nothing: the work is
    committed. Where a session joins a transaction of its connection, the session's own commit counts. A commit that is
    cut (the connection breaks within it, or its task is cancelled) sends nothing, although the database may have
    committed: an outbox has no such gap.

    `session`: a Session, AsyncSession, scoped session or SQLModel's; or a Connection or AsyncConnection, after whose
    commit it is sent at once, without `wait`.
    `headers`: metadata beside the payload, of each event. `emitter`: instead of the bound one.
    `outbox`: stores it there; False: sends it after the commit, although an outbox is bound; None: the bound one.

    Raises ConfigurationError when there is no emitter, TransactionError when there is no transaction to wait for,
    RouteError, HeaderError, SerializationError and NotStartedError as `emit` (of several events together in one
    ExceptionGroup, and then none of them waits), TypeError for another order of arguments.
    When the outbox's table is missing, or the work went to another database, the commit raises ConfigurationError and
    can be rolled back.
    """
    place = _place(session, event)
    way = way_of(place, emitter, outbox)
    context = copy_context()
    several = _several(event)
    prepared = way.emitter.prepare_many(event, headers) if several else [way.emitter.prepare(event, headers)]
    items = [_item(Parcel(outlet, message, None, context, False), way) for outlet, message in prepared]
    if items:
        if isinstance(place, Connection):
            after_connection(place, items)
        else:
            after_session(place, items)
    for outlet, message in prepared:
        outlet.held(message)
    ids = [message.id for _, message in prepared]
    return ids if several else ids[0]


def _several(event: object) -> bool:
    # Iterable, and yet one thing: an event, or a mistake that is told as such.
    return isinstance(event, Iterable) and not isinstance(event, (BaseModel, str, bytes, Mapping))


def _item(parcel: Parcel, way: Way) -> Item:
    outlet = parcel.outlet
    if way.outbox is not None:
        record = way.outbox.record_of(parcel.message)
        if overriding.active:  # Sent after the commit, by memory.
            parcel = parcel._replace(loop=way.loop_of(outlet))
        return Item(parcel, way.outbox, record)
    return Item(parcel._replace(loop=way.loop_of(outlet), wait=way.wait_for(outlet)))


def _place(session: object, event: object) -> Session | Connection:
    place = None if isinstance(session, EventBase) else place_of(session)
    if place is None or event is _MISSING:
        if isinstance(session, EventBase) or event is _MISSING:
            raise TypeError(
                "emit_on_commit takes the session, then the event: emit_on_commit(session, event). Without a session "
                "it is Django's: from dispytch_integrations.django import emit_on_commit"
            )
        raise TypeError(
            f"emit_on_commit takes a session or a connection first, not a {type(session).__name__}: write "
            f"`with Session() as session: emit_on_commit(session, event)`"
        )
    return place


# -- FastAPI ---------------------------------------------------------------------------------------------------------


@overload
def session_dependency(factory: async_sessionmaker[_A]) -> Callable[[], AsyncGenerator[_A, None]]: ...


@overload
def session_dependency(factory: sessionmaker[_S]) -> Callable[[], Generator[_S, None, None]]: ...


def session_dependency(factory: Any) -> Callable[[], Any]:
    """A dependency that gives a session and commits it when the route has returned, before the response is sent.

        SessionDep = Annotated[AsyncSession, Depends(session_dependency(Session), scope="function")]

        @app.post("/orders")
        async def place_order(session: SessionDep) -> None: ...

    `scope="function"` (FastAPI 0.121) is what makes the commit come first. Without it FastAPI ends a dependency after
    the response, and after background tasks: the client would have its 200 when the commit fails, and a background
    task would look for rows that are not there yet. The same holds for a dependency of your own that commits after
    its `yield`.

    What the route raises, HTTPException as well, rolls back, and closes the session. A commit that fails is an error
    of the route: 500. For one factory it is the same function each time, so that
    `app.dependency_overrides[session_dependency(Session)]` finds it.

    Raises TypeError for what is no sessionmaker or async_sessionmaker.
    """
    if not isinstance(factory, (sessionmaker, async_sessionmaker)):
        raise TypeError(
            f"session_dependency takes a sessionmaker or async_sessionmaker, not a {type(factory).__name__}; write "
            f"session_dependency(async_sessionmaker(engine))"
        )
    # With the factory, so that it goes with it.
    return cast("Callable[[], Any]", vars(factory).setdefault(_DEPENDENCY, _dependency(cast("Any", factory))))


def _dependency(factory: sessionmaker[Any] | async_sessionmaker[Any]) -> Callable[[], Any]:
    if isinstance(factory, async_sessionmaker):

        async def get_async_session() -> AsyncGenerator[Any, None]:
            async with factory() as session:
                yield session
                await session.commit()

        return get_async_session

    def get_session() -> Generator[Any, None, None]:
        with factory() as session:
            yield session
            session.commit()

    return get_session
