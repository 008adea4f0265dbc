"""The project's settings for the demo: what has to be kept goes into its temporary folder."""

from __future__ import annotations

import os
from pathlib import Path

from example_projects.django_orders.shop.databases import database_of
from example_projects.django_orders.shop.settings import *  # noqa: F403

_FOLDER = Path(os.environ["DEMO_FOLDER"])

DATABASES = {"default": database_of(f"sqlite:///{_FOLDER / 'db.sqlite3'}")}  # pyright: ignore[reportConstantRedefinition]

if OUTBOX and not DISPYTCH_OUTBOX["EMBEDDED"]:  # noqa: F405
    # SQLite wakes nobody; somebody is looking. With PostgreSQL, NOTIFY is the better answer.
    DISPYTCH_OUTBOX["POLL_INTERVAL"] = 0.1  # noqa: F405
    # The page starts and stops the relay.
    DEMO_RELAY_LOG = _FOLDER / "relay.log"

# The terminal is for what goes wrong; that somebody asked for what is not there is no such thing.
LOGGING = {"version": 1, "disable_existing_loggers": False, "loggers": {"django.request": {"level": "ERROR"}}}

# Celery's queues are files there: nothing else has to be installed for its worker.
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "data_folder_in": str(_FOLDER / "queue"),
    "data_folder_out": str(_FOLDER / "queue"),
    "control_folder": str(_FOLDER / "control"),
    "polling_interval": 0.1,
}
