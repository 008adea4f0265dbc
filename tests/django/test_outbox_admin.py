"""The outbox in the admin: what operators see, and what they may do."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from html import unescape
from typing import Any

import pytest
from django.conf import settings
from django.contrib import admin
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext, override_settings
from django.urls import path

pytestmark = [pytest.mark.django_db, pytest.mark.xdist_group("outbox admin")]

LIST = "/admin/dispytch_outbox/outboxevent/"
APPS = ("django.contrib.admin", "django.contrib.messages", "django.contrib.sessions", "django.contrib.staticfiles")
OUTBOX = "dispytch_integrations.django.outbox"
ALL = ("view_outboxevent", "change_outboxevent", "delete_outboxevent", "view_payload")


def __getattr__(name: str) -> Any:
    """The URLs of a project with the admin: made when they are asked for, since models register themselves first."""
    if name == "urlpatterns":
        return [path("admin/", admin.site.urls)]
    raise AttributeError(name)


@pytest.fixture(scope="module", autouse=True)
def installed(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """The admin and the outbox: this project has no admin otherwise."""
    processors = ("django.template.context_processors.request", "django.contrib.auth.context_processors.auth")
    middleware = (
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    )
    templates = {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": [*processors, "django.contrib.messages.context_processors.messages"]},
    }
    own = [app for app in settings.INSTALLED_APPS if app != OUTBOX]
    with override_settings(
        INSTALLED_APPS=[*APPS, *own, OUTBOX],
        MIDDLEWARE=middleware,
        TEMPLATES=[templates],
        ROOT_URLCONF=__name__,
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        STATIC_URL="static/",
        LANGUAGE_CODE="en",
        TIME_ZONE="Europe/Berlin",
    ):
        with django_db_blocker.unblock():
            for app in ("admin", "dispytch_outbox"):
                call_command("migrate", app, verbosity=0)
        yield
        with django_db_blocker.unblock():
            # Without the app its table, which refers to users, would be in the way of a TransactionTestCase.
            call_command("migrate", "admin", "zero", verbosity=0)


def now() -> int:
    return time.time_ns() // 1_000_000


def stored(number: int, **columns: Any) -> Any:
    """A row as the outbox would have it, 60 s old."""
    from dispytch_integrations.django.outbox.models import OutboxEvent

    values: dict[str, Any] = {
        "event_id": f"event-{number}",
        "type": "order.placed",
        "broker": "default",
        "destination": "orders",
        "ordering_key": f"key-{number}",
        "headers": json.dumps({"tenant": "acme"}),
        "properties": "{}",
        "payload": json.dumps({"order_id": number, "secret": "Ada"}).encode(),
        "content_type": "application/json",
        "format": 1,
        "lane": number,
        "shard": number % 64,
        "created_ms": now() - 60_000,
    }
    return OutboxEvent.objects.create(**{**values, **columns})


def dead(number: int, **columns: Any) -> Any:
    return stored(number, state=1, state_ms=now() - 5_000, attempts=10, last_error="too large", **columns)


def retrying(number: int, **columns: Any) -> Any:
    return stored(number, attempts=3, next_try_ms=now() + 600_000, last_error="no queue takes it", **columns)


def sent(number: int, **columns: Any) -> Any:
    return stored(number, state=2, state_ms=now() - 5_000, **columns)


def states() -> dict[str, tuple[int, int]]:
    """State and attempts of what is in the outbox, by event id."""
    from dispytch_integrations.django.outbox.models import OutboxEvent

    return {row.event_id: (row.state, row.attempts) for row in OutboxEvent.objects.all()}


def client_with(*permissions: str) -> Client:
    from django.contrib.auth.models import Permission, User

    user = User.objects.create_user(f"user{User.objects.count()}", is_staff=True)
    found = Permission.objects.filter(content_type__app_label="dispytch_outbox", codename__in=permissions)
    assert len(found) == len(permissions)
    user.user_permissions.set(found)
    client = Client()
    client.force_login(user)
    return client


def text_of(answer: Any) -> str:
    """What a reader sees of a page."""
    assert answer.status_code == 200, answer.status_code
    page = re.sub(r"(?s)<(script|style).*?</\1>", " ", answer.content.decode()).replace("<wbr>", "")
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def shown(client: Client, query: str = "") -> list[str]:
    """The event ids on a list, in order."""
    answer = client.get(LIST + query)
    assert answer.status_code == 200
    table = answer.content.decode().partition('id="result_list"')[2].partition("</table>")[0]
    return re.findall(r">(event-\d+)<", table)


def act(client: Client, action: str, *rows: Any, query: str = "", **more: str) -> Any:
    chosen = {"action": action, "_selected_action": [row.pk for row in rows], **more}
    return client.post(LIST + query, chosen, follow=True)


def confirmed(answer: Any) -> dict[str, str]:
    """The hidden fields of the question."""
    fields = re.findall(r'type="hidden" name="(last|confirmed|select_across)" value="(\w*)"', answer.content.decode())
    return dict(fields)


# -- the list ------------------------------------------------------------------------------------------------------


def test_the_list_says_how_each_event_is_doing() -> None:
    """State, age, attempts, next try and error at a glance: what an operator on call needs first."""
    stored(1)
    retrying(2, broker="alerts")
    dead(3)
    sent(4)

    page = client_with("view_outboxevent").get(LIST)

    assert shown(client_with("view_outboxevent")) == ["event-4", "event-3", "event-2", "event-1"]
    text = text_of(page)
    for told in (
        "order.placed event-1",
        "alerts: orders",
        "key key-1",
        "60 s",
        "retrying 3 attempts, next in 9 min no queue takes it",
    ):
        assert told in text
    badges = re.findall(r'class="outbox-state outbox-(\w+)"', page.content.decode())
    assert badges == ["sent", "dead", "retrying", "waiting"]


def test_above_the_list_stands_the_state_of_the_outbox() -> None:
    """Counts, the age of the oldest, and who relays: whether anything is wrong is seen before the first row."""
    from dispytch_integrations.django.outbox.models import OutboxShard

    stored(1, created_ms=now() - 7_200_000)
    stored(2)
    dead(3)
    for shard, until_ms in ((0, now() + 8_000), (1, now() + 8_000), (2, now() - 1)):
        OutboxShard.objects.create(shard=shard, owner="web-1", until_ms=until_ms, wanted_ms=0, heartbeat_ms=now())

    text = text_of(client_with("view_outboxevent").get(LIST))

    assert "Waiting 2 the oldest was stored 2 h ago" in text
    assert "Dead 1 the oldest was stored 60 s ago" in text
    assert "Relays 1 web-1: 2 shards" in text


def test_an_outbox_that_nobody_relays_is_seen() -> None:
    """The most likely mistake of all: the app is installed, and the relay never started."""
    from dispytch_integrations.django.outbox.models import OutboxShard

    stored(1)
    client = client_with("view_outboxevent")
    assert "Relays 0 none has ever run: start manage.py dispytch relay" in text_of(client.get(LIST))

    OutboxShard.objects.create(shard=0, owner="web-1", until_ms=now() - 1, wanted_ms=0, heartbeat_ms=now() - 180_000)
    assert "Relays 0 the last one was seen 3 min ago" in text_of(client.get(LIST))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?state=waiting", ["event-2", "event-1"]),
        ("?state=retrying", ["event-2"]),
        ("?state=dead", ["event-3"]),
        ("?state=sent", ["event-4"]),
        ("?broker=alerts", ["event-2"]),
        ("?type=order.cancelled", ["event-3"]),
        ("?attempts=some", ["event-3", "event-2"]),
        ("?attempts=none", ["event-4", "event-1"]),
        ("?q=event-3", ["event-3"]),
        ("?q=key-1", ["event-1"]),
        ("?q=event", []),
        ("?state=dead&broker=alerts", []),
        ("?o=0", ["event-1", "event-2", "event-3", "event-4"]),
    ],
)
def test_filters_and_search_find_what_is_asked_for(query: str, found: list[str]) -> None:
    """Among a million rows the one order that a customer asks about is found by its event id or its key."""
    stored(1)
    retrying(2, broker="alerts")
    dead(3, type="order.cancelled")
    sent(4)

    assert shown(client_with("view_outboxevent"), query) == found


def test_filters_offer_types_and_brokers_that_are_there() -> None:
    """Nobody knows all types by heart; the brokers of DISPYTCH are offered even when nothing waits for them."""
    stored(1, type="invoice.sent", broker="elsewhere")

    page = client_with("view_outboxevent").get(LIST).content.decode()

    for link in ("?type=invoice.sent", "?broker=elsewhere", "?broker=default"):
        assert link in page


def test_a_large_outbox_is_neither_counted_nor_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million rows the page must open at once, most of all on the day when so many wait."""
    from dispytch_integrations.django.outbox import _admin_shown
    from dispytch_integrations.django.outbox.models import OutboxEvent

    monkeypatch.setattr(_admin_shown, "MOST_COUNTED", 100)
    one = stored(1)
    rows = [OutboxEvent(**{**values_of(one), "id": None, "event_id": f"event-{number}"}) for number in range(2, 300)]
    OutboxEvent.objects.bulk_create(rows)

    client = client_with("view_outboxevent")
    with CaptureQueriesContext(connection) as queries:
        page = client.get(LIST)
    asked = [query["sql"].lower() for query in queries.captured_queries]  # The next request forgets them.

    text = text_of(page)
    assert "Waiting 100+" in text
    assert "100+ events" in text
    assert len(shown(client, "?p=2")) == 50
    assert client.get(f"{LIST}?p=3").status_code == 302
    rows_read = [sql for sql in asked if "dispytch_outbox_event" in sql]
    assert 8 < len(rows_read) < 20
    for sql in rows_read:
        assert "limit" in sql, sql  # counts as well: of at most so many rows
        assert "payload" not in sql, sql


def values_of(row: Any) -> dict[str, Any]:
    return {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}


# -- one event -----------------------------------------------------------------------------------------------------


def test_an_event_is_shown_readable_and_cannot_be_changed() -> None:
    """What was stored is what is sent: nobody edits it by mistake; times stand in the project's time zone."""
    row = dead(7, created_ms=1_767_225_600_000, headers='{"b":1,"a":{"$bytes":"YQ=="}}')
    client = client_with(*ALL)
    page = client.get(f"{LIST}{row.pk}/change/")

    text = text_of(page)
    assert "2026-01-01 01:00:00 CET" in text
    assert '"a": { "$bytes": "YQ==" }, "b": 1' in text
    assert '"secret": "Ada"' in text
    assert "too large" in text
    assert 'name="_save"' not in page.content.decode()
    assert client.post(f"{LIST}{row.pk}/change/", {"type": "x"}).status_code == 403
    assert client.get(f"{LIST}add/").status_code == 403
    assert client.post(f"{LIST}{row.pk}/delete/", {"post": "yes"}).status_code == 403
    assert states() == {"event-7": (1, 10)}


def test_payloads_are_for_those_who_may_see_them() -> None:
    """An operator requeues events without reading what customers ordered."""
    row = stored(7)
    with CaptureQueriesContext(connection) as queries:
        text = text_of(client_with("view_outboxevent", "change_outboxevent").get(f"{LIST}{row.pk}/change/"))
    asked = [query["sql"] for query in queries.captured_queries if "outbox_event" in query["sql"]]

    assert "Ada" not in text
    assert "Not shown: your account does not have the permission dispytch_outbox.view_payload." in text
    assert len(asked) == 1
    assert "payload" not in asked[0]


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (None, "none: a tombstone"),
        (b"plain\ntext", "plain text 10 bytes"),
        (b"\xff\x00\x01", "ff 00 01 3 bytes, no text: the first 3 in hexadecimal"),
        (b"<script>alert(1)</script>", "<script>alert(1)</script> 25 bytes"),
        (b"x" * 70_000, "70,000 bytes, the first 65,536 are shown"),
    ],
)
def test_payloads_of_every_kind_are_shown(payload: bytes | None, told: str) -> None:
    """Whatever somebody serialized: the page opens, and executes none of it."""
    row = stored(7, payload=payload)
    page = client_with(*ALL).get(f"{LIST}{row.pk}/change/")

    assert b"<script>alert(1)" not in page.content
    assert told in text_of(page)


@pytest.mark.parametrize("permissions", [(), ("view_outboxevent",)])
def test_nobody_does_what_they_may_not(permissions: tuple[str, ...]) -> None:
    """Each action has its permission; without any, the outbox is not even listed."""
    row = dead(1)
    client = client_with(*permissions)
    for action in ("requeue", "discard"):
        act(client, action, row, confirmed="yes")

    assert states() == {"event-1": (1, 10)}
    assert client.get(LIST).status_code == (200 if permissions else 403)
    assert ("dispytch_outbox" in client.get("/admin/").content.decode()) is bool(permissions)


def test_who_may_requeue_may_not_discard() -> None:
    """Deleting what was never delivered is the graver of the two."""
    row = dead(1)
    client = client_with("change_outboxevent")
    page = client.get(LIST).content.decode()

    assert 'value="requeue"' in page
    assert 'value="discard"' not in page
    assert 'value="delete_selected"' not in page
    act(client, "discard", row, confirmed="yes")
    assert states() == {"event-1": (1, 10)}


# -- actions -------------------------------------------------------------------------------------------------------


def test_dead_events_are_requeued() -> None:
    """The topic was made, the message is to go out: it waits again as on its first day."""
    from dispytch_integrations.django.outbox.models import OutboxEvent

    answer = act(client_with(*ALL), "requeue", dead(1), dead(2))

    assert states() == {"event-1": (0, 0), "event-2": (0, 0)}
    assert set(OutboxEvent.objects.values_list("next_try_ms", "state_ms")) == {(0, 0)}
    assert "2 events requeued." in text_of(answer)


def test_what_waits_already_is_left_alone_and_that_is_said() -> None:
    """Whoever selects all learns what became of each kind; one that failed need not wait for its next try."""
    answer = act(client_with(*ALL), "requeue", stored(1), retrying(2), dead(3))

    text = text_of(answer)
    assert "1 event requeued." in text
    assert "1 event that had failed will be tried at once." in text
    assert "1 event left alone: waiting already, and not failed." in text
    assert states() == {"event-1": (0, 0), "event-2": (0, 0), "event-3": (0, 0)}


@pytest.mark.parametrize(
    ("row", "permissions", "offered"),
    [
        (stored, ALL, ["discard"]),
        (retrying, ALL, ["requeue", "discard"]),
        (dead, ALL, ["requeue", "discard"]),
        (dead, ("change_outboxevent",), ["requeue"]),
        (dead, ("view_outboxevent",), []),
    ],
)
def test_an_event_is_requeued_and_discarded_on_its_page(
    row: Callable[[int], Any], permissions: tuple[str, ...], offered: list[str]
) -> None:
    """Whoever has just read the error need not look for the event in the list; what makes no sense is not offered."""
    page = client_with(*permissions).get(f"{LIST}{row(1).pk}/change/").content.decode()

    assert re.findall(r'name="action" value="(\w+)"', page) == offered
    assert "/history/" not in page  # of what nobody can edit
    if offered:
        assert f'class="outbox-actions" method="post" action="{LIST}"' in page


def test_an_empty_outbox_says_so() -> None:
    """A list without rows could as well be one that does not work."""
    client = client_with("view_outboxevent")
    assert "The outbox is empty: whatever was stored in it has been sent." in text_of(client.get(LIST))
    dead(1)
    assert "The outbox is empty" not in text_of(client.get(LIST))


def test_sent_events_are_delivered_again_only_after_a_question() -> None:
    """Consumers get them twice: that is asked for, never by the way."""
    rows = [sent(1), dead(2)]
    client = client_with(*ALL)
    question = act(client, "requeue", *rows)

    assert states() == {"event-1": (2, 0), "event-2": (1, 10)}
    assert "1 of them sent before: consumers get those a second time." in text_of(question)
    answer = act(client, "requeue", *rows, **confirmed(question))
    assert "2 events requeued." in text_of(answer)
    assert states() == {"event-1": (0, 0), "event-2": (0, 0)}


def test_events_are_discarded_after_a_question_that_says_what_that_means() -> None:
    """What still waits would never be delivered: that stands above the button, with every event's name."""
    rows = [stored(1), retrying(2), dead(3), sent(4)]
    client = client_with(*ALL)
    question = act(client, "discard", *rows)

    text = text_of(question)
    assert "4 events would be deleted, and cannot be brought back" in text
    assert "2 of them still to be sent. What is discarded is never delivered." in text
    for number in range(1, 5):
        assert f"event-{number}" in text
    assert len(states()) == 4

    answer = act(client, "discard", *rows[1:], **confirmed(question))
    assert "3 events discarded." in text_of(answer)
    assert states() == {"event-1": (0, 0)}


def test_dead_events_are_discarded_without_talk_of_waiting_ones() -> None:
    """The warning is read because it is not always there."""
    assert "still to be sent" not in text_of(act(client_with(*ALL), "discard", dead(1)))


def test_all_that_a_filter_finds_can_be_discarded_and_nothing_that_came_later() -> None:
    """Ten thousand dead events of one mistake: one click, and one that died since the question is not among them."""
    rows = [dead(number) for number in range(1, 61)]
    stored(100)
    client = client_with(*ALL)
    question = act(client, "discard", *rows[:50], query="?state=dead", select_across="1")
    assert "60 events would be deleted" in text_of(question)
    assert "… and 40 more." in text_of(question)
    dead(101)

    answer = act(client, "discard", *rows[:50], query="?state=dead", **confirmed(question))

    assert "60 events discarded." in text_of(answer)
    assert set(states()) == {"event-100", "event-101"}


def test_an_admin_of_its_own_looks_into_another_database() -> None:
    """Of several databases the router names one; the others are a proxy model and `using` away."""
    from dispytch_integrations.django.outbox.admin import OutboxEventAdmin
    from dispytch_integrations.django.outbox.models import OutboxEvent

    class ArchiveAdmin(OutboxEventAdmin):
        using = "archive"

    assert ArchiveAdmin(OutboxEvent, admin.site).get_queryset(None).db == "archive"  # type: ignore[arg-type]
    assert OutboxEventAdmin(OutboxEvent, admin.site).get_queryset(None).db == "default"  # type: ignore[arg-type]
