"""The HTTP API."""

from __future__ import annotations

from django.urls import path

from example_projects.django_orders.orders.views import CancellationView, OrdersView, OrderView

urlpatterns = [
    path("orders", OrdersView.as_view(), name="orders"),
    path("orders/<int:order_id>", OrderView.as_view(), name="order"),
    path("orders/<int:order_id>/cancellation", CancellationView.as_view(), name="cancellation"),
]
