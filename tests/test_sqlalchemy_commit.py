"""After the commit, with SQLAlchemy and SQLModel: an event goes out if, and when, its transaction is committed."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, assert_type

import pytest
import redis.asyncio
import sqlmodel
import sqlmodel.ext.asyncio.session
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import dispytch_integrations._sqlalchemy_sending as sending
from dispytch_integrations import EventEmitter, connect, event_id
from dispytch_integrations.blocking import BlockingEmitter, connect_blocking
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DispytchError,
    HeaderError,
    NotStartedError,
    RouteError,
    WrongLoopError,
)
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import TransactionError, bind, emit_on_commit, session_dependency
from dispytch_integrations.starlette import emitter_lifespan
from tests.apps.asgi import import_without
from tests.support.outboxes import Database, eventually, temporary_database
from tests.support.sessions import (
    ASYNCHRONOUS,
    DRIVERS,
    SCENARIOS,
    USED,
    Base,
    Order,
    Placed,
    Slow,
    Undone,
    emit,
    emits_without_work,
    numbers,
    order,
    put_in,
    run,
    session_factory,
    uses_a_connection,
)


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Database]]:
    with (
        temporary_database("postgresql") as postgresql,
        temporary_database("mysql") as mysql,
        temporary_database("sqlite", tmp_path_factory.mktemp("commit")) as sqlite,
    ):
        yield {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}


@pytest.fixture
def on(databases: dict[str, Database]) -> Callable[[str], Database]:
    return lambda driver: databases[driver.partition("+")[0]]


@pytest.fixture
async def emitter() -> AsyncIterator[EventEmitter]:
    async with connect("memory://") as emitter:
        yield emitter


def sent(emitter: EventEmitter) -> list[int]:
    producer = emitter.producer
    assert isinstance(producer, MemoryProducer)
    return numbers(producer.sent)


async def arrived(emitter: EventEmitter, expected: list[int]) -> None:
    """Wait until the events are there, and see that they are all."""
    await eventually(lambda: len(sent(emitter)) >= len(expected))
    await asyncio.sleep(0.01)
    assert sent(emitter) == expected


class Watch(Hook):
    def __init__(self) -> None:
        self.failures: list[tuple[Message, Exception]] = []

    def failed(self, message: Message, error: Exception) -> None:
        self.failures.append((message, error))


# -- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("scenario", "expected"), SCENARIOS, ids=lambda value: getattr(value, "__name__", None))
async def test_what_is_committed_goes_out_and_nothing_else(
    driver: str,
    scenario: Callable[[Session], None],
    expected: list[int],
    on: Callable[[str], Database],
    emitter: EventEmitter,
) -> None:
    """Consumers hear of what has happened, in its order, and never of what was undone."""
    async with session_factory(on(driver), driver) as (factory, _):
        bind(factory, emitter)
        await run(factory, scenario)
    await arrived(emitter, expected)


def _behind_the_commit(session: Session) -> None:
    session.add(Order(id=1))
    session.commit()
    emit(session, 1)


def _behind_the_commit_after_a_look(session: Session) -> None:
    session.add(Order(id=1))
    session.commit()
    session.scalars(select(Order)).all()
    emit(session, 1)


def _left_by_an_exception(session: Session) -> None:
    session.add(Order(id=1))
    session.flush()
    emit(session, 1)
    raise KeyError


def _rolled_back(session: Session) -> None:
    session.add(Order(id=1))
    emit(session, 1)
    emit(session, 2)
    session.rollback()


def _rolled_back_without_work(session: Session) -> None:
    emit(session, 1)
    session.rollback()


def _savepoint_rolled_back(session: Session) -> None:
    with session.begin_nested() as savepoint:
        emit(session, 1)
        savepoint.rollback()
    session.commit()


DROPPED = [
    # What the session does, what is told of it, and its level with a sync and with an async session.
    (_behind_the_commit, "closed without a commit", "WARNING", "WARNING"),
    (_behind_the_commit_after_a_look, "closed without a commit", "WARNING", "INFO"),
    (_left_by_an_exception, "closed without a commit", "INFO", "INFO"),
    (_rolled_back, "2 events (2 Placed) not emitted: its transaction was rolled back", "INFO", "INFO"),
    (_rolled_back_without_work, "its transaction was rolled back", "INFO", "INFO"),
    (_savepoint_rolled_back, "its savepoint was rolled back", "INFO", "INFO"),
]


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
@pytest.mark.parametrize(("scenario", "told", "level", "async_level"), DROPPED)
async def test_an_event_whose_commit_never_came_is_told_of(
    driver: str,
    scenario: Callable[[Session], None],
    told: str,
    level: str,
    async_level: str,
    on: Callable[[str], Database],
    emitter: EventEmitter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Called behind the commit, `emit_on_commit` would lose its event without a word."""
    caplog.set_level(logging.INFO, "dispytch_integrations.sqlalchemy")
    async with session_factory(on(driver), driver) as (factory, _):
        bind(factory, emitter)
        with suppress(KeyError):
            await run(factory, scenario)
    [record] = [record for record in caplog.records if record.name == "dispytch_integrations.sqlalchemy"]
    assert told in record.getMessage()
    assert record.levelname == (async_level if "+" in driver else level)
    assert vars(record)["event_type"] == "Placed"
    assert sent(emitter) == []


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
async def test_so_is_one_of_a_plain_connection(
    driver: str, on: Callable[[str], Database], emitter: EventEmitter, caplog: pytest.LogCaptureFixture
) -> None:
    """There SQLAlchemy makes no difference between rolled back and closed; what comes later is sent as ever."""
    caplog.set_level(logging.INFO, "dispytch_integrations.sqlalchemy")

    def behind_the_commit(connection: Any) -> None:
        connection.execute(text("select 1"))
        connection.commit()
        emit_on_commit(connection, Placed(number=1), emitter=emitter)
        connection.rollback()
        emit_on_commit(connection, Placed(number=2), emitter=emitter)
        connection.commit()

    database = on(driver)
    if "+" in driver:
        engine = create_async_engine(database.url(driver))
        async with engine.connect() as connection:
            await connection.run_sync(behind_the_commit)
        await engine.dispose()
    else:
        plain = create_engine(database.url(driver))
        with plain.connect() as connected:
            behind_the_commit(connected)
        plain.dispose()
    await arrived(emitter, [2])
    [told] = [record.getMessage() for record in caplog.records if record.name == "dispytch_integrations.sqlalchemy"]
    assert "rolled back, or closed without a commit" in told


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
async def test_async_sessions_of_every_kind(driver: str, on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """What the documentation of SQLAlchemy shows works, with both drivers for PostgreSQL."""
    database = on(driver)
    async with session_factory(database, "postgresql+asyncpg"):
        pass
    engine = create_async_engine(database.url(driver))
    factory = async_sessionmaker(engine)
    bind(factory, emitter)
    async with factory() as session:
        order(session.sync_session, 1)
        await session.commit()
        with suppress(Undone):
            async with session.begin_nested():
                emit_on_commit(session, Placed(number=2))
                raise Undone
        emit_on_commit(session, Placed(number=3))
        await session.commit()
        emit_on_commit(session, Placed(number=4))
        await session.rollback()
        emit_on_commit(session, Placed(number=5))
    async with factory.begin() as session:
        emit_on_commit(session, Placed(number=6))
    scoped = async_scoped_session(factory, asyncio.current_task)
    emit_on_commit(scoped, Placed(number=7))
    await scoped.commit()
    await scoped.remove()
    await engine.dispose()
    await arrived(emitter, [1, 3, 6, 7])


async def test_two_sessions_at_once_keep_their_events_apart(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """One request's rollback is not another one's."""
    async with session_factory(on("postgresql"), "postgresql+asyncpg") as (factory, _):
        bind(factory, emitter)
        async with factory() as one, factory() as other:
            order(one.sync_session, 1)
            order(other.sync_session, 2)
            await one.flush()
            await other.commit()
            await one.rollback()
    await arrived(emitter, [2])


async def test_the_message_is_made_at_the_call(on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """After the commit attributes are expired, and the event may have been changed: what was said counts."""
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        bind(factory, emitter)
        async with factory() as session:
            placed = Placed(number=1)
            emit_on_commit(session, placed, headers={"tenant": "acme"})
            placed.number = 2
            with pytest.raises(HeaderError):
                emit_on_commit(session, placed, headers={"bad\n": "x"})
            await session.commit()
    await arrived(emitter, [1])
    assert isinstance(emitter.producer, MemoryProducer)
    assert emitter.producer.sent[0].headers["tenant"] == "acme"


async def test_ids_come_back(on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """An API answers with the id by which its event will be known; several are emitted in their order."""
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        bind(factory, emitter)
        async with factory() as session:
            events = [Placed(number=number) for number in range(3)]
            one = assert_type(emit_on_commit(session, events[0]), str)
            several = assert_type(emit_on_commit(session, (each for each in events[1:])), list[str])
            assert_type(emit_on_commit(session, []), list[str])
            assert [one, *several] == [event_id(each) for each in events]
            await session.commit()
    await arrived(emitter, [0, 1, 2])


async def test_events_of_hooks_belong_to_the_transaction(on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """Emitting where SQLAlchemy tells of changes (after_flush) or of the commit is a common way."""
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        bind(factory, emitter)
        async with factory() as session:
            inner = session.sync_session
            event.listen(inner, "before_commit", lambda session: emit(session, 1), once=True)
            event.listen(inner, "after_flush", lambda session, context: emit(session, 2), once=True)
            event.listen(inner, "after_commit", lambda session: emit(session, 3), once=True)
            session.add(Order(id=1))
            await session.commit()
    await arrived(emitter, [1, 2, 3])


async def test_an_error_in_a_users_hook_takes_nothing_away(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """It is committed: the event goes out when the session is closed, although another hook has raised."""
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        bind(factory, emitter)

        def fails(session: Session) -> None:
            raise Undone

        async with factory() as session:
            event.listen(session.sync_session, "after_commit", fails)
            order(session.sync_session, 1)
            with pytest.raises(Undone):
                await session.commit()
    await arrived(emitter, [1])


async def test_a_commit_that_the_database_refuses_sends_nothing(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """A deferred constraint fails at the COMMIT itself: the last moment at which a transaction can fail."""
    database = on("postgresql")
    async with session_factory(database, "postgresql+asyncpg") as (factory, engine):
        bind(factory, emitter)
        make = "create table if not exists lines (id int, order_id int references orders deferrable initially deferred)"
        async with factory() as session:
            await session.execute(text(make))
            await session.commit()
            await session.execute(text("insert into lines values (1, 77)"))
            emit_on_commit(session, Placed(number=1))
            with pytest.raises(IntegrityError):
                await session.commit()
            await session.rollback()
            emit_on_commit(session, Placed(number=2))
            await session.commit()
        async with engine.connect() as connection:
            await connection.execute(text("insert into lines values (1, 77)"))
            emit_on_commit(connection, Placed(number=3), emitter=emitter)
            with pytest.raises(IntegrityError):
                await connection.commit()
            await connection.rollback()
            emit_on_commit(connection, Placed(number=4), emitter=emitter)
            await connection.commit()
            await connection.execute(text("drop table lines"))
            await connection.commit()
    await arrived(emitter, [2, 4])


async def test_a_joined_transaction_the_sessions_commit_counts(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """In a test suite that rolls all back around each test, the app's events are seen as they are in production."""
    async with session_factory(on("postgresql"), "postgresql+asyncpg") as (_, engine):
        factory = async_sessionmaker()
        bind(factory, emitter)
        async with engine.connect() as connection:
            outer = await connection.begin()
            async with factory(bind=connection, join_transaction_mode="create_savepoint") as session:
                order(session.sync_session, 1)
                await session.commit()
                order(session.sync_session, 2)
                await session.rollback()
            await arrived(emitter, [1])
            await outer.rollback()
        async with factory(bind=engine) as session:
            assert (await session.scalars(select(Order))).all() == []


async def test_a_session_without_autobegin_says_that_nothing_is_open(emitter: EventEmitter) -> None:
    """The event would wait for a transaction that nobody begins."""
    with Session(autobegin=False) as session:
        with pytest.raises(TransactionError, match=r"session\.begin"):
            emit_on_commit(session, Placed(number=1), emitter=emitter)
        with session.begin():
            emit_on_commit(session, Placed(number=2), emitter=emitter)
    await arrived(emitter, [2])
    assert issubclass(TransactionError, InvalidRequestError)
    assert issubclass(TransactionError, DispytchError)


# -- plain connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_plain_connections_commit(driver: str, on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """Without the ORM the same holds: commit as you go, blocks, savepoints; closed without a commit, nothing."""
    async with session_factory(on(driver), driver) as (_, engine):
        if driver in ASYNCHRONOUS:
            async with engine.connect() as connection:
                await connection.run_sync(uses_a_connection, emitter=emitter)
        else:

            def in_thread() -> None:
                with engine.connect() as connection:
                    uses_a_connection(connection, emitter=emitter)

            await asyncio.to_thread(in_thread)
    await arrived(emitter, USED)


async def test_engine_begin(on: Callable[[str], Database], emitter: EventEmitter) -> None:
    """The shortest way to a transaction is an event's as well; what its block raises undoes both."""
    async with session_factory(on("postgresql"), "postgresql+asyncpg") as (_, engine):
        async with engine.begin() as connection:
            assert isinstance(connection, AsyncConnection)
            emit_on_commit(connection, Placed(number=1), emitter=emitter)
        with suppress(Undone):
            async with engine.begin() as connection:
                emit_on_commit(connection, Placed(number=2), emitter=emitter)
                raise Undone
        with pytest.raises(NotStartedError, match=r"engine\.connect"):
            emit_on_commit(engine.connect(), Placed(number=3), emitter=emitter)
    await arrived(emitter, [1])


async def test_a_connection_without_transactions_is_refused(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """AUTOCOMMIT: nobody calls commit, and the event would wait for ever."""
    engine = create_engine(on("sqlite").url("sqlite"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(TransactionError, match="AUTOCOMMIT"):
            emit_on_commit(connection, Placed(number=1), emitter=emitter)
    engine.dispose()
    engine = create_engine(on("postgresql").url("postgresql+psycopg"))
    with engine.connect() as connection, connection.begin_twophase():
        with pytest.raises(TransactionError, match="two-phase"):
            emit_on_commit(connection, Placed(number=1), emitter=emitter)
    engine.dispose()


# -- when the broker is slow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
async def test_a_slow_broker_does_not_hold_the_pools_connection(wait: bool, on: Callable[[str], Database]) -> None:
    """A pool is smaller than the number of requests: with the connection held, a slow broker stops the whole app."""
    async with (
        connect("memory://") as emitter,
        session_factory(on("postgresql"), "postgresql+asyncpg", pool_size=1, max_overflow=0, pool_timeout=5) as (
            factory,
            _,
        ),
    ):
        slow = Slow()
        put_in(emitter, slow)
        bind(factory, emitter, wait=wait)

        async def first() -> None:
            async with factory() as session:
                order(session.sync_session, 1)
                await session.commit()

        request = asyncio.create_task(first())
        await asyncio.wait_for(slow.asked.wait(), 5)
        async with factory() as session:
            assert (await session.scalars(select(Order.id))).all() == [1]
        assert request.done() is not wait
        slow.confirm.set()
        await request
        assert not wait or numbers(slow.sent) == [1]
    assert numbers(slow.sent) == [1]


async def test_a_sync_session_in_a_thread_can_wait(on: Callable[[str], Database]) -> None:
    """A `def` route that wants its event confirmed before it answers has it, on the same connections."""
    async with connect("memory://") as emitter, session_factory(on("sqlite"), "sqlite+pysqlite") as (factory, _):
        slow = Slow()
        put_in(emitter, slow)
        bind(factory, emitter, wait=True)
        thread = asyncio.create_task(run(factory, emits_without_work))
        await asyncio.wait_for(slow.asked.wait(), 5)
        await asyncio.sleep(0.05)
        assert not thread.done()
        slow.confirm.set()
        await thread
        assert numbers(slow.sent) == [1]


async def test_an_emitter_over_a_producer_is_waited_for(on: Callable[[str], Database]) -> None:
    """Nobody stops a user's own producer for us: what was left to the loop would be lost at its end."""
    slow = Slow()
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _), factory() as session:
        emit_on_commit(session, Placed(number=1), emitter=EventEmitter(slow))
        commit = asyncio.create_task(session.commit())
        await asyncio.wait_for(slow.asked.wait(), 5)
        assert not commit.done()
        slow.confirm.set()
        await commit
        assert numbers(slow.sent) == [1]


async def test_more_than_can_wait_is_waited_for(on: Callable[[str], Database], monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker slower than the commits would fill the memory without end."""
    monkeypatch.setattr(sending, "MAX_PENDING", 2)
    async with connect("memory://") as emitter, session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        slow = Slow()
        put_in(emitter, slow)
        bind(factory, emitter)

        async def commits(number: int) -> None:
            async with factory() as session:
                emit_on_commit(session, Placed(number=number))
                await session.commit()

        await asyncio.wait_for(commits(1), 5)
        await asyncio.wait_for(commits(2), 5)
        third = asyncio.create_task(commits(3))
        await asyncio.sleep(0.1)
        assert not third.done()
        slow.confirm.set()
        await third
        assert numbers(slow.sent) == [1, 2, 3]


async def test_a_wait_that_is_cancelled_leaves_the_session_usable(on: Callable[[str], Database]) -> None:
    """A client hangs up while its request waits for the broker: the event goes out, and nothing is stuck."""
    async with connect("memory://") as emitter, session_factory(on("postgresql"), "postgresql+asyncpg") as (factory, _):
        slow = Slow()
        put_in(emitter, slow)
        bind(factory, emitter, wait=True)
        async with factory() as session:
            order(session.sync_session, 1)
            commit = asyncio.create_task(session.commit())
            await asyncio.wait_for(slow.asked.wait(), 5)
            commit.cancel()
            with suppress(asyncio.CancelledError):
                await commit
            slow.confirm.set()
            order(session.sync_session, 2)
            await session.commit()
            assert (await session.scalars(select(Order.id).order_by(Order.id))).all() == [1, 2]
    assert numbers(slow.sent) == [1, 2]


async def test_commits_keep_their_order(on: Callable[[str], Database]) -> None:
    """Of one key, the event of an earlier commit arrives first, although nobody waited for it."""
    async with connect("memory://") as emitter, session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        slow = Slow()
        put_in(emitter, slow)
        bind(factory, emitter)
        async with factory() as session:
            for number in range(5):
                emit_on_commit(session, Placed(number=number))
                await session.commit()
        await slow.asked.wait()
        slow.confirm.set()
    assert numbers(slow.sent) == list(range(5))


# -- the end of the app --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "sqlite+pysqlite"])
async def test_an_app_that_stops_right_after_the_commit_loses_nothing(
    driver: str, on: Callable[[str], Database]
) -> None:
    """A deploy stops the worker with events on their way, and others waiting behind them: all of them arrive."""
    async with session_factory(on(driver), driver) as (factory, _):
        slow = Slow()
        brokers = connect("memory://", shutdown_timeout=5)
        bind(factory, brokers)

        def commits(session: Session) -> None:
            for number in range(3):
                emit(session, number)
                session.commit()

        async with brokers as emitter:
            put_in(emitter, slow)
            await run(factory, commits)
            asyncio.get_running_loop().call_later(0.2, slow.confirm.set)
        assert numbers(slow.sent) == [0, 1, 2]


async def test_what_the_stop_cannot_wait_for_is_told(
    on: Callable[[str], Database], caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that hangs does not hold up the deploy, and no event vanishes without a word."""
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        slow = Slow()
        brokers = connect("memory://", shutdown_timeout=0.1)
        bind(factory, brokers)
        async with brokers as emitter:
            put_in(emitter, slow)
            async with factory() as session:
                for number in range(2):
                    emit_on_commit(session, Placed(number=number))
                    await session.commit()
            await slow.asked.wait()
        slow.confirm.set()
        await eventually(lambda: caplog.text.count("was not delivered after its transaction") == 1)
        assert "1 events abandoned" in caplog.text
    # The first one was in the broker's hands, and came through; the second one was behind it.
    assert numbers(slow.sent) == [0]


def test_a_script_with_a_blocking_emitter(tmp_path: Path) -> None:
    """A synchronous program has no event loop of its own, and at its exit all is flushed."""
    script = """
import sys, time
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.hooks import Hook
from dispytch_integrations.sqlalchemy import bind, emit_on_commit
from tests.support.sessions import Placed

class Tell(Hook):
    def sent(self, message):
        print(message.payload.decode(), flush=True)

brokers = connect_blocking("memory://", hooks=[Tell()])
Session = sessionmaker(create_engine("sqlite://"))
bind(Session, brokers)
brokers.start()
with Session.begin() as session:
    emit_on_commit(session, Placed(number=1))
with Session() as session:
    emit_on_commit(session, Placed(number=2))
with Session.begin() as session:
    emit_on_commit(session, Placed(number=3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert [line for line in done.stdout.splitlines() if line] == ['{"number":1,"key":"k"}', '{"number":3,"key":"k"}']


# -- failures after the commit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
async def test_a_failure_after_the_commit_is_told_and_not_raised(
    wait: bool, on: Callable[[str], Database], caplog: pytest.LogCaptureFixture
) -> None:
    """The work is committed: a request that failed for it would be repeated. Who operates the app learns of it."""
    watch = Watch()
    async with (
        connect("memory://", hooks=[watch]) as emitter,
        session_factory(on("postgresql"), "postgresql+asyncpg") as (factory, _),
    ):
        slow = Slow()
        slow.error = BrokerUnavailableError("gone")
        slow.confirm.set()
        put_in(emitter, slow)
        bind(factory, emitter, wait=wait)
        async with factory() as session:
            order(session.sync_session, 1)
            identity = emit_on_commit(session, Placed(number=2, key="secret"))
            await session.commit()
            assert (await session.scalars(select(Order.id))).all() == [1]
        await eventually(lambda: len(watch.failures) == 2)
    told = [record for record in caplog.records if record.name == "dispytch_integrations.sqlalchemy"]
    assert [record.levelno for record in told] == [logging.ERROR] * 2
    assert identity in caplog.text
    assert "default:orders" in caplog.text
    assert '"number"' not in caplog.text


async def test_brokers_that_are_closed_before_the_commit_are_told(
    on: Callable[[str], Database], caplog: pytest.LogCaptureFixture
) -> None:
    """A request that outlives the app's shutdown is committed: its event is reported, and its hooks called."""
    watch = Watch()
    async with session_factory(on("sqlite"), "sqlite+aiosqlite") as (factory, _):
        brokers = connect("memory://", hooks=[watch])
        bind(factory, brokers)
        async with factory() as session:
            async with brokers:
                emit_on_commit(session, Placed(number=1))
            await session.commit()
            await eventually(lambda: len(watch.failures) == 1)
            with pytest.raises(NotStartedError, match="is closed"):
                emit_on_commit(session, Placed(number=2))
    assert isinstance(watch.failures[0][1], NotStartedError)
    assert "was not delivered after its transaction was committed" in caplog.text


# -- emitters and threads ------------------------------------------------------------------------------------------


async def test_a_sync_session_on_the_loops_own_thread_is_handed_off(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """Synchronous SQLAlchemy within `async def` is common: it cannot wait for the loop that it blocks."""
    async with session_factory(on("sqlite"), "sqlite+pysqlite") as (factory, _):
        bind(factory, emitter, wait=True)
        with factory() as session:
            order(session, 1)
            session.commit()
            assert sent(emitter) == []
    await arrived(emitter, [1])


async def test_a_blocking_emitter_in_a_thread_and_not_on_the_loop(
    on: Callable[[str], Database], emitter: EventEmitter
) -> None:
    """A `def` route emits by the emitter that it has; in an `async def` it is told which one to take."""
    blocking = BlockingEmitter(emitter, asyncio.get_running_loop())
    async with session_factory(on("sqlite"), "sqlite+pysqlite") as (factory, _):

        def commits(session: Session) -> None:
            emit_on_commit(session, Placed(number=1), emitter=blocking)
            session.commit()

        await run(factory, commits)
        with factory() as session, pytest.raises(WrongLoopError, match="EmitterDep"):
            emit_on_commit(session, Placed(number=2), emitter=blocking)
    await arrived(emitter, [1])


def test_an_emitter_without_a_loop_is_refused_in_a_thread() -> None:
    """Nothing could send its events: better to hear of it before the commit than after."""
    with Session() as session, pytest.raises(NotStartedError, match="connect_blocking"):
        emit_on_commit(session, Placed(number=1), emitter=EventEmitter(MemoryProducer()))


def test_in_memory_events_are_there_when_the_commit_returns() -> None:
    """A test that commits and looks needs no waiting, and cannot fail now and then."""
    engine = create_engine("sqlite://")
    factory = sessionmaker(engine)
    with connect_blocking("memory://") as emitter:
        bind(factory, emitter)
        producer: Any = emitter.producers["default"]
        for number in range(100):
            with factory.begin() as session:
                emit_on_commit(session, Placed(number=number))
                session.execute(text("select 1"))
                assert len(producer.sent) == number
            assert len(producer.sent) == number + 1
    engine.dispose()


def test_brokers_that_are_not_open_are_refused_at_the_call() -> None:
    """The transaction can still be rolled back: an event is not dropped after it."""
    brokers = connect_blocking("memory://")
    factory = sessionmaker(create_engine("sqlite://"))
    bind(factory, brokers)
    with factory() as session:
        with pytest.raises(NotStartedError, match="connect_blocking"):
            emit_on_commit(session, Placed(number=1))
        bind(factory, connect("memory://"))
        with pytest.raises(NotStartedError, match="never opened"):
            emit_on_commit(session, Placed(number=1))


# -- bind ----------------------------------------------------------------------------------------------------------


class Bound(Session):
    """A session class of a user's own."""


class Nearer(Bound):
    """One derived from it."""


async def test_bind_takes_whatever_makes_sessions(emitter: EventEmitter) -> None:
    """However an app makes its sessions, one line says where their events go."""
    engine = create_engine("sqlite://")
    bind(Bound, emitter)
    with Bound(engine) as session:
        emit(session, 1)
        session.commit()
    scoped = scoped_session(sessionmaker(engine))
    bind(scoped, emitter)
    emit_on_commit(scoped, Placed(number=2))
    scoped.commit()
    scoped.remove()
    bind(sqlmodel.Session, emitter)
    with sqlmodel.Session(engine) as session:
        emit_on_commit(session, Placed(number=3))
        session.commit()
    async_engine = create_async_engine("sqlite+aiosqlite://")
    bind(sqlmodel.ext.asyncio.session.AsyncSession, emitter)
    async with sqlmodel.ext.asyncio.session.AsyncSession(async_engine) as asynchronous:
        emit_on_commit(asynchronous, Placed(number=4))
        await asynchronous.commit()
    scope = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
    bind(scope, emitter)
    async with scope() as inner:
        emit_on_commit(inner.sync_session, Placed(number=5))
        await inner.commit()
    engine.dispose()
    await async_engine.dispose()
    await arrived(emitter, [1, 2, 3, 4, 5])


async def test_the_nearest_binding_counts_and_the_newest() -> None:
    """A test binds anew what the app has bound, and a class of its own is not its parent's."""
    async with connect("memory://") as one, connect("memory://") as other:
        engine = create_engine("sqlite://")
        bind(Bound, one)
        bind(Nearer, other)
        for cls in (Bound, Nearer):
            with cls(engine) as session:
                emit(session, 1)
                session.commit()
        await arrived(one, [1])
        await arrived(other, [1])
        bind(Bound, one)
        bind(Bound, other)
        with Bound(engine) as session:
            emit(session, 2)
            session.commit()
        await arrived(other, [1, 2])
        await arrived(one, [1])
        engine.dispose()


def test_bind_says_what_it_takes() -> None:
    """A mistake in the line that everything rests on is told in that line."""
    factory = sessionmaker()
    wrong: Any = bind
    with pytest.raises(TypeError, match=r"emit_on_commit\(session, event, emitter=emitter\)"):
        wrong(Session(), connect("memory://"))
    with pytest.raises(TypeError, match="not a Engine"):
        wrong(create_engine("sqlite://"), connect("memory://"))
    with pytest.raises(TypeError, match="emitter or an outbox, not a str"):
        wrong(factory, "memory://")
    with pytest.raises(TypeError, match="the class MemoryProducer"):
        wrong(factory, MemoryProducer)
    with pytest.raises(TypeError, match="True or False"):
        wrong(factory, connect("memory://"), wait=1.0)


def test_another_order_of_arguments_names_the_right_import() -> None:
    """Who comes from Django writes emit_on_commit(event): the error is the documentation."""
    wrong: Any = emit_on_commit
    placed = Placed(number=1)
    for arguments in ((placed,), (placed, Session()), (Session(),)):
        with pytest.raises(TypeError, match=r"from dispytch_integrations.django import emit_on_commit"):
            wrong(*arguments)
    for other in (sessionmaker(), create_engine("sqlite://"), None, [placed]):
        with pytest.raises(TypeError, match=r"with Session\(\) as session"):
            wrong(other, placed)


async def test_what_is_no_event_is_named(emitter: EventEmitter) -> None:
    """A dict or a class passed by mistake is told, as `emit` tells it."""
    wrong: Any = emit_on_commit
    for given in ("event", {"number": 1}, None, Placed):
        with Session() as session, pytest.raises(RouteError, match="is not an event"):
            wrong(session, given, emitter=emitter)
    with Session() as session:
        with pytest.raises(ExceptionGroup, match="1 of 2 events cannot be sent; none was"):
            wrong(session, [Placed(number=1), "event"], emitter=emitter)
        session.commit()
    await arrived(emitter, [])


def test_a_session_without_an_emitter_says_what_to_write() -> None:
    """An event that goes nowhere is never silent."""
    with Session() as session, pytest.raises(ConfigurationError, match=r"bind\(sessionmaker, emitter\).*emitter="):
        emit_on_commit(session, Placed(number=1))
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(ConfigurationError, match=r"emit_on_commit\(connection"):
        emit_on_commit(connection, Placed(number=1))
    engine.dispose()
    wrong: Any = emit_on_commit
    with Session() as session, pytest.raises(TypeError, match="not a str"):
        wrong(session, Placed(number=1), emitter="memory://")
    with Session() as session, pytest.raises(TypeError, match="not a bool"):
        wrong(session, Placed(number=1), outbox=True)


def test_without_sqlalchemy_the_extra_is_named() -> None:
    """The error of a missing library is the line that installs it."""
    told = import_without("sqlalchemy", "dispytch_integrations.sqlalchemy")
    assert "pip install 'dispytch-integrations[sqlalchemy]'" in told


# -- FastAPI -------------------------------------------------------------------------------------------------------


def app_with(factory: Any, brokers: Brokers, dependency: Any, seen: list[str]) -> FastAPI:
    app = FastAPI(lifespan=emitter_lifespan(brokers))
    session_dep = Depends(dependency, scope="function")

    @app.get("/async/{number}")
    async def place(number: int, later: BackgroundTasks, session: Any = session_dep) -> dict[str, str]:
        session.add(Order(id=number))
        later.add_task(lambda: seen.append(f"background {number}"))
        return {"id": emit_on_commit(session, Placed(number=number))}

    @app.get("/sync/{number}")
    def place_in_thread(number: int, session: Any = session_dep) -> dict[str, str]:
        session.add(Order(id=number))
        return {"id": emit_on_commit(session, Placed(number=number))}

    @app.get("/refused")
    async def refuse(session: Any = session_dep) -> None:
        session.add(Order(id=99))
        emit_on_commit(session, Placed(number=99))
        raise HTTPException(409)

    return app


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "sqlite+pysqlite"])
async def test_a_fastapi_session_is_committed_before_the_response(driver: str, on: Callable[[str], Database]) -> None:
    """A client that has its 200 finds what it has written; a commit that fails is a 500, and nothing is sent."""
    async with session_factory(on(driver), driver) as (factory, _):
        brokers = connect("memory://")
        bind(factory, brokers)
        seen: list[str] = []
        dependency = session_dependency(factory)
        assert session_dependency(factory) is dependency
        app = app_with(factory, brokers, dependency, seen)
        path = "/async" if driver in ASYNCHRONOUS else "/sync"

        def visit() -> None:
            with TestClient(app, raise_server_exceptions=False) as client:
                assert client.get(f"{path}/1").status_code == 200
                assert client.get(f"{path}/1").status_code == 500
                assert client.get("/refused").status_code == 409
                assert client.get(f"{path}/2").status_code == 200

        await asyncio.to_thread(visit)
        assert sent(brokers.emitter) == [1, 2]
        # Of the request whose commit failed, no background task has run.
        assert seen == (["background 1", "background 2"] if driver in ASYNCHRONOUS else [])
        assert on(driver).all("select id from orders order by id") == [(1,), (2,)]


def test_session_dependency_says_what_it_takes() -> None:
    """A session given instead of what makes it would be shared by all requests."""
    wrong: Any = session_dependency
    with pytest.raises(TypeError, match="async_sessionmaker"):
        wrong(Session())


def test_types_of_the_dependency() -> None:
    """An editor knows what the route gets."""
    assert_type(
        session_dependency(async_sessionmaker[AsyncSession]()), Callable[[], AsyncGenerator[AsyncSession, None]]
    )
    assert_type(session_dependency(sessionmaker[Session]()), Callable[[], Generator[Session, None, None]])


# -- a real broker -------------------------------------------------------------------------------------------------


async def test_through_a_real_broker(redis_url: str, unique: str, on: Callable[[str], Database]) -> None:
    """Database and broker as in production: PostgreSQL commits, the stream of Redis has the event."""

    class Stored(Placed):
        __route__ = RedisStreamEventRoute(stream=unique)

    async with session_factory(on("postgresql"), "postgresql+asyncpg") as (factory, _):
        async with connect(redis_url) as emitter:
            bind(factory, emitter)
            async with factory() as session:
                emit_on_commit(session, [Stored(number=1), Stored(number=2)])
                await session.commit()
                emit_on_commit(session, Stored(number=3))
                await session.rollback()
    client = redis.asyncio.from_url(redis_url)
    entries: Any = await client.xrange(unique)
    assert [Stored.model_validate_json(fields[b"data"]).number for _, fields in entries] == [1, 2]
    await client.delete(unique)
    await client.aclose()


def test_tables_of_this_suite_are_known() -> None:
    """The scenarios work in a table of their own."""
    assert list(Base.metadata.tables) == ["orders"]
