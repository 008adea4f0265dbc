"""The outbox with SQLAlchemy and SQLModel: an event is stored in the transaction that made it true, or not at all."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import sqlmodel
import sqlmodel.ext.asyncio.session
from sqlalchemy import Connection, Engine, MetaData, create_engine, event, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from dispytch_integrations import connect, event_id
from dispytch_integrations._sqlalchemy_store import store_of
from dispytch_integrations.errors import ConfigurationError, HeaderError, NotStartedError, RouteError
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, TransactionError, bind, emit_on_commit, outbox_tables
from tests.support.outboxes import Database, temporary_database
from tests.support.proxy import TCPProxy
from tests.support.sessions import (
    ASYNCHRONOUS,
    DRIVERS,
    SCENARIOS,
    USED,
    Base,
    Order,
    Placed,
    Undone,
    emit,
    order,
    run,
    session_factory,
    uses_a_connection,
)


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Database]]:
    with (
        temporary_database("postgresql") as postgresql,
        temporary_database("mysql") as mysql,
        temporary_database("sqlite", tmp_path_factory.mktemp("outbox")) as sqlite,
    ):
        yield {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}


@pytest.fixture
def on(databases: dict[str, Database]) -> Callable[[str], Database]:
    return lambda driver: databases[driver.partition("+")[0]]


@pytest.fixture
def database(databases: dict[str, Database]) -> Database:
    """The one that most apps have: a PostgreSQL."""
    return databases["postgresql"]


@asynccontextmanager
async def storing(database: Database, driver: str, **options: Any) -> AsyncGenerator[tuple[Any, SQLAlchemyOutbox]]:
    """A factory of sessions that is bound to an outbox, which nobody relays: what is stored stays."""
    async with session_factory(database, driver, **options) as (factory, engine):
        outbox = SQLAlchemyOutbox(engine, relay="external")
        bind(factory, outbox)
        async with connect("memory://", outbox=outbox):
            yield factory, outbox


def stored(database: Database) -> list[int]:
    """The numbers of the events in the outbox, in their order, as another connection sees them."""
    rows = database.all("select payload from dispytch_outbox_event order by id")
    return [Placed.model_validate_json(bytes(payload)).number for (payload,) in rows]


def orders(database: Database) -> list[int]:
    return [number for (number,) in database.all("select id from orders order by id")]


# -- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("scenario", "expected"), SCENARIOS, ids=lambda value: getattr(value, "__name__", None))
async def test_what_is_committed_is_stored_and_nothing_else(
    driver: str, scenario: Callable[[Session], None], expected: list[int], on: Callable[[str], Database]
) -> None:
    """The same calls as without an outbox, and the same events."""
    async with storing(on(driver), driver) as (factory, _):
        await run(factory, scenario)
    assert stored(on(driver)) == expected


@pytest.mark.parametrize("driver", DRIVERS)
async def test_event_and_work_become_visible_together(driver: str, on: Callable[[str], Database]) -> None:
    """Neither an event without its order nor an order without its event, whoever looks and whenever."""
    database = on(driver)
    seen: list[tuple[list[int], list[int]]] = []

    def places(session: Session) -> None:
        order(session, 1)
        session.flush()
        seen.append((orders(database), stored(database)))
        session.commit()
        seen.append((orders(database), stored(database)))

    async with storing(database, driver) as (factory, _):
        await run(factory, places)
    assert seen == [([], []), ([1], [1])]


async def test_sessions_of_every_kind(database: Database) -> None:
    """What the documentations of SQLAlchemy and SQLModel show works, with both asynchronous drivers."""
    for driver in ("postgresql+asyncpg", "postgresql+psycopg"):
        async with session_factory(database, "postgresql+asyncpg"):
            pass
        engine = create_async_engine(database.url(driver))
        factory = async_sessionmaker(engine)
        outbox = SQLAlchemyOutbox(engine, relay="external")
        bind(factory, outbox)
        bind(sqlmodel.ext.asyncio.session.AsyncSession, outbox)
        async with connect("memory://", outbox=outbox):
            async with factory() as session:
                order(session.sync_session, 1)
                await session.commit()
                with suppress(Undone):
                    async with session.begin_nested():
                        emit_on_commit(session, Placed(number=2))
                        raise Undone
                await session.rollback()
            scoped = async_scoped_session(factory, asyncio.current_task)
            emit_on_commit(scoped, Placed(number=3))
            await scoped.commit()
            await scoped.remove()
            async with sqlmodel.ext.asyncio.session.AsyncSession(engine) as inner:
                emit_on_commit(inner, Placed(number=4))
                await inner.commit()
        await engine.dispose()
        assert stored(database) == [1, 3, 4]


async def test_synchronous_sessions_of_every_kind(database: Database) -> None:
    """The same in threads, as in `def` routes."""
    async with storing(database, "postgresql+psycopg") as (factory, outbox):
        bind(sqlmodel.Session, outbox)

        def places() -> None:
            scoped = scoped_session(factory)
            emit_on_commit(scoped, Placed(number=1))
            scoped.commit()
            scoped.remove()
            assert isinstance(outbox.engine, Engine)
            with sqlmodel.Session(outbox.engine) as session:
                emit_on_commit(session, Placed(number=2))
                session.commit()
            with factory.begin() as session:
                emit_on_commit(session, Placed(number=3))

        await asyncio.to_thread(places)
    assert stored(database) == [1, 2, 3]


async def test_two_sessions_at_once_keep_their_events_apart(database: Database) -> None:
    """One request's rollback is not another one's."""
    async with storing(database, "postgresql+asyncpg") as (factory, _), factory() as one, factory() as other:
        order(one.sync_session, 1)
        order(other.sync_session, 2)
        await one.flush()
        await other.commit()
        await one.rollback()
    assert stored(database) == [2]


def statements_of(engine: Any) -> list[str]:
    """What the engine executes from now on."""
    executed: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        executed.append(statement)

    event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", note)
    return executed


@pytest.mark.parametrize("driver", DRIVERS)
async def test_one_statement_for_a_transaction(driver: str, on: Callable[[str], Database]) -> None:
    """However often a transaction emits, it costs one round trip, after its work; one that does not emit, none."""

    def places(session: Session) -> None:
        order(session, 1)
        with session.begin_nested():
            order(session, 2)
        emit_on_commit(session, [Placed(number=3), Placed(number=4)])
        session.add(Order(id=5))
        session.commit()

    def places_silently(session: Session) -> None:
        session.add(Order(id=6))
        session.commit()

    async with storing(on(driver), driver) as (factory, outbox):
        executed = statements_of(outbox.engine)
        await run(factory, places)
        inserts = [each.split()[2] for each in executed if each.lower().startswith("insert")]
        assert inserts == ["orders"] * 3 + ["dispytch_outbox_event"]
        executed.clear()
        await run(factory, places_silently)
        assert [each for each in executed if "dispytch" in each] == []
    assert stored(on(driver)) == [1, 2, 3, 4]


async def test_many_events_in_one_transaction(database: Database) -> None:
    """An import of thousands stays below what a statement may have in parameters, and in order."""
    async with storing(database, "postgresql+asyncpg") as (factory, outbox), factory() as session:
        executed = statements_of(outbox.engine)
        emit_on_commit(session, [Placed(number=number) for number in range(1700)])
        await session.commit()
        assert len([each for each in executed if each.startswith("insert")]) == 4
    assert stored(database) == list(range(1700))


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_same_event_twice_is_stored_once(driver: str, on: Callable[[str], Database]) -> None:
    """A retried request that kept its event does not multiply it, nor fail."""
    again = Placed(number=1)

    def places(session: Session) -> None:
        emit_on_commit(session, [again, again])
        emit_on_commit(session, again)
        session.commit()
        again.number = 2
        assert emit_on_commit(session, again) == event_id(again)
        emit_on_commit(session, Placed(number=3))
        session.commit()

    async with storing(on(driver), driver) as (factory, _):
        await run(factory, places)
    assert stored(on(driver)) == [1, 3]
    assert on(driver).count(f"event_id = '{event_id(again)}'") == 1


async def test_what_cannot_be_stored_is_refused_at_the_call(database: Database) -> None:
    """The caller can still answer with an error: nothing that was accepted fails in the relay, hours later."""

    class Long(Placed):
        __event_type__ = "t" * 300

    async with storing(database, "postgresql+asyncpg") as (factory, _), factory() as session:
        order(session.sync_session, 1)
        for placed, headers, error in (
            (Placed(number=2, key="k" * 70_000), {}, RouteError),
            (Placed(number=2, key="a\0b"), {}, RouteError),
            (Placed.model_construct(number=2, key="\ud800"), {}, RouteError),
            (Placed(number=2), {"h": "v" * 70_000}, RouteError),
            (Placed(number=2), {"h": object()}, HeaderError),
            (Placed(number=2), {"ce_id": "mine", "id": "mine"}, HeaderError),
            (Long(number=2), {}, RouteError),
        ):
            with pytest.raises(error):
                emit_on_commit(session, placed, headers=headers)
            with pytest.raises((error, ExceptionGroup)):
                emit_on_commit(session, [Placed(number=3), placed], headers=headers)
        await session.commit()
    assert stored(database) == [1]


async def test_outbox_false_sends_after_the_commit(database: Database) -> None:
    """For one call a table may be too much: a metric, say. Where another process relays, there is no connection."""
    async with session_factory(database, "postgresql+asyncpg") as (factory, engine):
        outbox = SQLAlchemyOutbox(engine)
        bind(factory, outbox, wait=True)
        brokers = connect("memory://", outbox=outbox)
        async with brokers:
            executed = statements_of(engine)
            async with factory() as session:
                emit_on_commit(session, Placed(number=1), outbox=False)
                await session.commit()
            assert not [each for each in executed if each.startswith("insert into dispytch_outbox_event")]
            producer: Any = brokers.producers["default"]
            assert [each.payload for each in producer.sent] == [b'{"number":1,"key":"k"}']
    async with storing(database, "postgresql+asyncpg") as (factory, _), factory() as session:
        with pytest.raises(NotStartedError, match=r"relayed by another one; write emit_on_commit"):
            emit_on_commit(session, Placed(number=2), outbox=False)


async def test_an_emitter_knows_the_brokers_of_an_outbox_that_is_only_bound(database: Database) -> None:
    """Another process relays: here the outbox was given to no brokers, and the emitter of the call prepares."""
    async with session_factory(database, "postgresql+asyncpg") as (factory, engine):
        bind(factory, SQLAlchemyOutbox(engine, relay="external"))
        async with factory.begin() as session:
            with pytest.raises(NotStartedError, match="emitter=emitter"):
                emit_on_commit(session, Placed(number=1))
        async with connect("memory://", prefix="staging.") as emitter:
            async with factory.begin() as session:
                emit_on_commit(session, Placed(number=2), emitter=emitter)
            producer: Any = emitter.producer
            assert producer.sent == []
        assert stored(database) == [2]
        assert database.all("select destination from dispytch_outbox_event") == [("staging.orders",)]


async def test_an_emitter_and_an_outbox_that_contradict_each_other(database: Database) -> None:
    """Which of the two was meant cannot be guessed; the one that the outbox has anyway may be repeated."""
    async with storing(database, "postgresql+asyncpg") as (factory, outbox), factory() as session:
        async with connect("memory://") as other:
            with pytest.raises(ConfigurationError, match="outbox=False"):
                emit_on_commit(session, Placed(number=1), emitter=other)
        emit_on_commit(session, Placed(number=2), emitter=outbox.emitter)
        await session.commit()
    assert stored(database) == [2]


# -- plain connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_plain_connections_commit(driver: str, on: Callable[[str], Database]) -> None:
    """Without the ORM the same holds: commit as you go, blocks, savepoints; closed without a commit, nothing."""
    async with storing(on(driver), driver) as (_, outbox):
        engine: Any = outbox.engine
        if driver in ASYNCHRONOUS:
            async with engine.connect() as connection:
                await connection.run_sync(uses_a_connection, outbox=outbox)
        else:

            def in_thread() -> None:
                with engine.connect() as connection:
                    uses_a_connection(connection, outbox=outbox)

            await asyncio.to_thread(in_thread)
    assert stored(on(driver)) == USED


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_plain_connection_whose_event_cannot_be_stored_commits_nothing(
    driver: str, on: Callable[[str], Database]
) -> None:
    """The order without its event would be there for ever."""
    database = on(driver)

    def places(connection: Connection, outbox: SQLAlchemyOutbox) -> None:
        connection.execute(insert(Order).values(id=1, text=""))
        emit_on_commit(connection, Placed(number=1), outbox=outbox)
        with pytest.raises(ConfigurationError, match=r"1 event could not be stored.*metadata\.create_all.*Alembic"):
            connection.commit()
        connection.rollback()
        connection.execute(insert(Order).values(id=2, text=""))
        connection.commit()

    async with storing(database, driver) as (_, outbox):
        engine: Any = outbox.engine
        with without_tables(database):
            if driver in ASYNCHRONOUS:
                async with engine.connect() as connection:
                    await connection.run_sync(places, outbox)
            else:
                with engine.connect() as connection:
                    places(connection, outbox)
    assert orders(database) == [2]
    assert stored(database) == []


class without_tables:
    """The outbox's tables are missing in this block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.run("drop table dispytch_outbox_event")

    def __exit__(self, *exc_info: object) -> None:
        self._database.create_tables()


# -- over which connection -----------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[Database]:
    """Another database, with the tables of an outbox as well: a row in it would be a row that nobody relays."""
    with temporary_database("postgresql") as database:
        with database.engine.begin() as connection:
            Order.metadata.create_all(connection)
        yield database


def routing(main: Engine, other: Engine) -> type[Session]:
    """Sessions as the documentation of SQLAlchemy has them: orders to one database, all else to another."""

    class Routing(Session):
        def get_bind(self, mapper: Any = None, **given: Any) -> Any:
            if "bind" in given:
                return given["bind"]
            return main if mapper is not None else other

    return Routing


async def test_a_routing_session_stores_where_it_has_worked(database: Database, elsewhere: Database) -> None:
    """An INSERT of ours without a mapper would be routed to another database than the work."""
    async with session_factory(database, "postgresql+psycopg") as (_, engine):
        other = create_engine(elsewhere.url("postgresql+psycopg"))
        outbox = SQLAlchemyOutbox(engine, relay="external")
        async with connect("memory://", outbox=outbox):
            classes: tuple[Any, ...] = (routing(engine, other), sessionmaker(binds={Order: engine, Placed: other}))
            for number, cls in enumerate(classes):
                bind(cls, outbox)
                with cls() as session:
                    order(session, number)
                    session.commit()
                    emit(session, 10 + number)  # No work: to the outbox's own engine.
                    session.commit()
                    if cls is classes[0]:
                        session.execute(text("select 1"))  # In the other database, too.
                        order(session, 20)
                        session.commit()
        other.dispose()
    assert stored(database) == [0, 10, 20, 1, 11]
    assert stored(elsewhere) == []


async def test_work_in_another_database_is_told_at_the_commit(database: Database, elsewhere: Database) -> None:
    """An event in one database and its work in another are two transactions: the commit is refused, and says why."""
    async with session_factory(database, "postgresql+psycopg") as (_, engine):
        url = elsewhere.url("postgresql+psycopg").set(password="secret-word")
        other = create_engine(url)
        outbox = SQLAlchemyOutbox(engine, relay="external")
        cls = routing(other, engine)
        bind(cls, outbox)
        async with connect("memory://", outbox=outbox):
            with cls() as session:
                order(session, 1)
                with pytest.raises(
                    ConfigurationError, match=r"has worked in .*, and the outbox is in .*outbox=False"
                ) as told:
                    session.commit()
                assert str(elsewhere.url("x").database) in str(told.value)
                assert "secret-word" not in str(told.value)
                session.rollback()
                session.add(Order(id=2))
                session.commit()
            other.dispose()
    assert orders(elsewhere) == [2]
    assert stored(database) == stored(elsewhere) == []


async def test_a_database_of_the_same_name_elsewhere_is_another_one(database: Database) -> None:
    """Shards and replicas are called the same on each server: a row on the wrong one would never be relayed."""
    url = database.url("postgresql+asyncpg")
    async with (
        storing(database, "postgresql+asyncpg") as (_, outbox),
        TCPProxy(str(url.host), url.port or 5432) as proxy,
    ):
        engine = create_async_engine(url.set(port=proxy.port))
        async with AsyncSession(engine) as session:
            session.add(Order(id=1))
            emit_on_commit(session, Placed(number=1), outbox=outbox)
            with pytest.raises(ConfigurationError, match="with the engine that the work goes to"):
                await session.commit()
        await engine.dispose()
    assert orders(database) == []


async def test_another_engine_of_the_same_database_will_do(database: Database) -> None:
    """`def` routes have a synchronous engine beside the asynchronous one, and one outbox for both."""
    async with storing(database, "postgresql+asyncpg") as (_, outbox):
        engine = create_engine(database.url("postgresql+psycopg"))
        with Session(engine) as session:
            session.add(Order(id=1))
            emit_on_commit(session, Placed(number=1), outbox=outbox)
            session.commit()
            emit_on_commit(session, Placed(number=2), outbox=outbox)
            session.commit()
        other = create_async_engine(database.url("postgresql+psycopg"))
        async with AsyncSession(other) as asynchronous:
            emit_on_commit(asynchronous, Placed(number=3), outbox=outbox)
            await asynchronous.commit()
        with Session() as unbound:
            emit_on_commit(unbound, Placed(number=4), outbox=outbox)
            with pytest.raises(ConfigurationError, match="has worked in no database yet"):
                unbound.commit()
        engine.dispose()
        await other.dispose()
    assert stored(database) == [1, 2, 3]


async def test_a_joined_transaction(database: Database) -> None:
    """In a test suite that rolls all back around each test, the app's events are in the outbox, until then."""
    async with storing(database, "postgresql+asyncpg") as (factory, outbox):
        engine: Any = outbox.engine
        async with engine.connect() as connection:
            outer = await connection.begin()
            async with factory(bind=connection, join_transaction_mode="create_savepoint") as session:
                order(session.sync_session, 1)
                await session.commit()
                order(session.sync_session, 2)
                await session.rollback()
            rows = await connection.execute(text("select count(*) from dispytch_outbox_event"))
            assert rows.scalar() == 1
            assert stored(database) == []
            await outer.rollback()
    assert stored(database) == []


async def test_in_two_phases(on: Callable[[str], Database]) -> None:
    """The events are stored before the transaction is prepared; what comes between the phases is too late."""
    database = on("mysql")  # The other one has two phases only if it is set up for them.
    async with storing(database, "mysql+pymysql") as (_, outbox):
        engine: Any = outbox.engine
        with Session(engine, twophase=True) as session:
            session.add(Order(id=1))
            emit_on_commit(session, Placed(number=1), outbox=outbox)
            session.prepare()
            with pytest.raises(TransactionError, match="committed or prepared already"):
                emit_on_commit(session, Placed(number=2), outbox=outbox)
            session.commit()
            session.add(Order(id=3))
            emit_on_commit(session, Placed(number=3), outbox=outbox)
            session.prepare()
            session.rollback()
    assert (orders(database), stored(database)) == ([1], [1])


async def test_a_connection_without_transactions_is_refused(database: Database) -> None:
    """AUTOCOMMIT: the event would be there before the work, or without it."""
    async with storing(database, "postgresql+psycopg", isolation_level="AUTOCOMMIT") as (factory, _):
        with factory() as session:
            emit(session, 1)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                session.commit()
    assert stored(database) == []


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
async def test_tables_in_a_schema(kind: str, on: Callable[[str], Database]) -> None:
    """Where an app keeps what is not its own apart, the outbox is kept apart as well."""
    database = on(kind)
    schema = f"{database.url('x').database}_apart"
    metadata = MetaData()
    events, shards = outbox_tables(metadata, schema=schema)
    assert (events.schema, shards.schema) == (schema, schema)
    driver = {"postgresql": "postgresql+asyncpg", "mysql": "mysql+asyncmy"}[kind]
    database.run(f"create schema {schema}")
    try:
        async with session_factory(database, driver) as (factory, engine):
            outbox = SQLAlchemyOutbox(engine, relay="external", schema=schema)
            brokers = connect("memory://", outbox=outbox)
            with pytest.raises(ConfigurationError, match=f"missing in schema '{schema}'"):
                await brokers.start()
            metadata.create_all(database.engine)
            async with brokers, factory() as session:
                order_of_its_own = Placed(number=1)
                emit_on_commit(session, order_of_its_own, outbox=outbox)
                await session.commit()
            assert database.all(f"select event_id from {schema}.dispytch_outbox_event") == [
                (event_id(order_of_its_own),)
            ]
    finally:
        database.run(f"drop schema {schema}" + (" cascade" if kind == "postgresql" else ""))
    assert stored(database) == []


# -- within the commit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "sqlite+pysqlite"])
async def test_events_of_hooks_are_stored(driver: str, on: Callable[[str], Database]) -> None:
    """Emitting where SQLAlchemy tells of changes or of the commit is a common way; the end of it is too late."""

    def places(session: Session) -> None:
        event.listen(session, "before_flush", lambda session, *_: emit(session, 1), once=True)
        event.listen(session, "after_flush", lambda session, _: emit(session, 2), once=True)
        event.listen(session, "before_commit", lambda session: emit(session, 3), once=True)
        session.add(Order(id=1))
        session.commit()

    def comes_too_late(session: Session) -> None:
        event.listen(session, "after_commit", lambda session: emit(session, 5), once=True)
        order(session, 4)
        with pytest.raises(TransactionError, match="emit it earlier, in before_commit or after_flush"):
            session.commit()

    async with storing(on(driver), driver) as (factory, _):
        await run(factory, places)
        assert sorted(stored(on(driver))) == [1, 2, 3]
        await run(factory, comes_too_late)
    assert sorted(stored(on(driver))) == [1, 2, 3, 4]


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "sqlite+pysqlite"])
async def test_a_commit_that_was_given_up_can_be_tried_again(driver: str, on: Callable[[str], Database]) -> None:
    """What another hook has raised ends the commit, not the transaction: what comes then belongs to it as well."""

    def fails(session: Session) -> None:
        raise Undone

    def places(session: Session) -> None:
        order(session, 1)
        event.listen(session, "before_commit", fails, once=True)
        with suppress(Undone):
            session.commit()
        order(session, 2)
        session.commit()

    async with storing(on(driver), driver) as (factory, _):
        await run(factory, places)
    assert stored(on(driver)) == [1, 2]


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "sqlite+pysqlite"])
async def test_what_was_stored_within_a_savepoint_that_is_undone(driver: str, on: Callable[[str], Database]) -> None:
    """The event came before the savepoint, and a commit that was given up stored it within: it is stored again."""

    def fails(session: Session) -> None:
        raise Undone

    def places(session: Session) -> None:
        order(session, 1)
        root = session.begin_nested().parent
        assert root is not None
        event.listen(session, "before_commit", fails, once=True)
        with suppress(Undone):
            root.commit()
        savepoint = session.get_nested_transaction()
        assert savepoint is not None
        savepoint.rollback()
        session.commit()

    async with storing(on(driver), driver) as (factory, _):
        await run(factory, places)
    assert stored(on(driver)) == [1]


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "sqlite+pysqlite"])
async def test_a_savepoint_that_is_undone_within_the_commit(driver: str, on: Callable[[str], Database]) -> None:
    """SQLAlchemy makes a savepoint when it is first worked in: an event without work is undone with it all the same."""

    def tries(session: Session) -> None:
        with suppress(Undone), session.begin_nested():
            emit(session, 2)
            raise Undone
        with session.begin_nested():
            emit(session, 3)

    def places(session: Session) -> None:
        order(session, 1)
        event.listen(session, "before_commit", tries, once=True)
        session.commit()

    async with storing(on(driver), driver) as (factory, _):
        await run(factory, places)
    assert stored(on(driver)) == [1, 3]


async def test_a_commit_that_was_given_up_and_an_asynchronous_session(database: Database) -> None:
    """Outside of the commit nothing is executed: the call is not awaited."""

    def fails(session: Session) -> None:
        raise Undone

    async with storing(database, "postgresql+asyncpg") as (factory, _), factory() as session:
        emit_on_commit(session, Placed(number=1))
        event.listen(session.sync_session, "before_commit", fails, once=True)
        with suppress(Undone):
            await session.commit()
        emit_on_commit(session, Placed(number=2))
        await session.commit()
    assert stored(database) == [1, 2]


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_missing_table_is_told_at_the_commit_and_rolls_back(driver: str, on: Callable[[str], Database]) -> None:
    """Dropped by mistake, or a migration that was undone: nothing is committed, and nothing of an event is told."""
    database = on(driver)

    def places(session: Session) -> None:
        session.add(Order(id=1))
        emit_on_commit(session, Placed(number=1, key="secret-word"))
        with pytest.raises(ConfigurationError, match=r"1 event could not be stored.*create_all.*Alembic") as told:
            session.commit()
        assert "secret-word" not in f"{told.value} {told.value.__cause__}"
        session.rollback()
        session.add(Order(id=2))
        session.commit()

    async with storing(database, driver) as (factory, _):
        with without_tables(database):
            await run(factory, places)
    assert orders(database) == [2]


async def test_a_request_that_is_cancelled_within_the_commit(database: Database) -> None:
    """Work and event are undone together, and the session goes on."""
    async with storing(database, "postgresql+asyncpg") as (factory, _), factory() as session:
        with database.engine.connect() as lock:
            lock.execute(text("lock table dispytch_outbox_event in access exclusive mode"))
            order(session.sync_session, 1)
            commit = asyncio.create_task(session.commit())
            waiting = "select count(*) from pg_locks where not granted and relation = 'dispytch_outbox_event'::regclass"
            async with asyncio.timeout(10):
                while database.all(waiting) != [(1,)]:
                    await asyncio.sleep(0.01)
            commit.cancel()
            with suppress(asyncio.CancelledError):
                await commit
            await session.rollback()
        order(session.sync_session, 2)
        await session.commit()
    assert (orders(database), stored(database)) == ([2], [2])


# -- threads, memory, and the start ----------------------------------------------------------------------------------


async def test_sessions_in_many_threads(database: Database) -> None:
    """`def` routes run in a pool of threads: each session's events are its own."""
    async with storing(database, "postgresql+psycopg") as (factory, _):
        barrier = threading.Barrier(4)

        def places(thread: int) -> None:
            barrier.wait()
            for number in range(25):
                with factory() as session:
                    order(session, thread * 100 + number)
                    if number % 5 == 0:
                        session.rollback()
                    session.commit()

        await asyncio.gather(*(asyncio.to_thread(places, thread) for thread in range(4)))
    expected = [thread * 100 + number for thread in range(4) for number in range(25) if number % 5]
    assert sorted(stored(database)) == orders(database) == expected


async def test_what_is_never_closed_is_forgotten(database: Database) -> None:
    """A session that is dropped on the floor takes its events with it: nothing of ours keeps it."""
    async with storing(database, "postgresql+psycopg") as (factory, outbox):

        def drops() -> list[weakref.ref[Any]]:
            session = factory()
            placed = Placed(number=1)
            emit_on_commit(session, placed)
            connection: Any = outbox.engine.connect()
            emit_on_commit(connection, Placed(number=2), outbox=outbox)
            return [weakref.ref(session), weakref.ref(connection), weakref.ref(placed)]

        dropped = drops()
        gc.collect()
        assert [each() for each in dropped] == [None, None, None]
    assert stored(database) == []


async def test_a_long_transaction_does_not_collect_its_savepoints(database: Database) -> None:
    """An import that guards each row by a savepoint makes millions of them."""
    async with storing(database, "postgresql+psycopg") as (factory, _):
        with factory() as session:
            emit_on_commit(session, Placed(number=1))
            session.execute(select(1))
            for _ in range(50):
                with session.begin_nested():
                    pass
                session.begin_nested().rollback()
            gc.collect()
            assert sum(type(each) is SessionTransaction for each in gc.get_objects()) < 10
            session.commit()
    assert stored(database) == [1]


async def test_an_outbox_that_was_not_started_says_so(database: Database) -> None:
    """Before the app's start and after its end there is nobody to say how a message is made: told at the call."""
    async with session_factory(database, "postgresql+asyncpg") as (factory, engine):
        outbox = SQLAlchemyOutbox(engine, relay="external")
        bind(factory, outbox)
        async with factory() as session:
            with pytest.raises(NotStartedError, match=r"emitter_lifespan\(\.\.\., outbox=outbox\).*with TestClient"):
                emit_on_commit(session, Placed(number=1))
            async with connect("memory://", outbox=outbox):
                order(session.sync_session, 2)
            # Emitted while it was open, committed after its end: stored, and relayed after the next start.
            await session.commit()
            with pytest.raises(NotStartedError, match="knows no brokers"):
                emit_on_commit(session, Placed(number=3))
    assert stored(database) == [2]


async def test_a_pool_that_the_relay_would_use_up_is_refused(database: Database) -> None:
    """One connection, kept by the relay: the first request would wait for the pool, and time out."""
    url, make = database.url("postgresql+psycopg"), create_async_engine
    engine = make(url, pool_size=1, max_overflow=0)
    with pytest.raises(ConfigurationError, match="write pool_size=2 or more, or relay='external'"):
        SQLAlchemyOutbox(engine)
    SQLAlchemyOutbox(engine, relay="external")
    SQLAlchemyOutbox(make(url, pool_size=1, max_overflow=1))
    with pytest.raises(ConfigurationError, match="write pool_size=3"):
        SQLAlchemyOutbox(make(url, pool_size=1, max_overflow=1), options=RelayOptions(notify=True))
    SQLAlchemyOutbox(make(url, pool_size=1, max_overflow=-1), options=RelayOptions(notify=True))
    # On a synchronous engine it has its own beside the pool.
    SQLAlchemyOutbox(create_engine(url, pool_size=1, max_overflow=0), options=RelayOptions(notify=True))
    with pytest.raises(ConfigurationError, match="use a file"):
        SQLAlchemyOutbox(create_engine("sqlite://"))


async def test_two_factories_have_their_own_outboxes(database: Database, elsewhere: Database) -> None:
    """Two databases in one app: async_sessionmaker gives all factories one class, and the last bind must not win."""
    database.empty()
    elsewhere.empty()
    engines = [create_async_engine(each.url("postgresql+asyncpg")) for each in (database, elsewhere)]
    factories = [async_sessionmaker(engine) for engine in engines]
    outboxes = [SQLAlchemyOutbox(engine, relay="external") for engine in engines]
    for factory, outbox in zip(factories, outboxes, strict=True):
        bind(factory, outbox)
        bind(factory, outbox)  # Again: nothing changes.
    unbound = async_sessionmaker(engines[0])
    async with connect("memory://", outbox=outboxes[0]), connect("memory://", outbox=outboxes[1]):
        for number, factory in enumerate(factories):
            async with factory.begin() as session:
                emit_on_commit(session, Placed(number=number))
        async with unbound() as session:
            with pytest.raises(ConfigurationError, match="this session has no emitter"):
                emit_on_commit(session, Placed(number=9))
    for engine in engines:
        await engine.dispose()
    assert (stored(database), stored(elsewhere)) == ([0], [1])


class _Reversed:
    def encode(self, payload: bytes) -> bytes:
        return payload[::-1]

    def decode(self, stored: bytes) -> bytes:
        return stored[::-1]


async def test_a_codec_is_needed_to_relay_what_it_has_encoded(database: Database) -> None:
    """A relay that was started without the key must not send what nobody can read, nor give it up."""
    database.empty()
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    factory = async_sessionmaker(engine)
    for options in (RelayOptions(), RelayOptions(codec=_Reversed())):
        outbox = SQLAlchemyOutbox(engine, relay="external", options=options)
        bind(factory, outbox)
        async with connect("memory://", outbox=outbox), factory.begin() as session:
            emit_on_commit(session, Placed(number=0 if options.codec is None else 1))
    [(first,), (second,)] = database.all("select payload from dispytch_outbox_event order by id")
    assert (b'"number":0' in bytes(first), b'"number"' in bytes(second)) == (True, False)
    sent: list[list[int]] = []
    brokers = connect("memory://")
    async with brokers as emitter:
        producer: Any = emitter.producer
        for options in (RelayOptions(), RelayOptions(codec=_Reversed())):
            await Relay(store_of(engine, None), brokers.brokers, options).drain()
            sent.append([Placed.model_validate_json(message.payload).number for message in producer.sent])
    await engine.dispose()
    assert sent == [[0], [0, 1]]
    assert database.count() == 0


async def test_what_is_no_outbox_is_told_with_what_to_write(database: Database) -> None:
    """The engine in the outbox's place is an easy slip, and options as a dict another."""
    engine: Any = create_async_engine(database.url("postgresql+asyncpg"))
    wrong: Any
    for wrong, told in ((engine, "not a AsyncEngine"), (SQLAlchemyOutbox, "not the class SQLAlchemyOutbox")):
        with pytest.raises(ConfigurationError, match=f"outbox= takes an outbox, {told}; write outbox=SQLAlchemyOutbox"):
            connect("memory://", outbox=wrong)
    options: Any = {"batch_size": 3}
    with pytest.raises(ConfigurationError, match="options= takes RelayOptions, not a dict"):
        SQLAlchemyOutbox(engine, options=options)
    wrong = Base
    with pytest.raises(ConfigurationError, match=r"takes MetaData, not Base; write outbox_tables\(Base.metadata\)"):
        outbox_tables(wrong)
    with pytest.raises(ConfigurationError, match=r"unknown option 'outbx' \(did you mean 'outbox'\?\)"):
        await connect("memory://", outbx=engine).start()
