"""Where everything is."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from example_projects.django_orders.live import views as live

admin.site.site_header = "Orders"
admin.site.site_title = "Orders"

urlpatterns = [
    path("", live.page, name="page"),
    path("live", live.stream, name="stream"),
    path("outbox/relay", live.relay, name="relay"),
    path("", include("example_projects.django_orders.orders.urls")),
    path("admin/", admin.site.urls),
]
