"""What a relay says of a message and of an error: to logs, and to the column `last_error`. Never a payload."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from dispytch_integrations.errors import DispytchError
from dispytch_integrations.message import log_fields
from dispytch_integrations.outbox.record import Record, message_of

__all__ = ["extra", "first_line", "told"]

_ERROR_LENGTH = 500
_NAMED = re.compile(r"^<Message .*?(?: bytes|tombstone)> ")
"""How an error names its message, which a log line and the table do in their own way."""


def told(error: Exception | None) -> str:
    """What happened, for logs and `last_error`: other people's errors may repeat a payload, so their type alone."""
    if isinstance(error, DispytchError):
        return _NAMED.sub("", str(error))[:_ERROR_LENGTH]
    return type(error).__name__


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:_ERROR_LENGTH]


_TRACING = re.compile(r"traceparent|tracestate|correlation[-_]?id|request[-_]?id", re.IGNORECASE)
"""Headers by which a log line is found from the request that made the event."""


def extra(record: Record) -> dict[str, Any]:
    found = log_fields(record.type, record.event_id, record.broker, record.destination)
    if _TRACING.search(record.headers) is not None:
        with suppress(Exception):  # A row that cannot be read says so elsewhere.
            headers = message_of(record, _Unread()).headers
            found |= {name: str(value) for name, value in headers.items() if _TRACING.fullmatch(name)}
    return found


class _Unread:
    """A codec for who looks at headers alone."""

    def encode(self, payload: bytes) -> bytes:
        return payload

    def decode(self, stored: bytes) -> bytes:
        return stored
