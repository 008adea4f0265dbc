"""Health of a Django project: what a load balancer is told by servers of both kinds, through an outage and back."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from django.test import Client

from dispytch_integrations.django.health import check_health, health_urls
from dispytch_integrations.django.lifecycle import close_brokers, open_brokers
from dispytch_integrations.django.testing import override_brokers
from dispytch_integrations.errors import ConfigurationError
from tests.django.test_outbox_embedded import program_of
from tests.django.test_servers import GUNICORN, UVICORN, folder, migrated, serving_project
from tests.support.brokers import free_port
from tests.support.outboxes import temporary_database
from tests.support.proxy import TCPProxy
from tests.support.servers import Server, Shop, serving

__all__ = ["folder", "migrated"]

ONE = [*GUNICORN, "--workers", "1"]


async def _asked(server: Server, path: str = "/health/ready") -> tuple[int, dict[str, Any]]:
    """As soon as the server answers."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client:
        while True:
            try:
                answer = await client.get(path)
            except httpx.TransportError:
                assert server.process.returncode is None, server.output()
                await asyncio.sleep(0.05)
            else:
                return answer.status_code, answer.json()


async def _becomes(server: Server, status: int, state: str, path: str = "/health/ready") -> dict[str, Any]:
    end = time.monotonic() + 15
    while True:
        got, told = await _asked(server, path)
        if (got, told.get("brokers", {}).get("default", {}).get("state")) == (status, state):
            return told
        assert time.monotonic() < end, (got, told)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("command", [ONE, UVICORN], ids=["gunicorn", "uvicorn"])
async def test_an_outage_and_its_end(
    command: list[str],
    folder: Path,
    redis_url: str,
    unique: str,
) -> None:
    """A worker that has emitted nothing yet is ready: else no request would ever come."""
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with serving_project(command, folder, broker=url, name=unique) as server:
            shop = Shop(server)
            _, first = await _asked(server)
            assert first["status"] == "up"
            assert first["brokers"]["default"]["state"] == ("idle" if command is ONE else "up")
            await _becomes(server, 200, "up", "/strict/ready")
            await shop.place("emit")
            await proxy.refuse()
            assert (await _becomes(server, 200, "degraded"))["status"] == "degraded"
            assert (await _becomes(server, 503, "degraded", "/strict/ready"))["status"] == "down"
            assert await _asked(server, "/health/live") == (200, {"status": "up"})
            await proxy.resume()
            await _becomes(server, 200, "up")
            await _becomes(server, 200, "up", "/strict/ready")
            assert shop.failed == []


async def test_the_outbox_is_told_where_another_process_relays(redis_url: str, unique: str, tmp_path: Path) -> None:
    """The web process connects to no broker, is ready, and says that its events wait for nobody."""
    with temporary_database("postgresql") as database:
        program = program_of(database, tmp_path, redis_url, unique)
        program.manage("migrate", "--fake", "dispytch_outbox", "--verbosity", "0")
        program.manage("migrate", "--verbosity", "0")
        async with serving(ONE, tmp_path, program.environment) as server:
            shop = Shop(server)
            _, told = await _asked(server)
            assert (told["status"], told["brokers"]["default"]["state"]) == ("up", "elsewhere")
            assert told["outboxes"]["default"]["waiting"] == 0
            await shop.place("commit")
        async with serving(ONE, tmp_path, program.environment) as server:  # The counts are used again for ten seconds.
            _, told = await _asked(server)
            outbox = told["outboxes"]["default"]
            assert (told["status"], outbox["state"], outbox["waiting"]) == ("degraded", "degraded", 1)
            assert outbox["last_error"] == "events wait, and no relay runs"


@pytest.mark.usefixtures("_memory")
def test_what_is_open_and_what_is_closed(client: Client) -> None:
    """After the server's shutdown an emit is refused: nobody should send requests here."""
    assert client.get("/health/ready").json()["brokers"]["default"]["state"] == "idle"
    assert check_health().ready
    assert check_health(ready_on="broker", timeout=5).ready  # It has opened them itself.
    assert check_health().brokers["default"].state == "up"
    open_brokers()
    close_brokers()
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "down")
    open_brokers()
    assert client.get("/health/ready").status_code == 200
    close_brokers()


def test_the_check_of_a_new_process_waits_for_its_brokers() -> None:
    """A cron job that asks once is told the truth, and not that they are starting."""
    with override_brokers("memory"):
        health = check_health(ready_on="broker", timeout=5)
    assert (health.status, health.brokers["default"].state) == ("up", "up")


def test_an_outbox_that_is_not_installed_is_told() -> None:
    """Who asks for the outbox's backlog and is told of none would think that it is empty."""
    with override_brokers("memory"):
        health = check_health(outbox=True)
    assert "add 'dispytch_integrations.django.outbox' to INSTALLED_APPS" in (health.error or "")


@pytest.fixture
def _memory() -> Any:
    with override_brokers("memory"):
        yield


def test_only_looks_are_answered(client: Client) -> None:
    """A crawler's POST is no question; an answer is never one from a cache."""
    assert client.post("/health/live").status_code == 405
    assert client.head("/health/live").status_code == 200
    assert "no-store" in client.get("/health/live")["Cache-Control"]


def test_wrong_options_are_told_when_urls_are_read() -> None:
    """`manage.py check` reads them, so that a slip is not found by the load balancer."""
    with pytest.raises(ConfigurationError, match="ready_on='brokr'"):
        health_urls(ready_on="brokr")  # type: ignore[arg-type]


async def test_a_broker_that_was_never_reached_is_down(folder: Path, unique: str) -> None:
    """Under `ready_on="broker"` the check itself connects, and says what is wrong."""
    url = f"redis://app:geheim@127.0.0.1:{free_port()}/0?timeout=0.5"
    async with serving_project(ONE, folder, broker=url, name=unique) as server:
        assert (await _asked(server))[1]["brokers"]["default"]["state"] == "idle"
        told = await _becomes(server, 503, "down", "/strict/ready")
        assert "Connect call failed" in told["brokers"]["default"]["last_error"]
        assert "geheim" not in json.dumps(told)
