"""Routes of the shop."""

from __future__ import annotations

from django.urls import path

from tests.django.project.shop import views

urlpatterns = [
    path("emit/<int:number>", views.emit_view),
    path("aemit/<int:number>", views.aemit_view),
    path("commit/<int:number>", views.commit_view),
    path("acommit/<int:number>", views.acommit_view),
    path("process", views.process_view),
]
