"""The filters of the outbox's admin: none of them reads the whole table to say what it offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from django.conf import settings
from django.contrib import admin
from django.http import HttpRequest

from dispytch_integrations.outbox import State

__all__ = ["AttemptsFilter", "BrokerFilter", "StateFilter", "TypeFilter"]

_SAMPLE = 500
"""Rows at each end of the table whose types and brokers are offered."""


class StateFilter(admin.SimpleListFilter):
    """One of three states, and of those that wait the ones that have failed."""

    title = "state"
    parameter_name = "state"

    _states: ClassVar[dict[str, dict[str, Any]]] = {
        "waiting": {"state": State.WAITING},
        "retrying": {"state": State.WAITING, "attempts__gt": 0},
        "dead": {"state": State.DEAD},
        "sent": {"state": State.SENT},
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """What is offered."""
        return [
            ("waiting", "Waiting"),
            ("retrying", "Waiting, failed before"),
            ("dead", "Dead"),
            ("sent", "Sent and kept"),
        ]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        """The chosen rows."""
        found = self._states.get(self.value() or "")
        return queryset if found is None else queryset.filter(**found)


class AttemptsFilter(admin.SimpleListFilter):
    """Has it failed?"""

    title = "attempts"
    parameter_name = "attempts"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """What is offered."""
        return [("some", "Failed at least once"), ("none", "Never failed")]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        """The chosen rows."""
        match self.value():
            case "some":
                return queryset.filter(attempts__gt=0)
            case "none":
                return queryset.filter(attempts=0)
            case _:
                return queryset


class _SampledFilter(admin.SimpleListFilter):
    """Offers the values of the oldest and the newest rows: looking at all of a million takes too long."""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """What is offered."""
        column = self.parameter_name or ""
        rows = model_admin.get_queryset(request).values_list(column, flat=True)
        found = {*rows.order_by("pk")[:_SAMPLE], *rows.order_by("-pk")[:_SAMPLE], *self.known()}
        found.update(value for value in (request.GET.get(column),) if value)
        return [(value, value) for value in sorted(found)]

    def known(self) -> Sequence[str]:
        """What is offered, although no row that was looked at has it."""
        return ()

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        """The chosen rows."""
        value = self.value()
        return queryset if value is None else queryset.filter(**{self.parameter_name or "": value})


class TypeFilter(_SampledFilter):
    """By type."""

    title = "type"
    parameter_name = "type"


class BrokerFilter(_SampledFilter):
    """By the broker's alias; those of DISPYTCH are always offered."""

    title = "broker"
    parameter_name = "broker"

    def known(self) -> Sequence[str]:
        """What is offered, although no row that was looked at has it."""
        return list(getattr(settings, "DISPYTCH", {}))
