"""`dispytch-integrations relay | outbox`: run as processes, against real databases and brokers."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from dispytch_integrations import EventBase, cli, connect
from dispytch_integrations import _cli_relay as from_options
from dispytch_integrations._cli_options import duration
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox.record import ENCODED, record_of
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.support.arrivals import SECONDS, Arrivals, KafkaArrivals, RedisArrivals
from tests.support.brokers import Redis, free_port
from tests.support.commands import ROOT, Command, children_of, eventually, is_alive
from tests.support.outboxes import Database, record, temporary_database

pytestmark = pytest.mark.timeout(120)

CLI = [sys.executable, "-m", "dispytch_integrations.cli"]
SECRET = "geheim-81"


class Ordered(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __ordering_key__ = "{key}"

    place: str = Field(exclude=True)
    key: str
    number: int


@pytest.fixture(params=["postgresql", "sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with temporary_database(request.param, tmp_path) as database:
        yield database


@pytest.fixture
def postgresql() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def stream(redis_url: str, unique: str) -> Iterator[RedisArrivals]:
    arrivals = RedisArrivals(redis_url, unique)
    yield arrivals
    arrivals.close()


def url_of(database: Database) -> str:
    """Without a driver, as hosts of databases hand it out."""
    return database.url(database.kind).render_as_string(hide_password=False)


def store(database: Database, url: str, events: Sequence[EventBase], *, notify: bool = False) -> None:
    """What an app would have stored, for the broker at `url`."""
    brokers = connect(url)
    brokers.load()
    prepared = [brokers.emitter.prepare(event)[1] for event in events]
    database.insert([record_of(message) for message in prepared], notify=notify)


def ordered(place: str, count: int, keys: int = 100) -> list[EventBase]:
    return [Ordered(place=place, key=f"k{number % keys}", number=number) for number in range(count)]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, **environment: str) -> Done:
    """A command that ends by itself, run in this process: starting one takes a second."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in ("DATABASE_URL", "DISPYTCH_URL"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dispytch-integrations", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def run_process(*arguments: str) -> Done:
    """The same in a process of its own."""
    done = subprocess.run(
        [*CLI, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def objects(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def relaying(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a relay; all are killed at the end."""
    commands: list[Command] = []

    def start(database: str, broker: str, *more: str) -> Command:
        options = ["--database-url", database, "--broker-url", broker, "--json", "--report-every", "0.3", *more]
        commands.append(Command([*CLI, "relay", *options], tmp_path))
        return commands[-1]

    yield start
    for command in commands:
        command.__exit__()


def shards_held(database: Database) -> int:
    """Shards on which a relay has a lease that has not ended."""
    now = "extract(epoch from clock_timestamp()) * 1000"
    [(count,)] = database.all(
        f"select count(*) from dispytch_outbox_shard where owner is not null and until_ms > {now}"
    )
    return int(count)


# -- the command line as such ----------------------------------------------------------------------------------------


def test_help_loads_nothing_that_takes_time() -> None:
    """Who asks for help waits a tenth of a second, and not for pydantic, the drivers and a database's library."""
    code = (
        "import sys; sys.argv = ['x', 'relay', '--help']\n"
        "from dispytch_integrations import cli\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('pydantic', 'sqlalchemy', 'asyncio', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--liveness-file PATH" in done.stdout


def test_the_help_of_relay_documents_its_exit_codes() -> None:
    """Whoever writes a unit file or a cron job needs them, and looks here."""
    printed = run("relay", "--help").stdout
    for code in ("0  stopped as asked", "1  with --once", "2  a wrong option", "3  the database does not answer"):
        assert code in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["relay", "--broker-url", "memory://"], "write --database-url postgresql://user@host/name, or set DATABASE"),
        (["relay", "--database-url", "sqlite:///x.db"], "write --broker-url kafka://host:9092, or set DISPYTCH_URL"),
        (["relay", "--database-url", "oracle://x/y", "--broker-url", "memory://"], "not oracle"),
        (["relay", "--database-url", f"not {SECRET} a url", "--broker-url", "memory://"], "URL is not readable"),
        (["relay", "--app", "nowhere.to.be:found"], "there is no module 'nowhere'"),
        (["relay", "--app", "json"], "--app takes module:name"),
        (["relay", "--app", "json:nothing"], "json has no 'nothing'"),
        (["relay", "--app", "json:dumps"], "takes arguments"),
        (["relay", "--app", "json:__name__"], "is a str; name what connect(url, outbox=...) returned"),
        (["relay", "--app", "json:x", "--database-url", "sqlite:///x"], "leave out --database-url"),
        (["relay", "--batch-size", "0"], "'0' is no whole number above 0"),
        (["relay", "--keep-sent", "7 fortnights"], "no duration; write seconds, or 45s, 30m, 12h, 7d"),
        (["relay", "--once", "--workers", "2", "--database-url", "sqlite:///x"], "leave out --workers"),
        (["outbox", "list", "--state", "lost"], "no state; write one of waiting, dead, sent"),
        (["outbox", "prune", "--database-url", "sqlite:///x"], "write --older-than 7d"),
        (["outbox", "discard", "--database-url", "sqlite:///x"], "or --all for all dead ones"),
        (["relay", "--database-url", "sqlite:///x", "--broker-url", "a=memory://", "--broker-url", "a=memory://"],
         "names 'a' twice"),
        (["relay", "--database-url", "sqlite:///x", "--broker-url", "kafka://h?lingerms=3"], "'linger_ms'"),
        (["relay", "--database-url", "sqlite:///x", "--broker-url", "kafka://h", "--lease", "2"], "write lease="),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_what_to_write_and_exits_with_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that is set up wrongly must not restart for ever without a word that helps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_durations_are_seconds_or_carry_a_unit() -> None:
    """`7d` is what people write; 604800 is what scripts write."""
    read = [duration(text) for text in ("90", "2.5", "45s", "30m", "12h", "7d", "2w")]
    assert read == [90.0, 2.5, 45.0, 1800.0, 43200.0, 604800.0, 1209600.0]


# -- where its database and its brokers are ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "url", "driver"),
    [
        ({"asyncpg", "psycopg"}, "postgresql://h/d", "postgresql+asyncpg"),
        ({"psycopg"}, "postgres://h/d", "postgresql+psycopg"),
        ({"pymysql"}, "mysql://h/d", "mysql+pymysql"),
        ({"asyncmy", "pymysql"}, "mariadb://h/d", "mariadb+asyncmy"),
        ({"sqlite3"}, "sqlite:///d", "sqlite+pysqlite"),
        ({"psycopg"}, "postgresql+psycopg://h/d", "postgresql+psycopg"),
    ],
)
def test_a_url_without_a_driver_gets_an_installed_one(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], url: str, driver: str
) -> None:
    """DATABASE_URL is the same for Django, psql and us; nobody should have to write `+asyncpg` into it."""
    from sqlalchemy.engine import make_url

    monkeypatch.setattr(from_options, "find_spec", lambda name: name if name in installed else None)
    assert from_options._with_driver(make_url(url)).drivername == driver


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://h/d", "pip install asyncpg"),
        ("mysql+pymysql://h/d", "pip install pymysql"),
        ("mysql+mysqldb://h/d", "pip install mysqlclient"),
        ("postgresql+pyscopg://h/d", r"'pyscopg' \(did you mean 'psycopg'\?\), which is not installed"),
    ],
)
def test_a_missing_driver_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch, url: str, told: str) -> None:
    """The first error in a fresh container should say what to add to it."""
    monkeypatch.setattr(from_options, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=told):
        from_options.engine_of(url)


def test_sslmode_as_hosts_of_databases_write_it_is_understood() -> None:
    """`?sslmode=require` is in most DATABASE_URLs, and asyncpg alone calls it `ssl`."""
    engine = from_options.engine_of("postgresql://u:p@h/d?sslmode=require")
    assert dict(engine.url.query) == {"ssl": "require"}


def test_urls_come_from_the_environment(stream: RedisArrivals, database: Database) -> None:
    """Secrets stand in the environment of a container, not in its command line."""
    store(database, stream.url, [stream.placed(1)])
    done = run("relay", "--once", DATABASE_URL=url_of(database), DISPYTCH_URL=stream.url)
    assert (done.returncode, stream.numbers(1)) == (0, [1]), done.stderr


def test_several_brokers_are_named_by_their_aliases(stream: RedisArrivals, database: Database) -> None:
    """Rows carry the alias of their broker: the relay must find each."""
    store(database, stream.url, [stream.placed(1)])
    database.insert([record(2, broker="other", destination="anywhere", properties={"kind": "stream"})])
    brokers = ("--broker-url", f"default={stream.url}", "--broker-url", "other=memory://redis")
    done = run("relay", "--once", "--database-url", url_of(database), *brokers)
    assert done.returncode == 0, done.stderr
    assert (stream.numbers(1), database.count()) == ([1], 0)


APP = """
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from dispytch_integrations import connect
from dispytch_integrations.outbox import RelayOptions
from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox

class Reversed:
    def encode(self, payload): return payload[::-1]
    def decode(self, stored): return stored[::-1]

outbox = SQLAlchemyOutbox(ENGINE, relay="external", options=RelayOptions(codec=Reversed()))
brokers = connect(BROKER, outbox=outbox)
without = connect(BROKER)
def make(): return brokers
async def coroutine(): return brokers
def failing(): raise KeyError("the app's own")
class Web:
    def __call__(self, scope, receive, send): ...
app = Web()
"""


@pytest.fixture
def app(tmp_path: Path, redis_url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The working directory is that of an app whose payloads are stored backwards."""
    made = (
        f"create_async_engine({database.url('postgresql+asyncpg').render_as_string(hide_password=False)!r})"
        if database.kind == "postgresql"
        else f"create_engine({url_of(database)!r})"
    )
    (tmp_path / "shopapp.py").write_text(APP.replace("ENGINE", made).replace("BROKER", repr(redis_url)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("shopapp", None)


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("name", ["brokers", "make"])
def test_an_app_brings_its_brokers_its_outbox_and_its_codec(
    stream: RedisArrivals, database: Database, name: str
) -> None:
    """What is set up once, in code, is not repeated on a command line, where a codec could not stand anyway."""
    store(database, stream.url, [stream.placed(7)])
    sql = "update dispytch_outbox_event set payload = :payload, format = :format"
    database.run(sql, payload=b'{"number":7}'[::-1], format=ENCODED)
    done = run("relay", "--once", "--app", f"shopapp:{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert stream.numbers(1) == [7]
    assert json.loads(run("outbox", "stats", "--json", "--app", "shopapp:brokers").stdout)["waiting"] == 0


@pytest.mark.usefixtures("app")
def test_what_is_no_app_is_told() -> None:
    """The app's own trouble is shown in full, what we do not understand in a sentence."""
    for name, told in (
        ("without", "has no outbox; write connect(url, outbox=SQLAlchemyOutbox(engine, relay='external'))"),
        ("coroutine", "is a coroutine function; name a plain one"),
        ("failing", "KeyError"),
        (
            "app",
            "returned, or a function without arguments that returns it; shopapp has --app shopapp:brokers",
        ),
        ("broker", "shopapp has no 'broker'; shopapp has --app shopapp:brokers"),
    ):
        done = run("relay", "--app", f"shopapp:{name}")
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
        assert ("Traceback" in done.stderr) == (name == "failing")


# -- once --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["kafka", "redis"])
def test_once_relays_what_is_there(request: pytest.FixtureRequest, database: Database, transport: str) -> None:
    """A cron job, or the last step of a migration: exit code 0 means that all of it was delivered."""
    arrivals: Arrivals
    place = request.getfixturevalue("unique")
    if transport == "kafka":
        arrivals = KafkaArrivals(request.getfixturevalue("kafka_url"), place)
    else:
        arrivals = RedisArrivals(request.getfixturevalue("redis_url"), place)
    store(database, arrivals.url, [arrivals.placed(number) for number in range(3000)])
    done = run("relay", "--once", "--json", "--database-url", url_of(database), "--broker-url", arrivals.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert arrivals.numbers(3000) == list(range(3000))
    end = objects(done)[-1]
    assert (end["event"], end["sent"], end["left"], end["waiting"], end["dead"]) == ("end", 3000, 0, 0, 0)
    assert database.count() == 0
    arrivals.close()


def test_once_says_by_its_exit_code_that_a_broker_is_down(database: Database, unique: str) -> None:
    """A script must not take an outage for a success; and an outage uses up no attempt."""
    dead = f"redis://app:{SECRET}@127.0.0.1:{free_port()}/0?timeout=0.5"
    store(database, dead, ordered(unique, 3))
    done = run("relay", "--once", "--json", "--database-url", url_of(database), "--broker-url", dead)
    assert done.returncode == 1, done.stdout + done.stderr
    end = objects(done)[-1]
    assert (end["event"], end["left"], end["outages"]) == ("end", 3, ["default"])
    assert database.count("state = 0 and attempts = 0") == 3
    assert SECRET not in done.stdout + done.stderr


def test_once_says_by_its_exit_code_that_an_event_was_given_up(stream: RedisArrivals, database: Database) -> None:
    """0 means that all that was there is delivered; a poison event is not."""
    stream.client.set(stream.place, "not a stream")
    store(database, stream.url, [stream.placed(1)])
    done = run("relay", "--once", "--json", "--database-url", url_of(database), "--broker-url", stream.url)
    assert (done.returncode, objects(done)[-1]["died"]) == (1, 1)
    assert database.count("state = 1") == 1


def test_once_and_the_operations_say_that_the_database_is_away(stream: RedisArrivals) -> None:
    """3 is "try again later", 2 is "mend the settings": a script tells them apart."""
    away = f"postgresql://app:{SECRET}@127.0.0.1:{free_port()}/shop"
    for arguments in (("relay", "--once", "--broker-url", stream.url), ("outbox", "stats"), ("outbox", "list")):
        done = run(*arguments, "--database-url", away)
        assert done.returncode == 3, done.stderr
        assert "/shop does not answer: " in done.stderr
        assert "sqlalchemy" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_missing_tables_are_told_with_the_line_that_makes_them(stream: RedisArrivals, database: Database) -> None:
    """The commonest mistake of a first start; waiting for the tables would look like work."""
    database.run("drop table dispytch_outbox_event")
    for arguments in (("relay", "--broker-url", stream.url), ("outbox", "stats"),
                      ("relay", "--workers", "2", "--broker-url", stream.url)):  # fmt: skip
        done = run(*arguments, "--database-url", url_of(database))
        assert done.returncode == 2, done.stdout
        assert "dispytch_outbox_event" in done.stderr
        assert "outbox_tables(metadata)" in done.stderr


def test_notify_wakes_the_relay(postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command]) -> None:
    """Events are milliseconds behind their commit, although nobody looks for them."""
    relaying(url_of(postgresql), stream.url, "--notify", "--poll-interval", "60")
    eventually(lambda: shards_held(postgresql) > 0, lambda: "no relay")
    time.sleep(3)  # Its looks grow rarer: the next one is seconds away.
    store(postgresql, stream.url, [stream.placed(1)], notify=True)
    before = time.monotonic()
    assert stream.numbers(1) == [1]
    assert time.monotonic() - before < 0.7


# -- running -----------------------------------------------------------------------------------------------------------


def test_sigterm_in_a_backlog_loses_nothing_and_gives_the_leases_back(
    postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command]
) -> None:
    """A deployment replaces the relay under load: the next one goes on at once, in order, and nothing is missing."""
    store(postgresql, stream.url, ordered(stream.place, 10_000))
    first = relaying(url_of(postgresql), stream.url, "--batch-size", "200")
    eventually(lambda: stream.client.xlen(stream.place) > 1000, first.explain)
    first.terminate()
    assert first.exit_code() == 0
    assert shards_held(postgresql) == 0
    left = postgresql.count()
    assert 0 < left < 10_000
    second = run("relay", "--once", "--json", "--database-url", url_of(postgresql), "--broker-url", stream.url)
    assert (second.returncode, objects(second)[-1]["sent"]) == (0, left)
    entries: Any = stream.client.xrange(stream.place)
    bodies = [json.loads(fields[b"data"]) for _, fields in entries]
    by_key: dict[str, list[int]] = defaultdict(list)
    for body in bodies:
        by_key[body["key"]].append(body["number"])
    assert len(bodies) == 10_000
    assert by_key == {f"k{key}": list(range(key, 10_000, 100)) for key in range(100)}


def test_a_second_signal_ends_it_at_once(
    postgresql: Database, own_redis: Callable[..., Redis], unique: str, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """An operator who does not want to wait for a broker that hangs."""
    broker = own_redis()
    store(postgresql, broker.url, ordered(unique, 10))
    alive = tmp_path / "alive"
    relay = relaying(url_of(postgresql), f"{broker.url}?timeout=20", "--lease", "60", "--liveness-file", str(alive))
    eventually(lambda: postgresql.count() == 0, relay.explain)
    broker.pause()
    store(postgresql, broker.url, ordered(unique, 10))
    time.sleep(1.5)
    relay.terminate()
    relay.wait_for("stopping")
    assert relay.process.poll() is None
    started = time.monotonic()
    relay.terminate()
    assert relay.exit_code() == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5
    assert not alive.exists()


def test_workers_share_the_shards_and_are_started_again(
    postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """More than one core's work from one command, and a crash of one of them mends itself."""
    alive = tmp_path / "alive"
    workers = ("--workers", "2", "--lease", "4", "--liveness-file", str(alive))
    relay = relaying(url_of(postgresql), f"{stream.url}?timeout=1", *workers)

    def shares() -> list[int]:
        rows = postgresql.all("select count(*) from dispytch_outbox_shard where owner is not null group by owner")
        return [count for (count,) in rows]

    eventually(lambda: shares() == [32, 32], relay.explain)
    eventually(alive.exists, relay.explain)
    eventually(lambda: relay.lines[-1].get("workers") == 2 and relay.lines[-1]["shards"] == 64, relay.explain)
    killed, other = children_of(relay.process.pid)
    os.kill(killed, signal.SIGKILL)
    relay.wait_for("ended (SIGKILL); another one starts in 0.5 s")
    eventually(lambda: set(children_of(relay.process.pid)) not in ({killed, other}, {other}), relay.explain)
    store(postgresql, stream.url, ordered(stream.place, 500))
    eventually(lambda: postgresql.count() == 0, relay.explain)
    eventually(lambda: shares() == [32, 32], relay.explain)
    children = children_of(relay.process.pid)
    relay.terminate()
    assert relay.exit_code() == 0
    assert not any(is_alive(child) for child in children)
    assert shards_held(postgresql) == 0
    assert not alive.exists()
    end = relay.lines[-1]
    assert (end["event"], end["sent"]) == ("end", 500)


def test_workers_end_when_their_parent_is_killed(
    postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command]
) -> None:
    """No orphan goes on relaying with settings of yesterday."""
    relay = relaying(url_of(postgresql), stream.url, "--workers", "2")
    eventually(lambda: shards_held(postgresql) == 64, relay.explain)
    children = children_of(relay.process.pid)
    assert len(children) == 2
    relay.process.kill()
    eventually(lambda: not any(is_alive(child) for child in children), relay.explain)
    assert shards_held(postgresql) == 0


def test_the_liveness_file_is_touched_while_it_lives(
    postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """A probe of Kubernetes looks at the file's age; one that a killed relay has left must not deceive it."""
    alive = tmp_path / "alive"
    alive.touch()
    os.utime(alive, (0, 0))
    relay = relaying(url_of(postgresql), f"{stream.url}?timeout=0.5", "--lease", "2", "--liveness-file", str(alive))
    eventually(lambda: alive.exists() and alive.stat().st_mtime > 0, relay.explain)
    before = alive.stat().st_mtime_ns
    eventually(lambda: alive.stat().st_mtime_ns > before, relay.explain)
    relay.terminate()
    assert relay.exit_code() == 0
    assert not alive.exists()


def test_a_liveness_file_that_cannot_be_written_is_told(database: Database, stream: RedisArrivals) -> None:
    """Else the probe would kill a relay that works, again and again."""
    done = run("relay", "--database-url", url_of(database), "--broker-url", stream.url,
               "--liveness-file", "/nowhere/alive")  # fmt: skip
    assert done.returncode == 2
    assert "the liveness file /nowhere/alive cannot be written" in done.stderr


def test_a_broker_that_is_down_is_waited_for(
    postgresql: Database, own_redis: Callable[..., Redis], unique: str, relaying: Callable[..., Command]
) -> None:
    """Whatever starts first in a cluster: the relay says what it waits for, and goes on when it is there, and when it
    goes away in between."""
    broker = own_redis()
    url = f"{broker.url}?timeout=1"
    broker.stop()
    store(postgresql, url, ordered(unique, 5))
    relay = relaying(url_of(postgresql), url)
    relay.wait_for("is down, its events wait in the outbox")
    eventually(lambda: relay.lines[-1].get("outages") == ["default"], relay.explain)
    broker.start()
    eventually(lambda: postgresql.count() == 0, relay.explain)
    broker.stop()
    store(postgresql, url, ordered(unique, 5))
    eventually(lambda: relay.lines[-1].get("outages") == ["default"], relay.explain)
    broker.start()
    eventually(lambda: postgresql.count() == 0, relay.explain)
    relay.terminate()
    assert relay.exit_code() == 0


def test_a_broker_that_refuses_the_user_ends_it(postgresql: Database, own_redis: Callable[..., Redis]) -> None:
    """Trying a wrong password for ever would look like an outage."""
    broker = own_redis(password="right")
    refused = ("--database-url", url_of(postgresql), "--broker-url", f"redis://:{SECRET}@127.0.0.1:{broker.port}/0")
    for how in ((), ("--workers", "2"), ("--once",)):
        done = run_process("relay", *refused, *how)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "broker 'default': " in done.stderr
        assert SECRET not in done.stdout + done.stderr


@contextmanager
def forwarded(port: int) -> Generator[Callable[[], None], None, None]:
    """A function that makes 127.0.0.1:port reach PostgreSQL."""
    processes: list[subprocess.Popen[bytes]] = []
    code = (
        "import asyncio, sys\nfrom tests.support.proxy import TCPProxy\n"
        "async def main():\n"
        "    proxy = TCPProxy('127.0.0.1', 5432); proxy.port = int(sys.argv[1])\n"
        "    proxy._server = await asyncio.start_server(proxy._accept, '127.0.0.1', proxy.port)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )

    def start() -> None:
        processes.append(subprocess.Popen([sys.executable, "-c", code, str(port)], cwd=ROOT))

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_database_that_is_down_is_waited_for(
    postgresql: Database, stream: RedisArrivals, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """The database is restarted, or comes up after us: no restart of ours is needed, and the probe knows."""
    port, alive = free_port(), tmp_path / "alive"
    store(postgresql, stream.url, [stream.placed(1)])
    away = url_of(postgresql).replace(":5432", f":{port}")
    assert str(port) in away
    relay = relaying(away, stream.url, "--liveness-file", str(alive))
    relay.wait_for("does not answer; trying again")
    assert not alive.exists()
    assert relay.process.poll() is None
    with forwarded(port) as forward:
        forward()
        assert stream.numbers(1) == [1]
        eventually(alive.exists, relay.explain)
    relay.terminate()
    assert relay.exit_code() == 0


def test_progress_is_structured_where_nobody_looks(
    database: Database, stream: RedisArrivals, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """Logs are searched and graphed: each line carries the figures by name, JSON or name=value."""
    relay = relaying(url_of(database), stream.url)
    store(database, stream.url, [stream.placed(number) for number in range(10)])
    eventually(lambda: relay.lines and relay.lines[-1].get("sent") == 10, relay.explain)
    line = next(line for line in relay.lines if line["event"] == "progress")
    assert set(line) == {
        "time", "level", "event", "sent", "rate", "failed", "died", "waiting", "retrying", "dead", "oldest_seconds",
        "shards", "all_shards", "outages", "away", "workers", "seconds",
    }  # fmt: skip
    log = next(line for line in relay.lines if line["event"] == "log")
    assert {"time", "level", "logger", "message"} <= set(log)
    relay.terminate()
    relay.exit_code()
    options = ["--database-url", url_of(database), "--broker-url", stream.url, "--once"]
    printed = run("relay", *options).stdout.splitlines()
    assert re.fullmatch(r"time=\S+ level=info event=end sent=0 rate=0\.0 .* outages=- .* left=0", printed[-1])
    assert "\r" not in "".join(printed)


# -- on a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="150", LINES="40", PYTHONPATH=str(ROOT))
            os.execv(sys.executable, [*CLI, *arguments])
        self.output = ""

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < end, self.output
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self._end, 65536).decode()
                except OSError:  # It has ended.
                    assert text in self.output, self.output

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def exit_code(self) -> int:
        try:
            while data := os.read(self._end, 65536):
                self.output += data.decode()
        except OSError:
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._end)
        return os.waitstatus_to_exitcode(status)


def test_a_terminal_shows_one_line_that_is_updated_and_ctrl_c_ends_it(
    postgresql: Database, stream: RedisArrivals
) -> None:
    """Who starts it by hand sees at a glance whether it works, and how fast."""
    shown = Terminal("relay", "--database-url", url_of(postgresql), "--broker-url", stream.url, "--report-every", "0.2")
    shown.wait_for("64/64 shards")
    store(postgresql, stream.url, ordered(stream.place, 300))
    shown.wait_for("300 sent")
    shown.type("\x03")
    assert shown.exit_code() == 0
    assert shown.output.count("\r\x1b[2K") > 3
    assert "300 events sent in " in shown.output.splitlines()[-1]


def test_a_terminal_is_asked_before_anything_is_changed(postgresql: Database) -> None:
    """A slip of the keyboard requeues nothing."""
    postgresql.insert([record(number, "k") for number in range(3)])
    postgresql.run("update dispytch_outbox_event set state = 1, last_error = :error", error="refused " * 40)
    options = ("--database-url", url_of(postgresql), "--all")
    shown = Terminal("outbox", "requeue", *options)
    shown.wait_for("Requeue 3 events? [y/N]:")
    assert "shop.order.placed" in shown.output
    assert shown.output.count("…") == 3  # An error takes one line of many.
    shown.type("n\n")
    assert shown.exit_code() == 1
    assert "Nothing was changed." in shown.output
    assert postgresql.count("state = 1") == 3
    shown = Terminal("outbox", "requeue", *options)
    shown.wait_for("[y/N]:")
    shown.type("y\n")
    assert shown.exit_code() == 0
    assert "3 events were requeued." in shown.output
    assert postgresql.count("state = 0") == 3


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def outbox(database: Database) -> Callable[..., Done]:
    """Runs `outbox` on rows 1 to 6: two wait, three are dead (keys a, a, b; one of them for long), one is kept."""
    for number, key in enumerate(("a", "b", "a", "a", "b", "a"), start=1):
        database.insert([record(number, key, id=f"event-{number}", destination="orders" if key == "a" else "bills")])
    database.run("update dispytch_outbox_event set state = 1, attempts = 3, state_ms = :now, last_error = :error "
                 "where event_id in ('event-3', 'event-4', 'event-5')",
                 now=int(time.time() * 1000), error="refused\n\x1b[31m")  # fmt: skip
    database.run("update dispytch_outbox_event set state = 2, state_ms = 1 where event_id = 'event-6'")
    database.run("update dispytch_outbox_event set state_ms = 1, attempts = 10 where event_id = 'event-5'")

    def operate(*arguments: str) -> Done:
        return run("outbox", *arguments, "--database-url", url_of(database))

    return operate


Outbox = Callable[..., Done]


def states(database: Database) -> dict[str, int]:
    return dict(database.all("select event_id, state from dispytch_outbox_event order by id"))


def test_stats_counts_what_is_there(outbox: Outbox, database: Database) -> None:
    """A dashboard reads the fields, an operator the lines; a relay that never ran is said."""
    [read] = objects(outbox("stats", "--json"))
    assert {name: read[name] for name in ("database", "waiting", "retrying", "dead", "sent", "relays")} == {
        "database": "default", "waiting": 2, "retrying": 0, "dead": 3, "sent": 1, "relays": {},
    }  # fmt: skip
    assert 0 <= read["oldest_seconds"] < 60
    assert read["oldest_dead_seconds"] > 1000
    assert read["heartbeat_seconds"] is None
    printed = outbox("stats").stdout
    assert "waiting  2, the oldest for" in printed
    assert "none has ever run" in printed
    assert "for broker" not in printed
    database.insert([record(9, broker="alerts")])
    assert objects(outbox("stats", "--json"))[0]["brokers"] == {"alerts": 1, "default": 2}
    assert "1 for broker 'alerts'" in outbox("stats").stdout


def test_list_selects_and_shows_no_payload(outbox: Outbox) -> None:
    """Who looks for one customer's event finds it by its key, and a terminal does not obey what an error says."""
    rows = objects(outbox("list", "--json", "--key", "a", "--state", "dead"))
    assert [row["event_id"] for row in rows] == ["event-3", "event-4"]
    assert rows[0] | {"age_seconds": 0} == {
        "database": "default", "id": rows[0]["id"], "event_id": "event-3", "type": "shop.order.placed",
        "broker": "default", "destination": "orders", "key": "a", "state": "dead", "attempts": 3, "age_seconds": 0,
        "next_try_seconds": None, "last_error": "refused\n\x1b[31m", "size": 1,
    }  # fmt: skip
    table = outbox("list").stdout.splitlines()
    assert [len(table), table[0].split()[:2]] == [7, ["id", "state"]]
    assert "\x1b" not in "".join(table)
    assert "and 4 more" in outbox("list", "--limit", "2").stdout
    for selector, expected in (
        (("--id", str(rows[0]["id"])), ["event-3"]),
        (("--event-id", "event-1", "--event-id", "event-6"), ["event-1", "event-6"]),
        (("--destination", "bills"), ["event-2", "event-5"]),
        (("--type", "other"), []),
        (("--broker", "default", "--state", "sent"), ["event-6"]),
        (("--older-than", "1h"), ["event-5", "event-6"]),
    ):
        assert [row["event_id"] for row in objects(outbox("list", "--json", *selector))] == expected


def test_requeue_is_a_dry_run_until_it_is_told(outbox: Outbox, database: Database) -> None:
    """The first look shows what would be touched; scripts say --yes."""
    before = states(database)
    shown = outbox("requeue", "--key", "a")
    assert shown.returncode == 0
    assert "2 events are selected" in shown.stdout
    assert "write --yes to requeue them" in shown.stdout
    [dry] = objects(outbox("requeue", "--key", "a", "--json"))
    assert (dry["selected"], dry["done"], dry["dry_run"], len(dry["rows"])) == (2, 0, True, 2)
    assert states(database) == before
    assert "2 events were requeued." in outbox("requeue", "--key", "a", "--yes").stdout
    assert states(database) == {**before, "event-3": 0, "event-4": 0}
    assert database.count("event_id = 'event-3' and attempts = 0") == 1
    [done] = objects(outbox("requeue", "--all", "--yes", "--json"))
    assert (done["operation"], done["selected"], done["done"], done["dry_run"]) == ("requeue", 1, 1, False)


def test_discard_leaves_what_waits_unless_that_is_said(outbox: Outbox, database: Database) -> None:
    """`discard --key` must not delete what has never been tried."""
    assert outbox("discard", "--key", "a", "--yes").returncode == 0
    assert states(database) == {"event-1": 0, "event-2": 0, "event-5": 1, "event-6": 2}
    nothing = outbox("discard", "--event-id", "event-1", "--yes").stdout
    assert "none is dead; 1 is waiting (--state); 1 other event is dead" in nothing
    assert "have not been sent" in outbox("discard", "--event-id", "event-1", "--state", "waiting").stdout
    assert outbox("discard", "--event-id", "event-1", "--state", "waiting", "--yes").returncode == 0
    assert states(database) == {"event-2": 0, "event-5": 1, "event-6": 2}


def test_nothing_is_selected_by_accident(outbox: Outbox, database: Database) -> None:
    """An empty variable in a script must not empty the table."""
    before = states(database)
    for operation in ("requeue", "discard"):
        refused = outbox(operation, "--yes")
        assert refused.returncode == 2
        assert "or --all for all dead ones" in refused.stderr
    assert states(database) == before


def test_prune_deletes_what_is_old_and_never_what_waits(outbox: Outbox, database: Database) -> None:
    """A cron job keeps the table small, and loses nothing."""
    before = states(database)
    assert outbox("prune", "--older-than", "7d").returncode == 0
    assert states(database) == before
    assert "2 events were deleted." in outbox("prune", "--older-than", "7d", "--yes").stdout
    assert states(database) == {"event-1": 0, "event-2": 0, "event-3": 1, "event-4": 1}


def test_a_reader_that_has_seen_enough_is_no_error(outbox: Outbox, database: Database) -> None:
    """`outbox list | head -1` ends quietly."""
    database.insert([record(number, "k") for number in range(3000)])
    line = f"{sys.executable} -m dispytch_integrations.cli outbox list --limit 3000 --json | head -1"
    done = subprocess.run(
        line, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "DATABASE_URL": url_of(database)},
    )  # fmt: skip
    assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)
