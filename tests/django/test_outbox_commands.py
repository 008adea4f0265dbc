"""`manage.py dispytch relay | outbox`: what `dispytch-integrations` does, for a Django project and in its look."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connections as databases
from django.test.utils import override_settings

from dispytch_integrations import connect
from dispytch_integrations.outbox.record import record_of
from tests.support.arrivals import SECONDS, RedisArrivals
from tests.support.commands import ROOT, Command, children_of, eventually, is_alive
from tests.support.outboxes import Database, record, temporary_database

pytestmark = pytest.mark.timeout(120)

APPS = (
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "dispytch_integrations.django",
    "tests.django.project.shop",
    "dispytch_integrations.django.outbox",
)
KINDS = ["sqlite", "postgresql"]


@pytest.fixture
def stream(redis_url: str, unique: str) -> Iterator[RedisArrivals]:
    arrivals = RedisArrivals(redis_url, unique)
    yield arrivals
    arrivals.close()


def in_django(database: Database) -> dict[str, Any]:
    """What stands in DATABASES."""
    url = database.url("x")
    if database.kind == "sqlite":
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": url.database}
    return {
        "ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username,
        "PASSWORD": url.password or "", "HOST": url.host, "PORT": str(url.port),
    }  # fmt: skip


def store(database: Database, stream: RedisArrivals, count: int) -> None:
    """What a web process would have stored for the broker."""
    brokers = connect(stream.url)
    brokers.load()
    events = [stream.placed(number) for number in range(count)]
    database.insert([record_of(brokers.emitter.prepare(event)[1]) for event in events])


def states(database: Database) -> dict[str, int]:
    return dict(database.all("select event_id, state from dispytch_outbox_event order by id"))


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path, django_db_blocker: Any) -> Iterator[Database]:
    """The database "orders" of a project with the outbox."""
    with temporary_database(request.param, tmp_path) as database:
        databases.settings["orders"] = databases.configure_settings(
            {"default": in_django(database), "orders": in_django(database)}
        )["orders"]
        try:
            outbox = {"DATABASES": ["orders"], "LEASE": 2}
            broker = {"default": {"URL": "memory://", "TIMEOUT": 1}}
            with (
                override_settings(INSTALLED_APPS=APPS, DISPYTCH_OUTBOX=outbox, DISPYTCH=broker),
                django_db_blocker.unblock(),
            ):
                yield database
        finally:
            databases["orders"].close()
            del databases["orders"]
            del databases.settings["orders"]


def run(*arguments: str) -> str:
    """What `manage.py dispytch ...` prints."""
    printed = io.StringIO()
    call_command("dispytch", *arguments, stdout=printed, stderr=printed, no_color=True)
    return printed.getvalue()


def objects(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*arguments, "--json").splitlines()]


def failing(*arguments: str) -> CommandError:
    with pytest.raises(CommandError) as caught:
        run(*arguments)
    return caught.value


def fill(database: Database) -> None:
    """Rows 1 to 5: two wait, two are dead (keys a, b; the second one for long), one is kept."""
    for number, key in enumerate(("a", "b", "a", "b", "a"), start=1):
        database.insert([record(number, key, id=f"event-{number}")])
    database.run(
        "update dispytch_outbox_event set state = 1, attempts = 3, state_ms = :now, last_error = 'refused' "
        "where event_id in ('event-3', 'event-4')", now=int(time.time() * 1000),
    )  # fmt: skip
    database.run("update dispytch_outbox_event set state_ms = 1 where event_id = 'event-4'")
    database.run("update dispytch_outbox_event set state = 2, state_ms = 1 where event_id = 'event-5'")


def test_stats_and_list_show_what_is_there(database: Database) -> None:
    """The same figures as without Django, of the databases that the settings name."""
    fill(database)
    printed = run("outbox", "stats")
    assert "('orders')" in printed.splitlines()[0]
    assert "waiting  2, the oldest for" in printed
    assert "none has ever run" in printed
    [read] = objects("outbox", "stats")
    assert (read["database"], read["waiting"], read["dead"], read["sent"]) == ("orders", 2, 2, 1)
    rows = objects("outbox", "list", "--state", "dead", "--key", "a")
    assert [(row["event_id"], row["attempts"], row["last_error"]) for row in rows] == [("event-3", 3, "refused")]
    table = run("outbox", "list", "--limit", "3").splitlines()
    assert table[0].split()[:2] == ["id", "state"]
    assert (len(table), table[-1]) == (5, "... and 2 more: --limit 5")


def test_requeue_discard_and_prune_change_nothing_until_they_are_told(database: Database) -> None:
    """A look first; scripts say --yes. What waits is not discarded by its key alone."""
    fill(database)
    before = states(database)
    assert "write --yes to requeue it" in run("outbox", "requeue", "--key", "a")
    assert "write --yes to discard them" in run("outbox", "discard", "--all")
    assert "write --yes to prune them" in run("outbox", "prune", "--older-than", "7d")
    assert states(database) == before
    assert "1 event was requeued." in run("outbox", "requeue", "--key", "a", "--yes")
    assert states(database) == {**before, "event-3": 0}
    [done] = objects("outbox", "prune", "--older-than", "7d", "--yes")
    assert (done["operation"], done["done"]) == ("prune", 2)
    assert states(database) == {"event-1": 0, "event-2": 0, "event-3": 0}
    assert "1 event was deleted." not in run("outbox", "discard", "--event-id", "event-1", "--yes")
    run("outbox", "discard", "--event-id", "event-1", "--state", "waiting", "--yes")
    assert states(database) == {"event-2": 0, "event-3": 0}


def test_once_relays_what_is_there(database: Database, stream: RedisArrivals) -> None:
    """A cron job, or a step of a deployment: no exception means that all was delivered."""
    store(database, stream, 50)
    with override_settings(DISPYTCH={"default": {"URL": stream.url, "TIMEOUT": 1}}):
        end = objects("relay", "--once")[-1]
        assert (end["event"], end["sent"], end["left"]) == ("end", 50, 0)
        assert stream.numbers(50) == list(range(50))
        store(database, stream, 1)
        stream.client.delete(stream.place)
        stream.client.set(stream.place, "not a stream")
        error = failing("relay", "--once", "--max-attempts", "1")
    assert error.returncode == 1
    assert "see `manage.py dispytch outbox list`" in str(error)
    assert database.count("state = 1") == 1


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_emit_reaches_the_broker_past_an_outbox_that_is_relayed_elsewhere(database: Database) -> None:
    """ "Does an event arrive?" is a question to the broker; no transaction and no relay are asked."""
    assert "was sent to" in run("emit", "tests.django.project.shop.events.OrderPlaced", '{"number": 7}')
    assert (database.count(), _direct()) == (0, False)


def _direct() -> bool:
    from dispytch_integrations.django._connections import connections

    return connections.always_direct


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["outbox", "stats", "--database", "order"], "there is no database 'order' (did you mean 'orders'?)"),
        (["outbox", "discard", "--yes"], "or --all for all dead ones"),
        (["outbox", "prune"], "write --older-than 7d"),
        (["relay", "--database", "ordres"], "did you mean 'orders'?"),
        (["relay", "--once", "--workers", "2"], "leave out --workers"),
        (["relay", "--lease", "1"], "does not fit into a lease of 1 s"),
        (["relay", "--liveness-file", "/nowhere/alive"], "/nowhere/alive cannot be written"),
    ],
)
def test_a_mistake_is_told_with_what_to_write(database: Database, arguments: list[str], told: str) -> None:
    """2 is "mend the settings": a unit file with RestartPreventExitStatus=2 does not try for ever."""
    error = failing(*arguments)
    assert told in str(error)
    assert error.returncode == 2


def test_an_option_that_cannot_be_read_is_told() -> None:
    """argparse would say "invalid whole value"."""
    assert "'0' is no whole number above 0" in str(failing("relay", "--workers", "0"))
    assert "no duration; write seconds, or 45s, 30m" in str(failing("outbox", "prune", "--older-than", "week"))


def test_settings_that_are_wrong_are_told(database: Database) -> None:
    """All of them at once, in the words of `manage.py check`."""
    with override_settings(DISPYTCH_OUTBOX={"DATABASES": ["orders"], "BATCHSIZE": 5}):
        for arguments in (("relay", "--once"), ("outbox", "stats")):
            error = failing(*arguments)
            assert (error.returncode, "unknown key 'BATCHSIZE'" in str(error)) == (2, True)
    with override_settings(DISPYTCH={"default": "kafka://"}):
        assert failing("relay", "--once").returncode == 2


def test_missing_tables_are_told_with_the_line_that_makes_them(database: Database) -> None:
    """The commonest mistake of a first start."""
    database.run("drop table dispytch_outbox_event")
    for arguments in (("relay",), ("outbox", "stats")):
        error = failing(*arguments)
        assert "run manage.py migrate --database orders" in str(error)
        assert error.returncode == 2


def test_without_the_app_it_says_what_to_add() -> None:
    """Who reads of the command before the page on the outbox."""
    for arguments in (("relay",), ("outbox", "stats")):
        error = failing(*arguments)
        assert "write INSTALLED_APPS += ['dispytch_integrations.django.outbox']" in str(error)
        assert "run manage.py migrate" in str(error)
        assert error.returncode == 2


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_database_that_is_away_has_an_exit_code_of_its_own(database: Database) -> None:
    """3 is "try again later"."""
    databases.settings["orders"]["PORT"] = "1"
    for arguments in (("relay", "--once"), ("outbox", "stats")):
        error = failing(*arguments)
        assert error.returncode == 3
        assert "does not answer: " in str(error)


# -- as processes ------------------------------------------------------------------------------------------------------

SETTINGS = """
from tests.django.project.settings import *
INSTALLED_APPS = [*INSTALLED_APPS, "dispytch_integrations.django.outbox", "watching"]
DATABASES = {"default": DATABASE}
DATABASE_ROUTERS = []
DISPYTCH = {"default": {"URL": os.environ["TEST_BROKER"], "TIMEOUT": 1}}
DISPYTCH_OUTBOX = {"LEASE": 4, "MAX_ATTEMPTS": 1}
if os.environ.get("LOGGED"):
    LOGGING = {
        "version": 1,
        "formatters": {"ours": {"format": "LOGGED %(message)s"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "ours"}},
        "loggers": {"dispytch_integrations": {"handlers": ["console"], "level": "INFO"}},
    }
"""
WATCHING = """
import os, time
from django.apps import AppConfig

class Watching(AppConfig):
    name = "watching"

    def ready(self):
        if os.environ.get("WATCH"):
            from dispytch_integrations.django import signals
            for name in ("broker_started", "event_emitted", "event_failed"):
                getattr(signals, name).connect(getattr(self, name))

    def note(self, text, **more):
        from tests.django.project.shop.models import Failure
        Failure.objects.create(event_type=text, error=str(more.get("error", "")))

    def broker_started(self, sender, alias, **more):
        self.note(f"started {alias}")

    def event_emitted(self, sender, message, alias, after_commit, **more):
        self.note(f"emitted {message.type} {after_commit}")

    def event_failed(self, sender, message, error, **more):
        time.sleep(1)  # The relay is stopped meanwhile.
        self.note(f"failed {message.type}", error=error)
"""


class Project:
    """A project in a directory, whose processes are started here."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self.database = database
        made = repr(in_django(database))
        (folder / "outboxed.py").write_text(SETTINGS.replace("DATABASE}", f"{made}}}"))
        (folder / "watching").mkdir()
        (folder / "watching" / "__init__.py").write_text("")
        (folder / "watching" / "apps.py").write_text(WATCHING)

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{ROOT}{os.pathsep}{self.folder}"
        given = {"PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": "outboxed", "TEST_BROKER": "memory://"}
        return {**os.environ, **given, **more}

    def manage(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "django", *arguments], cwd=self.folder, env=self.environment(**more),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def notes(self) -> list[tuple[str, str]]:
        """What receivers of signals have written into the database."""
        return self.database.all("select event_type, error from shop_failure order by id")


@pytest.fixture(scope="module", params=KINDS)
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    with temporary_database(request.param, folder) as database:
        for table in ("dispytch_outbox_event", "dispytch_outbox_shard"):
            database.run(f"drop table {table}")
        project = Project(folder, database)
        done = project.manage("migrate", "-v", "0")
        assert done.returncode == 0, done.stderr
        yield project


@pytest.fixture
def project(migrated: Project) -> Project:
    """A project with the outbox, its tables made by its migration, and empty."""
    migrated.database.empty()
    migrated.database.run("delete from shop_failure")
    return migrated


@pytest.fixture
def relaying(project: Project, stream: RedisArrivals, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a relay; all are killed at the end."""
    commands: list[Command] = []

    def start(*more: str, **environment: str) -> Command:
        command = [sys.executable, "-m", "django", "dispytch", "relay", "--json", "--report-every", "0.3", *more]
        given: Mapping[str, str] = project.environment(TEST_BROKER=stream.url, **environment)
        commands.append(Command(command, tmp_path, given, cwd=project.folder))
        return commands[-1]

    yield start
    for command in commands:
        command.__exit__()


def held(database: Database) -> int:
    [(count,)] = database.all("select count(*) from dispytch_outbox_shard where owner is not null")
    return int(count)


def test_a_relay_runs_until_sigterm_and_receivers_use_the_orm(
    project: Project, stream: RedisArrivals, relaying: Callable[..., Command], tmp_path: Path
) -> None:
    """What watches the project's events in a web process watches them in the relay, too, and writes it down."""
    alive = tmp_path / "alive"
    relay = relaying("--liveness-file", str(alive), "--settings", "outboxed", "--no-color", WATCH="1")
    eventually(alive.exists, relay.explain)
    store(project.database, stream, 5)
    assert stream.numbers(5) == list(range(5))
    eventually(lambda: len(project.notes()) == 6, relay.explain)
    stream.client.delete(stream.place)
    stream.client.set(stream.place, "not a stream")
    store(project.database, stream, 1)
    eventually(lambda: project.database.count("state = 1") == 1, relay.explain)
    relay.terminate()
    assert relay.exit_code() == 0
    assert (alive.exists(), held(project.database)) == (False, 0)
    [first, *emitted, (last, error)] = project.notes()
    kind = stream.placed(0).__event_type__
    assert first == ("started default", "")
    assert emitted == [(f"emitted {kind} True", "")] * 5
    assert last == f"failed {kind}"
    assert "WRONGTYPE" in error
    assert (relay.lines[-1]["event"], relay.lines[-1]["sent"], relay.lines[-1]["died"]) == ("end", 5, 1)


@pytest.mark.parametrize("migrated", ["postgresql"], indirect=True)
def test_workers_share_the_work_and_the_project(
    project: Project, stream: RedisArrivals, relaying: Callable[..., Command]
) -> None:
    """Each one sets up Django by itself, with the same settings, and its signals are received in it."""
    relay = relaying("--workers", "2", WATCH="1", LOGGED="1")
    owners = "select count(*) from dispytch_outbox_shard where owner is not null group by owner"
    eventually(lambda: project.database.all(owners) == [(32,), (32,)], relay.explain)
    children = children_of(relay.process.pid)
    assert len(children) == 2
    store(project.database, stream, 40)
    eventually(lambda: project.database.count() == 0, relay.explain)
    eventually(lambda: len(project.notes()) == 42, relay.explain)
    relay.terminate()
    assert relay.exit_code() == 0
    assert not any(is_alive(child) for child in children)
    assert held(project.database) == 0
    assert sorted({text for text, _ in project.notes()}) == [
        f"emitted {stream.placed(0).__event_type__} True", "started default",
    ]  # fmt: skip
    assert (relay.lines[-1]["event"], relay.lines[-1]["sent"]) == ("end", 40)
    # The project's own way to log is used once, by the first process.
    connected = [line for line in relay.output.splitlines() if "connected to broker" in line]
    assert sorted(line.partition(": ")[0] for line in connected) == ["LOGGED worker 1", "LOGGED worker 2"]


def test_workers_say_what_is_wrong_once(project: Project) -> None:
    """It is found in the workers' processes, and told by the first one."""
    done = project.manage("dispytch", "relay", "--workers", "2", TEST_BROKER="kafka://h?lingerms=3")
    assert done.returncode == 2
    assert done.stderr.count("'linger_ms'") == 1
    assert "Traceback" not in done.stderr


class Terminal:
    """A management command on a terminal of its own."""

    def __init__(self, project: Project, *arguments: str, **more: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.chdir(project.folder)
            command = [sys.executable, "-m", "django", "dispytch", *arguments]
            os.execve(sys.executable, command, project.environment(TERM="xterm", COLUMNS="100", **more))
        self.output = ""

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.output:
            assert time.monotonic() < end, self.output
            if select.select([self._end], [], [], 0.2)[0]:
                self.output += os.read(self._end, 65536).decode()

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


def test_a_terminal_is_asked_and_sees_djangos_colours(project: Project) -> None:
    """A slip of the keyboard requeues nothing; lines are as wide as the terminal."""
    project.database.insert([record(number, "k") for number in range(3)])
    project.database.run("update dispytch_outbox_event set state = 1, last_error = :error", error="refused " * 20)
    shown = Terminal(project, "outbox", "requeue", "--all")
    shown.wait_for("Requeue 3 events? [y/N]:")
    assert "\x1b[36;1m3 events are selected:\x1b[0m" in shown.output
    assert max(len(line) for line in shown.output.splitlines() if "\x1b" not in line) == 100
    shown.type("n\n")
    assert shown.exit_code() == 1
    assert "Nothing was changed." in shown.output
    shown = Terminal(project, "outbox", "requeue", "--all")
    shown.wait_for("[y/N]:")
    shown.type("y\n")
    assert shown.exit_code() == 0
    assert "\x1b[32;1m3 events were requeued.\x1b[0m" in shown.output
    assert project.database.count("state = 0") == 3


def test_a_terminal_shows_one_line_that_is_updated(project: Project, stream: RedisArrivals) -> None:
    """Who starts it by hand sees at a glance whether it works; Ctrl-C ends it without a traceback."""
    shown = Terminal(project, "relay", "--report-every", "0.2", TEST_BROKER=stream.url)
    shown.wait_for("64/64 shards")
    store(project.database, stream, 30)
    shown.wait_for("30 sent")
    shown.type("\x03")
    assert shown.exit_code() == 0
    assert shown.output.count("\r\x1b[2K") > 3
    assert "30 events sent in " in shown.output.splitlines()[-1]


def test_help_tells_exit_codes_and_fields(project: Project) -> None:
    """Whoever writes a unit file or a dashboard looks here."""
    printed = project.manage("dispytch", "relay", "--help").stdout
    assert "  3  the database does not answer" in printed
    assert 'event "progress", and "end" for the last one: time, level, sent' in printed
    assert "oldest_dead_seconds" in project.manage("dispytch", "outbox", "stats", "--help").stdout
