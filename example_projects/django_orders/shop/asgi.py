"""What uvicorn and other ASGI servers serve: brokers are connected before the first request, flushed after the last."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_projects.django_orders.shop.settings")

from django.conf import settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

from dispytch_integrations.django.asgi import get_asgi_application
from example_projects.django_orders.live.asgi import LivePage

# In your project this line is all: application = get_asgi_application()
application: Any = LivePage(get_asgi_application())
if settings.DEBUG:
    # What runserver does by itself: the admin's styles. In production the web server has them, or whitenoise.
    application = ASGIStaticFilesHandler(application)
