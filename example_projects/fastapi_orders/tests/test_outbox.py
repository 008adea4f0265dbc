"""The app with its database and outbox: a file for SQLite and `memory://` are all that a test needs."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dispytch_integrations.errors import RouteError
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.starlette import get_emitter
from example_projects.fastapi_orders.app import create_app
from example_projects.fastapi_orders.settings import Settings
from example_projects.fastapi_orders.with_outbox import services

ORDER = {"customer": "Ada", "product": "Stoneware mug", "quantity": 2}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "orders.db"


@pytest.fixture
def app(file: Path) -> FastAPI:
    return create_app(Settings(broker_url="memory://", outbox=True, database_url=f"sqlite:///{file}"))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def sent(app: FastAPI, client: TestClient) -> list[Message]:
    """What the relay has sent, in order."""
    return cast("MemoryProducer", get_emitter(app).producer).sent


def until(holds: Callable[[], bool]) -> None:
    """The relay works beside the requests: wait for what it does."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stored(file: Path) -> list[str]:
    """The types of the events that are in the outbox."""
    with closing(sqlite3.connect(file)) as connection:
        return [row[0] for row in connection.execute("select type from dispytch_outbox_event order by id")]


def orders(file: Path) -> int:
    """How many orders are committed."""
    with closing(sqlite3.connect(file)) as connection:
        [(count,)] = connection.execute("select count(*) from orders")
        return int(count)


def test_a_placed_order_is_told_and_leaves_the_outbox(client: TestClient, sent: list[Message], file: Path) -> None:
    """The same event as without the outbox, and nothing stays behind to be cleaned up."""
    number = client.post("/orders", json=ORDER).json()["id"]

    until(lambda: len(sent) == 1)
    assert (sent[0].type, sent[0].ordering_key) == ("com.example.order.placed", str(number))
    assert sent[0].payload == (
        f'{{"order_id":{number},"customer":"Ada","product":"Stoneware mug","quantity":2,"total":"29.00"}}'.encode()
    )
    until(lambda: stored(file) == [])


def test_orders_are_taken_while_nobody_relays(client: TestClient, sent: list[Message], file: Path) -> None:
    """What the outbox is for: a broker or a relay that is away costs no order and no event, and order is kept."""
    assert client.post("/outbox/relay", json={"on": False}).status_code == 204
    number = client.post("/orders", json=ORDER).json()["id"]
    client.post(f"/orders/{number}/cancellation", json={"reason": "too many mugs"})

    assert stored(file) == ["com.example.order.placed", "com.example.order.cancelled"]
    time.sleep(0.2)
    assert sent == []

    client.post("/outbox/relay", json={"on": True})
    until(lambda: len(sent) == 2)
    assert [message.type for message in sent] == ["com.example.order.placed", "com.example.order.cancelled"]


def test_an_event_that_cannot_be_stored_takes_its_order_with_it(
    client: TestClient, sent: list[Message], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order and event are committed together: half of them would be the very thing that an outbox is there against."""

    def refuse(session: object, event: object) -> None:
        raise RouteError("no such route")

    monkeypatch.setattr(services, "emit_on_commit", refuse)

    assert client.post("/orders", json=ORDER).status_code == 500
    assert (orders(file), stored(file), sent) == (0, [], [])


def test_the_order_is_committed_before_the_answer(client: TestClient, file: Path) -> None:
    """A client that reads "201" may ask for the order at once, on another connection."""
    assert client.post("/orders", json=ORDER).status_code == 201
    assert orders(file) == 1


def test_an_order_is_cancelled_once(client: TestClient, sent: list[Message]) -> None:
    """The second click gets a 409 and no second event; what does not exist a 404."""
    path = f"/orders/{client.post('/orders', json=ORDER).json()['id']}/cancellation"

    assert client.post(path).json()["status"] == "cancelled"
    assert (client.post(path).status_code, client.post("/orders/7/cancellation").status_code) == (409, 404)
    until(lambda: len(sent) == 2)
    time.sleep(0.1)
    assert len(sent) == 2


def test_orders_are_listed_newest_first(client: TestClient) -> None:
    """The page shows the same list, wherever orders are kept."""
    numbers = [client.post("/orders", json=ORDER).json()["id"] for _ in range(3)]

    assert [order["id"] for order in client.get("/orders").json()] == numbers[::-1]
    assert client.get(f"/orders/{numbers[0]}").json()["total"] == "29.00"
    assert client.get("/orders/7").status_code == 404


def test_what_was_stored_before_a_crash_goes_out_after_it(app: FastAPI, file: Path) -> None:
    """A process that ends with events in its outbox has lost nothing: the next one sends them."""
    with TestClient(app) as client:
        client.post("/outbox/relay", json={"on": False})
        client.post("/orders", json=ORDER)
    assert stored(file) == ["com.example.order.placed"]

    again = create_app(Settings(broker_url="memory://", outbox=True, database_url=f"sqlite:///{file}"))
    with TestClient(again):
        sent = cast("MemoryProducer", get_emitter(again).producer).sent
        until(lambda: len(sent) == 1)
        until(lambda: stored(file) == [])


def test_the_page_is_told_how_the_outbox_is_doing(app: FastAPI, client: TestClient) -> None:
    """State and lag stand beside the events: waiting, the oldest one's age, and that no relay is alive."""
    assert '"outbox":true' in client.get("/").text
    client.post("/outbox/relay", json={"on": False})
    client.post("/orders", json=ORDER)

    async def told() -> None:
        async with asyncio.timeout(20):
            async for item in app.state.feed.listen():
                outbox = app.state.feed.outbox
                if outbox is not None and outbox.waiting == 1 and outbox.oldest:
                    assert item is not None
                    assert (outbox.relays, outbox.relaying, outbox.dead) == (0, False, 0)
                    assert [(event.type, event.key) for event in outbox.first] == [("com.example.order.placed", "1")]
                    assert outbox.heartbeat is not None
                    return

    assert client.portal is not None
    client.portal.call(told)
