"""The archive has a database of its own."""

from __future__ import annotations

from typing import Any

from django.db.models import Model

__all__ = ["ArchiveRouter"]


class ArchiveRouter:
    """ArchivedOrder lives in the database "archive", all else in "default"."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return "archive" if model.__name__ == "ArchivedOrder" else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, model_name: str | None = None, **hints: Any) -> bool | None:
        if app_label != "shop":
            return None
        return (db == "archive") == (model_name == "archivedorder")
