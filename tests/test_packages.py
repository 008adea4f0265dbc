"""What `pip install` brings: the wheel and the sdist, and the wheel installed with one extra or none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import pytest

import dispytch_integrations
from tests.support.commands import ROOT

# One worker builds the packages, and makes the environments.
pytestmark = [pytest.mark.xdist_group("packages"), pytest.mark.timeout(120)]

PROJECT: dict[str, Any] = tomllib.loads(Path(ROOT, "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

PIP_LINE = re.compile(r"pip install 'dispytch-integrations\[(?P<extra>\w+)\]'")
NO_ANSWER = ("Failed to fetch", "network was disabled")
"""What uv says when the registry cannot be reached; that a requirement cannot be met is another matter."""

CONNECT = """
import asyncio
from dispytch_integrations import connect

async def main():
    async with connect({url!r}, startup_timeout=0.1):
        pass

asyncio.run(main())
"""
USES = {
    "kafka": CONNECT.format(url="kafka://127.0.0.1:1"),
    "rabbitmq": CONNECT.format(url="amqp://127.0.0.1:1"),
    "redis": CONNECT.format(url="redis://127.0.0.1:1"),
    "msgpack": "from dispytch_integrations.serialization import MessagePackSerializer as S; S()",
    "starlette": "import dispytch_integrations.starlette",
    "fastapi": "import dispytch_integrations.fastapi",
    "django": "import dispytch_integrations.django, dispytch_integrations.django.outbox",
    "sqlalchemy": "import dispytch_integrations.sqlalchemy",
    "cli": "import dispytch_integrations.cli",
    "otel": "import dispytch_integrations.opentelemetry",
}
"""What each extra is for, as code that does not work without it; a new extra gets a line here."""

Environment = Callable[..., Path]
"""The interpreter of an environment: `environment("cli")` has the wheel with that extra, and what these require."""


class Packages(NamedTuple):
    """What was built from this checkout."""

    wheel: Path
    sdist: Path


def _build(source: Path, target: Path, *kinds: str) -> list[Path]:
    """Build with the backend itself, which pip and uv would call: nothing is fetched."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
    for kind in kinds:
        command += ["-t", kind]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return [next(target.glob("*.whl" if kind == "wheel" else "*.tar.gz")) for kind in kinds]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(*_build(ROOT, tmp_path_factory.mktemp("dist"), "wheel", "sdist"))


@pytest.fixture(scope="session")
def environment(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made: dict[tuple[str, ...], Path] = {}

    def make(*extras: str, more: tuple[str, ...] = ()) -> Path:
        key = (*extras, *more)
        if key not in made:
            directory = tmp_path_factory.mktemp("environment")
            _uv("venv", "--python", sys.executable, str(directory))
            wheel = f"dispytch-integrations[{','.join(extras)}] @ {packages.wheel.as_uri()}"
            python = directory / "bin" / "python"
            _uv("pip", "install", "--python", str(python), wheel, *more)
            made[key] = python
        return made[key]

    return make


def _uv(*arguments: str) -> None:
    environment = {**os.environ, "UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "1"}
    command = [sys.executable, "-m", "uv", "--quiet", "--no-progress", *arguments]
    try:
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        _no_registry("within a minute")
    if any(text in done.stderr for text in NO_ANSWER):
        _no_registry(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr


def _no_registry(why: str) -> NoReturn:
    reason = f"no registry of packages answers: {why.strip()}"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason} (CI=true: nothing is skipped)", pytrace=False)
    pytest.skip(reason)


def _run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in isolated mode: neither this checkout nor PYTHONPATH is looked at."""
    return subprocess.run(
        [str(python), "-I", *arguments], cwd=python.parent, capture_output=True, text=True, timeout=30
    )


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _text(wheel: Path, ending: str) -> str:
    name = next(name for name in _names(wheel) if name.endswith(f".dist-info/{ending}"))
    return _contents(wheel)[name].decode()


def _metadata(wheel: Path) -> Message:
    return Parser().parsestr(_text(wheel, "METADATA"))


def _public_modules(wheel: Path) -> list[str]:
    modules: list[str] = []
    for name in _names(wheel):
        path = PurePosixPath(name)
        if path.suffix != ".py":
            continue
        parts = path.parent.parts if path.name == "__init__.py" else (*path.parent.parts, path.stem)
        if not any(part.startswith("_") for part in parts) and "migrations" not in parts:
            modules.append(".".join(parts))
    return modules


def _is_contract(module: str) -> bool:
    """Is it a module of tests to be derived from? Who does has pytest, which no extra brings."""
    return module.startswith("dispytch_integrations.testing.") and module.endswith("_contract")


# -- what is in them ---------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(packages: Packages) -> None:
    """A `tests` or `docs` at the top of site-packages is in the way of the user's own."""
    names = _names(packages.wheel)
    version = dispytch_integrations.__version__
    assert {name.partition("/")[0] for name in names} == {
        "dispytch_integrations",
        f"dispytch_integrations-{version}.dist-info",
    }
    assert [name for name in names if "test" in name.split("/")[1:-1] or "tests" in name or "docs" in name] == []
    assert [name for name in names if name.endswith((".pyc", ".pyi", ".orig", ".rej", ".log", ".sqlite3"))] == []


def test_the_wheel_holds_what_is_no_code(packages: Packages) -> None:
    """Types, the licence, and the pages of Django's admin: none of them is missed before somebody has installed it."""
    names = _names(packages.wheel)
    assert "dispytch_integrations/py.typed" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    package = ROOT / "dispytch_integrations"
    shown = {
        path.relative_to(ROOT).as_posix()
        for folder in ("templates", "static")
        for path in package.rglob(f"{folder}/**/*")
        if path.is_file()
    }
    assert shown, "the admin's pages have moved: look for them elsewhere"
    assert shown - set(names) == set()


def test_the_sdist_builds_the_same_wheel(packages: Packages, tmp_path: Path) -> None:
    """Distributions and `pip install --no-binary` build from the sdist, and get what the others have."""
    with tarfile.open(packages.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (wheel,) = _build(source, tmp_path / "dist", "wheel")
    ours, theirs = _contents(packages.wheel), _contents(wheel)
    assert sorted(set(ours) ^ set(theirs)) == []
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_the_sdist_holds_tests_and_pages(packages: Packages) -> None:
    """Who packages it for a distribution runs the tests of that very version."""
    with tarfile.open(packages.sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO"} <= set(names)
    assert "tests/conftest.py" in names
    assert "docs/index.md" in names
    assert [
        name for name in names if "__pycache__" in name or name.startswith(("docs/_build", ".venv", ".cache"))
    ] == []


def test_the_metadata_names_versions_and_extras(packages: Packages) -> None:
    """PyPI's page and pip go by the metadata alone."""
    metadata = _metadata(packages.wheel)
    assert metadata["Version"] == dispytch_integrations.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert sorted(metadata.get_all("Provides-Extra") or ()) == sorted(EXTRAS)
    classifiers = metadata.get_all("Classifier") or ()
    pythons = [each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    assert "Typing :: Typed" in classifiers


def test_only_pydantic_is_required(packages: Packages) -> None:
    """A service that uses one broker carries no client of another; `all` is the sum of the others, none forgotten."""
    required: dict[str, set[str]] = {"": set()}
    for line in _metadata(packages.wheel).get_all("Requires-Dist") or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == '(\w+)'", marker)
        required.setdefault(extra[1] if extra else "", set()).add(requirement.strip())
    assert required.pop("") == {"pydantic>=2.10"}
    everything = required.pop("all")
    assert everything == set().union(*required.values())


def test_the_entry_points_are_there(packages: Packages) -> None:
    """The command `dispytch-integrations`, and the fixture `emitted_events` that pytest finds by itself."""
    lines = _text(packages.wheel, "entry_points.txt").split("\n")
    assert lines[lines.index("[console_scripts]") + 1] == "dispytch-integrations = dispytch_integrations.cli:main"
    assert lines[lines.index("[pytest11]") + 1] == "dispytch = dispytch_integrations._pytest_plugin"


# -- installed ---------------------------------------------------------------------------------------------------------


def test_every_module_can_be_imported_or_says_what_to_install(packages: Packages, environment: Environment) -> None:
    """Nobody has to guess from `No module named 'aiokafka'` which extra it was."""
    python = environment()
    wrong: dict[str, str] = {}
    modules = _public_modules(packages.wheel)
    assert "dispytch_integrations.kafka" in modules
    for module in modules:
        if _is_contract(module):
            continue
        done = _run(python, "-c", f"import {module}")
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0 and not said:
            continue
        line = PIP_LINE.search(said.splitlines()[-1] if said else "")
        if done.returncode == 0 or line is None or line["extra"] not in EXTRAS:
            wrong[module] = said or "nothing was said"
    assert wrong == {}


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"all"}))
def test_an_extra_is_asked_for_by_its_name_and_is_enough(extra: str, environment: Environment) -> None:
    """The line that the error says is the one that helps; an extra that lacks something works for its author only."""
    assert extra in USES, f"say in USES what the extra {extra} is for"
    asked = _run(environment(), "-c", USES[extra])
    line = PIP_LINE.search(asked.stderr.splitlines()[-1])
    assert line is not None, asked.stderr
    assert line["extra"] == extra

    given = _run(environment(extra), "-c", USES[extra])
    assert "ModuleNotFoundError" not in given.stderr
    assert PIP_LINE.search(given.stderr) is None
    if "connect(" in USES[extra]:
        assert "dispytch_integrations.errors.StartupError: " in given.stderr  # Nothing listens there.
    else:
        assert given.returncode == 0, given.stderr


def test_the_oldest_versions_can_be_imported(packages: Packages, tmp_path: Path) -> None:
    """Lower bounds are a promise that breaks unseen where all have the newest; `make test-matrix` tests more."""
    _uv("venv", "--python", sys.executable, str(tmp_path / "oldest"))
    python = tmp_path / "oldest" / "bin" / "python"
    oldest = ["--resolution", "lowest-direct", "--only-binary", ":all:", "-r", str(ROOT / "pyproject.toml")]
    _uv("pip", "install", "--python", str(python), *oldest, "--extra", "all")
    _uv("pip", "install", "--python", str(python), "--no-deps", str(packages.wheel))
    # Django's modules need the settings of a project.
    modules = [each for each in _public_modules(packages.wheel) if ".django." not in each and not _is_contract(each)]
    done = _run(python, "-c", f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


def test_the_command_line_needs_its_extra_alone(environment: Environment) -> None:
    """`dispytch-integrations --help` is what one types first; the database's extra is asked for when one is named."""
    python = environment("cli")
    for command in (["-m", "dispytch_integrations.cli"], [str(python.parent / "dispytch-integrations")]):
        helped = _run(python, *command, "--help")
        assert helped.returncode == 0, helped.stderr
        assert "relay" in helped.stdout
        assert "outbox" in helped.stdout
    asked = _run(python, "-m", "dispytch_integrations.cli", "relay", "--database-url", "sqlite:///none.sqlite3")
    assert asked.returncode == 2
    assert "pip install 'dispytch-integrations[sqlalchemy]'" in asked.stderr


def test_the_command_line_asks_for_its_extra_when_half_of_it_is_there(environment: Environment) -> None:
    """uvicorn and Celery bring click; without rich, tables would break at a terminal, and only there."""
    asked = _run(environment(more=("click",)), "-m", "dispytch_integrations.cli", "--help")
    assert asked.returncode == 1
    assert asked.stderr.strip().endswith("pip install 'dispytch-integrations[cli]'")


def test_pytest_finds_the_fixture_and_the_contracts(
    packages: Packages, environment: Environment, tmp_path: Path
) -> None:
    """The plugin is loaded in every project that has this package and pytest; the contracts need no more than these."""
    python = environment(more=("pytest",))
    done = _run(python, "-m", "pytest", "--fixtures", "-p", "no:cacheprovider", str(tmp_path))
    assert "emitted_events -- " in done.stdout, done.stdout + done.stderr
    contracts = [each for each in _public_modules(packages.wheel) if _is_contract(each)]
    done = _run(python, "-c", f"import {', '.join(contracts)}")
    assert (done.returncode, done.stderr) == (0, "")
