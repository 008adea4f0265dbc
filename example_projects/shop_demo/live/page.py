"""The page: one file, which a shop gives its own words."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from example_projects.shop_demo.live.feed import Arrived, BrokerState, Item, OutboxState

__all__ = ["Kind", "Link", "Shop", "Step", "page_of", "server_sent"]

_PAGE = Path(__file__).with_name("page.html")
_PLACE = '<script type="application/json" id="shop">{}</script>'


class Step(NamedTuple):
    """A station on the way of an event: what it is, and how it is called in the code."""

    title: str
    code: str


class Kind(BaseModel):
    """One kind of event, the page's colours among them: "placed", "packed", "cancelled"."""

    name: str
    topic: str
    made_in: Step
    sent_with: Step


class Link(NamedTuple):
    """Somewhere else to look."""

    text: str
    href: str


class Shop(BaseModel):
    """What the page has to know of its server."""

    kinds: list[Kind]
    links: list[Link]
    outbox: bool = False
    """Do events go through an outbox? Then the page shows it, and asks for `POST outbox/relay {"on": false}`."""


def page_of(shop: Shop) -> str:
    """The page as HTML; it loads nothing but its orders and events."""
    # Inside of a script element nothing but "<" could end it.
    data = shop.model_dump_json().replace("<", r"\u003c")
    return _PAGE.read_text(encoding="utf-8").replace(_PLACE, _PLACE.replace("{}", data))


def server_sent(item: Item) -> bytes:
    """A server-sent event, as it goes over the wire: `broker` and `outbox` are their states, all else a message."""
    match item:
        case BrokerState():
            first = "event: broker\nretry: 1000"
        case OutboxState():
            first = "event: outbox"
        case Arrived():
            first = f"id: {item.number}"
    return f"{first}\ndata: {item.model_dump_json()}\n\n".encode()
