"""The page, and the life of what feeds it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from django.http import StreamingHttpResponse
from django.test import AsyncRequestFactory, Client

from dispytch_integrations.django import aemit
from dispytch_integrations.django.asgi import get_asgi_application
from dispytch_integrations.django.testing import override_brokers
from example_projects.django_orders.live import asgi, views
from example_projects.django_orders.orders.events import OrderCancelled

pytestmark = pytest.mark.usefixtures("memory")


@pytest.fixture
def memory() -> Any:
    with override_brokers("memory"):
        yield


class Server:
    """Speaks the lifespan protocol to an application, as uvicorn does."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(
            asgi.LivePage(get_asgi_application())(self.scope, self.said.get, self.heard.put)
        )

    async def ask(self, kind: str) -> dict[str, Any]:
        await self.said.put({"type": f"lifespan.{kind}"})
        answer: dict[str, Any] = await asyncio.wait_for(self.heard.get(), 20)
        return answer


async def test_the_page_hears_events_as_long_as_the_server_runs() -> None:
    """Opened with the server, closed with it; an open stream ends, so that it delays nothing."""
    server = Server()
    assert (await server.ask("startup"))["type"] == "lifespan.startup.complete"
    request = AsyncRequestFactory().get("/live")
    request.scope = {**request.scope, "state": server.scope["state"]}
    response = await views.stream(request)
    assert isinstance(response, StreamingHttpResponse)
    lines: AsyncGenerator[bytes, None] = response.streaming_content  # type: ignore[assignment]
    assert b'"connected":true' in await anext(lines)

    await aemit(OrderCancelled(order_id=7, reason="no mug"))

    assert b'"order_id":7' in await asyncio.wait_for(anext(lines), 20)
    server.scope["state"]["feed"].close()  # What the signal does that ends a server.
    assert [line async for line in lines] == []
    assert (await server.ask("shutdown"))["type"] == "lifespan.shutdown.complete"
    await server.task


async def test_a_page_that_hears_nothing_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose page never shows anything must not look healthy."""

    def unheard(*arguments: object) -> None:
        raise ConnectionRefusedError("no broker")

    monkeypatch.setattr(asgi, "live_feed", unheard)
    server = Server()

    answer = await server.ask("startup")

    assert answer["type"] == "lifespan.startup.failed"
    assert "no broker" in answer["message"]
    await server.ask("shutdown")
    await server.task


def test_without_a_lifespan_the_page_says_what_to_start(client: Client) -> None:
    """`runserver` is what a Django developer tries first: the page opens, and names the server that feeds it."""
    answer = client.get("/live")

    assert answer.status_code == 503
    assert "uvicorn example_projects.django_orders.shop.asgi:application" in answer.json()["detail"]


def test_the_page_is_given_what_differs_between_the_shops(client: Client) -> None:
    """One page for all examples: kinds of events and links are data, and nothing is loaded from elsewhere."""
    page = client.get("/").content.decode()

    data = page.partition('id="shop">')[2].partition("</script>")[0]
    assert [kind["name"] for kind in json.loads(data)["kinds"]] == ["placed", "packed", "cancelled"]
    for reference in ('src="http', 'href="http', "@import", "url(http"):
        assert reference not in page
