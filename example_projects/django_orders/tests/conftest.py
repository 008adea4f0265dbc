"""These tests need the project's own settings: under others, as in a run of the whole repository, they are left out."""

from __future__ import annotations

import os

if os.environ.get("DJANGO_SETTINGS_MODULE") != "example_projects.django_orders.shop.settings":
    collect_ignore_glob = ["test_*.py"]
