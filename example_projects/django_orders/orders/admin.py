"""Orders in the admin: what is placed or cancelled here is told as well, after the admin's own transaction."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from example_projects.django_orders.orders import services
from example_projects.django_orders.orders.models import Cancellation, FailedEvent, Order

__all__ = ["CancellationInline", "FailedEventAdmin", "OrderAdmin"]


class CancellationInline(admin.StackedInline):  # type: ignore[type-arg]
    """Adding one cancels the order; its signal makes the event."""

    model = Cancellation
    extra = 0
    can_delete = False


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Orders, and what can be done with them."""

    list_display = ("id", "customer", "product", "quantity", "total", "status")
    list_display_links = ("id", "customer")
    list_filter = ("product",)
    date_hierarchy = "placed_at"
    list_select_related = ("cancellation",)
    search_fields = ("customer",)
    inlines = (CancellationInline,)
    actions = ("cancel",)

    def get_readonly_fields(self, request: HttpRequest, obj: Order | None = None) -> tuple[str, ...]:
        """What was placed stays as it was told."""
        return ("total", "placed_at", "packed_at") if obj is None else self._placed

    _placed = ("customer", "product", "quantity", "total", "placed_at", "packed_at")

    def has_delete_permission(self, request: HttpRequest, obj: Order | None = None) -> bool:
        """Orders are cancelled: others have heard of them."""
        return False

    def save_model(self, request: HttpRequest, obj: Order, form: Any, change: bool) -> None:
        """A new order is placed, by the same function as over HTTP."""
        if change:
            super().save_model(request, obj, form, change)
        else:
            services.place(obj)

    @admin.action(description="Cancel selected orders")
    def cancel(self, request: HttpRequest, queryset: QuerySet[Order]) -> None:
        """One by one: `bulk_create` would send no signals, and so no events."""
        orders = queryset.filter(cancellation=None)
        for order in orders:
            Cancellation.objects.get_or_create(order=order, defaults={"reason": "cancelled by the shop"})
        self.message_user(request, f"{len(orders)} cancelled.", messages.SUCCESS)


@admin.register(FailedEvent)
class FailedEventAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """What could not be told. To be looked at, not to be written."""

    list_display = ("failed_at", "type", "event_id", "error")
    list_filter = ("type", "failed_at")
    readonly_fields = ("failed_at", "type", "event_id", "body", "error")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """They come by themselves."""
        return False
