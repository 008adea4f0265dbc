"""What goes over HTTP: orders as clients send and see them."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

__all__ = ["CATALOGUE", "Cancellation", "NewOrder", "Order", "Product", "Status"]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60)]


class Product(StrEnum):
    """What the shop sells."""

    BEANS = "Espresso beans"
    KETTLE = "Pour-over kettle"
    MUG = "Stoneware mug"
    FILTERS = "Paper filters"


CATALOGUE = {
    Product.BEANS: Decimal("24.00"),
    Product.KETTLE: Decimal("59.00"),
    Product.MUG: Decimal("14.50"),
    Product.FILTERS: Decimal("6.90"),
}
"""Each product's price in euros."""


class Status(StrEnum):
    """How an order is doing."""

    PLACED = "placed"
    CANCELLED = "cancelled"


class NewOrder(BaseModel):
    """What a client sends to place an order."""

    customer: Text
    product: Product
    quantity: int = Field(1, ge=1, le=99)


class Cancellation(BaseModel):
    """What a client sends to cancel one."""

    reason: Text = "changed my mind"


class Order(NewOrder):
    """An order as the shop keeps it."""

    id: int
    total: Decimal
    status: Status = Status.PLACED
    placed_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
