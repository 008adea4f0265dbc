"""The event catalogue of a Django project: the project's events and brokers, for its staff, and off in production."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponseBase
from django.test import Client
from django.urls import include, path, reverse

from dispytch_integrations import EventBase
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.catalog import catalog_urls
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.kafka import KafkaEventRoute
from tests.django.project.shop import events as shop_events

SECRET = "hunter2-catalog"
PATHS = ("/events/", "/events/asyncapi.json", "/events/asyncapi.yaml")


class DjangoCatalogued(EventBase):
    """A customer has paid."""

    __route__ = KafkaEventRoute(topic="catalogued")
    __event_type__ = "django.catalogued"

    order_id: int = 1


class _User:
    """Who asks, as an authentication middleware would say."""

    is_authenticated = True

    def __init__(self, *, is_staff: bool, is_active: bool = True) -> None:
        self.is_staff, self.is_active = is_staff, is_active


asking: list[Any] = []
"""The user of the next requests, at most one."""


class AskingMiddleware:
    """Sets request.user."""

    def __init__(self, get_response: Any) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        user: Any = asking[0] if asking else AnonymousUser()
        request.user = user
        response: HttpResponseBase = self._get_response(request)
        return response


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DISPYTCH_CATALOG", raising=False)
    yield
    asking.clear()


Make = Callable[..., Client]


@pytest.fixture
def make(settings: Any) -> Make:
    """Makes a client of the project with the catalogue at /events/."""

    def client(**options: Any) -> Client:
        given: dict[str, Any] = {"events": [DjangoCatalogued], **options}
        urls: Any = ModuleType("catalog_urls_of_a_test")
        urls.urlpatterns = [path("events/", include(catalog_urls(**given)))]
        settings.ROOT_URLCONF = urls
        settings.MIDDLEWARE = [f"{__name__}.AskingMiddleware"]
        settings.DISPYTCH = {"default": {"URL": "memory://kafka"}}
        return Client()

    return client


def test_the_page_and_the_document_are_there(make: Make, settings: Any) -> None:
    """include(catalog_urls()) is all: three paths, with names, HEAD and conditional requests."""
    settings.DEBUG = True
    client = make(title="Shop")
    answers = [client.get(each) for each in PATHS]
    assert [each.status_code for each in answers] == [200, 200, 200]
    document = answers[1].json()
    assert document["info"]["title"] == "Shop"
    assert document["servers"]["default"]["x-dispytch-transport"] == "kafka"
    assert b"DjangoCatalogued" in answers[0].content
    assert "default-src 'none'" in answers[0]["Content-Security-Policy"]
    names = ["dispytch-catalog", "dispytch-catalog-json", "dispytch-catalog-yaml"]
    assert [reverse(name) for name in names] == list(PATHS)
    for each, answer in zip(PATHS, answers, strict=True):
        assert answer["Cache-Control"] == "private, no-cache"
        assert client.get(each, headers={"If-None-Match": answer["ETag"]}).status_code == 304
        head = client.head(each)
        assert (head.status_code, head.content) == (200, b"")
        assert client.post(each).status_code == 405


def test_events_of_the_installed_apps_are_found_and_no_broker_is_opened(make: Make, settings: Any) -> None:
    """`events.py` of each app is what a project has: nothing is named twice, and to look is not to connect."""
    settings.DEBUG = True
    document = make(events=None).get(PATHS[1]).json()
    classes = {message["x-dispytch-class"] for message in document["components"]["messages"].values()}
    assert f"{shop_events.__name__}.OrderPlaced" in classes
    assert connections.session is None


def test_servers_are_those_of_the_settings_without_secrets(make: Make, settings: Any) -> None:
    """The page says where events go, and never with which password."""
    client = make()
    settings.DEBUG = True
    settings.DISPYTCH = {"default": {"URL": f"kafka://shop:{SECRET}@kafka:9092?sasl_mechanism=PLAIN"}}
    answers = [client.get(each) for each in PATHS]
    assert answers[1].json()["servers"]["default"]["host"] == "kafka:9092"
    assert [each for each in answers if SECRET in each.content.decode()] == []


@pytest.mark.parametrize(
    ("debug", "enabled", "environment", "on"),
    [
        (True, None, None, True),
        (False, None, None, False),
        (False, None, "1", True),
        (True, False, None, False),
        (False, True, None, True),
    ],
)
def test_it_is_off_in_production_unless_switched_on(
    make: Make,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    debug: bool,
    enabled: bool | None,
    environment: str | None,
    on: bool,
) -> None:
    """Names of topics and fields are nobody's business by accident, not even with a login."""
    settings.DEBUG = debug
    if environment is not None:
        monkeypatch.setenv("DISPYTCH_CATALOG", environment)
    asking.append(_User(is_staff=True))
    client = make(enabled=enabled)
    assert {client.get(each).status_code for each in PATHS} == {200 if on else 404}


def test_that_it_is_off_is_logged_once_with_what_to_write(
    make: Make, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Who wonders about the 404 finds the answer in the log, and a scanner does not fill it."""
    settings.DEBUG = False
    client = make()
    with caplog.at_level(logging.INFO, "dispytch_integrations"):
        for each in (*PATHS, *PATHS):
            assert client.get(each).status_code == 404
    [record] = [each for each in caplog.records if each.name.startswith("dispytch_integrations")]
    assert "catalog_urls(..., enabled=True)" in record.getMessage()


@pytest.mark.parametrize(
    ("user", "status"),
    [
        (None, 403),
        (_User(is_staff=False), 403),
        (_User(is_staff=True, is_active=False), 403),
        (_User(is_staff=True), 200),
    ],
    ids=["anonymous", "customer", "former staff", "staff"],
)
def test_outside_of_debug_it_is_for_staff(make: Make, settings: Any, user: _User | None, status: int) -> None:
    """Switching it on in production must not show it to the world."""
    settings.DEBUG = False
    if user is not None:
        asking.append(user)
    client = make(enabled=True)
    assert {client.get(each).status_code for each in PATHS} == {status}


def test_a_decorator_says_who_may_see_it(make: Make, settings: Any) -> None:
    """The project's own rules, as for any view; a page that is off asks nobody to log in."""
    settings.DEBUG = False
    settings.LOGIN_URL = "/login/"
    client = make(enabled=True, decorator=login_required)
    for each in PATHS:
        answer = client.get(each)
        assert (answer.status_code, answer["Location"]) == (302, f"/login/?next={each}")
    asking.append(_User(is_staff=False))
    assert {client.get(each).status_code for each in PATHS} == {200}
    asking.clear()
    assert {make(decorator=login_required).get(each).status_code for each in PATHS} == {404}


def test_without_authentication_nobody_is_staff(make: Make, settings: Any) -> None:
    """A project without users has no request.user: closed, not open."""
    settings.DEBUG = False
    client = make(enabled=True)
    settings.MIDDLEWARE = []
    assert client.get(PATHS[0]).status_code == 403


def test_mistakes_are_told_where_they_are_written() -> None:
    """A module that is misspelt is found when the URLs are read, and not by the first visitor."""
    with pytest.raises(ConfigurationError, match="there is no such module"):
        catalog_urls(events="shop_without_events.events")
