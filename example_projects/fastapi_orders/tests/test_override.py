"""The emitter replaced by FastAPI's `dependency_overrides`: no lifespan runs, and brokers fail on demand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fastapi.testclient import TestClient

from dispytch_integrations import EventEmitter
from dispytch_integrations.errors import BrokerUnavailableError, DeliveryError, ProducerTimeout, UnroutableError
from dispytch_integrations.fastapi import get_emitter
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from example_projects.fastapi_orders.app import create_app
from example_projects.fastapi_orders.settings import Settings

ORDER = {"customer": "Ada", "product": "Stoneware mug"}


class FailingProducer(MemoryProducer):
    """A broker's trouble, which nothing real produces on demand."""

    error: DeliveryError | None = None

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        if self.error is not None:
            return [self.error] * len(messages)
        return await super().deliver(messages, timeout=timeout)


@pytest.fixture
def producer() -> FailingProducer:
    return FailingProducer()


@pytest.fixture
def client(producer: FailingProducer) -> TestClient:
    app = create_app(Settings(broker_url="kafka://not-there:9092"))
    emitter = EventEmitter(producer)
    # A bare emitter logs a timeout; the app's own raises it.
    emitter.on_timeout(raise_timeout)

    async def override() -> EventEmitter:
        return emitter

    app.dependency_overrides[get_emitter] = override
    return TestClient(app)


def raise_timeout(event: object) -> None:
    raise ProducerTimeout


def test_the_service_gets_the_overridden_emitter(client: TestClient, producer: FailingProducer) -> None:
    """The override reaches the service deep down, since it gets its emitter by dependency and not from a global."""
    assert client.post("/orders", json=ORDER).status_code == 201
    assert [message.destination for message in producer.sent] != []


@pytest.mark.parametrize("error", [BrokerUnavailableError("down"), UnroutableError("no queue")])
def test_an_order_that_nobody_heard_of_is_not_kept(
    client: TestClient, producer: FailingProducer, error: DeliveryError
) -> None:
    """The client gets a 503 and may try again, without ordering twice."""
    producer.error = error

    answer = client.post("/orders", json=ORDER)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.get("/orders").json() == []


def test_an_order_that_somebody_may_have_heard_of_is_kept(client: TestClient, producer: FailingProducer) -> None:
    """A timeout is not a no: billing may have the event, so the order must not be gone."""
    producer.error = ProducerTimeout()

    answer = client.post("/orders", json=ORDER)

    assert answer.status_code == 503
    assert "kept" in answer.json()["detail"]
    assert len(client.get("/orders").json()) == 1


def test_a_cancellation_that_nobody_heard_of_is_undone(client: TestClient, producer: FailingProducer) -> None:
    """The order can be cancelled again as soon as the broker is back."""
    path = f"/orders/{client.post('/orders', json=ORDER).json()['id']}/cancellation"
    producer.error = BrokerUnavailableError("down")
    assert client.post(path).status_code == 503

    producer.error = None

    assert client.post(path).status_code == 200
