"""Settings: memory and SQLite, unless the environment names a broker (TEST_BROKER) or another database (TEST_DATABASE).

TEST_DATABASE: "postgresql" or "mariadb": those of this machine, or TEST_DATABASE_HOST and TEST_DATABASE_PORT, USER and
PASSWORD. TEST_DATABASE_PREFIX: what the databases' names begin with. TEST_FOLDER: where SQLite's files are.

TEST_OUTBOX: DISPYTCH_OUTBOX as JSON; with it the outbox is installed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SECRET_KEY = "only for tests"
DEBUG = True
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "tests.django.project.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "dispytch_integrations.django",
    "tests.django.project.shop",
    *(["dispytch_integrations.django.outbox"] if "TEST_OUTBOX" in os.environ else []),
]
MIDDLEWARE = ["dispytch_integrations.django.middleware.EmitterMiddleware"]

DISPYTCH = {
    "default": {
        "URL": os.environ.get("TEST_BROKER", "memory://"),
        "SHUTDOWN_TIMEOUT": 10,
    },
}
if "TEST_OUTBOX" in os.environ:
    DISPYTCH_OUTBOX = json.loads(os.environ["TEST_OUTBOX"])


def _database(name: str) -> dict[str, Any]:
    kind = os.environ.get("TEST_DATABASE", "sqlite")
    host = os.environ.get("TEST_DATABASE_HOST", "127.0.0.1")
    port = os.environ.get("TEST_DATABASE_PORT", "")
    prefix = os.environ.get("TEST_DATABASE_PREFIX", "dispytch")
    if kind == "postgresql":
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": f"{prefix}_{name}",
            "USER": os.environ.get("TEST_DATABASE_USER", "postgres"),
            "PASSWORD": os.environ.get("TEST_DATABASE_PASSWORD", ""),
            "HOST": host,
            "PORT": port or "5432",
        }
    if kind == "mariadb":
        return {
            "ENGINE": "django.db.backends.mysql",
            "NAME": f"{prefix}_{name}",
            "USER": os.environ.get("TEST_DATABASE_USER", "root"),
            "PASSWORD": os.environ.get("TEST_DATABASE_PASSWORD", ""),
            "HOST": host,
            "PORT": port or "3306",
        }
    folder = Path(os.environ.get("TEST_FOLDER") or tempfile.gettempdir())
    return {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / f"{name}.sqlite3"}


if os.environ.get("TEST_DATABASE") == "mariadb":
    import pymysql  # type: ignore[import-untyped]

    pymysql.install_as_MySQLdb()

DATABASES = {"default": _database("default"), "archive": _database("archive")}
DATABASE_ROUTERS = ["tests.django.project.shop.routers.ArchiveRouter"]
