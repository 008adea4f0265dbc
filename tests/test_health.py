"""Health: what load balancers and people are told, while brokers are there, away, and back."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient as StarletteClient

from dispytch_integrations import EventEmitter, connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import ConfigurationError, WrongLoopError
from dispytch_integrations.fastapi import emitter_lifespan, health_router
from dispytch_integrations.health import Health, HealthCheck, check_health, check_health_blocking
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox
from dispytch_integrations.starlette import EmitterMiddleware, get_emitter, health_routes
from tests.support.brokers import Redis, Tansu, free_port
from tests.support.outboxes import Database, record, temporary_database
from tests.support.proxy import TCPProxy
from tests.support.servers import serving

SECRET = "hunter2"


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[TCPProxy]:
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        yield proxy


def _url(proxy: TCPProxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


def _states(health: Health) -> dict[str, str]:
    return {alias: broker.state for alias, broker in health.brokers.items()}


async def _becomes(ask: Callable[[], Any], wanted: Any, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while True:
        got = await ask()
        if got == wanted:
            return
        assert time.monotonic() < end, f"{got} has not become {wanted}"
        await asyncio.sleep(0.05)


# -- a real outage -------------------------------------------------------------------------------------------------


async def test_an_outage_takes_no_process_out_of_service_unless_asked_to(
    proxy: TCPProxy, unique: str, tmp_path: Path
) -> None:
    """A broker that is down must not take every web pod away; who wants that says ready_on="broker"."""
    environment = {"TEST_BROKER": f"{_url(proxy)}?timeout=1", "TEST_STREAM": unique}
    command = [sys.executable, "-m", "uvicorn", "tests.apps.orders:app", "--host", "127.0.0.1", "--port", "{port}"]
    async with (
        serving(command, tmp_path, environment) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client,
    ):

        async def ready(path: str = "/health/ready") -> tuple[int, str, str]:
            try:
                answer = await client.get(path)
            except httpx.TransportError:
                return 0, "", ""
            told = answer.json()
            return answer.status_code, told["status"], told["brokers"]["default"]["state"]

        await _becomes(ready, (200, "up", "up"))
        assert await ready("/strict/ready") == (200, "up", "up")
        up = (await client.get("/health/ready")).json()["brokers"]["default"]
        assert up["last_error"] is None

        await proxy.refuse()  # Nobody emits: it is found out by asking.
        await _becomes(ready, (200, "degraded", "degraded"))
        assert await ready("/strict/ready") == (503, "down", "degraded")
        away = (await client.get("/health/ready")).json()["brokers"]["default"]
        assert "Connect call failed" in away["last_error"] or "Connection" in away["last_error"]
        assert away["since"] >= up["since"]
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.head("/health/ready")).status_code == 200

        await proxy.resume()
        await _becomes(ready, (200, "up", "up"))
        assert await ready("/strict/ready") == (200, "up", "up")

        await proxy.stall()  # Half-open: the answer comes all the same, in its own time.
        before = time.monotonic()
        assert await ready() == (200, "degraded", "degraded")
        assert time.monotonic() - before < 2.0
        await proxy.resume()
        await _becomes(ready, (200, "up", "up"))


async def test_since_is_when_the_outage_began_and_when_it_ended(proxy: TCPProxy) -> None:
    """The moment of the first connection says nothing in an outage; of one that nobody has emitted in, neither."""
    check = HealthCheck(timeout=0.5)
    async with connect(_url(proxy), timeout=1.0) as emitter:

        async def became(state: str) -> datetime:
            end = time.monotonic() + 20
            while (broker := (await check(emitter)).brokers["default"]).state != state:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            return broker.since

        opened = lost = await became("up")
        for _ in range(2):
            await asyncio.sleep(0.2)
            before = datetime.now(UTC)
            await proxy.stall()
            lost = await became("degraded")
            assert before < lost <= datetime.now(UTC)
            await asyncio.sleep(0.2)
            assert await became("degraded") == lost
            await proxy.resume()
            back = await became("up")
            assert lost < back
            assert await became("up") == back
        assert opened < lost


@pytest.mark.parametrize("transport", ["kafka", "rabbitmq"])
async def test_a_broker_that_ends_and_comes_back(transport: str, request: pytest.FixtureRequest, unique: str) -> None:
    """The other transports tell an outage, and its end, in the same words."""
    broker: Tansu = await asyncio.to_thread(request.getfixturevalue(f"own_{transport}"))
    async with connect(broker.url, timeout=1.0) as emitter:
        assert (await check_health(emitter)).status == "up"
        await asyncio.to_thread(broker.stop)

        async def state() -> str:
            return (await check_health(emitter, timeout=2.0)).brokers["default"].state

        await _becomes(state, "degraded")
        health = await check_health(emitter, ready_on="broker")
        assert (health.ready, health.brokers["default"].last_error is None) == (False, False)
        await asyncio.to_thread(broker.start)
        await _becomes(state, "up", 30)


# -- states --------------------------------------------------------------------------------------------------------


async def test_states_from_the_start_to_the_end(redis_url: str) -> None:
    """Idle is not up, starting is not down, and what is closed is not ready."""
    nowhere = f"redis://app:{SECRET}@127.0.0.1:{free_port()}/0"
    brokers = connect({"default": redis_url, "alerts": {"url": nowhere, "required": False}}, timeout=0.5)
    health = await check_health(brokers)
    assert (health.status, health.ready, "not opened" in (health.error or "")) == ("down", False, True)
    async with brokers as emitter:

        async def states() -> dict[str, str]:
            return _states(await check_health(emitter))

        await _becomes(states, {"default": "up", "alerts": "down"})
        health = await check_health(emitter)
        assert (health.status, health.ready) == ("degraded", True)
        alerts = health.brokers["alerts"]
        assert (alerts.transport, alerts.last_error is not None) == ("redis", True)
        assert SECRET not in json.dumps(health.as_dict()) + repr(health)
        assert not (await check_health(emitter, ready_on="broker")).ready
        assert _states(await check_health(brokers.emitter_to("alerts"))) == {"default": "up", "alerts": "down"}
    assert not (await check_health(emitter)).ready


async def test_brokers_that_are_relayed_to_elsewhere(tmp_path: Path) -> None:
    """A web process that is not connected on purpose is ready, by either measure."""
    with temporary_database("sqlite", tmp_path) as database:
        engine = create_engine(database.url("sqlite+pysqlite"))
        async with connect("kafka://127.0.0.1:1", outbox=SQLAlchemyOutbox(engine, "external")) as emitter:
            for ready_on in ("started", "broker"):
                health = await check_health(emitter, ready_on=ready_on)
                assert (health.status, _states(health)) == ("up", {"default": "elsewhere"})
        engine.dispose()


async def test_many_who_ask_share_one_ping(own_redis: Callable[..., Redis]) -> None:
    """A load balancer with fifty nodes must not load the broker, and a hanging broker piles up no questions."""
    broker = await asyncio.to_thread(own_redis)
    async with connect(broker.url) as emitter:
        check = HealthCheck(timeout=0.5)
        pings = 0
        [managed] = check_brokers(emitter)
        ping = managed.backend.ping

        async def counted() -> None:
            nonlocal pings
            pings += 1
            await ping()

        managed.backend.ping = counted
        await asyncio.to_thread(broker.pause)
        before = time.monotonic()
        answers = await asyncio.gather(*(check(emitter) for _ in range(50)))
        assert time.monotonic() - before < 2.0
        assert {answer.brokers["default"].state for answer in answers} == {"degraded"}
        assert "did not answer within 0.5 s" in (answers[0].brokers["default"].last_error or "")
        assert pings == 1
        await asyncio.to_thread(broker.resume)

        async def up() -> str:
            return (await check(emitter)).status

        await _becomes(up, "up")


def check_brokers(emitter: EventEmitter) -> list[Any]:
    from dispytch_integrations.brokers import brokers_of

    brokers = brokers_of(emitter)
    assert brokers is not None
    return list(brokers.brokers.values())


async def test_wrong_options_and_foreign_emitters_are_told() -> None:
    """What cannot be asked must not look healthy."""
    with pytest.raises(ConfigurationError, match="write ready_on='started' or ready_on='broker'"):
        HealthCheck(ready_on="brokers")  # type: ignore[arg-type]
    for timeout in (0, -1, None, "1", True):
        with pytest.raises(ConfigurationError, match="timeout="):
            HealthCheck(timeout=timeout)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_age=-1"):
        HealthCheck(max_age=-1)
    with pytest.raises(ConfigurationError, match=r"use connect\(\)"):
        await check_health(EventEmitter(MemoryProducer()))
    with pytest.raises(ConfigurationError, match="write outbox=True, max_age=60"):
        HealthCheck(max_age=60)


async def test_nobody_to_ask_is_an_error() -> None:
    """`check_health()` that answers "up" would be the check that never fails."""
    with pytest.raises(ConfigurationError, match=r"write check_health\(emitter\)"):
        await check_health()
    with pytest.raises(ConfigurationError, match=r"not a str; write `async with connect\(...\) as emitter"):
        await check_health("redis://:hunter2@localhost")  # type: ignore[arg-type]
    for given in (connect_blocking("memory://"), connect_blocking("memory://").emitter):
        with pytest.raises(ConfigurationError, match=r"write check_health_blocking\(emitter\)"):
            await check_health(given)  # type: ignore[arg-type]


async def test_a_connection_that_is_being_made_is_waited_for(redis_url: str) -> None:
    """A command that opens the brokers to ask whether they answer is told so, and not that they are starting."""
    brokers = connect(redis_url)
    await brokers.start(wait=False)
    health = await check_health(brokers, ready_on="broker", timeout=5)
    assert (health.status, _states(health)) == ("up", {"default": "up"})
    await brokers.stop()


async def test_a_connection_that_does_not_come_is_waited_for_within_the_deadline(proxy: TCPProxy) -> None:
    """A health check ends in time, whatever is the matter."""
    await proxy.stall()
    brokers = connect(_url(proxy))
    await brokers.start(wait=False)
    begun = time.monotonic()
    health = await check_health(brokers, ready_on="broker", timeout=0.3)
    assert (health.status, _states(health)) == ("down", {"default": "starting"})
    assert 0.25 < time.monotonic() - begun < 1.5
    await brokers.stop()


async def test_an_outbox_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Who asks for the outbox's backlog and is told of none would think that it is empty."""
    async with connect("memory://") as emitter:
        check = HealthCheck(outbox=True)
        await check(emitter)
        health = await check(emitter)
        assert health.ready
        assert health.error == (
            "outbox=True, and there is no outbox to ask; write connect(..., outbox=SQLAlchemyOutbox(engine)), "
            "or leave outbox=True away"
        )
        assert [record.getMessage() for record in caplog.records] == [health.error]


# -- the outbox ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Any:
    with temporary_database("postgresql") as database:
        yield database


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg"])
async def test_an_outbox_that_nobody_relays_is_degraded(driver: str, database: Database) -> None:
    """Orders are taken, and nobody hears of them: that is told, and is no reason to stop taking orders."""
    url = database.url(driver)
    engine: Any = create_async_engine(url) if "asyncpg" in driver else create_engine(url)
    async with connect("memory://", outbox=SQLAlchemyOutbox(engine, "external")) as emitter:
        health = await check_health(emitter, outbox=True)
        [(name, outbox)] = health.outboxes.items()
        assert name.startswith("postgresql://")
        assert (health.status, outbox.state, outbox.waiting, outbox.heartbeat) == ("up", "up", 0, None)
        database.insert([record(1), record(2)])
        health = await check_health(emitter, outbox=True)
        [outbox] = health.outboxes.values()
        assert (health.status, health.ready, outbox.waiting) == ("degraded", True, 2)
        assert outbox.last_error == "events wait, and no relay runs"
        assert "outboxes" not in (await check_health(emitter)).as_dict()
        # A relay comes, and sends them.
        async with connect("memory://", outbox=SQLAlchemyOutbox(engine)):

            async def status() -> tuple[str, int | None, int | None]:
                told = await check_health(emitter, outbox=True)
                [outbox] = told.outboxes.values()
                return told.status, outbox.waiting, outbox.relays

            await _becomes(status, ("up", 0, 1))
        database.insert([record(3)])
        database.run("update dispytch_outbox_event set created_ms = created_ms - 100000")
        told = await check_health(emitter, outbox=True, max_age=60)
        assert "has waited for 100 s" in (next(iter(told.outboxes.values())).last_error or "")
        database.run("drop table dispytch_outbox_event")
        told = await check_health(emitter, outbox=True)
        assert "tables are missing" in (next(iter(told.outboxes.values())).last_error or "")
        assert (told.ready, told.status) == (True, "degraded")
    disposed = engine.dispose()
    if disposed is not None:
        await disposed


async def test_counts_of_an_outbox_are_used_again(database: Database) -> None:
    """They read its whole index: a load balancer that asks each second must not."""
    engine = create_async_engine(database.url("postgresql+asyncpg"))
    async with connect("memory://", outbox=SQLAlchemyOutbox(engine, "external")) as emitter:
        check = HealthCheck(outbox=True)
        assert next(iter((await check(emitter)).outboxes.values())).waiting == 0
        database.insert([record(1)])
        assert next(iter((await check(emitter)).outboxes.values())).waiting == 0
    await engine.dispose()


# -- over HTTP -----------------------------------------------------------------------------------------------------


def test_fastapi_and_several_emitters() -> None:
    """The router knows all emitters of the app, and tells which of them a broker is of."""
    app = FastAPI(lifespan=emitter_lifespan("memory://", lifespan=emitter_lifespan("memory://redis", name="alerts")))
    app.include_router(health_router(include_in_schema=True))
    with TestClient(app) as client:
        answer = client.get("/health/ready")
        assert answer.status_code == 200
        assert set(answer.json()["brokers"]) == {"emitter.default", "alerts.default"}
        assert answer.headers["cache-control"] == "no-store"
        assert set(client.get("/openapi.json").json()["paths"]) == {"/health/live", "/health/ready"}
    without = TestClient(app)
    answer = without.get("/health/ready")
    assert (answer.status_code, "its lifespan has not run" in answer.json()["error"]) == (503, True)
    assert without.get("/health/live").json() == {"status": "up"}


def test_strangers_are_told_the_status_alone() -> None:
    """Addresses and errors of brokers are not for everybody."""
    app = Starlette(routes=health_routes(details=False), lifespan=emitter_lifespan("memory://"))
    with StarletteClient(app) as client:
        assert client.get("/health/ready").json() == {"status": "up"}


def test_any_asgi_app_and_mounted_ones() -> None:
    """EmitterMiddleware's emitter is found, by an app within an app as well."""
    inner = Starlette(routes=health_routes("/h"))
    app = EmitterMiddleware(Starlette(routes=[Mount("/inner", app=inner)]), "memory://")
    with StarletteClient(app) as client:
        assert client.get("/inner/h/ready").json()["brokers"]["default"]["state"] == "up"
        assert get_emitter(app)


# -- synchronous code ----------------------------------------------------------------------------------------------


def test_synchronous_code_asks_as_well(redis_url: str) -> None:
    """Flask has health checks, too."""
    brokers = connect_blocking(redis_url)
    assert "is not open" in (check_health_blocking(brokers).error or "")
    with brokers:
        health = check_health_blocking(brokers, ready_on="broker")
        assert (health.status, _states(health)) == ("up", {"default": "up"})
    assert not check_health_blocking(brokers).ready


def test_the_blocking_emitter_is_asked_as_well() -> None:
    """It is what `with` gives, and so what is at hand."""
    with connect_blocking("memory://") as emitter:
        health = check_health_blocking(emitter, ready_on="broker")
        assert (health.status, _states(health)) == ("up", {"default": "up"})
    assert "is not open" in (check_health_blocking(emitter).error or "")


async def test_blocking_health_says_what_to_ask_and_where() -> None:
    """An AttributeError would tell neither."""
    with pytest.raises(ConfigurationError, match=r"`await check_health\(emitter\)`"):
        check_health_blocking(connect("memory://"))  # type: ignore[arg-type]
    with pytest.raises(WrongLoopError, match=r"asyncio.to_thread\(check_health_blocking, brokers\)"):
        check_health_blocking(connect_blocking("memory://"))
