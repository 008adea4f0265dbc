"""DATABASE_URL, for the two databases that the example is tried on; dj-database-url knows all."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

__all__ = ["database_of"]


def database_of(url: str) -> dict[str, Any]:
    """An entry of DATABASES: "sqlite:///relative.db", "sqlite:////absolute.db", "postgresql://user:pw@host:5432/name".

    Raises ImproperlyConfigured for other URLs, without repeating them: they hold passwords.
    """
    read = urlsplit(url)
    name = unquote(read.path.removeprefix("/"))
    if read.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": name,
            # Web server and worker write at the same time: readers go on, and writers wait for each other.
            "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL"},
        }
    if read.scheme in ("postgresql", "postgres"):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": name,
            "USER": unquote(read.username or ""),
            "PASSWORD": unquote(read.password or ""),
            "HOST": read.hostname or "",
            "PORT": str(read.port or ""),
        }
    raise ImproperlyConfigured("DATABASE_URL is sqlite:///db.sqlite3 or postgresql://user:password@host:5432/name")
