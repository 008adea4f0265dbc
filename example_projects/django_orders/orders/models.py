"""What the shop keeps."""

from __future__ import annotations

from decimal import Decimal

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models

__all__ = ["PRICES", "Cancellation", "FailedEvent", "Order", "Product"]


class Product(models.TextChoices):
    """What the shop sells."""

    BEANS = "Espresso beans", "Espresso beans"
    KETTLE = "Pour-over kettle", "Pour-over kettle"
    MUG = "Stoneware mug", "Stoneware mug"
    FILTERS = "Paper filters", "Paper filters"


PRICES = {
    Product.BEANS: Decimal("24.00"),
    Product.KETTLE: Decimal("59.00"),
    Product.MUG: Decimal("14.50"),
    Product.FILTERS: Decimal("6.90"),
}
"""Each product's price in euros."""


class Order(models.Model):
    """Somebody wants something."""

    customer = models.CharField(max_length=60)
    product = models.CharField(max_length=40, choices=Product)
    quantity = models.PositiveSmallIntegerField(default=1, validators=[MinValueValidator(1), MaxValueValidator(99)])
    total = models.DecimalField(max_digits=8, decimal_places=2, editable=False)
    placed_at = models.DateTimeField(auto_now_add=True)
    packed_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        """The newest first."""

        ordering = ("-pk",)

    def __str__(self) -> str:
        return f"{self.pk}: {self.customer}, {self.quantity} {self.product}"

    @property
    def status(self) -> str:
        """ "placed", "packed" or "cancelled"."""
        if hasattr(self, "cancellation"):
            return "cancelled"
        return "placed" if self.packed_at is None else "packed"


class Cancellation(models.Model):
    """An order is not wanted any more. The database sees to it that this happens once."""

    order = models.OneToOneField(Order, on_delete=models.CASCADE, related_name="cancellation")
    reason = models.CharField(max_length=60, default="changed my mind")
    cancelled_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.order}: {self.reason}"


class FailedEvent(models.Model):
    """An event that no broker confirmed after its transaction was committed; written by a receiver in `signals`."""

    event_id = models.CharField(max_length=64)
    type = models.CharField(max_length=200)
    body = models.TextField()
    error = models.TextField()
    failed_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        """The newest first."""

        ordering = ("-pk",)

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"
