"""Processes of a project with the outbox: who relays, what is connected, and how it ends.

Each test runs programs and servers of its own, on a database and a broker that are real.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.django.test_outbox_commands import in_django
from tests.django.test_processes import Program, listener
from tests.django.test_servers import GUNICORN, UVICORN, UVICORN_PLAIN
from tests.support.arrivals import RedisArrivals
from tests.support.brokers import free_port
from tests.support.outboxes import Database, temporary_database
from tests.support.proxy import TCPProxy
from tests.support.servers import Shop, serving

pytestmark = pytest.mark.timeout(90)

SETTINGS = """
from tests.django.project.settings import *
DATABASES = {"default": %r}
DATABASE_ROUTERS = []
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
"""


@pytest.fixture
def place(redis_url: str, unique: str) -> Iterator[RedisArrivals]:
    """A stream of the shared Redis."""
    arrivals = RedisArrivals(redis_url.replace("127.0.0.1", "localhost"), unique)
    yield arrivals
    arrivals.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with temporary_database(request.param, tmp_path) as database:
        yield database


def program_of(database: Database, folder: Path, url: str, name: str, **outbox: Any) -> Program:
    """Programs of a project whose outbox is in this database."""
    (folder / "outbox_settings.py").write_text(SETTINGS % in_django(database))
    program = Program(folder, url, name)
    program.environment |= {"DJANGO_SETTINGS_MODULE": "outbox_settings", "TEST_OUTBOX": json.dumps(outbox)}
    return program


@pytest.fixture
def program(database: Database, tmp_path: Path, place: RedisArrivals) -> Program:
    """One that relays its own outbox, and looks at it once a minute unless it is woken."""
    return program_of(database, tmp_path, place.url, place.place, EMBEDDED=True, POLL_INTERVAL=60)


def owners(database: Database) -> set[str | None]:
    """Who holds leases."""
    return {owner for (owner,) in database.all("select owner from dispytch_outbox_shard where until_ms > 0")}


# -- the life of a process -----------------------------------------------------------------------------------------


def test_a_program_that_ends_loses_nothing(program: Program, place: RedisArrivals, database: Database) -> None:
    """What its relay could not send any more waits in the table for the next one, and nothing is sent twice."""
    done = program.run("commit(1000)")
    assert done.returncode == 0, done.stderr
    done = program.run("commit(1, first=1000); time.sleep(0.5)")
    assert done.returncode == 0, done.stderr
    if database.count():
        done = program.manage("dispytch", "relay", "--once")
        assert done.returncode == 0, done.stdout + done.stderr
    assert place.numbers(1001) == list(range(1001))
    assert database.count() == 0


def test_it_gives_its_leases_back_when_it_ends(program: Program, place: RedisArrivals, database: Database) -> None:
    """The next process relays at once, and not after the time of a lease."""
    done = program.run(
        """
        from dispytch_integrations.django.lifecycle import close_brokers, open_brokers
        from dispytch_integrations.django._connections import connections
        open_brokers()
        commit(1)
        while connections.session.outbox.relays["default"].counts.sent < 1:
            time.sleep(0.01)
        print(connections.session.outbox.relays["default"].shards)
        started = time.monotonic()
        close_brokers()
        print(time.monotonic() - started < 3)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\nTrue\n", "")
    assert place.numbers(1) == [0]
    assert owners(database) <= {None}


def test_each_process_of_a_fork_has_a_relay_of_its_own(
    program: Program, place: RedisArrivals, database: Database
) -> None:
    """A preloading server forks after its first event: children share neither a thread nor a connection with it."""
    done = program.run(
        """
        from django.db import connections as databases
        commit(10)
        databases.close_all()  # Django's own connections are the program's business.
        children = []
        for child in range(1, 4):
            pid = os.fork()
            if pid == 0:
                try:
                    commit(10, first=10 * child)
                    time.sleep(0.5)
                finally:
                    from dispytch_integrations.django.lifecycle import close_brokers
                    close_brokers()
                    os._exit(0)
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        commit(10, first=40)
        time.sleep(1.5)
        print(codes)
        """
    )
    assert (done.returncode, done.stdout) == (0, "[0, 0, 0]\n"), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    if database.count():  # Its leases were still another's.
        program.manage("dispytch", "relay", "--once")
    assert sorted(place.numbers(50)) == list(range(50))


def test_a_broker_that_is_away_is_no_matter_of_the_commit(database: Database, tmp_path: Path, unique: str) -> None:
    """The request is answered, the event is safe; when the process ends, it does not wait for the broker."""
    url = f"redis://127.0.0.1:{free_port()}"
    program = program_of(database, tmp_path, url, unique, EMBEDDED=True)
    done = program.run(
        """
        started = time.monotonic()
        commit(10)
        print(time.monotonic() - started < 3)
        """
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert database.count("attempts = 0") == 10


def test_a_commit_after_the_shutdown_is_stored(program: Program, database: Database) -> None:
    """The last requests of a server: the next process sends what they tell."""
    done = program.run(
        """
        from dispytch_integrations.django.lifecycle import close_brokers, open_brokers
        open_brokers()
        close_brokers()
        commit(3)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert database.count() == 3


def test_tables_that_come_later_are_found(program: Program, place: RedisArrivals, database: Database) -> None:
    """A process that was started before `migrate` need not be started again; a server says so at its start."""
    database.run("alter table dispytch_outbox_shard rename to later")
    done = program.run(
        """
        from dispytch_integrations.django.lifecycle import open_brokers
        try:
            open_brokers()
        except Exception as exc:
            print(exc)
        commit(1)
        sys.stdout.flush()
        from django.db import connection
        time.sleep(0.5)
        with connection.cursor() as cursor:
            cursor.execute("alter table later rename to dispytch_outbox_shard")
        time.sleep(2.5)
        """
    )
    assert done.returncode == 0, done.stderr
    missing = "the outbox's tables are missing in database 'default' (dispytch_outbox_shard): run manage.py migrate"
    assert done.stdout == f"{missing}\n"
    assert f"is not relayed, trying again in 1 s: {missing}" in done.stderr
    assert place.numbers(1) == [0]


# -- what must not connect, nor relay --------------------------------------------------------------------------------


@pytest.mark.parametrize("outbox", [{"EMBEDDED": True}, {"EMBEDDED": False}, {"DIRECT_EMITS": True}])
def test_commands_neither_connect_nor_relay(tmp_path: Path, unique: str, outbox: dict[str, Any]) -> None:
    """A migration job has no access to the broker, and is no relay."""
    with temporary_database("sqlite", tmp_path) as database, listener() as (url, accepted):
        done = program_of(database, tmp_path, url, unique, **outbox).run(
            """
            from django.core.management import call_command
            call_command("migrate", "shop", verbosity=0)
            call_command("check", deploy=True)
            call_command("check", databases=["default"])
            call_command("dispytch", "events")
            call_command("dispytch", "outbox", "stats")
            with transaction.atomic():
                emit_on_commit(OrderPlaced(number=1))
                transaction.set_rollback(True)
            print([thread.name for thread in threading.enumerate() if thread.name.startswith("dispytch loop")])
            """
        )
        assert accepted == []
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n"), done.stdout
        assert owners(database) <= {None}


async def test_web_processes_do_not_connect_where_another_process_relays(
    tmp_path: Path, place: RedisArrivals, redis_url: str
) -> None:
    """However many workers there are, the broker has the relay's connection alone; the relay sends what they stored."""
    address = urlsplit(redis_url)
    with temporary_database("postgresql", tmp_path) as database:
        async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
            url = f"redis://{proxy.host}:{proxy.port}{address.path}"
            for command in (UVICORN, UVICORN_PLAIN, GUNICORN):
                program = program_of(database, tmp_path, url, place.place)
                migrated = await asyncio.to_thread(program.manage, "migrate", "shop", "--verbosity", "0")
                assert migrated.returncode == 0, migrated.stderr
                async with serving(command, tmp_path, program.environment) as server:
                    shop = Shop(server)
                    await shop.place_first("commit")
                    await asyncio.gather(*(shop.place(way) for way in ("commit", "acommit") * 10))
                    assert (len(shop.placed), shop.failed) == (21, []), server.output()
                    await shop.place("emit")
                    assert shop.failed == [500]
                    await server.wait_for_output("write emit_on_commit(...), which stores the event")
                    assert "runs no lifespan" not in server.output()
                    server.terminate()
                    await server.exit_code(20)
            assert proxy.accepted == 0
            assert database.count() == 63
            done = await asyncio.to_thread(program.manage, "dispytch", "relay", "--once")
            assert done.returncode == 0, done.stderr
            assert proxy.accepted >= 1
    assert len(await asyncio.to_thread(place.numbers, 63)) == 63


async def test_direct_emits_connect_at_the_first_one(tmp_path: Path, place: RedisArrivals, redis_url: str) -> None:
    """DIRECT_EMITS opens nothing by itself: neither the start of the server nor a stored event does."""
    address = urlsplit(redis_url)
    with temporary_database("postgresql", tmp_path) as database:
        async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
            url = f"redis://{proxy.host}:{proxy.port}{address.path}"
            program = program_of(database, tmp_path, url, place.place, DIRECT_EMITS=True)
            migrated = await asyncio.to_thread(program.manage, "migrate", "shop", "--verbosity", "0")
            assert migrated.returncode == 0, migrated.stderr
            async with serving(UVICORN, tmp_path, program.environment) as server:
                shop = Shop(server)
                await shop.place_first("commit")
                assert proxy.accepted == 0
                await shop.place("aemit")
                assert (shop.failed, proxy.accepted) == ([], 1), server.output()
        assert database.count() == 1
    assert set(await asyncio.to_thread(place.numbers, 1)) < shop.placed


# -- under a server ----------------------------------------------------------------------------------------------------


async def test_a_server_relays_from_its_start_to_its_end(tmp_path: Path, place: RedisArrivals) -> None:
    """A deployment under load loses nothing: what the old process has not sent, the new one sends at its start."""
    with temporary_database("postgresql", tmp_path) as database:
        program = program_of(database, tmp_path, place.url, place.place, EMBEDDED=True, POLL_INTERVAL=60)
        migrated = await asyncio.to_thread(program.manage, "migrate", "shop", "--verbosity", "0")
        assert migrated.returncode == 0, migrated.stderr
        async with serving(UVICORN, tmp_path, program.environment) as server:
            shop = Shop(server)
            await shop.place_first("commit")
            assert set(await asyncio.to_thread(place.numbers, 1)) == shop.placed
            load = [asyncio.create_task(shop.place_until_closed(way)) for way in ["commit", "acommit"] * 4]
            await shop.wait_for(len(shop.placed) + 100)
            server.terminate()
            await asyncio.gather(*load)
            await server.exit_code(20)
            assert shop.failed == [], server.output()
        assert owners(database) <= {None}
        async with serving(UVICORN, tmp_path, program.environment) as server:
            await Shop(server).get_first("/process")
            arrived = await asyncio.to_thread(place.numbers, len(shop.placed))
        assert shop.placed <= set(arrived)
        assert len(set(arrived)) == len(arrived)
        assert database.count() == 0


async def test_a_server_does_not_start_without_the_tables(tmp_path: Path, unique: str) -> None:
    """`migrate` was forgotten: the deployment fails, and not its first order."""
    with temporary_database("sqlite", tmp_path) as database:
        database.run("drop table dispytch_outbox_event")
        program = program_of(database, tmp_path, "memory://", unique)
        async with serving(UVICORN, tmp_path, program.environment) as server:
            assert await server.exit_code(20) != 0
            assert "(dispytch_outbox_event): run manage.py migrate" in server.output()
