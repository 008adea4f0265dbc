"""The public contract of producers holds for ours, for one in dispytch's way, and finds one that breaks it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from dispytch_integrations.errors import UnroutableError
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.producer import Producer
from dispytch_integrations.redis import RedisProducer, RedisStreamEventRoute
from dispytch_integrations.testing.producer_contract import ProducerContract, Received
from tests.support.servers import ROOT


class ListRoute(EventRoute):
    name: str


class ListProducer(Producer):
    """In dispytch's way: `send` alone."""

    routes = (ListRoute,)

    def __init__(self) -> None:
        self.lists: dict[str, list[bytes]] = {}

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        assert isinstance(route, ListRoute)
        if route.name == "closed":
            raise UnroutableError("the list is closed")
        await asyncio.sleep(0)
        self.lists.setdefault(route.name, []).append(payload)


class TestOneWithSendAlone(ProducerContract):
    @pytest.fixture
    def producer(self) -> ListProducer:
        return ListProducer()

    @pytest.fixture
    def route(self) -> EventRoute:
        return ListRoute(name="orders")

    @pytest.fixture
    def refused(self) -> EventRoute:
        return ListRoute(name="closed")

    @pytest.fixture
    def received(self, producer: ListProducer) -> Received:
        async def received(count: int) -> list[bytes]:
            return producer.lists["orders"]

        return received


class TestMemory(ProducerContract):
    @pytest.fixture
    def producer(self) -> MemoryProducer:
        return MemoryProducer()

    @pytest.fixture
    def route(self) -> EventRoute:
        return ListRoute(name="orders")

    @pytest.fixture
    def received(self, producer: MemoryProducer) -> Received:
        async def received(count: int) -> list[bytes]:
            return [message.payload or b"" for message in producer.sent]

        return received


class TestRedisStreams(ProducerContract):
    @pytest.fixture
    async def client(self, redis_url: str, unique: str) -> AsyncIterator[Redis]:
        async with Redis.from_url(redis_url) as client:
            yield client
            await client.delete(unique, f"{unique}-text")

    @pytest.fixture
    def producer(self, client: Redis) -> Producer:
        return RedisProducer(client)

    @pytest.fixture
    def route(self, unique: str) -> EventRoute:
        return RedisStreamEventRoute(stream=unique)

    @pytest.fixture
    async def refused(self, client: Redis, unique: str) -> EventRoute:
        await client.set(f"{unique}-text", "no stream")
        return RedisStreamEventRoute(stream=f"{unique}-text")

    @pytest.fixture
    def received(self, client: Redis, unique: str) -> Received:
        async def received(count: int) -> list[bytes]:
            end = time.monotonic() + 10
            while await client.xlen(unique) < count and time.monotonic() < end:
                await asyncio.sleep(0.01)
            entries: Any = await client.xrange(unique)
            return [fields[b"data"] for _, fields in entries]

        return received


BROKEN = """
import asyncio
import pytest
from dispytch_integrations.events import EventRoute
from dispytch_integrations.producer import Producer
from dispytch_integrations.testing.producer_contract import ProducerContract

class Route(EventRoute):
    name: str

class Hasty(Producer):
    '''Returns before anything is sent, forgets each tenth message, and raises what its client raises.'''
    def __init__(self):
        self.sent = []
    async def deliver(self, messages, *, timeout=None):
        if any(message.destination == "closed" for message in messages):
            raise KeyError("closed")
        for message in reversed(messages):
            if len(self.sent) % 10 != 9:
                self.sent.append(message.payload)
        return [None] * min(len(messages), 4)
    async def send(self, payload, route, config=None): ...

class TestHasty(ProducerContract):
    @pytest.fixture
    def producer(self): return Hasty()
    @pytest.fixture
    def route(self): return Route(name="open")
    @pytest.fixture
    def refused(self): return Route(name="closed")
    @pytest.fixture
    def received(self, producer):
        async def received(count): return producer.sent
        return received
"""


def test_a_producer_that_breaks_its_promises_is_found(tmp_path: Path) -> None:
    """A contract that everything passes is none."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    (tmp_path / "test_hasty.py").write_text(textwrap.dedent(BROKEN))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:django"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DJANGO_SETTINGS_MODULE": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    failed = {line.partition("::test_")[2].split()[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {
        *("many_arrive_complete_and_in_order_per_key", "concurrent_emits_all_arrive", "one_outcome_for_each_message"),
        *("in_order", "what_is_refused_does_not_take_the_others_with_it"),
    }, done.stdout


def test_the_producer_of_the_documentation_passes(tmp_path: Path) -> None:
    """Both blocks of the page as a reader copies them: the classes, and the tests that inherit."""
    page = (ROOT / "docs" / "extending.md").read_text()
    code = {block.partition("\n")[0]: block.partition("```")[0] for block in page.split("```python\n")[1:]}
    [classes] = [block for block in code.values() if "class FileProducer(Producer):" in block]
    [tests] = [block for first, block in code.items() if first.startswith("# test_files.py")]
    (tmp_path / "files.py").write_text(classes.partition("class ReportDone")[0])
    (tmp_path / "test_files.py").write_text(tests)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "8 passed, 2 skipped" in done.stdout, done.stdout
