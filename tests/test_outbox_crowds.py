"""The relay under a crowd of failures, under locks of others, beside forks and with producers that hang: it goes on."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from dispytch_integrations._sqlalchemy_store import store_of
from dispytch_integrations.errors import DeliveryError
from dispytch_integrations.outbox import relay as relay_module
from dispytch_integrations.outbox.store import Selection
from tests.support.outboxes import (
    Database,
    FakeBackend,
    Watched,
    eventually,
    opened,
    record,
    relaying,
    started,
    temporary_database,
)
from tests.support.proxy import TCPProxy
from tests.support.servers import ROOT

DRIVERS = ["postgresql+asyncpg", "mysql+asyncmy", "mysql+pymysql", "sqlite+aiosqlite"]


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    driver: str = request.getfixturevalue("driver")
    with temporary_database(driver.partition("+")[0], tmp_path) as database:
        yield database


def _engine(database: Database, driver: str, **options: Any) -> Any:
    url = database.url(driver)
    if driver.endswith(("asyncpg", "asyncmy", "aiosqlite")):
        return create_async_engine(url, **options)
    return create_engine(url, **options)


async def _disposed(engine: Any) -> None:
    disposed = engine.dispose()
    if disposed is not None:
        await disposed


@pytest.mark.parametrize("driver", DRIVERS)
async def test_thousands_of_refused_events_hold_up_nobody_else(driver: str, database: Database) -> None:
    """A topic is refused for an afternoon, the database is a few milliseconds away: the others get their events."""
    bad, good = FakeBackend(), FakeBackend()
    bad.fake.answer = lambda message: DeliveryError("refused")
    engine = _engine(database, driver)
    database.insert([record(number) for number in range(4000)])
    store = Watched(store_of(engine))
    store.before["settle"] = lambda: asyncio.sleep(0.05)
    async with started(default=bad, good=good) as brokers, relaying(store, brokers, lease=4.0, backoff=2.0) as relay:
        for number in range(3):
            await asyncio.to_thread(database.insert, [record(number, broker="good")])
            relay.wake()
            await eventually(lambda number=number: len(good.fake.sent) == number + 1, 5)  # type: ignore[misc]
        await eventually(lambda: database.count("attempts > 0") == 4000, 20)
        assert relay.shards == 64, "leases are renewed meanwhile"
        assert relay.last_error is None
    await _disposed(engine)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_thousands_of_keys_that_wait_do_not_fill_each_batch(
    driver: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key waits for its next try in minutes; an event of another key, stored behind them, goes out at once."""
    monkeypatch.setattr(relay_module, "_LONGEST_PAUSE", 0.05)  # Else reading them once would be enough for this test.
    database.insert([record(number, f"key {number}", payload=b"x" * 500) for number in range(5000)])
    database.run("update dispytch_outbox_event set attempts = 3, next_try_ms = 99999999999999")
    backend, engine = FakeBackend(), _engine(database, driver)
    async with started(default=backend) as brokers, relaying(store_of(engine), brokers, batch_size=50) as relay:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(3):
            await asyncio.to_thread(database.insert, [record(number, "healthy")])
            relay.wake()
            await eventually(lambda number=number: backend.fake.numbers("healthy") == list(range(number + 1)), 5)  # type: ignore[misc]
            await asyncio.sleep(0.3)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
        # The operator has mended it: all of them go out, and the relay notices by itself.
        store = store_of(engine)
        async with opened(store):
            assert await store.requeue(Selection()) == 5000
        await eventually(lambda: database.count() == 0, 30)
    assert len(backend.fake.sent) == 5003
    await _disposed(engine)


@pytest.mark.parametrize("keep", [None, 60.0], ids=["deleted", "kept"])
@pytest.mark.parametrize("driver", ["mysql+asyncmy", "mysql+pymysql", "postgresql+asyncpg"])
async def test_an_open_transaction_keeps_nothing_from_being_settled(
    driver: str, keep: float | None, database: Database
) -> None:
    """MariaDB locks what a statement passes: one transaction left open stopped the whole outbox."""
    backend, engine = FakeBackend(), _engine(database, driver)
    database.insert([record(number, "first") for number in range(3)])
    with database.engine.connect() as slow:
        database.insert([record(100, "slow")], on=slow)
        database.insert([record(number, f"key {number % 7}") for number in range(3, 60)])
        backend.fake.answer = lambda message: DeliveryError("refused") if message.payload == b"5" else None
        async with (
            started(default=backend) as brokers,
            relaying(store_of(engine), brokers, keep_sent=keep, max_attempts=1) as relay,
        ):
            await eventually(lambda: database.count("state = 0") == 0, 10)
            assert relay.last_error is None
            assert database.count("state = 1") == 1, "the dead one"
            store = store_of(engine)
            async with opened(store):
                assert await store.discard(Selection()) == (1 if keep is None else 60)
            slow.commit()
            await eventually(lambda: backend.fake.numbers("slow") == [100])
    await _disposed(engine)


@pytest.mark.parametrize("driver", ["mysql+asyncmy", "postgresql+asyncpg", "sqlite+aiosqlite"])
async def test_names_are_told_apart_by_their_case(
    driver: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """MySQL takes "Alerts" for "alerts": a relay would turn round an event it cannot send, or discard another one's."""
    backend, engine = FakeBackend(), _engine(database, driver)
    database.insert([record(1, "Key", broker="Alerts"), record(2, "key", broker="alerts"), record(3, "key ")])
    store = Watched(store_of(engine))
    async with started(alerts=backend) as brokers, relaying(store, brokers):
        await eventually(lambda: backend.fake.numbers() == [2])
        await asyncio.sleep(0.5)
        assert store.calls["fetch"] < 50
        assert "events wait for broker 'Alerts'" in caplog.text
    async with opened(store_of(engine)) as operator:
        assert (await operator.stats()).brokers == {"Alerts": 1, "default": 1}
        assert await operator.count(Selection(key="key")) == 0
        assert await operator.count(Selection(broker="alerts")) == 0
        assert await operator.discard(Selection(key="KEY")) == 0
        assert await operator.discard(Selection(key="Key", broker="Alerts")) == 1
    await _disposed(engine)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg"])
async def test_a_producer_that_does_not_return_is_cut(driver: str, database: Database) -> None:
    """A bug of a client that knows no deadline: its events are tried again, and count as not confirmed."""
    backend, engine = FakeBackend(), _engine(database, driver)
    database.insert([record(1, "anna"), record(2, "bob")])
    backend.fake.gate.clear()
    async with started(timeout=0.2, default=backend) as brokers, relaying(store_of(engine), brokers):
        await eventually(lambda: database.count("attempts = 1") == 2)
        [(told,), _] = database.all("select last_error from dispytch_outbox_event")
        assert "the producer did not return within 1.2 s" in told
        backend.fake.gate.set()
        await eventually(lambda: database.count() == 0)
    await _disposed(engine)


@pytest.mark.parametrize("driver", ["mysql+pymysql", "postgresql+psycopg"])
async def test_connections_that_die_without_a_word_cost_nothing(driver: str, database: Database) -> None:
    """A firewall forgets them, again and again: neither the app's pool nor the process's threads are used up."""
    location = database.url(driver)
    backend = FakeBackend()
    async with TCPProxy("127.0.0.1", location.port or 0) as proxy:
        engine = create_engine(location.set(port=proxy.port), pool_size=1, max_overflow=0)
        async with started(default=backend) as brokers, relaying(store_of(engine), brokers, lease=0.6):
            for number in range(4):
                await asyncio.to_thread(database.insert, [record(number)])
                await eventually(lambda number=number: len(backend.fake.sent) > number)  # type: ignore[misc]
                await proxy.freeze()
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            await eventually(lambda: len(_threads("dispytch outbox")) <= 2)
        await eventually(lambda: not _threads("dispytch outbox"))
        engine.dispose()


def _threads(name: str) -> list[str]:
    import threading

    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


FORKING = """
import asyncio, gc, os, sys, time
from sqlalchemy import create_engine
from tests.support.outboxes import *
from dispytch_integrations._sqlalchemy_store import store_of

async def main(kind, driver):
    with temporary_database(kind) as database:
        engine, backend = create_engine(database.url(driver)), FakeBackend()
        async with started(default=backend) as brokers, relaying(store_of(engine), brokers) as relay:
            for number in range(4):
                database.insert([record(number, "anna")])
                relay.wake()
                await eventually(lambda: len(backend.fake.sent) == number + 1 and database.count() == 0)
                child = os.fork()
                if not child:
                    gc.collect()
                    for _ in range(1000):
                        relay.wake()
                    os._exit(0)
                os.waitpid(child, 0)
        assert backend.fake.numbers() == [0, 1, 2, 3], backend.fake.numbers()
        engine.dispose()
    print("all sent once")

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("driver", ["mysql+pymysql", "postgresql+psycopg"])
def test_a_forked_child_leaves_the_relays_connection_alone(driver: str, tmp_path: Path) -> None:
    """It has a copy of the connection: cleaned up there, the parent's relay stood in a transaction for ever."""
    program = tmp_path / "forking.py"
    program.write_text(textwrap.dedent(FORKING))
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), driver.partition("+")[0], driver],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert "all sent once" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - before < 30
