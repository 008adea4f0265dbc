"""What the shop keeps. Alembic finds the outbox's tables among these, and writes their migration as any other."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import DateTime, Numeric, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dispytch_integrations.sqlalchemy import outbox_tables
from example_projects.fastapi_orders.schemas import Status

__all__ = ["Base", "OrderRow"]


class Base(DeclarativeBase):
    """All tables of the shop."""


outbox_tables(Base.metadata)


class OrderRow(Base):
    """Somebody wants something."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(String(60))
    product: Mapped[str] = mapped_column(String(40))
    quantity: Mapped[int]
    total: Mapped[Decimal] = mapped_column(Numeric(8, 2))
    status: Mapped[str] = mapped_column(String(10), default=Status.PLACED)
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=lambda: datetime.now(UTC))
