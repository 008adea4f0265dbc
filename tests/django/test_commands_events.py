"""`manage.py dispytch tail | catalog`, and what emit and check have in common with `dispytch-integrations`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import call_command
from django.core.management.base import CommandError
from pytest_django import Settings

from dispytch_integrations.django import _events
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.management import _brokers as commands
from tests.support.brokers import free_port
from tests.support.commands import ROOT, Command

PLACED = "tests.django.project.shop.events.OrderPlaced"
SECRET = "geheim-19"


def run(*arguments: str) -> str:
    """What `manage.py dispytch ...` prints to standard output; raises CommandError when it fails."""
    printed = io.StringIO()
    call_command("dispytch", *arguments, stdout=printed, stderr=io.StringIO(), no_color=True)
    return printed.getvalue()


def failing(*arguments: str) -> CommandError:
    with pytest.raises(CommandError) as caught:
        run(*arguments)
    return caught.value


@pytest.fixture
def stream(redis_url: str, unique: str, settings: Settings) -> Iterator[str]:
    """A stream with three entries, at the project's broker."""
    settings.DISPYTCH = {"default": redis_url, "kafka": "memory://kafka"}
    client: Any
    with redis.Redis.from_url(redis_url) as client:
        for number in range(3):
            client.xadd(unique, {"data": json.dumps({"number": number}), "ce_specversion": "1.0", "ce_type": "x.y"})
        yield unique
        client.delete(unique)


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events of the project, without those of other tests."""
    classes = [cls for cls in _events.event_classes() if cls.__module__.startswith("tests.django.project.")]
    monkeypatch.setattr(commands, "event_classes", lambda: classes)


# -- tail --------------------------------------------------------------------------------------------------------------


def test_tail_shows_what_arrives_at_the_projects_broker(stream: str) -> None:
    """Without a URL: the settings know it."""
    printed = run("tail", stream, "--from-beginning", "--count", "2", "--filter", "type=x.*")
    assert printed.count("x.y") == 2
    assert '{"number": 1}' in printed
    told = [json.loads(line) for line in run("tail", stream, "--from-beginning", "--count", "3", "--json").splitlines()]
    assert [each["body"]["number"] for each in told] == [0, 1, 2]
    assert connections.session is None


def test_tail_takes_another_alias(stream: str) -> None:
    """A project may have several brokers."""
    told = failing("tail", stream, "--alias", "kafka")
    assert ("memory:// lives inside" in str(told), told.returncode) == (True, 2)
    told = failing("tail", stream, "--alias", "kafak")
    assert "DISPYTCH has no broker 'kafak' (did you mean 'kafka'?)" in str(told)


def test_tail_ends_with_the_codes_of_its_help(settings: Settings, redis_url: str, unique: str) -> None:
    """2: correct it; 3: the broker does not answer."""
    settings.DISPYTCH = {"only": redis_url}
    told = failing("tail", unique, "--stream")
    assert (told.returncode, f"There is no stream '{unique}'" in str(told)) == (2, True)
    settings.DISPYTCH = {"default": f"redis://u:{SECRET}@127.0.0.1:{free_port()}"}
    told = failing("tail", unique)
    assert (told.returncode, "does not answer" in str(told), SECRET in str(told)) == (3, True, False)
    settings.DISPYTCH = {"default": {"URL": "memory://", "TIMEUOT": 3}}
    assert "DISPYTCH is wrong" in str(failing("tail", unique))


def test_ctrl_c_ends_tail_quietly(redis_url: str, unique: str, tmp_path: Path) -> None:
    """It is how one ends it: no traceback, exit code 0."""
    environment = {"DJANGO_SETTINGS_MODULE": "tests.django.project.settings", "TEST_BROKER": redis_url}
    line = [sys.executable, "-m", "django", "dispytch", "tail", unique]
    with Command(line, tmp_path, environment) as command:
        command.wait_for(f"listening to the channel '{unique}'")
        command.process.send_signal(2)
        assert command.exit_code() == 0
        assert len(command.output.splitlines()) == 1, command.output


# -- catalog -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project")
def test_catalog_describes_the_projects_events(settings: Settings, tmp_path: Path) -> None:
    """The document and the page, with the brokers of the settings and none of their passwords."""
    settings.DISPYTCH = {"default": f"redis://u:{SECRET}@queue.example:6379"}
    document = json.loads(run("catalog", "--json", "--title", "The shop", "--api-version", "9.1"))
    assert (document["info"]["title"], document["info"]["version"]) == ("The shop", "9.1")
    assert "queue.example:6379" in json.dumps(document["servers"])
    run("catalog", "-o", str(tmp_path / "events.yaml"), "--html", str(tmp_path / "events.html"))
    for name in ("events.yaml", "events.html"):
        text = (tmp_path / name).read_text()
        assert "shop.order.placed" in text
        assert SECRET not in text
    assert PLACED in run("catalog")
    settings.DISPYTCH = {}
    assert "servers" not in json.loads(run("catalog", "--json"))


@pytest.mark.usefixtures("project")
def test_catalog_diff_is_for_pipelines(tmp_path: Path) -> None:
    """The same as without Django, exit codes included."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    run("catalog", "-o", str(old))
    new.write_text(old.read_text().replace('"number"', '"count"'))
    assert "No difference." in run("catalog", "diff", str(old), str(old))
    with pytest.raises(SystemExit) as ended:
        run("catalog", "diff", str(old), str(new))
    assert ended.value.code == 1
    for arguments, told in (
        (["diff", str(old)], "write `catalog"),
        (["diff", "gone.json", "b"], "gone.json cannot be read"),
    ):
        error = failing("catalog", *arguments)
        assert (error.returncode, told in str(error)) == (2, True)


# -- emit, check and help --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("project")
def test_emit_takes_lines_and_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script pipes in, and what it reads."""
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"number": 1}\n{"number": 2}\n'))
    assert json.loads(run("emit", "shop.order.placed", "--lines", "--json"))["sent"] == 2
    told = json.loads(run("emit", "shop.order.placed", '{"number": 7}', "--json", "--dry-run"))
    assert (told["sent"], told["body"], told["broker"]) == (False, {"number": 7}, "default")


def test_check_tells_settings_from_outages(settings: Settings) -> None:
    """1: it does not answer; 2: it will not, as it is written."""
    settings.DISPYTCH = {"default": {"URL": f"redis://127.0.0.1:{free_port()}"}}
    assert failing("check").returncode == 1
    settings.DISPYTCH = {"default": {"URL": lambda: "kafak://h"}}
    assert failing("check").returncode == 2


@pytest.mark.parametrize("command", ["check", "emit", "events", "tail", "catalog"])
def test_help_has_an_example_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As without Django."""
    with pytest.raises(SystemExit):
        run(command, "--help")
    printed = capsys.readouterr().out
    assert f"  manage.py dispytch {command}" in printed
    assert "exit codes:\n  0  " in printed


def test_help_needs_no_click(tmp_path: Path) -> None:
    """A Django project installs the extra `django` alone."""
    code = (
        "import sys; sys.modules['click'] = None; sys.modules['rich'] = None\n"
        "from django.core.management import execute_from_command_line\n"
        "execute_from_command_line(['manage.py', 'dispytch', 'check'])\n"
        "execute_from_command_line(['manage.py', 'dispytch', 'emit', 'shop.order.placed', '{\"number\": 1}'])"
    )
    environment = {"DJANGO_SETTINGS_MODULE": "tests.django.project.settings", "PYTHONPATH": str(ROOT), **os.environ}
    with Command([sys.executable, "-c", code], tmp_path, environment) as command:
        assert command.exit_code() == 0, command.output
        assert "was sent to" in command.output


@pytest.mark.parametrize("command", ["catalog", "catalog --html -", "events"])
def test_a_reader_that_has_seen_enough_is_no_error(command: str) -> None:
    """`manage.py dispytch events | head -1` ends like any command in a pipe: with no traceback."""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.django.project.settings"}
    line = f"{sys.executable} -m django dispytch {command} | true"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
