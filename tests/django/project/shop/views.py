"""Views that emit in every way; an order of a number is one event of that number."""

from __future__ import annotations

import os
import threading
from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse

from dispytch_integrations.django import aemit_on_commit, emit_on_commit
from tests.django.project.shop.events import OrderPlaced
from tests.django.project.shop.models import Order


def emit_view(request: Any, number: int) -> HttpResponse:
    request.emitter.emit(OrderPlaced(number=number))
    return HttpResponse(status=201)


async def aemit_view(request: Any, number: int) -> HttpResponse:
    await request.emitter.aemit(OrderPlaced(number=number))
    return HttpResponse(status=201)


def commit_view(request: HttpRequest, number: int) -> HttpResponse:
    with transaction.atomic():
        Order.objects.create(customer=f"customer {number}")
        event_id = emit_on_commit(OrderPlaced(number=number))
    return HttpResponse(event_id, status=201)


async def acommit_view(request: HttpRequest, number: int) -> HttpResponse:
    await sync_to_async(Order.objects.create)(customer=f"customer {number}")
    await aemit_on_commit(OrderPlaced(number=number))
    return HttpResponse(status=201)


def process_view(request: HttpRequest) -> JsonResponse:
    """What this worker is: for tests of servers."""
    page = JsonResponse({"pid": os.getpid(), "threads": sorted(thread.name for thread in threading.enumerate())})
    page["Content-Length"] = len(page.content)  # Else some servers send it in chunks.
    return page
