"""A page of the documentation that builds a Django project: done in an empty folder, as its reader does it.

- Blocks with a file's name go to the end of that file.
- Blocks of commands are run, line by line. Servers and who calls them (`curl`) are left out: see `servers`.
- Python without a file's name, hidden checks among it, is run in a process of its own with Django set up.
- `<!-- output -->` above a text block: the last command, or the last Python, has printed this. An error may be
  among what is shown; what fails otherwise is reported.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.support.pages import Block, blocks_of, compare, replaced
from tests.support.servers import ROOT, Server, serving

__all__ = ["DjangoPage"]

_SERVERS = {"celery", "daphne", "gunicorn", "uvicorn", "uwsgi"}
_RUN = """
import ast, asyncio, django, inspect, sys
django.setup()
name, line = sys.argv[1:]
flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
code = compile("\\n" * (int(line) - 1) + sys.stdin.read(), name, "exec", flags=flags)
result = eval(code, {"__name__": "documented"})
if inspect.iscoroutine(result):
    asyncio.run(result)
"""


class DjangoPage:
    """One page and its project in `folder`. `replacements`: what stands for the page's addresses here."""

    def __init__(self, page: Path, folder: Path, replacements: Mapping[str, str]) -> None:
        self._page = page
        self._folder = folder
        self._replacements = replacements
        self._printed = ""
        self._failed: Block | None = None
        project = next(line for block in blocks_of(page) for line in block.commands if "startproject" in line).split()[
            2
        ]
        self.environment = {
            "DJANGO_SETTINGS_MODULE": f"{project}.settings",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        }

    def run(self) -> None:
        """Do all that the page says, from top to bottom."""
        for block in blocks_of(self._page):
            if block.language == "text" and block.comment == "output":
                compare(block, self._printed, self._replacements)
                self._failed = None
            self._refuse_failure()
            if block.file is not None:
                self._write(block)
            elif block.language == "python" and not block.comment.startswith("not run: "):
                self._execute(block, [sys.executable, "-c", _RUN, block.page.name, str(block.line)], block.code)
            elif block.language == "bash":
                for command in block.commands:
                    self._refuse_failure()
                    if not _serves(command) and not command.startswith("curl "):
                        self._execute(block, _words(command))
        self._refuse_failure()

    def build(self) -> None:
        """Make the project, and nothing else: what the page starts, its files, its tables."""
        for block in blocks_of(self._page):
            if block.file is not None:
                self._write(block)
            for command in block.commands if block.language == "bash" else ():
                if "startproject" in command or "startapp" in command:
                    self._execute(block, _words(command))
                    self._refuse_failure()
        for command in ("makemigrations", "migrate"):
            subprocess.run(
                [sys.executable, "manage.py", command, "--verbosity", "0"],
                cwd=self._folder, env=self.environment, check=True, timeout=60,
            )  # fmt: skip

    def servers(self) -> Iterator[list[str]]:
        """The commands of the page that serve, each once."""
        return self.servers_of(self._page)

    @staticmethod
    def servers_of(page: Path) -> Iterator[list[str]]:
        """The same of any page."""
        found = (tuple(_words(line)) for block in blocks_of(page) for line in block.commands if _serves(line))
        yield from (list(command) for command in dict.fromkeys(found))

    def serving(self, command: Sequence[str], directory: Path) -> AbstractAsyncContextManager[Server]:
        """Serve the project with a command of the page, on a port of its own; what it prints goes to `directory`."""
        where = {
            "runserver": ["127.0.0.1:{port}"],
            "gunicorn": ["--bind", "127.0.0.1:{port}"],
            "uvicorn": ["--port", "{port}"],
            "daphne": ["--port", "{port}"],
        }
        more = next((options for name, options in where.items() if name in command), [])
        # HOME: gunicorn puts a socket there.
        environment = {**self.environment, "HOME": str(directory)}
        words = [word.replace(":8000", "127.0.0.1:{port}") for word in command]
        return serving([*words, *more], directory, environment, cwd=self._folder)

    async def order(self, server: Server, command: Sequence[str], customer: str) -> None:
        """Place an order as soon as the server answers; a Celery worker has a task for it."""
        if command[0] == "celery":
            code = (
                f"import django; django.setup(); from shop.tasks import import_order as task; task.delay({customer!r})"
            )
            asking = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, cwd=self._folder, env=self.environment
            )
            assert await asking.wait() == 0
            await server.wait_for_output("succeeded in")
            return
        url = f"http://127.0.0.1:{server.port}/orders/{customer}"
        async with asyncio.timeout(30):
            while True:
                assert server.process.returncode is None, f"{command} ended:\n{server.output()}"
                try:
                    with await asyncio.to_thread(urllib.request.urlopen, url, timeout=20) as answer:
                        assert answer.status == 201
                    return
                except HTTPError as exc:
                    pytest.fail(f"{command}: {exc}\n{server.output()}")
                except OSError:
                    await asyncio.sleep(0.05)

    def _write(self, block: Block) -> None:
        assert block.file is not None
        file = self._folder / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as text:
            text.write("\n" + replaced(block.code, self._replacements) + "\n")

    def _execute(self, block: Block, command: Sequence[str], code: str = "") -> None:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self.environment,
            input=replaced(code, self._replacements),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self._printed = done.stdout
        self._failed = block if done.returncode else None

    def _refuse_failure(self) -> None:
        assert self._failed is None, f"{self._failed} fails:\n{self._printed}"


def _serves(command: str) -> bool:
    words = command.split()
    return words[0] in _SERVERS or "runserver" in words


def _words(command: str) -> list[str]:
    """A command, with the programs of this interpreter."""
    name, *arguments = shlex.split(command)
    program = {"python": [sys.executable], "django-admin": [sys.executable, "-m", "django"]}
    return [*program.get(name, [name]), *arguments]
