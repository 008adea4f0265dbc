"""Routes of the shop."""

from __future__ import annotations

from django.urls import include, path

from dispytch_integrations.django.health import health_urls
from tests.django.project.shop import views

urlpatterns = [
    path("emit/<int:number>", views.emit_view),
    path("aemit/<int:number>", views.aemit_view),
    path("commit/<int:number>", views.commit_view),
    path("acommit/<int:number>", views.acommit_view),
    path("process", views.process_view),
    path("health/", include(health_urls(outbox=True))),
    path("strict/", include(health_urls(ready_on="broker", timeout=0.5))),
]
