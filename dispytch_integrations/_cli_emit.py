"""`emit`: an event from the command line, validated, sent or shown."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from pydantic import AliasChoices, AliasPath, ValidationError

from dispytch_integrations._cli_look import Look, cleaned, json_line
from dispytch_integrations._templates import nearest
from dispytch_integrations.errors import ConfigurationError, DeliveryError, DispytchError
from dispytch_integrations.events import EventBase
from dispytch_integrations.message import Message

__all__ = ["FAILED", "NotDeliveredError", "Way", "emit", "event_of"]

FAILED = 1
_AT_ONCE = 500


class NotDeliveredError(DispytchError):
    """An event was not delivered, or it is not known; its words say which."""


class Way(Protocol):
    """How events are sent."""

    def prepare(self, event: EventBase, headers: Mapping[str, str]) -> tuple[str, str, Message]:
        """The broker's alias and address, and the message."""
        ...

    def send(self, events: Sequence[EventBase], headers: Mapping[str, str]) -> None:
        """Send them; return when they are confirmed."""
        ...


def event_of(cls: type[EventBase], text: str) -> EventBase:
    """The event of a JSON text. Raises ConfigurationError: what of it is wrong, field by field."""
    try:
        event = cls.model_validate_json(text)
    except ValidationError as exc:
        raise ConfigurationError(_told(cls, exc)) from None
    _refuse_unknown_fields(cls, json.loads(text))
    return event


def emit(cls: type[EventBase], given: Mapping[str, Any], way: Way, look: Look, *, stdin: Any = None) -> int:
    """Emit or show what the options say; return the exit code, which is 0.

    Raises NotDeliveredError, ConfigurationError and what else is wrong with the event.
    """
    headers: dict[str, str] = dict(given.get("header") or ())
    stdin = sys.stdin if stdin is None else stdin
    if given.get("lines"):
        if given.get("fields") not in (None, "-"):
            raise ConfigurationError("--lines reads the events from standard input; leave the JSON out")
        return _emit_lines(cls, given, headers, way, look, stdin)
    text = given.get("fields")
    text = "{}" if text is None else text
    event = event_of(cls, stdin.read() if text == "-" else text)
    alias, address, message = way.prepare(event, headers)
    if not given.get("dry_run"):
        _send(way, [event], headers)
    _show(alias, address, message, given, look)
    return 0


def _send(way: Way, events: Sequence[EventBase], headers: Mapping[str, str]) -> None:
    try:
        way.send(events, headers)
    except DeliveryError as exc:
        raise NotDeliveredError(str(exc)) from exc
    except ExceptionGroup as exc:
        told = [str(error) for error in exc.exceptions[:5]]
        more = [f"... and {len(exc.exceptions) - 5:,} more"] if len(exc.exceptions) > 5 else []
        raise NotDeliveredError("\n  ".join([f"{exc.message}:", *told, *more])) from exc


def _emit_lines(
    cls: type[EventBase],
    given: Mapping[str, Any],
    headers: Mapping[str, str],
    way: Way,
    look: Look,
    stdin: Iterable[str],
) -> int:
    started, number, sent = time.monotonic(), 0, 0
    rest = iter(stdin)
    while lines := list(islice(rest, _AT_ONCE)):
        events: list[EventBase] = []
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                events.append(event_of(cls, line))
            except ConfigurationError as exc:
                before = f"\n{sent:,} events of the lines before were sent." if sent else "\nNothing was sent."
                raise ConfigurationError(f"line {number}: {exc}{before if not given.get('dry_run') else ''}") from None
        if given.get("dry_run"):
            for event in events:
                _show(*way.prepare(event, headers), given, look)
            continue
        try:
            _send(way, events, headers)
        except NotDeliveredError as exc:
            raise NotDeliveredError(f"{exc}\n{sent:,} events of the lines before were sent.") from exc
        sent += len(events)
    if given.get("dry_run"):
        return 0
    seconds = time.monotonic() - started
    if given.get("json"):
        look.say(json.dumps({"sent": sent, "seconds": round(seconds, 3)}))
    else:
        look.say(f"{sent:,} event{' was' if sent == 1 else 's were'} sent in {seconds:.1f} s", "good")
    return 0


def _show(alias: str, address: str, message: Message, given: Mapping[str, Any], look: Look) -> None:
    dry = bool(given.get("dry_run"))
    hidden = {"key", "kind"} if "maxlen" in message.properties else {"key", "kind", "approximate"}
    properties = {name: value for name, value in message.properties.items() if name not in hidden}
    body = None if message.payload is None else message.payload.decode(errors="backslashreplace")
    if given.get("json"):
        fields: dict[str, Any] = {
            "id": message.id,
            "type": message.type,
            "sent": not dry,
            "broker": alias,
            "address": address,
            "destination": message.destination,
            "key": message.ordering_key,
            "properties": properties,
            "headers": message.headers,
            "body": _value(body),
        }
        look.say(json_line(fields))
        return
    done = "would go" if dry else "was sent"
    look.say(f"{cleaned(message.type)} {message.id} {done} to {message.destination!r}", "good")
    facts: list[tuple[str, object]] = [("broker", f"{alias} ({address})")]
    if message.ordering_key is not None:
        facts.append(("key", message.ordering_key))
    facts += properties.items()
    if dry:
        headers = [f"{name}: {value}" for name, value in message.headers.items()] or ["none"]
        facts += zip(["headers", *[""] * (len(headers) - 1)], headers, strict=True)
    facts.append(("body", "a tombstone: none" if body is None else body))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        look.say(f"  {look.paint(cleaned(name).ljust(width), 'faint')}  {cleaned(value, keep=chr(10))}")


def _value(body: str | None) -> Any:
    try:
        return None if body is None else json.loads(body)
    except ValueError:
        return body


def _refuse_unknown_fields(cls: type[EventBase], given: Mapping[str, Any]) -> None:
    """A misspelt field that has a default would be left out without a word."""
    if cls.model_config.get("extra") == "allow":
        return
    by_name = bool(cls.model_config.get("populate_by_name") or cls.model_config.get("validate_by_name"))
    known: set[str] = set()
    for name, field in cls.model_fields.items():
        aliases = _names(field.validation_alias)
        known |= aliases
        if by_name or not aliases:
            known.add(name)
    unknown = [name for name in given if name not in known]
    if unknown:
        told = ", ".join(f"{name!r}{nearest(name, sorted(known))}" for name in unknown)
        raise ConfigurationError(f"{cls.__qualname__} has no field {told}")


def _names(alias: str | AliasPath | AliasChoices | None) -> set[str]:
    if alias is None:
        return set()
    if isinstance(alias, str):
        return {alias}
    if isinstance(alias, AliasPath):
        return {str(alias.path[0])}
    return {name for choice in alias.choices for name in _names(choice)}


def _told(cls: type[EventBase], error: ValidationError) -> str:
    lines = [
        f"  {'.'.join(str(part) for part in each['loc']) or 'JSON'}: {each['msg']}"
        for each in error.errors(include_url=False, include_input=False)
    ]
    fields = ", ".join(
        f"{name}: {getattr(field.annotation, '__name__', field.annotation)}" for name, field in cls.model_fields.items()
    )
    return "\n".join([f"that is no {cls.__qualname__} ({fields}):", *lines])
