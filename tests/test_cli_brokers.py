"""`dispytch-integrations check | emit | catalog`: what is asked in a terminal, and in a deployment's script."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from dispytch_integrations import cli
from tests.support.brokers import Redis, free_port
from tests.support.commands import ROOT

pytestmark = pytest.mark.timeout(90)

SECRET = "geheim-52"
EVENTS = '''
from pydantic import AliasChoices, BaseModel, Field
from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute

class CliCustomer(BaseModel):
    name: str

class CliOrderPlaced(EventBase):
    """An order was placed."""
    __route__ = RedisStreamEventRoute(stream="STREAM")
    __event_type__ = "cli.order.placed"
    __ordering_key__ = "{order_id}"

    order_id: int
    customer: CliCustomer | None = None
    note: str = Field(default="", validation_alias=AliasChoices("note", "remark"))
    city: str = Field(default="", alias="town")

class CliElsewhere(EventBase):
    __route__ = KafkaEventRoute(topic="elsewhere")

class NoEvent: ...
'''
MAIN = """
from fastapi import FastAPI
from cli_shop import events
app = FastAPI(title="The shop", version="3.2.1")
bare = FastAPI()
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def told(self) -> str:
        return self.stdout + self.stderr


def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
    """A command that ends by itself, in this process: starting one takes a second."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.delenv("DISPYTCH_URL", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dispytch-integrations", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def dead() -> str:
    """A URL with a password, at whose port nobody listens."""
    return f"redis://app:{SECRET}@127.0.0.1:{free_port()}/0"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unique: str) -> Iterator[str]:
    """The working directory has an app with events; the name of its stream."""
    folder = tmp_path / "cli_shop"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "events.py").write_text(EVENTS.replace("STREAM", unique))
    (folder / "main.py").write_text(MAIN)
    (folder / "broken.py").write_text("raise KeyError('the app')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield unique
    for name in [name for name in sys.modules if name.partition(".")[0] == "cli_shop"]:
        del sys.modules[name]


@pytest.fixture
def arrived(redis_url: str, shop: str) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """What the stream of the app has."""
    client: Any
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield lambda: [fields for _, fields in client.xrange(shop)]
        client.delete(shop)


# -- help --------------------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    return [["check"], ["emit"], ["tail"], ["catalog"], ["catalog", "diff"], ["relay"], ["outbox", "stats"]]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_help_has_an_example_and_exit_codes(command: list[str]) -> None:
    """Whoever writes a script looks here, and copies what is there."""
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "exit codes:\n    0  " in done.stdout
    if command[0] != "outbox":
        assert f"examples:\n    dispytch-integrations {' '.join(command)} " in done.stdout


def test_help_is_quick() -> None:
    """A third of a second, the start of Python included, and nothing loaded that the help does not need."""
    code = (
        "import sys; sys.argv = ['x', *sys.argv[1:]]\n"
        "from dispytch_integrations import cli\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('pydantic', 'asyncio', 'rich', 'aiokafka', 'json', 'yaml') if m in sys.modules])"
    )
    for command in ([], ["check"], ["tail"], ["emit"], ["catalog"]):
        taken: list[float] = []
        for _ in range(5):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
            )
            taken.append(time.perf_counter() - started)
            assert done.stdout.splitlines()[-1] == "[]"
            if taken[-1] < 0.3:
                break
        assert min(taken) < 0.3


@pytest.mark.parametrize(
    ("environment", "colored"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals(redis_url: str, unique: str, environment: dict[str, str], colored: bool) -> None:
    """A log file has no use for escape sequences; CI that shows colours says so, and who wants none, too."""
    client: Any
    with redis.Redis.from_url(redis_url) as client:
        client.xadd(unique, {"data": '{"a": [1, true, "x"]}', "ce_specversion": "1.0", "ce_type": "x.y"})
        for arguments in (("check", redis_url), ("tail", redis_url, unique, "--from-beginning", "--count", "1")):
            done = run(*arguments, **environment, TERM="xterm")
            assert (done.returncode, "\x1b[3" in done.stdout) == (0, colored), done.told
            assert "\x1b" not in run(*arguments, "--json", **environment, TERM="xterm").stdout
        client.delete(unique)


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_tells_what_each_broker_is(redis_url: str, rabbitmq_url: str, kafka_url: str) -> None:
    """Reachable, which version, how quick: the first three questions, for all at once."""
    done = run("check", redis_url, rabbitmq_url, kafka_url, "--json", "--timeout", "20")
    assert done.returncode == 0, done.told
    of_redis, rabbit, kafka = json.loads(done.stdout)
    assert [each["state"] for each in (of_redis, rabbit, kafka)] == ["up"] * 3
    assert (rabbit["server"], rabbit["version"].count(".")) == ("RabbitMQ", 2)
    assert of_redis["server"] in ("Redis", "Valkey")
    assert of_redis["version"].count(".") == 2
    assert (kafka["version"], "broker" in kafka["details"]) == (None, True)  # It tells its clients none.
    assert all(each["milliseconds"] >= 0 for each in (of_redis, rabbit, kafka))
    table = run("check", redis_url, rabbitmq_url).stdout
    assert table.splitlines()[0].split() == ["broker", "state", "server", "answered", "in", "details"]


def test_check_reads_the_environment_and_aliases(redis_url: str) -> None:
    """URLs with passwords stand in the environment; names tell brokers apart."""
    assert redis_url in run("check", DISPYTCH_URL=redis_url).stdout
    done = run("check", f"main={redis_url}", "spare=memory://")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["alias", "main", "spare"]


def test_check_says_what_is_wrong_and_ends_with_its_code(
    own_redis: Callable[..., Redis], rabbitmq_url: str, dead: str
) -> None:
    """1: wait, or call somebody; 2: correct what you wrote. And no password in any of it."""
    locked = own_redis(password="sesame").port
    started = time.monotonic()
    done = run("check", "memory://", dead)
    assert time.monotonic() - started < 4  # Refused is refused: that is told at once.
    assert done.returncode == 1
    assert "does not answer: Error 111" in done.stdout
    assert "is it running, and are host and port right?" in done.stdout
    for url, told in (
        (f"redis://:{SECRET}@127.0.0.1:{locked}", "refuses the credentials"),
        (rabbitmq_url.replace("guest:guest", f"guest:{SECRET}"), "check username and password"),
        (f"kafak://u:{SECRET}@h", "did you mean 'kafka'?"),
        (f"redis://:{SECRET}@h?socket_timeot=1", "(did you mean 'socket_timeout'?)"),
        (f"kafka://u:{SECRET}@h", "sasl_mechanism="),
    ):
        done = run("check", url, dead)
        assert done.returncode == 2, done.told
        assert told in done.stdout
        assert SECRET not in done.told
        rows = json.loads(run("check", url, dead, "--json").stdout)
        assert [row["state"] for row in rows] == ["wrong", "down"]
        assert SECRET not in str(rows)


def test_check_names_what_it_cannot_read_by_number() -> None:
    """It may hold a secret, and is not repeated."""
    for given, named in (([f"{SECRET}:6379"], "URL 1"), (["memory://", f"{SECRET}:6379"], "URL 2")):
        done = run("check", *given)
        assert f"\n{named}: a broker's URL is not readable; write scheme://host:port" in done.stdout
        assert SECRET not in done.told


def test_check_gives_up_on_a_silent_host_in_time() -> None:
    """A firewall that swallows packets must not hold up a deployment."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        started = time.monotonic()
        done = run(
            "check", *(f"{scheme}://127.0.0.1:{port}" for scheme in ("redis", "amqp", "kafka")), "--timeout", "1"
        )
        assert time.monotonic() - started < 8
    assert done.returncode == 1
    assert done.stdout.count(" down") == 3


def test_check_of_nothing_says_what_to_write() -> None:
    """The first call of a newcomer."""
    done = run("check")
    assert (done.returncode, done.stdout) == (2, "")
    assert "check kafka://localhost:9092, or set DISPYTCH_URL" in done.stderr


# -- emit --------------------------------------------------------------------------------------------------------------


def test_emit_sends_a_validated_event(redis_url: str, arrived: Callable[[], list[dict[str, str]]]) -> None:
    """One event by hand, to see its consumer work."""
    done = run(
        "emit", "cli_shop.events:CliOrderPlaced", '{"order_id": 7, "remark": "soon"}', "--broker-url", redis_url,
        "--header", "tenant=acme",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [fields] = arrived()
    assert (json.loads(fields["data"])["note"], fields["tenant"], fields["ce_type"]) == (
        "soon", "acme", "cli.order.placed",
    )  # fmt: skip
    assert done.stdout.startswith(f"cli.order.placed {fields['ce_id']} was sent to ")


def test_emit_reads_standard_input(redis_url: str, arrived: Callable[[], list[dict[str, str]]]) -> None:
    """`jq ... | dispytch-integrations emit ... -`, and a file of them with --lines."""
    event = "cli_shop.events:CliOrderPlaced"
    assert run("emit", event, "-", stdin='{"order_id": 1}', DISPYTCH_URL=redis_url).returncode == 0
    lines = "".join(f'{{"order_id": {number}}}\n' for number in range(2, 1203))
    done = run("emit", event, "--lines", "--json", stdin=f"{lines}\n", DISPYTCH_URL=redis_url)
    assert (done.returncode, json.loads(done.stdout)["sent"]) == (0, 1201)
    assert {json.loads(fields["data"])["order_id"] for fields in arrived()} == set(range(1, 1203))


def test_a_wrong_line_is_named(redis_url: str, arrived: Callable[[], list[dict[str, str]]]) -> None:
    """Of ten thousand lines the one that is wrong, and how far it got."""
    lines = '{"order_id": 1}\n{"order_id": "x"}\n'
    done = run("emit", "cli_shop.events:CliOrderPlaced", "--lines", stdin=lines, DISPYTCH_URL=redis_url)
    assert done.returncode == 2
    assert "line 2: that is no CliOrderPlaced" in done.stderr
    assert "Nothing was sent." in done.stderr
    assert arrived() == []


@pytest.mark.usefixtures("shop")
def test_a_dry_run_shows_everything_and_connects_to_nothing(dead: str) -> None:
    """Route, key and headers are seen before anybody consumes them, without a broker, too."""
    event = ("emit", "cli_shop.events:CliOrderPlaced", '{"order_id": 7}', "--dry-run", "--header", "a=b")
    for arguments, broker in (((), "none is given"), (("--broker-url", dead), "redis://127.0.0.1")):
        done = run(*event, *arguments)
        assert done.returncode == 0, done.stderr
        for part in (broker, "would go to", "ce_type: cli.order.placed", "a: b", '"order_id":7'):
            assert part in done.stdout
        assert SECRET not in done.told
    [told] = [json.loads(line) for line in run(*event, "--json").stdout.splitlines()]
    assert (told["sent"], told["key"], told["headers"]["a"], told["body"]["order_id"]) == (False, "7", "b", 7)


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cli_shop.events:CliOrderPlaced", '{"order_id": "x"}'], "order_id: Input should be a valid integer"),
        (["cli_shop.events:CliOrderPlaced", "{"], "JSON: Invalid JSON"),
        # As "$EVENT" is in a script that has not set it.
        (["cli_shop.events:CliOrderPlaced", ""], "JSON: Invalid JSON: EOF"),
        (["cli_shop.events:CliOrderPlaced", '{"order_id": 1, "nte": ""}'], "no field 'nte' (did you mean 'note'?)"),
        (["cli_shop.events:CliOrderPlaced", '{"order_id": 1, "city": "x"}'], "has no field 'city'"),
        (["cli_shop.events:CliOrderPlacd", "{}"], "has no 'CliOrderPlacd' (did you mean 'CliOrderPlaced'?)"),
        (["cli_shop.events:Nothing", "{}"], "it has CliOrderPlaced, CliElsewhere"),
        (["cli_shop.events:NoEvent", "{}"], "is no event class; derive it from EventBase"),
        (["cli_shop.nowhere:X", "{}"], "there is no module 'cli_shop.nowhere'"),
        (["cli_shop.events", "{}"], "EVENT takes module:name, as in shop.events:OrderPlaced"),
        (["cli_shop.broken:X", "{}"], "EVENT cli_shop.broken raised KeyError, see above"),
        (["cli_shop.events:CliElsewhere", "{}"], "which no broker takes"),
        (["cli_shop.events:CliOrderPlaced", '{"order_id": 1}', "--header", "x"], "--header takes NAME=VALUE"),
        (["cli_shop.events:CliOrderPlaced", '{"order_id": 1}', "--header", "ce_id=x"], "ce_id"),
        (["cli_shop.events:CliOrderPlaced", '{"order_id": 1}', "--lines"], "leave the JSON out"),
    ],
)
def test_what_cannot_be_emitted_is_told_and_ends_with_2(arguments: list[str], told: str, redis_url: str) -> None:
    """A typing error gets the word to write, and nothing is sent."""
    done = run("emit", *arguments, DISPYTCH_URL=redis_url)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


@pytest.mark.usefixtures("shop")
def test_what_was_not_delivered_ends_with_1(dead: str) -> None:
    """The broker's fault is told from one's own."""
    done = run("emit", "cli_shop.events:CliOrderPlaced", '{"order_id": 1}', DISPYTCH_URL=f"{dead}?startup_timeout=0.3")
    assert done.returncode == 1
    assert "not connected within" in done.stderr
    assert SECRET not in done.told


@pytest.mark.usefixtures("shop")
def test_emit_without_a_broker_says_what_to_write() -> None:
    """And not a traceback about a variable of the environment."""
    done = run("emit", "cli_shop.events:CliOrderPlaced", '{"order_id": 1}')
    assert done.returncode == 2
    assert "write --broker-url kafka://host:9092, or set DISPYTCH_URL" in done.stderr


# -- catalog -----------------------------------------------------------------------------------------------------------


def catalog(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the events of an app are all that it has imported."""
    return subprocess.run(
        [sys.executable, "-m", "dispytch_integrations.cli", "catalog", *arguments], cwd=cwd, capture_output=True,
        text=True, timeout=60, check=False,
        env={**{k: v for k, v in os.environ.items() if k != "DISPYTCH_URL"}, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_catalog_of_an_app_has_its_events_and_its_title(shop: str, tmp_path: Path) -> None:
    """The app is named as for uvicorn; what it imports is what it emits."""
    done = catalog(
        "cli_shop.main:app", "--json", "--html", "page.html", "--broker-url", f"redis://u:{SECRET}@h", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["asyncapi"][0], document["info"]["title"], document["info"]["version"]) == (
        "3", "The shop", "3.2.1",
    )  # fmt: skip
    assert "cli.order.placed" in done.stdout
    page = (tmp_path / "page.html").read_text()
    assert "cli.order.placed" in page
    assert done.stderr == "2 events written to page.html\n"
    assert SECRET not in done.stdout + page
    table = catalog("cli_shop.main:app", cwd=tmp_path).stdout
    assert f"stream {shop}" in table
    assert catalog("cli_shop.main:app", "-o", "events.yaml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "events.yaml").read_text().startswith("asyncapi:")


@pytest.mark.usefixtures("shop")
def test_catalog_diff_ends_with_1_when_a_consumer_would_break(tmp_path: Path) -> None:
    """A pipeline stops before the consumers do."""
    event = tmp_path / "cli_shop" / "events.py"
    assert catalog("cli_shop.events", "-o", "old.yaml", cwd=tmp_path).returncode == 0
    event.write_text(event.read_text().replace("order_id: int", "order_id: int\n    more: int = 0"))
    assert catalog("cli_shop.events", "-o", "more.json", cwd=tmp_path).returncode == 0
    event.write_text(event.read_text().replace("note: str", "notice: str"))
    assert catalog("cli_shop.events", "-o", "less.json", cwd=tmp_path).returncode == 0
    old, more, less = (str(tmp_path / name) for name in ("old.yaml", "more.json", "less.json"))
    same = run("catalog", "diff", old, old)
    assert (same.returncode, same.stdout) == (0, "No difference.\n")
    assert run("catalog", "diff", old, more).returncode == 0
    done = run("catalog", "diff", more, less)
    assert done.returncode == 1
    assert "breaking  cli.order.placed: payload.note\n" in done.stdout
    assert "1 change breaks consumers" in done.stdout
    changes = [json.loads(line) for line in run("catalog", "diff", more, less, "--json").stdout.splitlines()]
    assert [change["where"] for change in changes if change["breaking"]] == ["payload.note"]


@pytest.mark.usefixtures("shop")
def test_what_catalog_cannot_do_ends_with_2(tmp_path: Path) -> None:
    """A file that is missing is no catalogue without changes."""
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "bad.yaml").write_text("a: [")
    for arguments, told in (
        (["diff", "none.json", "old.json"], "none.json cannot be read"),
        (["diff", "old.json", "old.json"], "old.json is no AsyncAPI 3 document"),
        (["diff", "bad.yaml", "old.json"], "is neither JSON nor YAML"),
        (["cli_shop.nowhere"], "there is no module 'cli_shop.nowhere'"),
        (["cli_shop.main:nothing"], "cli_shop.main has no 'nothing'"),
        (["cli_shop.broken"], "raised KeyError, see above"),
        (["json"], "has no event classes"),
        (["cli_shop.events", "--json", "--yaml"], "exclude each other"),
        (["cli_shop.events", "-o", "none/x.json"], "none/x.json cannot be written"),
    ):
        done = run("catalog", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.told
        assert told in done.stderr


# -- what nobody has thought of -----------------------------------------------------------------------------------


def test_a_url_in_the_wrong_place_is_not_repeated(dead: str) -> None:
    """Terminals are recorded, and logs of CI are read by many: a password must not stand in a usage error."""
    for arguments in (
        ["tail", dead, "orders", dead],
        ["emit", "shop:Event", "{}", dead],
        ["emit", dead, "{}"],
        ["check", "--timeout", dead],
        ["catalog", dead],
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert SECRET not in done.told


def test_what_a_module_prints_is_not_in_the_document(shop: str, tmp_path: Path) -> None:
    """`catalog ... --json > events.json` of an app that greets would be no JSON."""
    (tmp_path / "cli_shop" / "noisy.py").write_text("print('hello')\nfrom cli_shop.events import *\n")
    done = run("catalog", "cli_shop.noisy", "--json")
    assert (done.returncode, done.stderr) == (0, "hello\n")
    assert json.loads(done.stdout)["asyncapi"]


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unique: str) -> None:
    """A project's `app` or `tests` is meant, and not what some package has installed under that name."""
    name, other = f"here_{unique.replace('-', '_')}", tmp_path / "other"
    other.mkdir()
    (other / f"{name}.py").write_text("")
    declared = "route = RedisStreamEventRoute(stream='here')\nclass CliHere(EventBase):\n    __route__ = route\n"
    imports = "from dispytch_integrations import EventBase\nfrom dispytch_integrations.redis import *\n"
    (tmp_path / f"{name}.py").write_text(imports + declared)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(other), str(tmp_path), *sys.path])
    assert "CliHere" in run("catalog", name).stdout


def test_a_module_that_ends_the_program_is_told(shop: str, tmp_path: Path) -> None:
    """A script without a main guard would end a job of CI with 0, and nothing checked."""
    (tmp_path / "cli_shop" / "ends.py").write_text("import sys\nsys.exit(0)\n")
    done = run("catalog", "cli_shop.ends", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "as it was imported" in done.stderr


def test_a_dry_run_of_somebody_elses_lines_moves_no_cursor(shop: str) -> None:
    """A body may hold what terminals obey, and what turns the direction of reading."""
    fields = json.dumps({"order_id": 1, "note": "a\x9b31m\u202eb"})
    assert "a\\x9b31m\\u202eb" in run("emit", "cli_shop.events:CliOrderPlaced", fields, "--dry-run").stdout
    shown = run("emit", "cli_shop.events:CliOrderPlaced", fields, "--dry-run", "--json").stdout
    assert shown[:-1].isprintable()
    assert json.loads(shown)["body"]["note"] == "a\x9b31m\u202eb"


@pytest.mark.usefixtures("shop")
def test_the_page_and_the_document_do_not_share_standard_output() -> None:
    """A file of both is neither."""
    for more in (["--json"], ["-o", "-"]):
        done = run("catalog", "cli_shop.events", "--html", "-", *more)
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_an_output_that_takes_nothing_leaves_no_traceback(redirection: str) -> None:
    """Cron closes what it does not read, and disks are full when one looks for the reason."""
    command = f"{sys.executable} -m dispytch_integrations.cli catalog cli_shop.events --json {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == ("full" in redirection)
    assert "Traceback" not in done.stderr
    assert ("No space left" in done.stderr) == ("full" in redirection)


def test_documents_from_anybodys_branch_are_read_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI compares what a pull request brings: it must neither hang, nor run, nor believe, nor obey it."""
    monkeypatch.chdir(tmp_path)
    head = 'asyncapi: "3.0.0"\n'
    nine = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    body = "channels: {{c: {{address: a, messages: {{m: {{name: t, payload: {}}}}}}}}}\n"
    for name, text in {
        "laughs": f"{head}a0: &a0 [x]\n{nine}{body.format('{enum: *a11}')}",
        "itself": head + body.format("&p {type: object, properties: {a: *p}}"),
        "deep": f"{head}x: {'[' * 3000}",
        "run": f"{head}x: !!python/object/apply:os.getcwd []\n",
        "elsewhere": head + body.format("{$ref: 'other.yaml#/A'}"),
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        done = run("catalog", "diff", f"{name}.yaml", f"{name}.yaml")
        assert (done.returncode, done.stdout) == (2, ""), name
        assert done.stderr.startswith("Error: "), name
    (tmp_path / "words.yaml").write_text(
        head + body.format("{properties: {on: {type: string, const: no}}}") + "x: 2001-99-99"
    )
    message = {"name": "t", "payload": {"properties": {"on": {"type": "string", "const": "no"}}}}
    channels = {"c": {"address": "a", "messages": {"m": message}}}
    (tmp_path / "words.json").write_text(json.dumps({"asyncapi": "3.0.0", "channels": channels}), "utf-8-sig")
    assert run("catalog", "diff", "words.yaml", "words.json").stdout == "No difference.\n"
    message["name"] = "t\x1b[2J\n::error::"
    (tmp_path / "obeyed.json").write_text(json.dumps({"asyncapi": "3.0.0", "channels": channels}))
    shown = run("catalog", "diff", "words.yaml", "obeyed.json").stdout
    assert "t\\x1b[2J\\x0a::error::" in shown
