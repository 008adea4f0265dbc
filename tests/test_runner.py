"""`Runner`: relays as a process, started, watched, and stopped by a signal, whatever their databases do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from dispytch_integrations import connect
from dispytch_integrations._broker import Broker
from dispytch_integrations._sqlalchemy_store import store_of
from dispytch_integrations.errors import ConfigurationError, DeliveryError
from dispytch_integrations.outbox._signals import on_signals
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.relay import Relay
from dispytch_integrations.outbox.runner import DONE, LEFT, DatabaseAwayError, Progress, Runner
from dispytch_integrations.outbox.workers import Workers
from tests.support.brokers import free_port
from tests.support.outboxes import Database, Watched, eventually, record, temporary_database
from tests.support.proxy import TCPProxy

OPTIONS = RelayOptions(lease=1.0, poll_interval=0.1, backoff=0.05)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with temporary_database("sqlite", tmp_path) as database:
        yield database


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Database]:
    folder = tmp_path / "other"
    folder.mkdir()
    with temporary_database("sqlite", folder) as database:
        yield database


@pytest.fixture
def postgresql() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


def made(*databases: Database, **given: Any) -> Runner:
    """A runner to a broker in memory, of databases that are called "0", "1" and so on."""
    stores = {str(number): lambda each=each: store_of(each.engine) for number, each in enumerate(databases)}
    given = {"options": OPTIONS, **given}
    return Runner(connect("memory://", timeout=0.3, shutdown_timeout=0.2), stores, **given)


@asynccontextmanager
async def running(runner: Runner) -> AsyncGenerator[asyncio.Task[None]]:
    """It runs, and is stopped at the end of the block."""
    task = asyncio.create_task(runner.run())
    try:
        yield task
    finally:
        runner.stop()
        await asyncio.wait_for(task, 15)


def sent(runner: Runner) -> list[int]:
    """The numbers of the messages that the broker has confirmed."""
    producer: Any = runner.brokers.producers.get("default")
    return [] if producer is None else [int(message.payload) for message in producer.sent]


def held(*databases: Database) -> int:
    """Shards that somebody has a lease on."""
    query = "select count(*) from dispytch_outbox_shard where owner is not null"
    return sum(count for database in databases for [count] in database.all(query))


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_the_first_signal_ends_it_with_all_settled(database: Database, number: signal.Signals) -> None:
    """A deployment, Ctrl-C, and a terminal that is closed: nothing is sent twice, the next relay begins at once."""
    database.insert([record(number) for number in range(50)])
    before = signal.getsignal(number)
    runner = made(database)
    runner.on_beat = lambda: os.kill(os.getpid(), number) if sent(runner) else None
    assert runner.main() == DONE
    assert sorted(sent(runner)) == list(range(50))
    assert (database.count(), held(database)) == (0, 0)
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup` and shells ask for it: a relay in the background does not end with Ctrl-C in the foreground."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(lambda: None, lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_it_leaves_signals_alone(database: Database) -> None:
    """Somebody's own process may run it beside other work, and stops it itself."""
    runner, codes, beaten = made(database), list[int](), threading.Event()
    runner.on_beat = beaten.set
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: codes.append(runner.main()))
    thread.start()
    assert beaten.wait(10)
    assert signal.getsignal(signal.SIGTERM) is before
    runner.stop()
    thread.join(10)
    assert codes == [DONE]
    runner.stop()  # Harmless afterwards.


async def test_a_stop_before_the_start_is_not_lost(database: Database) -> None:
    """SIGTERM while a slow import still runs: the process ends, and sends nothing."""
    database.insert([record(1)])
    runner = made(database)
    runner.stop()
    await asyncio.wait_for(runner.run(), 10)
    assert (database.count(), held(database)) == (1, 0)


# -- liveness ----------------------------------------------------------------------------------------------------------


async def test_the_liveness_file_is_touched_at_each_renewal_and_removed(database: Database, tmp_path: Path) -> None:
    """A probe looks at its age; one that a killed process has left says nothing about this one."""
    alive = tmp_path / "alive"
    alive.touch()
    os.utime(alive, (0, 0))
    runner = made(database, liveness_file=alive)
    async with running(runner):
        await eventually(lambda: alive.exists() and alive.stat().st_mtime > 0)
        first = alive.stat().st_mtime_ns
        await eventually(lambda: alive.stat().st_mtime_ns > first)
    assert not alive.exists()


async def test_a_liveness_file_speaks_for_all_databases(database: Database, other: Database, tmp_path: Path) -> None:
    """With one of two databases away the process is not well, and the file must not say so."""
    alive, stores = tmp_path / "alive", [Watched(store_of(each.engine)) for each in (database, other)]
    stores[1].fail["open"] = 1_000_000
    runner = Runner(
        connect("memory://", timeout=0.3),
        {"well": lambda: stores[0], "away": lambda: stores[1]},  # type: ignore[dict-item,return-value]
        OPTIONS,
        liveness_file=alive,
    )
    async with running(runner):
        await eventually(lambda: held(database) == 64 and stores[1].calls["open"] > 1)
        await eventually(lambda: stores[0].calls["renew"] > 2)
        assert not alive.exists()
        stores[1].fail["open"] = 0
        await eventually(alive.exists)


async def test_a_liveness_file_that_cannot_be_written_is_told_at_once(database: Database, tmp_path: Path) -> None:
    """Else the probe would kill a relay that works, again and again."""
    runner = made(database, liveness_file=tmp_path / "nowhere" / "alive")
    with pytest.raises(ConfigurationError, match="nowhere/alive cannot be written: No such file or directory; give"):
        await runner.run()
    assert held(database) == 0


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_relay_that_fails_is_replaced(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug that strikes once must not end the process, nor take its counts away."""
    failures = [RuntimeError("a bug")]
    wait = Relay._wait

    async def failing(self: Relay, poll: float) -> None:
        if failures and self.counts.sent:
            raise failures.pop()
        await wait(self, poll)

    monkeypatch.setattr(Relay, "_wait", failing)
    monkeypatch.setattr("dispytch_integrations.outbox.runner._FIRST_PAUSE", 0.05)
    database.insert([record(1)])
    runner = made(database)
    async with running(runner):
        await eventually(lambda: not failures)
        database.insert([record(2)])
        await eventually(lambda: sent(runner) == [1, 2])
        await eventually(lambda: runner.counts.sent == 2)
    assert "the relay of 0 failed; another one starts in about 0 s" in caplog.text
    assert held(database) == 0


async def test_missing_tables_end_it_and_the_other_relays(database: Database, other: Database) -> None:
    """A mistake in the settings is told by an exit, and not hidden behind the outbox that works."""
    other.run("drop table dispytch_outbox_event")
    ended: list[int] = []

    async def on_end() -> None:
        ended.append(held(database))

    with pytest.raises(ConfigurationError, match="dispytch_outbox_event"):
        await asyncio.wait_for(made(database, other, on_end=on_end).run(), 15)
    assert ended == [0]


async def test_without_a_database_drain_says_so_and_run_waits(caplog: pytest.LogCaptureFixture) -> None:
    """A cron job ends with a code of its own; the relay of a cluster that is just starting does not."""
    url = f"postgresql+asyncpg://app:geheim-81@127.0.0.1:{free_port()}/shop"
    engine = create_async_engine(url, poolclass=NullPool)
    runner = Runner(connect("memory://", timeout=0.3), {"shop": lambda: store_of(engine)}, OPTIONS)
    with pytest.raises(DatabaseAwayError, match="/shop does not answer: ") as caught:
        await runner.drain()
    assert "geheim-81" not in str(caught.value)
    runner = Runner(connect("memory://", timeout=0.3), {"shop": lambda: store_of(engine)}, OPTIONS)
    async with running(runner) as task:
        await eventually(lambda: "does not answer; trying again" in caplog.text)
        assert not task.done()
        assert "geheim-81" not in caplog.text


def behind(proxy: TCPProxy, database: Database, driver: str) -> Any:
    """An engine whose connections go through the proxy."""
    url = database.url(driver).set(host="127.0.0.1", port=proxy.port)
    make: Any = create_async_engine if driver == "postgresql+asyncpg" else create_engine
    return make(url, poolclass=NullPool)


async def test_a_database_that_goes_away_in_the_middle_is_waited_for(postgresql: Database) -> None:
    """A failover of the database needs no restart of the relay; progress names the database meanwhile."""
    reports: list[Progress] = []
    async with TCPProxy("127.0.0.1", 5432) as proxy:
        engine: AsyncEngine = behind(proxy, postgresql, "postgresql+asyncpg")
        runner = Runner(
            connect("memory://", timeout=0.3), {"shop": lambda: store_of(engine)}, OPTIONS,
            on_progress=reports.append, every=0.05,
        )  # fmt: skip
        async with running(runner):
            postgresql.insert([record(1)])
            await eventually(lambda: sent(runner) == [1])
            await proxy.refuse()
            await eventually(lambda: reports and reports[-1].away == ("shop",) and reports[-1].waiting is None)
            postgresql.insert([record(2)])
            await proxy.resume()
            await eventually(lambda: sent(runner) == [1, 2])
            await eventually(lambda: reports[-1].away == () and reports[-1].waiting == 0)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
async def test_a_stop_does_not_wait_for_a_database_that_hangs(postgresql: Database, driver: str) -> None:
    """A container runtime kills after 30 s: a stop that takes longer would lose what can be settled elsewhere."""
    reports: list[Progress] = []
    async with TCPProxy("127.0.0.1", 5432) as proxy:
        engine = behind(proxy, postgresql, driver)
        runner = Runner(
            connect("memory://", timeout=0.3), {"shop": lambda: store_of(engine)}, OPTIONS,
            on_progress=reports.append, every=0.05,
        )  # fmt: skip
        task = asyncio.create_task(runner.run())
        await eventually(lambda: reports and reports[-1].waiting == 0)
        await proxy.stall()
        await eventually(lambda: reports[-1].away == ("shop",))
        started = time.monotonic()
        runner.stop()
        await asyncio.wait_for(task, 20)
        assert time.monotonic() - started < 8
        assert reports[-1].ended


async def test_a_stop_leaves_a_relay_behind_that_does_not_end(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its lease is longer than anybody waits: the process ends as it was asked to, and takes its liveness file away."""
    monkeypatch.setattr("dispytch_integrations.outbox.runner._CLOSING", 0.2)
    alive = tmp_path / "alive"
    async with TCPProxy("127.0.0.1", 5432) as proxy:
        engine = behind(proxy, postgresql, "postgresql+asyncpg")
        options = RelayOptions(lease=10.0, poll_interval=0.1)
        brokers = connect("memory://", timeout=0.3)
        runner = Runner(brokers, {"shop": lambda: store_of(engine)}, options, liveness_file=alive)
        task = asyncio.create_task(runner.run())
        await eventually(alive.exists)
        await proxy.stall()
        await asyncio.sleep(0.3)  # It asks its database meanwhile.
        started = time.monotonic()
        runner.stop()
        await asyncio.wait_for(task, 10)
        assert time.monotonic() - started < 5
        assert not alive.exists()


# -- what it tells -----------------------------------------------------------------------------------------------------


async def test_counts_and_progress_are_those_of_all_outboxes(database: Database, other: Database) -> None:
    """One process may relay several databases: its figures are of all of them."""
    database.insert([record(number) for number in range(30)])
    other.insert([record(number) for number in range(12)])
    reports: list[Progress] = []
    runner = made(database, other, on_progress=reports.append, every=0.05)
    async with running(runner):
        await eventually(lambda: reports and (reports[-1].sent, reports[-1].waiting) == (42, 0))
        assert (reports[-1].shards, reports[-1].all_shards) == (128, 128)
        assert runner.counts.sent == 42
        assert sum(report.rate for report in reports) > 0
        assert set(runner.relays) == {"0", "1"}
    assert (reports[-1].ended, reports[-1].sent, reports[-1].shards) == (True, 42, 0)
    assert [report.ended for report in reports[:-1]] == [False] * (len(reports) - 1)


async def test_progress_that_cannot_be_shown_does_not_end_it(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads the relay's output may go away (`| head`, a closed terminal): events go on being sent."""

    def broken(progress: Progress) -> None:
        raise BrokenPipeError

    runner = made(database, on_progress=broken, every=0.05)
    async with running(runner):
        await eventually(lambda: "progress is shown no more" in caplog.text)
        database.insert([record(1)])
        await eventually(lambda: sent(runner) == [1])
    assert caplog.text.count("progress is shown no more") == 1


def test_once_returns_what_a_script_needs(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: all delivered; 1: something was given up. The counts say how much."""
    database.insert([record(number) for number in range(3)])
    assert made(database).main(once=True) == DONE
    database.insert([record(number) for number in range(3)])
    refusing: Callable[..., Any] = lambda self, messages, **more: _refused(messages)  # noqa: E731
    monkeypatch.setattr("dispytch_integrations.memory.MemoryProducer.deliver", refusing)
    runner = made(database, options=RelayOptions(lease=1.0, max_attempts=1))
    assert runner.main(once=True) == LEFT
    assert (runner.counts.sent, runner.counts.attempts_failed, runner.counts.dead) == (0, 3, 3)


async def _refused(messages: Any) -> list[Exception | None]:
    return [DeliveryError("refused") for _ in messages]


async def test_who_watched_the_brokers_goes_on_watching_them(database: Database) -> None:
    """Django's signals `broker_started` and `broker_stopped` are sent by a relay, too."""
    states: list[str] = []
    runner = made(database)
    watched = connect("memory://", timeout=0.3)
    watched.on_change = lambda broker: states.append(broker.state)
    runner = Runner(watched, runner.stores, OPTIONS)
    async with running(runner):
        await eventually(lambda: "up" in states)
    assert states[-1] == "stopped"


async def test_a_connection_to_a_broker_is_logged_once(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The first line of a log says where events go."""
    caplog.set_level(logging.INFO)
    runner = made(database)
    async with running(runner):
        await eventually(lambda: held(database) == 64)
        broker: Broker = runner.brokers.brokers["default"]
        assert broker.state == "up"
    assert caplog.text.count("connected to broker 'default' (memory://)") == 1


def test_nothing_to_relay_is_a_mistake() -> None:
    """An empty list of databases, from settings, would run for ever and do nothing."""
    with pytest.raises(ConfigurationError, match="there is no outbox to relay"):
        Runner(connect("memory://"), {})
    with pytest.raises(ConfigurationError, match="0 workers relay nothing; write 1 or more"):
        Workers(lambda: made(), 0)
