# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Health, OpenTelemetry, and the tools for tests of every framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

import httpx
from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.errors import ProducerTimeout
from dispytch_integrations.fastapi import health_router
from dispytch_integrations.health import BrokerHealth, Health, HealthCheck, check_health, check_health_blocking
from dispytch_integrations.hooks import Hook
from dispytch_integrations.message import Message
from dispytch_integrations.opentelemetry import OpenTelemetryHook, instrument
from dispytch_integrations.starlette import health_routes
from dispytch_integrations.testing import EmittedEvents, asgi_client, capture_events, override_brokers
from tests.typed.orders import OrderPlaced


async def health(emitter: EventEmitter, app: FastAPI) -> None:
    assert_type(await check_health(emitter, ready_on="broker"), Health)
    assert_type(await HealthCheck(outbox=True)(emitter, connect("memory://")), Health)
    assert_type(check_health_blocking(connect_blocking("memory://")), Health)
    told = await check_health(emitter)
    assert_type(told.ready, bool)
    assert_type(told.brokers["default"], BrokerHealth)
    assert_type(told.as_dict(details=False), dict[str, Any])
    assert_type(health_router("/health", timeout=2), APIRouter)
    assert_type(health_routes(), list[Route])

    health_router(ready_on="brokers")  # type: ignore[arg-type]
    await check_health(app)  # type: ignore[arg-type]


def tracing() -> None:
    instrument()
    connect("memory://", hooks=[OpenTelemetryHook()])
    instrument(tracer_provider="console")  # type: ignore[arg-type]


class Audit(Hook):
    def held(self, message: Message) -> None: ...

    def delivering(self, messages: Sequence[Message]) -> None: ...


async def tests(app: FastAPI) -> None:
    with capture_events("kafka") as events:
        assert_type(events, EmittedEvents)
        events.fail_next(ProducerTimeout, event_type=OrderPlaced, times=2)
        events.fail_next(ProducerTimeout("late"))
        events.time_out_next()
        assert_type(events.failed, list[tuple[EventBase, Exception]])
        events.fail_next("late")  # type: ignore[arg-type]
    async with asgi_client(app, headers={"x": "y"}) as client:
        assert_type(client, httpx.AsyncClient)
    with override_brokers("redis"):
        pass
    capture_events("memory")  # type: ignore[arg-type]
