"""The outbox on the page."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from django.conf import settings

from example_projects.django_orders.live.relay import RelayProcess
from example_projects.shop_demo.live.feed import Feed
from example_projects.shop_demo.live.outbox import outbox_on_page

__all__ = ["outbox_of_shop"]


@asynccontextmanager
async def outbox_of_shop(feed: Feed) -> AsyncGenerator[RelayProcess | None, None]:
    """Show it, as long as the block runs. Gives the relay that goes with the server: the demo's alone has one."""
    # Imported here: its models are there where INSTALLED_APPS has the outbox.
    from dispytch_integrations.django.outbox.store import DjangoStore

    log: Path | None = getattr(settings, "DEMO_RELAY_LOG", None)
    relay = RelayProcess(log) if log else None
    async with outbox_on_page(feed, DjangoStore(), relay):
        if relay is not None:
            await relay.turn(True)
        yield relay
