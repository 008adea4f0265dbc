"""What somebody has ticked in the outbox's admin, counted by state."""

from __future__ import annotations

from collections import Counter
from typing import Any

from django.db.models import Count, Max, Q, QuerySet
from django.http import HttpRequest

from dispytch_integrations.django.outbox._admin_shown import state_name
from dispytch_integrations.outbox import State

__all__ = ["Chosen"]


class Chosen:
    """The rows that an action is for; once it was asked about them, none that came after the question."""

    def __init__(self, request: HttpRequest, queryset: QuerySet[Any, Any]) -> None:
        self.confirmed = request.POST.get("confirmed") == "yes"
        last = request.POST.get("last", "")
        if self.confirmed and last.isdecimal():
            self.last = int(last)
        else:
            self.last = queryset.aggregate(last=Max("pk"))["last"] or 0
        self.rows = queryset.order_by().filter(pk__lte=self.last)
        # In the order in which they are told.
        self.counts: Counter[str] = Counter(waiting=0, retrying=0, dead=0, sent=0)
        retried = Count("pk", filter=Q(attempts__gt=0))
        for state, rows, failed in (
            self.rows.values("state").annotate(n=Count("pk"), r=retried).values_list("state", "n", "r")
        ):
            if state == State.WAITING:
                self.counts.update(waiting=rows - failed, retrying=failed)
            else:
                self.counts[state_name(state, 0)] = rows
        self.total = self.counts.total()
