"""`request.emitter`, in sync and async views."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from dispytch_integrations.django import conf
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django._emitter import Emitter

__all__ = ["EmitterMiddleware"]

_R = TypeVar("_R", bound="HttpResponseBase | Awaitable[HttpResponseBase]")


class EmitterMiddleware:
    """Gives each request an emitter.

        MIDDLEWARE += ["dispytch_integrations.django.middleware.EmitterMiddleware"]

        def place_order(request):
            request.emitter.emit(OrderPlaced(order_id=1))

        async def place_order(request):
            await request.emitter.aemit(OrderPlaced(order_id=1))

    It opens nothing. A server that runs no system checks learns here what is wrong with DISPYTCH: SettingsError.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        conf.require(connections.settings().problems)
        self.get_response = get_response
        self._emitter = Emitter()
        if iscoroutinefunction(get_response):  # pyright: ignore[reportDeprecated]  # as in _emitter
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Pass the request on, with its emitter; under ASGI what is returned is awaited."""
        cast("_WithEmitter", request).emitter = self._emitter
        return self.get_response(request)


class _WithEmitter:
    emitter: Emitter
