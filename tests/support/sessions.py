"""What sessions of SQLAlchemy may do with events: one list of scenarios, for those that are sent and those stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Integer, String, create_engine, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from dispytch_integrations import EventBase
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import emit_on_commit
from tests.support.outboxes import Database

DRIVERS = [
    "sqlite+pysqlite",
    "sqlite+aiosqlite",
    "postgresql+psycopg",
    "postgresql+asyncpg",
    "mysql+pymysql",
    "mysql+asyncmy",
]
ASYNCHRONOUS = {"sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg_async", "mysql+asyncmy"}


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(String(50), default="")


class Placed(EventBase):
    __route__ = RedisStreamEventRoute(stream="orders")
    __ordering_key__ = "{key}"

    number: int
    key: str = "k"


def numbers(messages: Sequence[Message]) -> list[int]:
    return [Placed.model_validate_json(message.payload or b"").number for message in messages]


class Slow(MemoryProducer):
    """A broker that confirms when it is told to. `asked`: somebody has sent something."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.confirm = asyncio.Event()
        self.error: Exception | None = None

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        self.asked.set()
        await self.confirm.wait()
        if self.error is not None:
            return [self.error] * len(messages)
        return await super().deliver(messages, timeout=timeout)


def put_in(emitter: Any, producer: Producer) -> None:
    """Let the only broker of an emitter send through another producer."""
    [broker] = emitter._outlets.brokers.values()
    broker.producer = producer


@asynccontextmanager
async def session_factory(database: Database, driver: str, **options: Any) -> AsyncGenerator[tuple[Any, Any], None]:
    """A sessionmaker and its Engine, or an async_sessionmaker and its AsyncEngine; the table of orders is empty."""
    await asyncio.to_thread(_empty, database)
    if driver in ASYNCHRONOUS:
        async_engine = create_async_engine(database.url(driver), **options)
        try:
            yield async_sessionmaker(async_engine), async_engine
        finally:
            await async_engine.dispose()
    else:
        engine = create_engine(database.url(driver), **options)
        try:
            yield sessionmaker(engine), engine
        finally:
            engine.dispose()


def _empty(database: Database) -> None:
    Base.metadata.drop_all(database.engine)
    Base.metadata.create_all(database.engine)
    database.empty()


async def run(factory: Any, scenario: Callable[[Session], None]) -> None:
    """Run a scenario with a session: a synchronous one in a thread, as in a `def` route."""
    if isinstance(factory, async_sessionmaker):
        session: AsyncSession
        async with factory() as session:
            await session.run_sync(scenario)
        return

    def in_thread() -> None:
        with factory() as session:
            scenario(session)

    await asyncio.to_thread(in_thread)


class Undone(Exception):
    """What a block raises that is to be rolled back."""


def emit(session: Session, number: int) -> None:
    emit_on_commit(session, Placed(number=number))


def order(session: Session, number: int) -> None:
    session.add(Order(id=number))
    emit(session, number)


# -- scenarios: a session does something, and these events were committed ------------------------------------------


def commits(session: Session) -> None:
    order(session, 1)
    order(session, 2)
    session.commit()


def emits_without_work(session: Session) -> None:
    emit(session, 1)
    session.commit()


def rolls_back(session: Session) -> None:
    order(session, 1)
    session.flush()
    session.rollback()
    session.commit()


def closes_without_commit(session: Session) -> None:
    order(session, 1)
    session.flush()
    session.close()
    order(session, 2)
    session.commit()


def commits_by_block(session: Session) -> None:
    with session.begin():
        order(session, 1)


def raises_in_block(session: Session) -> None:
    with suppress(Undone), session.begin():
        order(session, 1)
        raise Undone


def releases_a_savepoint(session: Session) -> None:
    order(session, 1)
    with session.begin_nested():
        order(session, 2)
    order(session, 3)
    session.commit()


def rolls_a_savepoint_back(session: Session) -> None:
    order(session, 1)
    with suppress(Undone), session.begin_nested():
        order(session, 2)
        raise Undone
    order(session, 3)
    session.commit()


def begins_in_a_savepoint(session: Session) -> None:
    session.add(Order(id=9))
    with suppress(Undone), session.begin_nested():
        order(session, 1)
        raise Undone
    with session.begin_nested():
        order(session, 2)
    session.commit()


def releases_within_one_that_is_rolled_back(session: Session) -> None:
    order(session, 1)
    with suppress(Undone), session.begin_nested():
        with session.begin_nested():
            order(session, 2)
        order(session, 3)
        raise Undone
    order(session, 4)
    session.commit()


def rolls_back_within_one_that_is_released(session: Session) -> None:
    with session.begin_nested():
        order(session, 1)
        with suppress(Undone), session.begin_nested():
            order(session, 2)
            raise Undone
        order(session, 3)
    session.commit()


def rolls_back_around_a_released_one(session: Session) -> None:
    with session.begin_nested():
        order(session, 1)
    session.rollback()
    order(session, 2)
    session.commit()


def closes_a_savepoint_by_hand(session: Session) -> None:
    order(session, 1)
    savepoint = session.begin_nested()
    order(session, 2)
    session.flush()
    savepoint.rollback()
    order(session, 3)
    session.commit()


def meets_a_duplicate_in_a_savepoint(session: Session) -> None:
    order(session, 1)
    session.flush()
    with suppress(IntegrityError), session.begin_nested():
        session.connection().execute(insert(Order).values(id=2, text=""))
        emit(session, 2)
        session.connection().execute(insert(Order).values(id=1, text=""))
    order(session, 3)
    session.commit()


def meets_a_duplicate_at_the_commit(session: Session) -> None:
    order(session, 1)
    session.commit()
    session.expunge_all()
    order(session, 1)
    order(session, 2)
    with suppress(IntegrityError):
        session.commit()
    session.rollback()
    order(session, 3)
    session.commit()


def commits_the_root_with_a_savepoint_open(session: Session) -> None:
    root = session.begin()
    order(session, 1)
    session.begin_nested()
    order(session, 2)
    root.commit()


def commits_twice(session: Session) -> None:
    order(session, 1)
    session.commit()
    session.commit()
    order(session, 2)
    session.commit()


SCENARIOS: list[tuple[Callable[[Session], None], list[int]]] = [
    (commits, [1, 2]),
    (emits_without_work, [1]),
    (rolls_back, []),
    (closes_without_commit, [2]),
    (commits_by_block, [1]),
    (raises_in_block, []),
    (releases_a_savepoint, [1, 2, 3]),
    (rolls_a_savepoint_back, [1, 3]),
    (begins_in_a_savepoint, [2]),
    (releases_within_one_that_is_rolled_back, [1, 4]),
    (rolls_back_within_one_that_is_released, [1, 3]),
    (rolls_back_around_a_released_one, [2]),
    (closes_a_savepoint_by_hand, [1, 3]),
    (meets_a_duplicate_in_a_savepoint, [1, 3]),
    (meets_a_duplicate_at_the_commit, [1, 3]),
    (commits_the_root_with_a_savepoint_open, [1, 2]),
    (commits_twice, [1, 2]),
]


# -- the same with a plain connection ------------------------------------------------------------------------------


def uses_a_connection(connection: Connection, **given: Any) -> None:
    """Emit as `given` says; the numbers in USED are committed."""

    def emit(number: int) -> None:
        connection.execute(insert(Order).values(id=number, text=""))
        emit_on_commit(connection, Placed(number=number), **given)

    emit_on_commit(connection, Placed(number=0), **given)
    connection.commit()
    emit(1)
    connection.rollback()
    emit(2)
    emit(3)
    with suppress(Undone), connection.begin_nested():
        emit(4)
        with connection.begin_nested():
            emit(5)
        raise Undone
    with connection.begin_nested():
        emit(6)
    connection.commit()
    connection.commit()
    emit(7)
    connection.rollback()
    connection.execute(insert(Order).values(id=8, text=""))
    connection.commit()
    with connection.begin():
        emit(9)
    savepoint = (connection.begin(), connection.begin_nested())[1]
    emit(10)
    savepoint.rollback()
    emit(11)
    connection.commit()
    emit(12)


USED = [0, 2, 3, 6, 9, 11]
