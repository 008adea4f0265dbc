"""How rows of the outbox are shown in the admin: ages, states, payloads. Knows values, and no request."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.utils import timezone
from django.utils.formats import number_format
from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from dispytch_integrations.outbox import State

__all__ = [
    "MOST_COUNTED",
    "Capped",
    "CappedPaginator",
    "ago",
    "badge",
    "breakable",
    "capped",
    "counted",
    "moment",
    "now_ms",
    "pre",
    "pretty_json",
    "shown_payload",
    "shown_relays",
    "state_name",
    "told_state",
]

MOST_COUNTED = 10_000
"""Up to how many rows are counted, and can be paged through: counting a million takes longer than anybody waits."""
_MOST_SHOWN = 65_536
"""Bytes of a payload that are shown."""


class Capped(int):
    """A count that stops at MOST_COUNTED; shown as "10,000+" where there are more."""

    def __str__(self) -> str:
        return f"{counted(MOST_COUNTED)}+" if self > MOST_COUNTED else super().__str__()


def counted(count: int) -> str:
    """A count as it is read: "10,000"."""
    return str(number_format(count, use_l10n=True, force_grouping=True))


def capped(queryset: QuerySet[Any]) -> Capped:
    """How many rows there are, if not more than MOST_COUNTED."""
    return Capped(queryset.order_by()[: MOST_COUNTED + 1].count())


class CappedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through the first MOST_COUNTED rows, and counts no more of them."""

    @cached_property
    def count(self) -> int:
        """How many rows there are, or one more than MOST_COUNTED."""
        return capped(self.object_list)  # type: ignore[arg-type]

    @cached_property
    def num_pages(self) -> int:
        """How many pages hold what was counted."""
        rows = max(1, min(int(self.count), MOST_COUNTED) - self.orphans)
        return -(-rows // self.per_page)


def now_ms() -> int:
    """The time here. The rows' times are the database's: ages are off by as much as the two clocks differ."""
    return time.time_ns() // 1_000_000


def ago(milliseconds: int) -> str:
    """A duration in the largest unit that fits: "0 s", "45 s", "12 min", "3 h", "8 d"."""
    seconds = max(milliseconds, 0) // 1000
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def moment(milliseconds: int) -> str:
    """A time in the project's time zone, with its name: "2026-11-25 20:59:03 UTC"."""
    return timezone.localtime(datetime.fromtimestamp(milliseconds / 1000, UTC)).strftime("%Y-%m-%d %H:%M:%S %Z")


def state_name(state: int, attempts: int) -> str:
    """ "waiting", "retrying", "dead", "sent"; of a newer version's state its number."""
    if state == State.WAITING:
        return "retrying" if attempts else "waiting"
    return {State.DEAD: "dead", State.SENT: "sent"}.get(State(state), str(state)) if state in _STATES else str(state)


_STATES = frozenset(int(state) for state in State)


def badge(name: str) -> SafeString:
    """The state's name, in its colour."""
    return format_html('<span class="outbox-state outbox-{}">{}</span>', name, name)


def breakable(name: str) -> SafeString:
    """A dotted name that may go on in the next line after a dot, a colon or a slash."""
    return format_html_join(mark_safe("<wbr>"), "{}", ((part,) for part in re.split(r"(?<=[.:/])", name)))


def told_state(name: str) -> str:
    """What a state means, for whoever is about to change it."""
    return {
        "waiting": "sent as soon as a relay can, which may be right now",
        "retrying": "failed before, and waiting for the next try",
        "dead": "given up, and nobody was told",
        "sent": "confirmed by the broker, and kept to be looked at",
    }.get(name, "written by a newer version")


def pre(text: str) -> SafeString:
    """Text in lines, as it is."""
    return format_html('<pre class="outbox-pre">{}</pre>', text)


def _plain(text: str) -> SafeString:
    return format_html("<span>{}</span>", text)


def pretty_json(text: str) -> SafeString:
    """Headers and properties, readable; what is no JSON as it is."""
    if text == "{}":
        return _plain("none")
    try:
        return pre(json.dumps(json.loads(text), indent=2, ensure_ascii=False, sort_keys=True))
    except ValueError:
        return pre(text)


def shown_payload(payload: bytes | None) -> SafeString:
    """A payload as JSON or text if it is one, else its first bytes in hexadecimal."""
    if payload is None:
        return _plain("none: a tombstone")
    size = f"{counted(len(payload))} bytes"
    beginning = payload[:_MOST_SHOWN]
    if len(payload) > _MOST_SHOWN:
        size += f", the first {counted(_MOST_SHOWN)} are shown"
    try:
        text = json.dumps(json.loads(payload), indent=2, ensure_ascii=False) if beginning == payload else ""
    except (ValueError, RecursionError):
        text = ""
    if not text:
        try:
            text = beginning.decode("utf-8", "strict" if beginning == payload else "ignore")
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() and not text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable():
            text = ""
    if not text and payload:
        beginning = payload[:1024]
        text = "\n".join(beginning[at : at + 32].hex(" ") for at in range(0, len(beginning), 32))
        size = f"{len(payload)} bytes, no text: the first {len(beginning)} in hexadecimal"
    return format_html("{}<p>{}</p>", pre(text), size)


def shown_relays(shards: Iterable[tuple[str | None, int]], now: int) -> list[dict[str, Any]]:
    """The relays that live, given each shard's owner and the end of its lease."""
    counts = Counter(owner for owner, until_ms in shards if owner is not None and until_ms >= now)
    return [{"name": name, "shards": count} for name, count in sorted(counts.items())]
