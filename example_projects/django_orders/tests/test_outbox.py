"""With the outbox, `OUTBOX=1`: an order and its event are stored together, whoever is away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as project
from django.db import transaction
from django.test import Client

from example_projects.django_orders.live import relay
from example_projects.django_orders.orders import services
from example_projects.django_orders.orders.models import FailedEvent, Order

ORDER = {"customer": "Ada", "product": "Stoneware mug", "quantity": 2}
with_outbox = pytest.mark.skipif(not project.OUTBOX, reason="OUTBOX=1 is not set")


@pytest.fixture
def nobody_relays(settings: Any) -> None:
    """The broker is away, and the relay with it."""
    settings.DISPYTCH = {"default": {"URL": "kafka://127.0.0.1:1"}}
    settings.DISPYTCH_OUTBOX = {"EMBEDDED": False}


def stored() -> list[tuple[str, str]]:
    """Type and key of what waits, in order."""
    from dispytch_integrations.django.outbox.models import OutboxEvent

    return list(OutboxEvent.objects.order_by("pk").values_list("type", "ordering_key"))


@with_outbox
@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("nobody_relays")
def test_orders_are_taken_while_nobody_relays(client: Client) -> None:
    """What the outbox is for: a broker that is away costs no order and no event, and nobody waits for it."""
    placed = client.post("/orders", ORDER, content_type="application/json")
    number = placed.json()["id"]
    cancelled = client.post(f"/orders/{number}/cancellation")

    assert (placed.status_code, cancelled.status_code) == (201, 200)
    assert stored() == [(f"com.example.order.{what}", str(number)) for what in ("placed", "packed", "cancelled")]
    assert not FailedEvent.objects.exists()


@with_outbox
@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("nobody_relays")
def test_an_order_that_is_rolled_back_leaves_no_event() -> None:
    """Both are rows of one transaction."""
    with transaction.atomic():
        services.place(Order(customer="Ada", product="Stoneware mug"))
        assert len(stored()) == 1
        transaction.set_rollback(True)

    assert (stored(), Order.objects.count()) == ([], 0)


async def test_a_relay_that_ends_by_itself_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A demo whose relay did not start must say why, in the terminal that somebody looks at."""
    command = tmp_path / "manage.py"
    command.write_text("raise SystemExit('no such table')", encoding="utf-8")
    monkeypatch.setattr(relay, "_MANAGE", command)
    process = relay.RelayProcess(tmp_path / "relay.log")

    await process.turn(True)
    await process.ended()

    assert "ended with code 1. It said:\nno such table" in caplog.text
    await process.close()


async def test_a_relay_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the demo, whatever its relay is about."""
    command, log = tmp_path / "manage.py", tmp_path / "relay.log"
    command.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)",
        encoding="utf-8",
    )
    monkeypatch.setattr(relay, "_MANAGE", command)
    monkeypatch.setattr(relay, "_PATIENCE", 0.1)
    process = relay.RelayProcess(log)
    await process.turn(True)
    while "deaf" not in log.read_text():
        await asyncio.sleep(0.01)

    await process.turn(False)

    assert process.exit_code == -9


def test_without_a_relay_the_page_cannot_stop_one(client: Client) -> None:
    """In production somebody else runs it: the page says so, instead of an error."""
    answer = client.post("/outbox/relay", {"on": False}, content_type="application/json")

    assert answer.status_code == 404
    assert "manage.py dispytch relay" in answer.json()["detail"]
