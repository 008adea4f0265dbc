# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""The event catalogue: the document, what has changed in it, and the page in each framework."""

from __future__ import annotations

from typing import Any, assert_type

from django.urls import URLPattern
from fastapi import APIRouter, Depends, FastAPI
from starlette.routing import Route

from dispytch_integrations import EventBase, connect
from dispytch_integrations.asyncapi import Change, describe, diff, event_classes, to_json, to_yaml
from dispytch_integrations.django.catalog import catalog_urls
from dispytch_integrations.fastapi import catalog_router
from dispytch_integrations.starlette import catalog_routes
from tests.typed.orders import OrderPlaced


def documents() -> None:
    document = describe([OrderPlaced], brokers="kafka://localhost:9092", title="Shop", version="1.0")
    assert_type(document, dict[str, Any])
    assert_type(describe("shop.events"), dict[str, Any])
    assert_type(describe(brokers=connect("memory://")), dict[str, Any])
    assert_type(event_classes(), list[type[EventBase]])
    assert_type(to_json(document), str)
    assert_type(to_yaml(document), str)
    changes = diff(document, document)
    assert_type(changes, list[Change])
    assert_type(changes[0].breaking, bool)
    describe(OrderPlaced)  # type: ignore[arg-type]
    describe([str])  # type: ignore[list-item]


def login(token: str) -> None: ...


def pages() -> None:
    router = catalog_router("/events", events="shop.events", dependencies=[Depends(login)])
    assert_type(router, APIRouter)
    FastAPI().include_router(router)
    assert_type(catalog_routes("/events", enabled=True), list[Route])
    assert_type(catalog_urls(title="Shop"), list[URLPattern])
    catalog_router(enabled="yes")  # type: ignore[arg-type]
    catalog_router(module="shop.events")  # type: ignore[call-arg]
