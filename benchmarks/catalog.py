"""The event catalogue: 500 event classes of 20 modules as an AsyncAPI document, as text, and as a page in Chromium.

And the command line: how long `--help` takes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from types import new_class
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from benchmarks.harness import Row, is_quick
from dispytch_integrations import EventBase
from dispytch_integrations._catalog_page import render
from dispytch_integrations.asyncapi import describe, diff, to_json, to_yaml
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisStreamEventRoute
from tests.support.chromium import BrowserMissing, Tab, browsing

BROKERS = {"default": "kafka://one,two", "rabbit": "amqp://localhost", "streams": "redis://localhost"}


class Currency(Enum):
    EUR = "EUR"
    USD = "USD"


class Line(BaseModel):
    sku: str = Field(pattern=r"^[A-Z]{3}-\d{4}$")
    count: int = Field(ge=1, le=1000)
    price: Decimal


class Address(BaseModel):
    street: str
    city: str = Field(max_length=80)
    country: str = Field(min_length=2, max_length=2, examples=["DE"])


def classes(count: int) -> list[type[EventBase]]:
    """Events as an app has them: ten fields, nested models, a route with a part, a third on each transport."""
    routes = (
        KafkaEventRoute(topic="orders.{tenant}"),
        RabbitMQEventRoute(exchange="orders", routing_key="{tenant}.placed"),
        RedisStreamEventRoute(stream="orders.{tenant}"),
    )
    annotations: dict[str, Any] = {
        "tenant": str,
        "order_id": UUID,
        "placed_at": datetime,
        "customer": str,
        "lines": list[Line],
        "shipping": Address,
        "billing": Address | None,
        "currency": Currency,
        "total": Decimal,
        "note": str | None,
    }
    made: list[type[EventBase]] = []
    for number in range(count):
        namespace = {
            "__module__": f"shop.part{number % 20}",
            "__doc__": "An order was placed.\n\nBy a customer, and paid.",
            "__route__": routes[number % 3],
            "__annotations__": annotations,
            "note": None,
        }
        made.append(new_class(f"Event{number}", (EventBase,), exec_body=partial(_fill, namespace)))
    return made


def _fill(own: dict[str, Any], body: dict[str, Any]) -> None:
    body.update(own)


def _milliseconds(run: Callable[[], object], rounds: int) -> float:
    times: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


async def run() -> list[Row]:
    """The median of some runs."""
    count, rounds = (50, 1) if is_quick() else (500, 5)
    events = classes(count)
    document = describe(events, brokers=BROKERS)
    examples = sum("examples" in each for each in document["components"]["messages"].values())
    reach = f"<= {count * 2}"
    return [
        Row(
            what=f"catalogue of {count} event classes: describe() and to_json()",
            measured=_milliseconds(lambda: to_json(describe(events, brokers=BROKERS)), rounds),
            unit="ms",
            reach=reach,
            note=f"{examples} with an example",
        ),
        Row(
            what=f"catalogue of {count} event classes: to_yaml()",
            measured=_milliseconds(lambda: to_yaml(document), rounds),
            unit="ms",
        ),
        Row(
            what=f"catalogue of {count} event classes: diff()",
            measured=_milliseconds(lambda: diff(document, document), rounds),
            unit="ms",
        ),
        *_page(document, count, rounds),
        _help(rounds),
    ]


def _page(document: dict[str, Any], count: int, rounds: int) -> list[Row]:
    """From the address to the first result of a search, in a new tab each time; nothing where there is no Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "events.html")
        file.write_text(render(document), encoding="utf-8")
        try:
            with browsing(Path(folder)) as make:
                times = [_searched(make(), file.as_uri()) for _ in range(rounds + 1)][1:]
        except BrowserMissing:
            return []
    return [
        Row(
            what=f"catalogue of {count} event classes: page opened, typed into, first result seen in Chromium",
            measured=statistics.median(times),
            unit="ms",
            reach="<= 1000",
            note=f"{len(render(document)) / 1e6:.1f} MB",
        )
    ]


def _searched(tab: Tab, url: str) -> float:
    # Timed inside the page: the way to the browser is no part of it.
    searched = """(async () => {
        const box = document.getElementById("search"), began = performance.now();
        box.value = "event42";
        box.dispatchEvent(new Event("input"));
        await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
        if (!document.querySelector("#list b")) throw new Error("nothing was found");
        return performance.now() - began;
    })()"""
    tab.open(url)
    took = tab.js("performance.getEntriesByType('navigation')[0].loadEventEnd") + tab.js(searched)
    tab.close()
    return float(took)


def _help(rounds: int) -> Row:
    program = str(Path(sys.executable).parent / "dispytch-integrations")
    return Row(
        what="dispytch-integrations --help",
        measured=_milliseconds(
            lambda: subprocess.run([program, "--help"], capture_output=True, check=True), rounds * 4
        ),
        unit="ms",
        reach="<= 300",
    )
