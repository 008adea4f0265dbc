"""What gunicorn and other WSGI servers serve: brokers are connected at the first event. They have no live page."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_projects.django_orders.shop.settings")

application = get_wsgi_application()
