"""`manage.py check` of a project with the outbox, as people see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.checks import CheckMessage, run_checks
from django.db import connections as databases
from django.http import HttpResponse
from django.test import override_settings

from dispytch_integrations.django import emit_on_commit
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.asgi import get_asgi_application
from dispytch_integrations.django.checks import TAG
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.middleware import EmitterMiddleware
from dispytch_integrations.django.outbox import conf
from tests.django.project.shop.events import OrderPlaced
from tests.django.test_processes import Program

pytestmark = pytest.mark.timeout(60)

APPS = [*settings.INSTALLED_APPS, conf.APP]
DATABASES = {"DATABASES": ["default"]}


def program(folder: Path, **outbox: Any) -> Program:
    made = Program(folder, "memory://", "shop")
    made.environment["TEST_OUTBOX"] = json.dumps(outbox)
    return made


def found() -> list[CheckMessage]:
    """What the checks say of the settings: events of other tests are about, memory:// is fine."""
    return [each for each in run_checks(tags=[TAG], databases=[]) if each.obj is None and each.id != "dispytch.W001"]


def ids() -> list[str | None]:
    return [each.id for each in found()]


def test_a_typo_is_told_with_what_to_write(tmp_path: Path) -> None:
    """The first thing that people do: all is told at once, each with its remedy, and nothing below a traceback."""
    wrong = program(tmp_path, EMBEDED=True, DATABASES=["defalt"], CODEC="shop.codec")
    done = wrong.manage("check", "--no-color")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line] == [
        "SystemCheckError: System check identified some issues:",
        "ERRORS:",
        "?: (dispytch.E008) DISPYTCH_OUTBOX has the unknown key 'EMBEDED'.",
        "\tHINT: Did you mean 'EMBEDDED'?",
        (
            "?: (dispytch.E009) DISPYTCH_OUTBOX['CODEC']: 'shop.codec' cannot be imported: ModuleNotFoundError: "
            "No module named 'shop'."
        ),
        "\tHINT: Write the dotted path of an object with encode(payload) and decode(stored), or the object itself.",
        (
            "?: (dispytch.E009) DISPYTCH_OUTBOX['DATABASES'] names 'defalt', which is no database (did you mean "
            "'default'?)."
        ),
        "\tHINT: DATABASES has 'default', 'archive'.",
        "System check identified 3 issues (0 silenced).",
    ]


def test_migrate_does_not_ask_for_itself(tmp_path: Path) -> None:
    """Tables that it is about to make are not missed; afterwards, and only with --database, they are looked for."""
    project = program(tmp_path, DATABASES=["default"])
    before = project.manage("check", "--database", "default", "--no-color")
    assert before.returncode == 0
    assert "?: (dispytch.W003) The outbox's tables are missing in database 'default'" in before.stderr
    assert "\tHINT: Run manage.py migrate.\n" in before.stderr
    assert "no issues" in project.manage("check").stdout
    migrated = project.manage("migrate", "--verbosity", "0")
    assert (migrated.returncode, migrated.stdout, migrated.stderr) == (0, "", "")
    assert "no issues" in project.manage("check", "--database", "default").stdout


def test_a_database_that_does_not_answer_is_a_warning(tmp_path: Path) -> None:
    """A check must not end in a traceback of the driver's."""
    project = program(tmp_path, DATABASES=["default"])
    project.environment |= {"TEST_DATABASE": "postgresql", "TEST_DATABASE_PORT": "1"}
    done = project.manage("check", "--database", "default", "--no-color")
    assert "?: (dispytch.W003) The outbox in database 'default' could not be looked at: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_without_the_app_is_an_error() -> None:
    """Whoever writes it believes that events are stored."""
    with override_settings(DISPYTCH_OUTBOX=DATABASES):
        [message] = found()
        assert message.id == "dispytch.E010"
        assert message.hint == f"Write INSTALLED_APPS += ['{conf.APP}'], or remove the setting."
        with pytest.raises(SettingsError, match="no event would be stored"):
            emit_on_commit(OrderPlaced(number=1))


def test_the_app_without_that_of_events_is_an_error() -> None:
    """The outbox alone finds no events.py, and sends nothing at the end of a Celery worker."""
    apps = [app for app in APPS if app != "dispytch_integrations.django"]
    with override_settings(INSTALLED_APPS=apps, DISPYTCH_OUTBOX=DATABASES):
        [message] = found()
        assert (message.id, message.hint) == (
            "dispytch.E001",
            "Write INSTALLED_APPS += ['dispytch_integrations.django'].",
        )


@override_settings(INSTALLED_APPS=APPS, DISPYTCH_OUTBOX={"LEESE": 5, **DATABASES})
def test_servers_say_the_same() -> None:
    """They run no checks."""
    for start in (get_asgi_application, lambda: EmitterMiddleware(lambda request: HttpResponse())):
        with pytest.raises(SettingsError, match=r"unknown key 'LEESE'. Did you mean 'LEASE'\?"):
            start()
    with pytest.raises(SettingsError, match="'LEESE'"):
        emit_on_commit(OrderPlaced(number=1))


@pytest.mark.parametrize(
    ("timeout", "embedded", "told"),
    [
        (5, False, []),
        (6, False, ["dispytch.W002"]),
        (8, False, ["dispytch.E011"]),
        (None, False, ["dispytch.E011"]),
        (6, True, ["dispytch.W002"]),
        (8, True, ["dispytch.E011"]),
    ],
)
def test_a_timeout_has_to_fit_into_the_lease(timeout: float | None, embedded: bool, told: list[str]) -> None:
    """Told once, wherever the relay runs; a process that relays itself refuses to begin."""
    with override_settings(
        INSTALLED_APPS=APPS,
        DISPYTCH={"default": {"URL": "memory://", "TIMEOUT": timeout}},
        DISPYTCH_OUTBOX={"EMBEDDED": embedded, **DATABASES},
    ):
        assert ids() == told
        assert bool(connections.settings().problems) == (embedded and told == ["dispytch.E011"])


def test_another_vendor_cannot_hold_an_outbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relays could not lease: found before the first event."""
    monkeypatch.setattr(databases["default"], "vendor", "oracle")
    with override_settings(INSTALLED_APPS=APPS, DISPYTCH_OUTBOX=DATABASES):
        [message] = found()
    assert message.id == "dispytch.E012"
    assert "needs PostgreSQL, MySQL, MariaDB or SQLite, and this database is oracle" in message.msg


@pytest.mark.parametrize("name", [":memory:", "file:orders?mode=memory&cache=shared", "file::memory:"])
def test_sqlite_in_memory_cannot_hold_an_outbox(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each connection has a database of its own there; Django's test database is no mistake."""
    with override_settings(INSTALLED_APPS=APPS, DISPYTCH_OUTBOX=DATABASES):
        assert ids() == []
        monkeypatch.setattr(databases["default"], "vendor", "sqlite")
        monkeypatch.setitem(databases["default"].settings_dict, "NAME", name)
        assert ids() == ["dispytch.E012"]
        monkeypatch.setitem(databases["default"].settings_dict, "NAME", "file:memorydb_default?mode=memory")
        assert ids() == []


class BreakingRouter:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        raise LookupError("no tenant")


class KeepsOut:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db != "archive" if app_label == conf.LABEL else None


def test_routers_and_the_setting_have_to_agree() -> None:
    """Where `migrate` makes no tables nothing can be stored; where the setting names none, routers decide."""
    with override_settings(INSTALLED_APPS=APPS, DATABASE_ROUTERS=[f"{__name__}.KeepsOut"]):
        with override_settings(DISPYTCH_OUTBOX={"DATABASES": ["default", "archive"]}):
            [message] = found()
            assert (message.id, message.hint) == (
                "dispytch.E013",
                "Let allow_migrate('archive', 'dispytch_outbox') return True, or take 'archive' out of DATABASES.",
            )
        assert ids() == []
    with (
        override_settings(
            INSTALLED_APPS=APPS, DATABASE_ROUTERS=[f"{__name__}.BreakingRouter"], DISPYTCH_OUTBOX=DATABASES
        ),
    ):
        [message] = found()
        assert (message.id, "LookupError: no tenant" in message.msg) == ("dispytch.E013", True)


def test_checks_open_no_connection_of_their_own() -> None:
    """`manage.py check` runs where there is no database, in a build for example."""
    with override_settings(INSTALLED_APPS=APPS, DISPYTCH_OUTBOX={"EMBEDDED": True, **DATABASES}):
        assert ids() == []  # A test without the mark django_db may not ask a database.
        assert connections.session is None
