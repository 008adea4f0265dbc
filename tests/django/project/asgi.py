"""What ASGI servers serve: `application` has our lifespan; `plain` is Django's own, which has none."""

from __future__ import annotations

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django.project.settings")

from django.core import asgi

from dispytch_integrations.django.asgi import get_asgi_application

application = get_asgi_application()
plain = asgi.get_asgi_application()
