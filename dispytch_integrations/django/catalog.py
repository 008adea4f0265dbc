"""The event catalogue of a Django project: a page for people, and the AsyncAPI document behind it.

    # urls.py
    from dispytch_integrations.django.catalog import catalog_urls
    urlpatterns += [path("events/", include(catalog_urls()))]

In it is what `events.py` of the installed apps has, and every other event class that has been imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.urls import URLPattern, path
from django.views.decorators.http import require_safe

from dispytch_integrations._asyncapi_classes import Events
from dispytch_integrations._catalog_serving import PARTS, Catalog
from dispytch_integrations.django._connections import connections

__all__ = ["catalog_urls"]

logger = logging.getLogger("dispytch_integrations.django")

View = Callable[..., HttpResponseBase]


def catalog_urls(
    *,
    events: Events = None,
    title: str | None = None,
    version: str | None = None,
    description: str | None = None,
    enabled: bool | None = None,
    decorator: Callable[[Any], Any] | None = None,
) -> list[URLPattern]:
    """Three URLs for `include`: the page, "asyncapi.json" and "asyncapi.yaml".

    Their names are "dispytch-catalog", "dispytch-catalog-json" and "dispytch-catalog-yaml".

    `events`, `title`, `version`, `description`: see `dispytch_integrations.asyncapi.describe`; the brokers are those of
    DISPYTCH, to which nothing is connected.
    `enabled`: None: where `settings.DEBUG` is True, or the environment has DISPYTCH_CATALOG=1; else it answers 404.
    `decorator`: who may see it, as for any view: `staff_member_required`, `login_required`. None: everybody where DEBUG
    is True, elsewhere active users with `is_staff`, and 403 for the others.

    Raises ConfigurationError for options that are none.
    """
    catalog = Catalog(
        "catalog_urls",
        logger,
        events=events,
        title=title,
        version=version,
        description=description,
        enabled=enabled,
    )
    guard = _staff_only if decorator is None else decorator
    return [path(part, _switched(catalog, guard(_view(part, catalog))), name=_name(part)) for part in PARTS]


def _name(part: str) -> str:
    return "dispytch-catalog" + (f"-{part.rpartition('.')[2]}" if part else "")


def _view(part: str, catalog: Catalog) -> View:
    @require_safe
    def view(request: HttpRequest) -> HttpResponse:
        answer = catalog.answer(part, connections.loaded(), request.headers.get("If-None-Match"))
        return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))

    return view


def _switched(catalog: Catalog, view: View) -> View:
    """Outermost: nobody is asked to log in to a page that is not there."""

    @wraps(view)
    def switched(request: HttpRequest) -> HttpResponseBase:
        if not catalog.is_on(debug=settings.DEBUG):
            raise Http404
        return view(request)

    return switched


def _staff_only(view: View) -> View:
    @wraps(view)
    def guarded(request: HttpRequest) -> HttpResponseBase:
        user: Any = getattr(request, "user", None)
        if settings.DEBUG or (user is not None and user.is_active and user.is_staff):
            return view(request)
        raise PermissionDenied("The event catalogue is for staff: catalog_urls(decorator=...) says who may see it.")

    return guarded
