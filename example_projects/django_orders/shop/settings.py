"""Settings. What differs between a laptop and production comes from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from example_projects.django_orders.shop.databases import database_of
from example_projects.shop_demo.transports import EXCHANGE, transport_of

BASE_DIR = Path(__file__).resolve().parent.parent

DEBUG = os.environ.get("DJANGO_DEBUG", "1") == "1"
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "not a secret: for the example alone")
ALLOWED_HOSTS = os.environ.get("DJANGO_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")

# -- events ------------------------------------------------------------------------------------------------------------

# Without DISPYTCH_URL=kafka://localhost:9092 events stay in this process: `manage.py check` warns where DEBUG is off.
_EVENTS: dict[str, Any] = {"URL": os.environ.get("DISPYTCH_URL") or "memory://", "SOURCE": "/shop"}
if transport_of(_EVENTS["URL"]) == "rabbitmq":
    _EVENTS["EXCHANGES"] = {EXCHANGE: "topic"}  # Declared at start.

DISPYTCH = {"default": _EVENTS}

# With OUTBOX=1 what `emit_on_commit` and `@emits` tell is stored in the transaction that made it true, and relayed by
# `manage.py dispytch relay`. Neither web server nor worker connects to a broker then.
OUTBOX = os.environ.get("OUTBOX", "").lower() in ("1", "true", "yes")
if OUTBOX:
    DISPYTCH_OUTBOX: dict[str, Any] = {
        # No other process reaches what is in this one's memory.
        "EMBEDDED": transport_of(_EVENTS["URL"]) == "memory",
        # To be looked at in the admin; by default a row is deleted once the broker has confirmed it.
        "KEEP_SENT": 3600,
    }

# -- the rest is Django as you know it ---------------------------------------------------------------------------------

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "dispytch_integrations.django",
    *(["dispytch_integrations.django.outbox"] if OUTBOX else []),
    "example_projects.django_orders.orders",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    # Gives views `request.emitter`, and says at a server's start what is wrong with DISPYTCH.
    "dispytch_integrations.django.middleware.EmitterMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

ROOT_URLCONF = "example_projects.django_orders.shop.urls"
ASGI_APPLICATION = "example_projects.django_orders.shop.asgi.application"
WSGI_APPLICATION = "example_projects.django_orders.shop.wsgi.application"

DATABASES = {"default": database_of(os.environ.get("DATABASE_URL") or f"sqlite:///{BASE_DIR / 'db.sqlite3'}")}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Without CELERY_BROKER_URL=redis://localhost:6379/1 tasks run where they are asked for.
CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL")
CELERY_TASK_ALWAYS_EAGER = not CELERY_BROKER_URL
CELERY_TASK_IGNORE_RESULT = True

STATIC_URL = "static/"
LANGUAGE_CODE = "en"
TIME_ZONE = os.environ.get("TZ") or "UTC"
USE_TZ = True
