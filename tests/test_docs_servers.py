"""The pages on servers keep their word: each command is started as it stands, takes an order, and ends on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from tests.support.django_pages import DjangoPage
from tests.support.pages import blocks_of
from tests.support.servers import ROOT, Server, serving

PAGES = sorted((ROOT / "docs" / "servers").glob("*.md"))
PORTS = {"uvicorn": ["--port", "{port}"], "gunicorn": ["--bind", "127.0.0.1:{port}", "--no-control-socket"]}


def commands_of(page: Path, *, django: bool) -> list[list[str]]:
    """The page's servers: of the Django project of docs/django.md, or of the page's own apps."""
    lines = [line for block in blocks_of(page) if block.language == "bash" for line in block.commands]
    return [shlex.split(line) for line in lines if ("mysite" in line) is django]


CASES = [(page, command) for page in PAGES for command in commands_of(page, django=False)]


@pytest.mark.timeout(160)
@pytest.mark.parametrize(
    ("page", "command"), CASES, ids=[f"{page.stem}: {' '.join(command)[:70]}" for page, command in CASES]
)
async def test_a_server_is_started_as_its_page_says(
    page: Path, command: list[str], own_redis: Callable[..., Any], tmp_path: Path
) -> None:
    """What is copied into a unit file has to start, to deliver, and to end."""
    url: str = own_redis().url.removesuffix("/0")
    for block in blocks_of(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code.replace("redis://localhost:6379", url))
    words = [word.replace(":8000", "127.0.0.1:{port}") for word in command]
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    async with serving([*words, *PORTS.get(command[0], ())], tmp_path, environment, cwd=tmp_path) as server:
        for number in range(3):
            await place(server, number)
        await server.settle()
        server.terminate()
        await server.exit_code(40)
        assert "Traceback" not in server.output(), server.output()
    async with Redis.from_url(url, decode_responses=True) as redis:
        entries = cast("list[tuple[str, dict[str, str]]]", await redis.xrange("orders"))
    assert {json.loads(fields["data"])["order_id"] for _, fields in entries} == set(range(3)), server.output()


async def place(server: Server, number: int) -> None:
    """Place an order as soon as the server answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/orders/{number}", method="POST")
    async with asyncio.timeout(60):
        while True:
            assert server.process.returncode is None, server.output()
            try:
                with await asyncio.to_thread(urllib.request.urlopen, request, timeout=20) as answer:
                    assert answer.status == 201
                return
            except urllib.error.HTTPError as exc:
                pytest.fail(f"{exc}\n{server.output()}")
            except OSError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_server_of_django_is_one_of_djangos_page(page: Path) -> None:
    """Those are started in the project of that page, which the tests build: see test_docs."""
    known = list(DjangoPage.servers_of(ROOT / "docs" / "django.md"))
    for command in commands_of(page, django=True):
        assert command in known
