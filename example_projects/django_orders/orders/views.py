"""The HTTP API: a sync view that places orders, an async view that cancels them.

It answers when the order is committed; the event is on its way then. A client that must know that it arrived needs
`emit` or `aemit` in the view, and an answer for the case that it did not.
"""

from __future__ import annotations

import json
from typing import Any, cast

from django.forms import BaseForm
from django.http import HttpRequest, JsonResponse
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from example_projects.django_orders.orders import services
from example_projects.django_orders.orders.forms import CancellationForm, OrderForm
from example_projects.django_orders.orders.models import Cancellation, Order

__all__ = ["CancellationView", "OrderView", "OrdersView"]


# Exempt, for nobody is logged in here: no cookie says who it is, so no other site can act in somebody's name. An API
# that knows its users by their session keeps the check, and its pages send the token (csrftoken -> X-CSRFToken).
@method_decorator(csrf_exempt, name="dispatch")
class OrdersView(View):
    """Place orders and list them."""

    def get(self, request: HttpRequest) -> JsonResponse:
        """The newest orders first; `?limit=` at most 100, default 20."""
        limit = request.GET.get("limit", "20")
        count = min(int(limit), 100) if limit.isdecimal() else 20
        orders = Order.objects.select_related("cancellation")[:count]
        return JsonResponse([_shown(order) for order in orders], safe=False)

    def post(self, request: HttpRequest) -> JsonResponse:
        """Place an order."""
        form = OrderForm({"quantity": 1, **_body(request)})
        if not form.is_valid():
            return _refused(form)
        order = services.place(form.save(commit=False))
        return JsonResponse(_shown(order), status=201)


class OrderView(View):
    """One order."""

    def get(self, request: HttpRequest, order_id: int) -> JsonResponse:
        """Look at it."""
        order = Order.objects.select_related("cancellation").filter(pk=order_id).first()
        return _missing(order_id) if order is None else JsonResponse(_shown(order))


@method_decorator(csrf_exempt, name="dispatch")  # As above.
class CancellationView(View):
    """Cancel orders."""

    async def post(self, request: HttpRequest, order_id: int) -> JsonResponse:
        """Cancel an order. The event is made by the signal of the Cancellation, see `signals`."""
        form = CancellationForm({"reason": "changed my mind", **_body(request)})
        if not form.is_valid():
            return _refused(form)
        order = await Order.objects.filter(pk=order_id).afirst()
        if order is None:
            return _missing(order_id)
        _, created = await Cancellation.objects.aget_or_create(order=order, defaults=form.cleaned_data)
        if not created:
            return JsonResponse({"detail": f"Order {order_id} is cancelled already."}, status=409)
        return JsonResponse(_shown(order))


def _body(request: HttpRequest) -> dict[str, Any]:
    """The JSON of the body; of none, and of what is no object, nothing: the form says what is missing."""
    try:
        body = json.loads(request.body or b"{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", body) if isinstance(body, dict) else {}


def _refused(form: BaseForm) -> JsonResponse:
    problems = [f"{name}: {' '.join(map(str, texts))}" for name, texts in form.errors.items()]
    return JsonResponse({"detail": "; ".join(problems)}, status=422)


def _missing(order_id: int) -> JsonResponse:
    return JsonResponse({"detail": f"There is no order {order_id}."}, status=404)


def _shown(order: Order) -> dict[str, Any]:
    return {
        "id": order.pk,
        "customer": order.customer,
        "product": order.product,
        "quantity": order.quantity,
        "total": order.total,
        "status": order.status,
        "placed_at": order.placed_at,
    }
