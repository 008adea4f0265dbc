"""The documentation keeps its word: every Python block runs against real brokers, every command and link exists.

How a block of README.md or docs/*.md is treated:

- Blocks of a page share one namespace, and run from top to bottom on one event loop; `await` may stand at top level.
- `# name.py` as the first line makes the block a file, too, which later blocks and commands of the page may import;
  `# test_*.py` and `# conftest.py` are only files: pytest runs them at the end.
- `<!-- not run: reason -->` above a block: it is compiled, not run.
- `<!-- output -->` above a text block: the last Python block has printed this; `...` stands for anything.
- `<!-- check` ... `-->`: Python that readers do not see, run in its place.

A page with `django-admin startproject` builds a project instead: see `tests.support.django_pages`.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
import types
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from aiokafka import AIOKafkaConsumer  # type: ignore[import-untyped]

from dispytch_integrations import errors
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.settings import load_brokers
from tests.support.django_pages import DjangoPage
from tests.support.outboxes import Database, temporary_database
from tests.support.pages import Block, blocks_of, compare, replaced

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LANGUAGES = {"python", "bash", "text", "json", "ini", "http"}
# Exchanges are kept by the broker: a run of the tests has names of its own.
EXCHANGES = ("user.events", "partner.events", "shop.events")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- running a page ------------------------------------------------------------------------------------------------


class Page:
    """Runs the blocks of one page, in a module and a folder of their own."""

    def __init__(self, page: Path, folder: Path, replacements: Mapping[str, str]) -> None:
        self._page = page
        self._folder = folder
        self._replacements = replacements
        self._module = types.ModuleType("documented")
        self._printed = ""

    def run(self) -> None:
        """Run all blocks; what fails is reported with the page's line."""
        sys.modules["documented"] = self._module
        with asyncio.Runner() as runner, _unopened_brokers() as unopened:
            for block in blocks_of(self._page):
                if block.language == "python":
                    self._take(block, runner)
                elif block.comment == "output":
                    compare(block, self._printed, self._replacements)
            # Those that were only shown: what their block says is read, and not connected to.
            for config, options in unopened.values():
                load_brokers(config, options)
        if any(self._folder.glob("test_*.py")):
            self._run_tests()

    def _take(self, block: Block, runner: asyncio.Runner) -> None:
        code = compile(
            "\n" * (block.line - 1) + replaced(block.code, self._replacements),
            _name(self._page),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if block.comment.startswith("not run: "):
            return
        if block.file is not None:
            (self._folder / block.file).write_text(replaced(block.code, self._replacements))
            if block.file.startswith(("test_", "conftest")):
                return
        printed = io.StringIO()
        with redirect_stdout(printed):
            result = eval(code, self._module.__dict__)
            if inspect.iscoroutine(result):
                runner.run(result)
        self._printed = printed.getvalue()

    def _run_tests(self) -> None:
        (self._folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."],
            cwd=self._folder,
            env={"PYTHONPATH": f"{ROOT}", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, f"the tests of {_name(self._page)} fail:\n{done.stdout}"


@contextmanager
def _unopened_brokers() -> Generator[dict[Brokers, tuple[Any, Any]]]:
    """The brokers that `connect` has made and nobody has started, with their settings."""
    unopened: dict[Brokers, tuple[Any, Any]] = {}
    make, start = Brokers.__init__, Brokers.start

    def remember(self: Brokers, config: Any, options: Any, outbox: Any = None) -> None:
        make(self, config, options, outbox)
        unopened[self] = (config, options)

    async def forget(self: Brokers, *, wait: bool = True) -> None:
        unopened.pop(self, None)
        await start(self, wait=wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Brokers, "__init__", remember)
        patch.setattr(Brokers, "start", forget)
        yield unopened


@pytest.fixture
def replacements(request: pytest.FixtureRequest, page: Path, unique: str) -> dict[str, str]:
    """What stands in the pages, and what it is here: addresses of brokers, names that outlive the run."""
    text = page.read_text()
    found: dict[str, str] = {}
    if "localhost:9092" in text:
        url = request.getfixturevalue("own_kafka")().url  # Of its own: what another test has sent would be read here.
        found |= {"kafka://localhost:9092": url, "localhost:9092": url.removeprefix("kafka://")}
    if "localhost:6379" in text or "Redis()" in text:
        url = request.getfixturevalue("own_redis")().url.removesuffix("/0")
        found |= {"redis://localhost:6379": url, "Redis()": f"Redis.from_url({url!r})"}
    if "localhost:5672" in text:
        url = request.getfixturevalue("rabbitmq_url").rstrip("/")
        found |= {f"{scheme}localhost:5672": url for scheme in ("amqp://guest:guest@", "rabbitmq://", "amqp://")}
        found |= {
            f"{quote}{exchange}{quote}": f"{quote}{unique}.{exchange}{quote}"
            for exchange in EXCHANGES
            for quote in "\"'"
        }
        request.getfixturevalue("exchanges")
    if "@localhost/shop" in text:
        database: Database = request.getfixturevalue("database")
        for driver in ("postgresql+asyncpg", "postgresql+psycopg"):
            found[f"{driver}://user:password@localhost/shop"] = str(database.url(driver))
    return found


@pytest.fixture
def database() -> Iterator[Database]:
    """The database of a page that stores something, empty but for the outbox's tables."""
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def exchanges(rabbitmq_url: str, unique: str) -> Iterator[None]:
    """The exchanges of the pages, with a queue that takes everything, as a consumer would have made them."""
    import aio_pika

    names = [f"{unique}.{exchange}" for exchange in EXCHANGES]

    async def declare(runner_done: bool) -> None:
        connection = await aio_pika.connect(rabbitmq_url)
        async with connection:
            channel = await connection.channel()
            for name in names:
                if runner_done:
                    await channel.queue_delete(name)
                    await channel.exchange_delete(name)
                    continue
                exchange = await channel.declare_exchange(name, "topic", durable=True)
                queue = await channel.declare_queue(name, durable=True)
                await queue.bind(exchange, "user.#")

    asyncio.run(declare(False))
    yield
    asyncio.run(declare(True))


PROJECTS = [page for page in PAGES if "django-admin startproject" in page.read_text()]
WITH_PYTHON = [
    page for page in PAGES if page not in PROJECTS and any(block.language == "python" for block in blocks_of(page))
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=_name)
def test_python_blocks_run(
    page: Path, replacements: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples are copied by everybody who starts: one that does not run costs each of them an hour."""
    monkeypatch.setenv("DISPYTCH_URL", replacements.get("kafka://localhost:9092", "memory://"))
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    try:
        Page(page, tmp_path, replacements).run()
    finally:
        for name in set(sys.modules) - known:
            if name == "documented" or (tmp_path / f"{name}.py").exists():
                del sys.modules[name]


@pytest.mark.timeout(200)  # A process for each of its commands.
@pytest.mark.parametrize("page", PROJECTS, ids=_name)
def test_projects_are_built(page: Path, replacements: dict[str, str], tmp_path: Path) -> None:
    """Who follows a page step by step from an empty folder gets what it shows: files, commands, output, tests."""
    DjangoPage(page, tmp_path, replacements).run()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("page", [page for page in PROJECTS if any(DjangoPage.servers_of(page))], ids=_name)
async def test_servers_of_projects_serve(page: Path, replacements: dict[str, str], tmp_path: Path) -> None:
    """What is copied into a unit file has to start, to deliver, and to end: each server as the page starts it."""
    folder = tmp_path / "project"
    folder.mkdir()
    project = DjangoPage(page, folder, replacements)
    await asyncio.to_thread(project.build)
    orders: set[str] = set()
    # Two at a time: they import for seconds, and a machine may have no more processors.
    turns = asyncio.Semaphore(2)

    async def serve(number: int, command: list[str]) -> None:
        if "runserver" not in command:  # Its process is killed, whatever is in flight.
            orders.add(f"order{number}")
        (tmp_path / f"{number}").mkdir()
        async with turns, project.serving(command, tmp_path / f"{number}") as server:
            await project.order(server, command, f"order{number}")
            await server.settle()
            server.terminate()
            await server.exit_code(40)

    await asyncio.gather(*(serve(*numbered) for numbered in enumerate(project.servers())))
    async with (
        AIOKafkaConsumer(
            "orders", bootstrap_servers=replacements["localhost:9092"], auto_offset_reset="earliest"
        ) as consumer,
        asyncio.timeout(60),
    ):
        async for record in consumer:
            orders.discard(json.loads(record.value or b"")["customer"])
            if not orders:
                break


def test_a_wrong_block_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of examples that cannot fail is worth nothing: errors, wrong output and wrong options must be seen."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    wrong = {
        "raises": "```python\nraise LookupError\n```",
        "awaits": "```python\nimport asyncio\nawait asyncio.sleep(0)\nassert 1 == 2\n```",
        "builds": "```python\na = 1\n```\n\n```python\nassert a == 2\n```",
        "prints": "```python\nprint(1)\n```\n\n<!-- output -->\n```text\n2\n```",
        "checks": "<!-- check\nassert 1 == 2\n-->",
        "options": "```python\nfrom dispytch_integrations import connect\nconnect('memory://', timout=2)\n```",
        "syntax": "<!-- not run: it is wrong -->\n```python\nif\n```",
        "tests": "```python\n# test_it.py\ndef test_it():\n    assert 1 == 2\n```",
    }
    for name, text in wrong.items():
        page = tmp_path / f"{name}.md"
        page.write_text(text)
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises((AssertionError, LookupError, SyntaxError, errors.ConfigurationError)):
            Page(page, folder, {}).run()


def test_a_wrong_step_of_a_project_fails(tmp_path: Path) -> None:
    """The same of a page that builds a project: a command that fails, output that is another, Python that raises."""
    start = "```bash\ndjango-admin startproject site1 .\n```\n\n"
    wrong = {
        "command": "```bash\npython manage.py nothing\npython manage.py check\n```",
        "output": "```bash\npython manage.py check\n```\n\n<!-- output -->\n```text\nAll is well.\n```",
        "file": "```python\n# site1/settings.py\nINSTALLED_APPS += ['nothing']\n```\n\n```python\n1\n```",
        "check": "<!-- check\nassert 1 == 2\n-->",
    }
    for name, text in wrong.items():
        page = tmp_path / f"{name}.md"
        page.write_text(start + text)
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(AssertionError, match=page.name):
            DjangoPage(page, folder, {}).run()


# -- what is not Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_say_what_they_are(page: Path) -> None:
    """A block without a language is not highlighted, and not tested; one that is not run says why."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is not one of {sorted(LANGUAGES)}"
        if block.language == "python" and block.comment.startswith("not run"):
            assert re.fullmatch(r"not run: \w.{9,}", block.comment), f"{block}: write <!-- not run: the reason -->"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page: Path) -> None:
    """The first thing a stranger does is to paste a command."""
    files = {block.file for block in blocks_of(page)} - {None}
    files.add("manage.py")  # Django's own.
    if page in PROJECTS or page.parent.name == "servers":  # Of those test_docs_servers asks Django's page.
        files |= {"mysite/settings.py", "mysite/wsgi.py", "mysite/asgi.py"}
    for block in blocks_of(page):
        if block.language == "bash":
            for line in block.commands:
                _check_command(line, block, files)


def _check_command(line: str, block: Block, files: set[str | None]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, extras in re.findall(r"(dispytch-integrations|\.)\[([\w,]+)\]", line):
        unknown = set(extras.split(",")) - set(project["optional-dependencies"])
        assert not unknown, f"{block}: {name} has no extra {', '.join(sorted(unknown))}"
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    match words:
        case ["make", target, *_]:
            assert target in targets, f"{block}: there is no `make {target}`"
        case ["python", file, *_] if file.endswith(".py"):
            assert file in files, f"{block}: the page has no block `# {file}`"
        case ["uvicorn" | "hypercorn" | "gunicorn", *arguments]:
            named = [argument for argument in arguments if re.fullmatch(r"[\w.]+:\w+|\w+\.\w+", argument)]
            assert named, f"{block}: no app is named"
            module = named[0].partition(":")[0].replace(".", "/")
            assert f"{module}.py" in files, f"{block}: the page has no block for {named[0]}"
        case ["dispytch-integrations", *arguments]:
            _check_options(arguments, block)
        case _:
            pass


def _check_options(arguments: list[str], block: Block) -> None:
    """Does the command line have these commands, with these options?"""
    from dispytch_integrations import cli

    command: click.Command = cli._cli
    while arguments and isinstance(command, click.Group):
        name, *arguments = arguments
        assert name in command.commands, f"{block}: there is no command {name!r}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = {word for word in arguments if word.startswith("-")} - known
    assert not unknown, f"{block}: {command.name} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    """A dead link on the first page makes a reader doubt the rest."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{_name(page)} links to {path}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), f"{_name(page)} links to {path}#{anchor}, which has no such heading"


@pytest.mark.parametrize("source", sorted((ROOT / "docs" / "diagrams").glob("*.txt")), ids=lambda path: path.stem)
def test_diagrams_are_drawn(source: Path) -> None:
    """A picture that says something else than its source was changed by hand, or forgotten: `make pictures`."""
    drawing = runpy.run_path(str(ROOT / "docs" / "diagrams.py"))
    picture = ROOT / "docs" / "images" / f"flow-{source.stem}.svg"
    assert picture.read_text() == drawing["draw"](source.read_text())
    with pytest.raises(ValueError, match="no step between your code"):
        drawing["draw"]("A title\nyour code | broker\nyour code => broker: emit")


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# -- what the pages say of the code --------------------------------------------------------------------------------


def _tree(text: str) -> dict[str, str | None]:
    """Each name in a drawn tree, with the name above it."""
    above: dict[int, str] = {}
    tree: dict[str, str | None] = {}
    for line in text.splitlines():
        match = re.match(r"([ │├└─]*)(\w+)", line)
        if match and (match[2] == "DispytchError" or "─" in match[1]):
            depth = len(match[1]) // 4
            tree[match[2]] = above.get(depth - 1)
            above[depth] = match[2]
    return tree


def _real_tree() -> dict[str, str | None]:
    tree: dict[str, str | None] = {}
    for name in errors.__all__:
        bases = [base.__name__ for base in getattr(errors, name).__bases__ if issubclass(base, errors.DispytchError)]
        tree[name] = bases[0] if bases else None
    return tree


def test_error_tree_is_the_one_in_the_code() -> None:
    """What to catch is decided by reading the tree: a class that moved would be caught by nobody."""
    page = ROOT / "docs" / "errors.md"
    [drawn] = [block.code for block in blocks_of(page) if "├── " in block.code]
    assert _tree(drawn) == _real_tree()
    assert _tree(textwrap.dedent(inspect.getdoc(errors) or "")) == _real_tree()
    for name, also in re.findall(r"(\w+) .*\(also (\w+)\)", drawn):
        assert issubclass(getattr(errors, name), getattr(builtins, also)), f"{name} is no {also}"


def test_every_error_has_its_paragraph() -> None:
    """Who meets an error looks it up: when is it raised, and what to do."""
    from dispytch_integrations.django import errors as of_django

    text = (ROOT / "docs" / "errors.md").read_text()
    explained = set(re.findall(r"^### `?(\w+)`?$", text, re.MULTILINE))
    assert explained == {*errors.__all__, *of_django.__all__}


def test_every_option_is_documented() -> None:
    """An option that nobody finds is not there; one that is gone misleads."""
    from dispytch_integrations.backend import BrokerOptions
    from dispytch_integrations.kafka import KafkaOptions
    from dispytch_integrations.rabbitmq import RabbitMQOptions
    from dispytch_integrations.redis import RedisOptions

    common = set(BrokerOptions.model_fields)
    pages = {
        "configuration.md": common,
        "kafka.md": set(KafkaOptions.model_fields) - common,
        "rabbitmq.md": set(RabbitMQOptions.model_fields) - common,
        "redis.md": set(RedisOptions.model_fields) - common,
    }
    for page, names in pages.items():
        _, _, text = (ROOT / "docs" / page).read_text().partition("\n## Options\n")
        table = text.partition("\n## ")[0]
        rows = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
        assert rows == names, f"docs/{page}, section Options"


def _rows(page: str, section: str) -> dict[str, list[str]]:
    """The rows of a section's tables, by what their first cell has in backticks."""
    _, found, text = (ROOT / "docs" / page).read_text().partition(f"\n## {section}\n")
    assert found, f"docs/{page} has no section {section}"
    rows = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", text.partition("\n## ")[0], re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows}


def test_settings_of_django_are_documented_with_their_defaults() -> None:
    """Who relies on a default reads it in the table, and not in the code."""
    from dispytch_integrations.backend import BrokerOptions
    from dispytch_integrations.django import conf

    defaults = {
        name.upper(): field.get_default(call_default_factory=True)
        for name, field in BrokerOptions.model_fields.items()
        if name != "client"
    }
    defaults |= {"MAX_PENDING": conf.DEFAULT_MAX_PENDING, "OPTIONS": {}, "DISPYTCH_REQUIRE_TRANSACTION": False}
    rows = _rows("django.md", "Settings")
    given = [rows.pop(name)[-1] for name in ("URL", "DISPYTCH")]
    assert given == ["must be given"] * 2
    assert {name: ast.literal_eval(cells[-1].strip("`")) for name, cells in rows.items()} == defaults
    assert set(re.findall(r"\bDISPYTCH(?:_[A-Z_]+)?\b", inspect.getsource(conf))) == {
        "DISPYTCH",
        "DISPYTCH_REQUIRE_TRANSACTION",
    }


def test_settings_of_the_outbox_are_documented_with_their_defaults() -> None:
    """The same of DISPYTCH_OUTBOX, and of the relay's options."""
    options = {field.name: field.default for field in fields(RelayOptions)}
    rows = {
        name: ast.literal_eval(cells[-1].strip("`")) for name, cells in _rows("django-outbox.md", "Settings").items()
    }
    others = {"DATABASES": ["default"], "EMBEDDED": False, "DIRECT_EMITS": False}
    assert rows == {name.upper(): value for name, value in options.items()} | others
    rows = {name: cells[0].strip("`") for name, cells in _rows("outbox.md", "Who relays").items()}
    assert rows == {name: repr(value) for name, value in options.items()}


def test_checks_of_django_are_documented() -> None:
    """An id in the output of `manage.py check` is what people search for."""
    from dispytch_integrations.django import checks, conf
    from dispytch_integrations.django.outbox import checks as outbox_checks
    from dispytch_integrations.django.outbox import conf as outbox_conf

    source = "".join(inspect.getsource(each) for each in (checks, conf, outbox_checks, outbox_conf))
    ids = {f"dispytch.{number}" for number in re.findall(r"\b([EW]\d{3})\b", source)}
    assert set(_rows("django.md", "Checks")) == ids


def test_signals_of_django_are_documented() -> None:
    """Receivers are written from the table: a signal that is not in it is heard by nobody."""
    from dispytch_integrations.django import signals

    assert set(_rows("django.md", "Signals")) == set(signals.__all__)
