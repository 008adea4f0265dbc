"""Health checks of a Django project: two views, and a function.

    # urls.py
    from dispytch_integrations.django.health import health_urls
    urlpatterns += [path("health/", include(health_urls()))]

`health/live` answers 200 as long as the process does; `health/ready` 200 or 503 with the state of each broker as JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import URLPattern, path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.outbox.store import DjangoStore
from dispytch_integrations.errors import DispytchError
from dispytch_integrations.health import Health, HealthCheck, ReadyOn
from dispytch_integrations.outbox.store import OutboxStore

__all__ = ["check_health", "health_urls"]

_INSTALL_OUTBOX = "add 'dispytch_integrations.django.outbox' to INSTALLED_APPS"


def health_urls(
    *,
    ready_on: ReadyOn = "started",
    timeout: float = 1.0,
    outbox: bool = False,
    max_age: float | None = None,
    details: bool = True,
) -> list[URLPattern]:
    """Two URLs for `include`: "live" and "ready", named "dispytch-live" and "dispytch-ready".

    `ready_on`: "started" (default): a broker's outage answers 200 with the status "degraded"; "broker": 503 unless
    each broker answers. Where nothing has been emitted yet and no server has opened the brokers, "started" answers 200
    with the state "idle", and "broker" opens them and waits for them within `timeout`.
    `timeout`: seconds for the whole answer. `outbox`: tell of the outbox, too; `max_age`: seconds after which a
    waiting event is late. `details`: False: the status alone, where strangers may ask.

    Raises ConfigurationError for options that are none.
    """
    check = HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age)

    def live(request: HttpRequest) -> HttpResponse:
        return JsonResponse({"status": "up"})

    def ready(request: HttpRequest) -> HttpResponse:
        health = _ask(check)
        return JsonResponse(health.as_dict(details=details), status=200 if health.ready else 503)

    return [path("live", _view(live), name="dispytch-live"), path("ready", _view(ready), name="dispytch-ready")]


def _view(view: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    return never_cache(require_safe(view))


def check_health(
    *, ready_on: ReadyOn = "started", timeout: float = 1.0, outbox: bool = False, max_age: float | None = None
) -> Health:
    """Ask the project's brokers and outboxes, from any thread; the options are those of `health_urls`.

    Raises ConfigurationError for options that are none, WrongLoopError where an event loop runs.
    """
    return _ask(HealthCheck(ready_on=ready_on, timeout=timeout, outbox=outbox, max_age=max_age))


def _ask(check: HealthCheck) -> Health:
    stores = _stores() if check.outbox else {}
    try:
        session = connections.session
        if session is None and check.ready_on == "broker" and connections.connects:
            session = connections.reach()
        if session is not None:
            brokers = session.brokers.brokers
            return session.calls.run(lambda: check.ask(brokers, stores, advice=_INSTALL_OUTBOX), limit=check.timeout)
        # Nothing is open yet in this process, and perhaps never will be.
        brokers = connections.loaded().brokers
        for broker in brokers.values():
            broker.elsewhere = not connections.connects
        return asyncio.run(check.ask(brokers, stores, opened=not connections.closed, advice=_INSTALL_OUTBOX))
    except DispytchError as exc:
        return Health(status="down", error=str(exc))


def _stores() -> dict[str, Callable[[], OutboxStore]]:
    settings = connections.outbox()
    return {} if settings is None else {alias: partial(DjangoStore, alias) for alias in settings.databases}
