"""`manage.py dispytch check | emit | events`: what people ask first, answered in a terminal and for a script."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import call_command
from django.core.management.base import CommandError
from pytest_django import Settings

from dispytch_integrations import EventBase
from dispytch_integrations.django import _events, get_emitter
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.management import _brokers as commands
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.support.brokers import Redis, free_port

ROOT = Path(__file__).parents[2]
MANAGE_PY = """
import sys
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", *sys.argv[1:]])
"""
PLACED = "tests.django.project.shop.events.OrderPlaced"


class Shipped(EventBase):
    __route__ = KafkaEventRoute(topic="shipments.{tenant}")
    __ordering_key__ = "{order}"
    __event_type__ = "commands.shipped"

    tenant: str
    order: int


class Parcelled(EventBase):
    __route__ = KafkaEventRoute(topic="parcels")
    __backend_config__ = KafkaEventConfig(partition_key="{order}")
    __broker__ = "default"

    order: int


class Routed(EventBase):
    __route__ = RabbitMQEventRoute(exchange="amq.topic", routing_key="{key}")

    key: str


class Streamed(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str


Stream = Callable[[], list[dict[bytes, bytes]]]


def run(*arguments: str) -> str:
    """What `manage.py dispytch ...` prints; raises CommandError when it fails."""
    printed = io.StringIO()
    call_command("dispytch", *arguments, stdout=printed, stderr=printed, no_color=True)
    return printed.getvalue()


def failing(*arguments: str) -> tuple[str, CommandError]:
    """What it prints when it fails, and the error with its exit code."""
    printed = io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command("dispytch", *arguments, stdout=printed, stderr=printed, no_color=True)
    return printed.getvalue(), caught.value


def sent(alias: str = "default") -> list[Message]:
    producer = get_emitter().producers[alias]
    assert isinstance(producer, MemoryProducer)
    return producer.sent


@pytest.fixture
def dead() -> str:
    """A URL with a password, at whose port nobody listens."""
    return f"redis://app:hunter2@127.0.0.1:{free_port()}/0"


@pytest.fixture
def stream(redis_url: str, unique: str) -> Iterator[Stream]:
    """What has arrived in the stream of this test."""
    client: Any
    with redis.Redis.from_url(redis_url) as client:
        yield lambda: [fields for _, fields in client.xrange(unique)]
        client.delete(unique)


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_says_of_each_broker_whether_it_can_be_used(
    settings: Settings, redis_url: str, rabbitmq_url: str, kafka_url: str, dead: str
) -> None:
    """The first question of an operator, answered for all brokers in one run, and by the exit code."""
    settings.DISPYTCH = {"redis": redis_url, "kafka": kafka_url, "rabbit": rabbitmq_url, "memory": "memory://"}
    table = rows(run("check", "--timeout", "20"))
    assert {alias: cells[1] for alias, cells in table.items()} == dict.fromkeys(settings.DISPYTCH, "up")
    assert all(cells[3].endswith(" ms") for cells in table.values())
    assert table["rabbit"][2].startswith("RabbitMQ ")
    assert table["redis"][2].startswith(("Redis ", "Valkey "))
    assert table["kafka"][4].endswith("tells no version")

    settings.DISPYTCH = {"redis": redis_url, "dead": {"URL": dead, "REQUIRED": False}}
    printed, error = failing("check", "--timeout", "0.5")
    table = rows(printed)
    assert (table["redis"][1], table["dead"][1]) == ("up", "down")
    assert "127.0.0.1" in table["dead"][0]
    assert "\ndead: does not answer" in printed
    assert str(error) == "1 of 2 brokers cannot be used: dead."
    assert error.returncode == 1
    assert "hunter2" not in f"{printed} {error}"


def rows(printed: str) -> dict[str, list[str]]:
    """A printed table: by its first cell the others."""
    told = printed.partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in told.splitlines()]
    assert lines[0][:3] == ["alias", "broker", "state"]
    return {cells[0]: cells[1:] for cells in lines[1:]}


@pytest.mark.timeout(25)  # The broker's own STARTUP_TIMEOUT would be 30.
def test_check_as_json_is_for_scripts(settings: Settings, dead: str) -> None:
    """A deployment's probe reads fields, and gets the same exit code."""
    settings.DISPYTCH = {"default": "memory://", "dead": dead}
    printed, error = failing("check", "--json", "--timeout", "0.5")
    up, down = json.loads(printed)
    assert (up["alias"], up["address"], up["state"], up["error"]) == ("default", "memory://", "up", None)
    assert up["milliseconds"] >= 0
    assert (down["alias"], down["state"], down["milliseconds"]) == ("dead", "down", None)
    assert down["error"].startswith("does not answer")
    assert (error.returncode, "hunter2" in printed) == (1, False)


def test_check_tells_wrong_credentials(settings: Settings, own_redis: Callable[..., Redis]) -> None:
    """A server that answers "no" is told from one that does not answer."""
    broker = own_redis(password="sesame")
    settings.DISPYTCH = {"default": {"URL": f"redis://127.0.0.1:{broker.port}/0", "PASSWORD": "hunter2"}}
    printed, _ = failing("check")
    assert "refuses the credentials" in printed
    assert "hunter2" not in printed


def test_check_connects_on_its_own(settings: Settings) -> None:
    """It says what is there now, and leaves nothing open."""
    settings.DISPYTCH = {"default": {"URL": lambda: "memory://"}}
    assert "memory://" in run("check")
    assert connections.session is None


def test_check_tells_wrong_settings_before_it_connects(settings: Settings) -> None:
    """Everything that is wrong, with the numbers of the system checks."""
    settings.DISPYTCH = {"default": {"URL": "memory://", "TIMEUOT": 3}, "two": "kafak://h"}
    for command in (["check"], ["emit", PLACED, '{"number": 1}']):
        _, error = failing(*command)
        assert "DISPYTCH is wrong" in str(error)
        assert "dispytch.E002: DISPYTCH['default'] has the unknown key 'TIMEUOT'. Did you mean 'TIMEOUT'?" in str(error)
        assert "dispytch.E003: DISPYTCH['two']" in str(error)


def test_check_tells_what_a_function_gives(settings: Settings) -> None:
    """A URL from a secret store is checked like one that is written out."""
    settings.DISPYTCH = {"default": {"URL": lambda: "kafak://h"}, "two": "memory://"}
    printed, _ = failing("check")
    table = rows(printed)
    assert table["default"] == ["?", "wrong"]
    assert "default: nobody serves kafak" in printed
    assert table["two"][1] == "up"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_number_above_0(seconds: str) -> None:
    """Otherwise each broker would be called down, with a reason that is not the broker's."""
    with pytest.raises(CommandError, match=r"--timeout: .*(no duration|above 0 seconds)"):
        run("check", "--timeout", seconds)


# -- emit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLACED, "shop.order.placed", "OrderPlaced"])
def test_emit_sends_an_event_and_prints_where_it_went(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class by its path, by its type, or by its name where that is the only one."""
    # Other tests have events of their own, which a project does not see.
    classes = [cls for cls in _events.event_classes() if cls.__module__.startswith("tests.django.project.")]
    monkeypatch.setattr(commands, "event_classes", lambda: classes)
    printed = run("emit", name, '{"number": 7}', "--header", "tenant=acme", "--header", "note=a=b")
    [message] = sent()
    assert message.payload == b'{"number":7}'
    assert (message.headers["tenant"], message.headers["note"]) == ("acme", "a=b")
    first, *facts = printed.splitlines()
    assert first == f"shop.order.placed {message.id} was sent to 'shop-orders'"
    assert ["broker", "default (memory://)"] in cells(facts)
    assert ["body", '{"number":7}'] in cells(facts)


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_emit_reaches_a_real_broker(settings: Settings, redis_url: str, unique: str, stream: Stream) -> None:
    """What it calls sent is confirmed."""
    settings.DISPYTCH = {"default": redis_url}
    printed = run("emit", f"{__name__}.Streamed", json.dumps({"stream": unique}))
    [fields] = stream()
    assert printed.split()[1].encode() in fields.values()


def test_a_dry_run_shows_the_message_and_connects_to_nothing(settings: Settings, dead: str) -> None:
    """Key and headers are seen before anybody consumes them; on a laptop without a broker, too."""
    settings.DISPYTCH = {"default": {"URL": f"kafka://127.0.0.1:{free_port()}"}}
    printed = run(
        "emit", "commands.shipped", '{"tenant": "acme", "order": 7}', "--dry-run", "--header", "who=me"
    ).splitlines()
    assert " would go to 'shipments.acme'" in printed[0]
    assert ["key", "7"] in cells(printed)
    headers = [line[-1] for line in cells(printed)]
    assert "ce_type: commands.shipped" in headers
    assert "who: me" in headers
    assert connections.session is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([PLACED, "{}"], "That is no OrderPlaced (number: int):\n  number: Field required"),
        ([PLACED], "number: Field required"),
        ([PLACED, '{"number": "x"}'], "number: Input should be a valid integer"),
        ([PLACED, "{"], "JSON: Invalid JSON"),
        ([PLACED, "[]"], "JSON: Input should be an object"),
        (["OrderPlacd", "{}"], "There is no event 'OrderPlacd' (did you mean 'OrderPlaced'?)"),
        (["shop.order.place", "{}"], "(did you mean 'shop.order.placed'?); `manage.py dispytch events` lists them"),
        (["nowhere.Nothing", "{}"], "There is no event 'nowhere.Nothing'"),
        (["tests.django.project.shop.models.Order", "{}"], "is no event class; derive it from EventBase"),
        (["tests.django.project.shop.events.EventBase", "{}"], "has no __route__"),
        ([PLACED, '{"number": 1}', "--header", "tenant"], "--header takes NAME=VALUE, not 'tenant'"),
        ([PLACED, '{"number": 1}', "--header", "=x"], "--header takes NAME=VALUE, not '=x'"),
        ([PLACED, '{"number": 1}', "--header", "ce_id=mine"], "ce_id"),
        (["commands.shipped", '{"tenant": "a.b", "order": 1}'], "tenant"),
    ],
)
def test_bad_input_is_told_and_nothing_is_sent(arguments: list[str], expected: str) -> None:
    """A typo in a terminal gets the word to write and no traceback."""
    for options in ([], ["--dry-run"]):
        _, error = failing("emit", *arguments, *options)
        assert expected in str(error)
        assert error.returncode == (1 if "--header takes" in expected else 2)  # Of argparse Django makes 1.
    assert sent() == []


def test_a_name_that_several_events_have_is_told_with_their_paths() -> None:
    """Two apps may call an event Created."""

    class One(EventBase):
        __route__ = RedisStreamEventRoute(stream="one")
        __event_type__ = "commands.same"

    class Two(EventBase):
        __route__ = RedisStreamEventRoute(stream="two")
        __event_type__ = "commands.same"

    _, error = failing("emit", "commands.same")
    told = "'commands.same' is the name of several events; write "
    assert str(error) == f"{told}{' or '.join(f'{cls.__module__}.{cls.__qualname__}' for cls in (One, Two))}."


def test_what_no_broker_of_the_project_takes_is_told() -> None:
    """The settings are at fault, not the event: the error names what there is."""

    class Astray(EventBase):
        __route__ = RedisStreamEventRoute(stream="astray")
        __event_type__ = "commands.astray"
        __broker__ = "nowhere"

    _, error = failing("emit", Astray.__event_type__)
    assert "'nowhere'" in str(error)
    assert "'default'" in str(error)


def test_what_the_broker_refuses_is_told(settings: Settings, rabbitmq_url: str, unique: str, dead: str) -> None:
    """An event that no queue takes was not sent, and neither was one without a broker."""
    settings.DISPYTCH = {"default": rabbitmq_url}
    _, error = failing("emit", f"{__name__}.Routed", json.dumps({"key": unique}))
    assert unique in str(error)
    settings.DISPYTCH = {"default": {"URL": dead, "TIMEOUT": 0.3}}
    _, error = failing("emit", f"{__name__}.Streamed", json.dumps({"stream": unique}))
    assert "hunter2" not in str(error)
    assert error.returncode == 1


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_lists_the_classes_and_where_they_go() -> None:
    """Which topics does this project write to? Whoever operates the broker asks that."""
    table = {line.split()[0]: line for line in run("events").splitlines()}
    assert table["event"].split("  ")[0] == "event"
    assert "stream shop-orders" in table[PLACED]
    shipped = table[f"{__name__}.Shipped"]
    assert "commands.shipped" in shipped
    assert "kafka shipments.{tenant}" in shipped
    assert "{order}" in shipped
    assert "rabbitmq amq.topic routing_key={key}" in table[f"{__name__}.Routed"]


def test_events_as_json_is_for_scripts() -> None:
    """A catalogue of events is made of it."""
    listed = {row["event"]: row for row in json.loads(run("events", "--json"))}
    assert listed[f"{__name__}.Shipped"] == {
        "event": f"{__name__}.Shipped",
        "type": "commands.shipped",
        "transport": "kafka",
        "route": "kafka shipments.{tenant}",
        "key": "{order}",
        "broker": None,
    }
    parcelled = listed[f"{__name__}.Parcelled"]
    assert (parcelled["key"], parcelled["broker"]) == ("{order}", "default")
    assert list(listed) == sorted(listed)


def test_events_needs_no_broker_and_no_settings(settings: Settings) -> None:
    """It is about the code."""
    settings.DISPYTCH = {}
    assert PLACED in run("events")


# -- as a process ----------------------------------------------------------------------------------------------------


def manage(*arguments: str, broker: str, folder: Path, name: str = "shop-orders") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", MANAGE_PY, "dispytch", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
            "TEST_BROKER": broker,
            "TEST_FOLDER": str(folder),
            "TEST_NAME": name,
        },
        capture_output=True,
        text=True,
        timeout=40,
    )


def test_manage_py_emits_and_ends(redis_url: str, unique: str, stream: Stream, tmp_path: Path) -> None:
    """In a shell: exit code 0 when it was confirmed, and the process ends by itself, saying nothing else."""
    done = manage("emit", PLACED, '{"number": 5}', broker=redis_url, folder=tmp_path, name=unique)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"was sent to {unique!r}" in done.stdout
    assert [json.loads(fields[b"data"]) for fields in stream()] == [{"number": 5}]


def test_manage_py_check_of_a_broker_with_a_password_is_quiet(own_redis: Callable[..., Redis], tmp_path: Path) -> None:
    """A probe that writes warnings each time fills a log."""
    broker = own_redis(password="sesame")
    done = manage("check", broker=broker.url, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert " up " in done.stdout


@pytest.mark.parametrize("command", [["check", "--timeout", "0.5"], ["emit", PLACED, '{"number": 5}']])
def test_manage_py_fails_at_a_dead_port(command: list[str], dead: str, tmp_path: Path) -> None:
    """Exit code 1, a sentence on stderr and no traceback: a deployment stops there."""
    done = manage(*command, broker=f"{dead}?timeout=0.5", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("CommandError: ")
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def test_emit_refuses_a_field_that_the_event_does_not_have() -> None:
    """A misspelt field with a default would be left out without a word."""
    with pytest.raises(CommandError, match=r"OrderCancelled has no field 'reson' \(did you mean 'reason'\?\)"):
        run("emit", "shop.order.cancelled", '{"number": 7, "reson": "too late"}')
