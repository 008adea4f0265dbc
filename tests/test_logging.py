"""What is logged: under names that can be configured, with fields that can be searched, and never a payload."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import dispytch_integrations
from dispytch_integrations import EventBase, connect, event_id
from dispytch_integrations._sqlalchemy_store import store_of
from dispytch_integrations.errors import DeliveryError, DispytchError
from dispytch_integrations.redis import RedisStreamEventRoute
from dispytch_integrations.sqlalchemy import emit_on_commit
from tests.support.brokers import free_port
from tests.support.outboxes import FakeBackend, eventually, record, relaying, started, temporary_database
from tests.support.proxy import TCPProxy

PAYLOAD = "payload-8151"


class Placed(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")
    __event_type__ = "shop.placed"

    place: str = "orders"
    secret: str = PAYLOAD


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.DEBUG, "dispytch_integrations")
    yield caplog
    ours = [each for each in caplog.records if each.name.startswith("dispytch_integrations")]
    assert not [each for each in ours if PAYLOAD in each.getMessage() and each.levelno >= logging.INFO]


def _about(logged: pytest.LogCaptureFixture, text: str) -> Any:
    return next(each for each in logged.records if text in each.getMessage())


def test_loggers_are_named_after_public_modules() -> None:
    """Who writes `"dispytch_integrations.brokers": {"level": "ERROR"}` finds the name in the documentation."""
    package = Path(dispytch_integrations.__file__).parent
    names = set[str]()
    for file in package.rglob("*.py"):
        for given in re.findall(r"getLogger\(([^)]*)\)", file.read_text()):
            if given == "__name__":
                names.add("dispytch_integrations." + str(file.relative_to(package))[:-3].replace("/", "."))
            elif given.startswith('"'):
                names.add(given.strip('"'))
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]


async def test_a_brokers_outage_is_found_by_its_alias(logged: pytest.LogCaptureFixture, redis_url: str) -> None:
    """A search for the broker finds when it went and when it came back."""
    host, port = redis_url.rpartition("/")[0].rpartition("://")[2].split(":")
    async with TCPProxy(host, int(port)) as proxy:
        async with connect({"orders": f"redis://127.0.0.1:{proxy.port}/0"}, timeout=0.5) as emitter:
            await proxy.refuse()
            for _ in range(3):
                with pytest.raises(DispytchError):
                    await emitter.emit(Placed())
            await eventually(lambda: "is down" in logged.text)
            await proxy.resume()
            await eventually(lambda: "is up again" in logged.text)
    for text in ("is down", "is up again"):
        told = _about(logged, text)
        assert (told.name, told.broker) == ("dispytch_integrations.brokers", "orders")


async def test_an_event_after_a_commit_that_fails_is_found_by_its_id(
    logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The row is there, the event is not: the line that says so is found from either."""
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    event = Placed()
    url = f"redis://127.0.0.1:{free_port()}"
    async with connect(url, required=False, timeout=0.3) as emitter:
        with Session(engine) as session:
            emit_on_commit(session, event, emitter=emitter)
            session.commit()
        await eventually(lambda: "was not delivered" in logged.text)
    engine.dispose()
    told = _about(logged, "was not delivered")
    assert (told.event_type, told.event_id, told.broker, told.destination) == (
        *("shop.placed", event_id(event), "default", "orders"),
    )


async def test_a_relays_line_is_found_from_the_request(logged: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The stored headers of the trace, and the correlation id, are fields of the line; others are not."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with temporary_database("sqlite", tmp_path) as database:
        headers = {"traceparent": trace, "Correlation-Id": "c-17", "authorization": "Bearer geheim", "raw": b"\x00"}
        database.insert([record(1, headers=headers, payload=PAYLOAD.encode())])
        backend, engine = FakeBackend(), create_engine(database.url("sqlite+pysqlite"))
        backend.fake.answer = lambda message: DeliveryError("refused")
        async with started(default=backend) as brokers, relaying(store_of(engine), brokers, max_attempts=2):
            await eventually(lambda: "is dead after 2 attempts" in logged.text)
        engine.dispose()
    for text in ("was not delivered, attempt 1", "is dead"):
        told = _about(logged, text)
        assert (told.name, told.traceparent, vars(told)["Correlation-Id"]) == (
            *("dispytch_integrations.outbox", trace, "c-17"),
        )
        assert not hasattr(told, "authorization")
        assert "geheim" not in str(vars(told))
