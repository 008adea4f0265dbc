"""The whole app over the memory transport: `memory://` as its URL is all that a test needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.starlette import get_emitter
from example_projects.fastapi_orders.app import create_app
from example_projects.fastapi_orders.settings import Settings

ORDER = {"customer": "Ada", "product": "Stoneware mug", "quantity": 2}


@pytest.fixture
def app() -> FastAPI:
    return create_app(Settings(broker_url="memory://"))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:  # `with` runs the lifespan, and so connects the emitter.
        yield client


@pytest.fixture
def sent(app: FastAPI, client: TestClient) -> list[Message]:
    """What the app has emitted, in order."""
    return cast("MemoryProducer", get_emitter(app).producer).sent


def test_a_placed_order_is_told(client: TestClient, sent: list[Message]) -> None:
    """Packing and billing live on this event: type, order and body are what they rely on."""
    order = client.post("/orders", json=ORDER).json()

    (message,) = sent
    assert message.type == "com.example.order.placed"
    assert message.ordering_key == str(order["id"])
    assert message.payload is not None
    assert message.payload.decode() == (
        f'{{"order_id":{order["id"]},"customer":"Ada","product":"Stoneware mug","quantity":2,"total":"29.00"}}'
    )


def test_a_cancellation_is_told_under_the_orders_key(client: TestClient, sent: list[Message]) -> None:
    """Of one order, the cancellation must not overtake the placing: both have the same ordering key."""
    order = client.post("/orders", json=ORDER).json()
    answer = client.post(f"/orders/{order['id']}/cancellation", json={"reason": "too many mugs"})

    assert answer.json()["status"] == "cancelled"
    assert [message.type for message in sent] == ["com.example.order.placed", "com.example.order.cancelled"]
    assert len({message.ordering_key for message in sent}) == 1


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/orders", {"customer": " ", "product": "Stoneware mug"}, 422),
        ("/orders", {"customer": "Ada", "product": "Teapot"}, 422),
        ("/orders/7/cancellation", None, 404),
    ],
)
def test_what_did_not_happen_is_not_told(
    client: TestClient, sent: list[Message], path: str, body: dict[str, str] | None, code: int
) -> None:
    """A refused request emits nothing."""
    assert client.post(path, json=body).status_code == code
    assert sent == []


def test_an_order_is_cancelled_once(client: TestClient, sent: list[Message]) -> None:
    """The second click gets a 409 and no second event."""
    path = f"/orders/{client.post('/orders', json=ORDER).json()['id']}/cancellation"

    assert client.post(path).status_code == 200
    assert client.post(path).status_code == 409
    assert len(sent) == 2


def test_orders_are_listed_newest_first(client: TestClient) -> None:
    """The page shows what was just placed on top."""
    numbers = [client.post("/orders", json=ORDER).json()["id"] for _ in range(3)]

    assert [order["id"] for order in client.get("/orders").json()] == numbers[::-1]
    assert client.get(f"/orders/{numbers[0]}").json()["total"] == "29.00"
    assert client.get("/orders/7").status_code == 404


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    """It must work on a train: one file, without a script, style or font from another address."""
    page = client.get("/").text

    assert "<title>Orders, live</title>" in page
    for reference in ('src="http', 'href="http', "@import", "url(http"):
        assert reference not in page
