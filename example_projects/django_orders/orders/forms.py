"""What clients may send.

Only the stubs of Django know forms and admins with type arguments, hence the ignores.
"""

from __future__ import annotations

from django import forms

from example_projects.django_orders.orders.models import Cancellation, Order

__all__ = ["CancellationForm", "OrderForm"]


class OrderForm(forms.ModelForm):  # type: ignore[type-arg]
    """To place an order."""

    class Meta:
        """The rest of an order is the shop's."""

        model = Order
        fields = ("customer", "product", "quantity")


class CancellationForm(forms.ModelForm):  # type: ignore[type-arg]
    """To cancel one."""

    class Meta:
        """The order is in the URL."""

        model = Cancellation
        fields = ("reason",)
