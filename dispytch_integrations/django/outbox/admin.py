"""The outbox in Django's admin: what waits, what has died and why, and the two things to do about it.

Nothing can be written here: events come from the project, and go by a relay. Who may see the list has the permission
"view"; the action "requeue" needs "change", "discard" needs "delete". Payloads are shown to users with the permission
`dispytch_outbox.view_payload` alone.

With several databases in DISPYTCH_OUTBOX the list shows the one that your router gives for OutboxEvent; look at
another with `manage.py dispytch outbox stats --database ALIAS`, or register a ModelAdmin of your own:

    class ArchivedEvent(OutboxEvent):
        class Meta:
            proxy = True

    @admin.register(ArchivedEvent)
    class ArchivedEventAdmin(OutboxEventAdmin):
        using = "archive"
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from dispytch_integrations.django.outbox._admin_chosen import Chosen
from dispytch_integrations.django.outbox._admin_filters import AttemptsFilter, BrokerFilter, StateFilter, TypeFilter
from dispytch_integrations.django.outbox._admin_shown import (
    CappedPaginator,
    ago,
    badge,
    breakable,
    capped,
    counted,
    moment,
    now_ms,
    pre,
    pretty_json,
    shown_payload,
    shown_relays,
    state_name,
    told_state,
)
from dispytch_integrations.django.outbox.models import OutboxEvent, OutboxShard
from dispytch_integrations.outbox import State

__all__ = ["OutboxEventAdmin"]

logger = logging.getLogger("dispytch_integrations.outbox")

_MOST_LISTED = 20
"""Rows that are listed before an action."""
_ERROR_LENGTH = 120
_NONE = "-"

# A model's fields have no types without Django's plugin.
_Event = Any
_Events = QuerySet[Any, Any]


@admin.register(OutboxEvent)
class OutboxEventAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Events in the outbox, the newest first. Counts no more than 10,000: a backlog of a million opens at once."""

    using: str | None = None
    """The database to look into; None: the one that the routers give."""

    list_display = ("event", "doing", "goes_to", "age")
    list_filter = (StateFilter, BrokerFilter, TypeFilter, AttemptsFilter)
    list_per_page = 50
    list_max_show_all = 500
    ordering = ("-pk",)
    search_fields = ("event_id",)
    search_help_text = "An event id, or else an ordering key; in full."
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = CappedPaginator
    actions = ("requeue", "discard")
    change_list_template = "admin/dispytch_outbox/outboxevent/change_list.html"
    change_form_template = "admin/dispytch_outbox/outboxevent/change_form.html"
    confirm_template = "admin/dispytch_outbox/outboxevent/confirm.html"

    fieldsets = (
        (None, {"fields": ("type", "event_id", "state_shown", "stored_at", "state_since")}),
        ("Where it goes", {"fields": ("broker", "destination", "ordering_key", "content_type")}),
        ("Delivery", {"fields": ("attempts", "next_try_at", "whole_error")}),
        ("Message", {"fields": ("shown_headers", "shown_properties", "shown_payload")}),
        ("For relays", {"classes": ("collapse",), "fields": ("id", "lane", "shard", "format")}),
    )

    class Media:
        """Colours of states, light and dark."""

        css: ClassVar = {"all": ("dispytch_outbox/admin.css",)}

    # -- who may do what -----------------------------------------------------------------------------------------

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Events come from the project."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """What was stored is what is sent."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """There is an action for it, which says what it means."""
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Who may requeue or discard sees what; so does who has the permission to view."""
        return any(self._may(request, action) for action in ("view", "change", "delete"))

    def has_module_permission(self, request: HttpRequest) -> bool:
        """Is the outbox on the admin's first page?"""
        return self.has_view_permission(request)

    def has_requeue_permission(self, request: HttpRequest) -> bool:
        """Needs `dispytch_outbox.change_outboxevent`."""
        return self._may(request, "change")

    def has_discard_permission(self, request: HttpRequest) -> bool:
        """Needs `dispytch_outbox.delete_outboxevent`."""
        return self._may(request, "delete")

    def _may(self, request: HttpRequest, action: str) -> bool:
        return bool(_user_of(request).has_perm(f"dispytch_outbox.{action}_outboxevent"))

    # -- the list ------------------------------------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> _Events:
        """Without payloads: those of a page of events may be many megabytes."""
        rows: _Events = super().get_queryset(request).using(self.using).defer("payload")  # pyright: ignore[reportUnknownVariableType]
        return rows

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """By event id, which has an index; if there is none such, by ordering key, which reads the table."""
        term = search_term.strip()
        if not term:
            return queryset, False
        by_id = queryset.filter(event_id=term)
        return (by_id, False) if by_id.exists() else (queryset.filter(ordering_key=term), False)

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """The list, with the state of the outbox above it."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {"title": "Events in the outbox", "summary": self._summary(request), **(extra_context or {})}
        return super().changelist_view(request, context)

    def _summary(self, request: HttpRequest) -> dict[str, Any]:
        events, now = self.get_queryset(request), now_ms()
        summary: dict[str, Any] = {}
        for state in State:
            rows = events.filter(state=state)
            summary[state.name.lower()] = capped(rows)
            oldest = rows.order_by("pk").values_list("created_ms", flat=True).first()
            told = "" if oldest is None else f"the oldest was stored {ago(now - oldest)} ago"
            summary[f"{state.name.lower()}_told"] = told
        leases = list(
            OutboxShard.objects.using(self.using or events.db).values_list("owner", "until_ms", "heartbeat_ms")
        )
        summary["relays"] = shown_relays([lease[:2] for lease in leases], now)
        heartbeats = [lease[2] for lease in leases if lease[2]]
        if not heartbeats:
            summary["relay_told"] = "none has ever run: start manage.py dispytch relay"
        elif not summary["relays"]:
            summary["relay_told"] = f"the last one was seen {ago(now - max(heartbeats))} ago"
        summary["empty"] = not (summary["waiting"] or summary["dead"] or summary["sent"])
        summary["nobody"] = not summary["relays"] and summary["waiting"] > 0
        return summary

    @admin.display(description="Event", ordering="pk")
    def event(self, row: _Event) -> SafeString:
        """Type and id."""
        return format_html('{}<span class="outbox-id">{}</span>', breakable(row.type), row.event_id)

    @admin.display(description="State")
    def doing(self, row: _Event) -> SafeString:
        """State, attempts, when it is tried again, and the last error: shortened, in full on its page."""
        attempts = [f"{row.attempts} {'attempt' if row.attempts == 1 else 'attempts'}"] if row.attempts else []
        told = _next_try(row)
        return format_html(
            '{} <span class="outbox-attempts">{}</span>{}',
            badge(state_name(row.state, row.attempts)),
            ", ".join([*attempts, *([f"next {told}"] if told else [])]),
            format_html('<span class="outbox-error">{}</span>', _short(row.last_error, _ERROR_LENGTH))
            if row.last_error
            else "",
        )

    @admin.display(description="Destination, key")
    def goes_to(self, row: _Event) -> SafeString:
        """Destination, the broker where it is not "default", and the ordering key."""
        broker = "" if row.broker == "default" else f"{row.broker}: "
        key = "no key" if row.ordering_key is None else f"key {_short(row.ordering_key)}"
        return format_html(
            '<span class="outbox-code">{}{}</span><span class="outbox-id">{}</span>',
            *(broker, breakable(_short(row.destination)), key),
        )

    @admin.display(description="Age", ordering="pk")
    def age(self, row: _Event) -> SafeString:
        """Since it was stored; the time itself on hovering."""
        return format_html('<span title="{}">{}</span>', moment(row.created_ms), ago(now_ms() - row.created_ms))

    # -- one event -----------------------------------------------------------------------------------------------

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        """All of them, those that are computed among them."""
        return tuple(field for _, options in self.get_fieldsets(request, obj) for field in options["fields"])

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Without the payload for those who may not see it: they are told what is missing to them."""
        fieldsets: Any = self.fieldsets
        if _user_of(request).has_perm("dispytch_outbox.view_payload"):
            return fieldsets
        return [
            (name, {**options, "fields": tuple(_HIDDEN.get(field, field) for field in options["fields"])})
            for name, options in fieldsets
        ]

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """One event, with the two things that can be done to it: both are the list's actions."""
        actions = {
            "may_requeue": self.has_requeue_permission(request),
            "may_discard": self.has_discard_permission(request),
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
        }
        return super().change_view(request, object_id, form_url, {**actions, **(extra_context or {})})

    @admin.display(description="State")
    def state_shown(self, row: _Event) -> SafeString:
        """In colour."""
        return badge(state_name(row.state, row.attempts))

    @admin.display(description="Stored")
    def stored_at(self, row: _Event) -> str:
        """In the project's time zone."""
        return f"{moment(row.created_ms)}, {ago(now_ms() - row.created_ms)} ago"

    @admin.display(description="In this state since")
    def state_since(self, row: _Event) -> str:
        """Of one that is dead or sent, or has failed."""
        return f"{moment(row.state_ms)}, {ago(now_ms() - row.state_ms)} ago" if row.state_ms else _NONE

    @admin.display(description="Next try")
    def next_try_at(self, row: _Event) -> str:
        """In the project's time zone, and how long yet."""
        told = _next_try(row)
        return _NONE if not told else told if told == "now" else f"{moment(row.next_try_ms)}, {told}"

    @admin.display(description="Last error")
    def whole_error(self, row: _Event) -> str:
        """What the broker or the database said; never a payload."""
        return pre(row.last_error) if row.last_error else _NONE

    @admin.display(description="Headers")
    def shown_headers(self, row: _Event) -> SafeString:
        """As JSON, in lines."""
        return pretty_json(row.headers)

    @admin.display(description="Properties")
    def shown_properties(self, row: _Event) -> SafeString:
        """As JSON, in lines."""
        return pretty_json(row.properties)

    @admin.display(description="Payload")
    def shown_payload(self, row: _Event) -> SafeString:
        """As it is stored: with a codec, what that has made of it."""
        return shown_payload(None if row.payload is None else bytes(row.payload))

    @admin.display(description="Payload")
    def hidden_payload(self, row: _Event) -> str:
        """For those who may not see it."""
        return "Not shown: your account does not have the permission dispytch_outbox.view_payload."

    # -- actions -------------------------------------------------------------------------------------------------

    @admin.action(description="Requeue: deliver again", permissions=["requeue"])
    def requeue(self, request: HttpRequest, queryset: _Events) -> HttpResponse | None:
        """Dead events wait again, with no attempt counted; those that wait for their next try are tried at once.

        Asks first when some were sent: they would be delivered a second time.
        """
        chosen = Chosen(request, queryset)
        if chosen.counts["sent"] and not chosen.confirmed:
            return self._ask(
                request,
                chosen,
                action="requeue",
                title="Requeue events",
                question=f"{_events(chosen.total)} selected:",
                warning=f"{counted(chosen.counts['sent'])} of them sent before: consumers get those a second time.",
                button="Yes, requeue",
            )
        again = chosen.rows.filter(state__in=(State.DEAD, State.SENT))
        retried = chosen.rows.filter(state=State.WAITING, attempts__gt=0)
        fresh = {"state": State.WAITING, "state_ms": 0, "attempts": 0, "next_try_ms": 0}
        sooner, count = retried.update(**fresh), again.update(**fresh)
        if count:
            self.message_user(request, f"{_events(count)} requeued.", messages.SUCCESS)
        if sooner:
            told = f"{_events(sooner)} that had failed will be tried at once."
            self.message_user(request, told, messages.SUCCESS)
        if chosen.counts["waiting"]:
            left = chosen.counts["waiting"]
            told = f"{_events(left)} left alone: waiting already, and not failed."
            self.message_user(request, told, messages.WARNING)
        return None

    @admin.action(description="Discard: delete, unsent", permissions=["discard"])
    def discard(self, request: HttpRequest, queryset: _Events) -> HttpResponse | None:
        """Delete events after a question that says what that means."""
        chosen = Chosen(request, queryset)
        if not chosen.confirmed:
            waiting = chosen.counts["waiting"] + chosen.counts["retrying"]
            return self._ask(
                request,
                chosen,
                action="discard",
                title="Discard events",
                question=f"{_events(chosen.total)} would be deleted, and cannot be brought back:",
                warning=f"{counted(waiting)} of them still to be sent. What is discarded is never delivered."
                if waiting
                else "",
                button="Yes, discard",
            )
        count, _ = chosen.rows.delete()
        logger.warning("user %s discarded %d events of the outbox in the admin", _user_of(request).pk, count)
        self.message_user(request, f"{_events(count)} discarded.", messages.SUCCESS)
        return None

    def _ask(self, request: HttpRequest, chosen: Chosen, *, action: str, **told: str) -> HttpResponse:
        now = now_ms()
        context: dict[str, Any] = {
            **self.admin_site.each_context(request),
            **told,
            "opts": self.opts,  # pyright: ignore[reportUnknownMemberType]
            "media": self.media,
            "action": action,
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
            "lines": [
                {"state": state, "count": counted(count), "told": told_state(state)}
                for state, count in chosen.counts.items()
                if count
            ],
            "rows": [
                {
                    "type": row.type,
                    "event_id": row.event_id,
                    "state": state_name(row.state, row.attempts),
                    "destination": f"{row.broker}: {_short(row.destination)}",
                    "key": _NONE if row.ordering_key is None else _short(row.ordering_key),
                    "age": ago(now - row.created_ms),
                }
                for row in chosen.rows.order_by("pk")[:_MOST_LISTED]
            ],
            "more": counted(max(chosen.total - _MOST_LISTED, 0)),
            "chosen": request.POST.getlist(ACTION_CHECKBOX_NAME),
            "select_across": request.POST.get("select_across", "0"),
            "last": chosen.last,
        }
        return TemplateResponse(request, self.confirm_template, context)


_HIDDEN = {"shown_payload": "hidden_payload"}


def _user_of(request: HttpRequest) -> Any:
    return request.user


def _next_try(row: _Event) -> str:
    """Of one that has failed and waits: "in 3 min", "now"; of others nothing."""
    if row.state != State.WAITING or not row.next_try_ms:
        return ""
    left = row.next_try_ms - now_ms()
    return f"in {ago(left)}" if left > 0 else "now"


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _events(count: int) -> str:
    return "1 event" if count == 1 else f"{counted(count)} events"
