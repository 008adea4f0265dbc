#!/usr/bin/env python
"""Django's command line: `python example_projects/django_orders/manage.py dispytch events`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Run a command."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_projects.django_orders.shop.settings")
    # A project of your own has its packages beside this file; here they are imported from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
