"""Orders over HTTP, in pytest's way: the fixture `emitted_events` puts the brokers on memory and sees what is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from django.conf import settings as project
from django.db import transaction
from django.test import Client

from dispytch_integrations.django.lifecycle import flush_events
from dispytch_integrations.django.testing import EmittedEvents
from dispytch_integrations.errors import RouteError
from example_projects.django_orders.orders import services
from example_projects.django_orders.orders.events import OrderCancelled, OrderPacked, OrderPlaced
from example_projects.django_orders.orders.models import Cancellation, FailedEvent, Order
from example_projects.django_orders.orders.tasks import pack

ORDER = {"customer": "Ada", "product": "Stoneware mug", "quantity": 2}

OnCommit = Callable[..., AbstractContextManager[list[Any]]]


def post(client: Client, path: str, body: object) -> Any:
    return client.post(path, body, content_type="application/json")


@pytest.mark.django_db
def test_a_placed_order_is_told_after_its_commit(
    client: Client, emitted_events: EmittedEvents, django_capture_on_commit_callbacks: OnCommit
) -> None:
    """Packing and billing live on this event: type, order and body are what they rely on."""
    with django_capture_on_commit_callbacks():
        answer = post(client, "/orders", ORDER)
        emitted_events.assert_pending(OrderPlaced, customer="Ada")
        assert list(emitted_events) == []
    with django_capture_on_commit_callbacks(execute=True):
        number = post(client, "/orders", ORDER).json()["id"]

    assert answer.status_code == 201
    emitted_events.assert_emitted(OrderPlaced, order_id=number)
    placed = next(message for message in emitted_events.messages if message.type == "com.example.order.placed")
    assert placed.ordering_key == str(number)
    assert placed.payload is not None
    assert placed.payload.decode() == (
        f'{{"order_id":{number},"customer":"Ada","product":"Stoneware mug","quantity":2,"total":"29.00"}}'
    )


@pytest.mark.django_db(transaction=True)
def test_a_rolled_back_order_is_not_told(emitted_events: EmittedEvents) -> None:
    """Whoever calls the service may change their mind: an event without an order would be packed."""
    with transaction.atomic():
        services.place(Order(customer="Ada", product="Stoneware mug"))
        transaction.set_rollback(True)

    emitted_events.assert_rolled_back(OrderPlaced)
    emitted_events.assert_not_emitted(OrderPlaced)
    assert not Order.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_an_order_that_cannot_be_told_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and event belong to one transaction, whoever calls: a mistake in the event must not leave half of it."""

    def refuse(event: OrderPlaced) -> None:
        raise RouteError("no such route")

    monkeypatch.setattr(services, "emit_on_commit", refuse)
    with pytest.raises(RouteError):
        services.place(Order(customer="Ada", product="Stoneware mug"))

    assert not Order.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_cancellation_is_told_by_its_signal(client: Client, emitted_events: EmittedEvents) -> None:
    """The async view emits nothing itself: creating the row is enough, once."""
    path = f"/orders/{post(client, '/orders', ORDER).json()['id']}/cancellation"

    first, second = post(client, path, {"reason": "too many mugs"}), client.post(path)

    assert (first.status_code, first.json()["status"], second.status_code) == (200, "cancelled", 409)
    told = [event for event in emitted_events if isinstance(event, OrderCancelled)]
    assert [event.reason for event in told] == ["too many mugs"]


@pytest.mark.django_db(transaction=True)
def test_the_task_packs_what_was_placed(client: Client, emitted_events: EmittedEvents) -> None:
    """Without a broker for Celery it runs at the commit; the order is packed once, however often the task runs."""
    number = post(client, "/orders", ORDER).json()["id"]
    packed_at = Order.objects.get(pk=number).packed_at

    pack(number)

    assert client.get(f"/orders/{number}").json()["status"] == "packed"
    emitted_events.assert_emitted(OrderPacked, order_id=number, packed_at=packed_at)
    assert Order.objects.get(pk=number).packed_at == packed_at


@pytest.mark.django_db
def test_a_cancelled_order_is_not_packed(emitted_events: EmittedEvents) -> None:
    """Nobody pays for what is sent after the cancellation."""
    order = Order.objects.create(customer="Ada", product="Stoneware mug", total=1)
    Cancellation.objects.create(order=order)

    pack(order.pk)

    emitted_events.assert_not_emitted(OrderPacked)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("path", "body", "code", "told"),
    [
        ("/orders", {"customer": " ", "product": "Stoneware mug"}, 422, "customer: This field is required."),
        ("/orders", {"customer": "Ada", "product": "Teapot"}, 422, "Teapot is not one of"),
        ("/orders", {"customer": "Ada", "product": "Stoneware mug", "quantity": 0}, 422, "quantity"),
        ("/orders", ["no object"], 422, "customer"),
        ("/orders/7/cancellation", {}, 404, "There is no order 7."),
    ],
)
def test_what_did_not_happen_is_not_told(
    client: Client, emitted_events: EmittedEvents, path: str, body: object, code: int, told: str
) -> None:
    """A refused request emits nothing, and says what was wrong in the page's words."""
    answer = post(client, path, body)

    assert answer.status_code == code
    assert told in answer.json()["detail"]
    assert (list(emitted_events), emitted_events.pending) == ([], [])


@pytest.mark.django_db
def test_orders_are_listed_newest_first(client: Client) -> None:
    """The page shows what was just placed on top."""
    numbers = [post(client, "/orders", ORDER).json()["id"] for _ in range(3)]

    assert [order["id"] for order in client.get("/orders?limit=2").json()] == numbers[:0:-1]
    assert client.get(f"/orders/{numbers[0]}").json()["total"] == "29.00"
    assert client.get("/orders/0").status_code == 404


@pytest.mark.skipif(project.OUTBOX, reason="with the outbox it waits there")
@pytest.mark.django_db(transaction=True)
def test_an_event_that_failed_after_the_commit_is_kept(settings: Any) -> None:
    """The order is taken although the broker is away, and somebody can see in the admin who was not told."""
    settings.DISPYTCH = {"default": {"URL": "kafka://127.0.0.1:1", "TIMEOUT": 0.1}}
    Cancellation.objects.create(order=Order.objects.create(customer="Ada", product="Stoneware mug", total=1))

    assert flush_events(20)

    failed = FailedEvent.objects.get()
    assert failed.type == "com.example.order.cancelled"
    assert '"order_id"' in failed.body
