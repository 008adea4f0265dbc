"""`catalog`: the events of an app as a table, a document or a page; `catalog diff`: what has changed between two."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dispytch_integrations._asyncapi_schemas import mapping, sequence
from dispytch_integrations._cli_look import Look, cleaned, json_line
from dispytch_integrations._templates import nearest
from dispytch_integrations.asyncapi import Change, describe, diff, to_json, to_yaml
from dispytch_integrations.errors import ConfigurationError, MissingExtraError
from dispytch_integrations.events import EventBase, event_type, string_fields

__all__ = ["BREAKS", "catalog", "compared", "described", "listed"]

BREAKS = 1
_YAML = (".yaml", ".yml")


def catalog(
    classes: Sequence[type[EventBase]],
    brokers: Any,
    given: Mapping[str, Any],
    look: Look,
    *,
    title: str | None = None,
    version: str | None = None,
    description: str | None = None,
) -> int:
    """Write the catalogue of event classes as the options say; return the exit code, which is 0.

    `brokers`: as `connect` takes them; None: no servers are described. Raises ConfigurationError.
    """
    if given.get("json") and given.get("yaml"):
        raise ConfigurationError("--json and --yaml exclude each other; write one of them")
    page, output = given.get("html"), given.get("output")
    form = "yaml" if given.get("yaml") else "json" if given.get("json") else None
    if page == "-" and (output == "-" or (form is not None and output is None)):
        raise ConfigurationError("the page and the document cannot both go to standard output; write --output FILE")
    if not classes:
        raise ConfigurationError("there are no event classes: derive them from EventBase, with a __route__")
    if form is None and page is None and output is None:
        listed(classes, look)
        return 0
    document = describe(
        classes,
        brokers=brokers,
        title=given.get("title") or title,
        version=given.get("api_version") or version,
        description=description,
    )
    count = f"{len(classes):,} event{'' if len(classes) == 1 else 's'}"
    if page is not None:
        from dispytch_integrations._catalog_page import render

        _write(page, render(document), count, look)
    if output is not None and output != "-":
        form = form or ("yaml" if Path(output).suffix.lower() in _YAML else "json")
    if form is not None or output is not None:
        _write(output or "-", to_yaml(document) if form == "yaml" else to_json(document), count, look)
    return 0


def _write(path: str, text: str, count: str, look: Look) -> None:
    if path == "-":
        look.say(text.removesuffix("\n"))
        return
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror}") from exc
    look.aside(f"{count} written to {path}")


def listed(classes: Sequence[type[EventBase]], look: Look) -> None:
    """A table of event classes, for people."""
    names = ("event", "type", "route", "key", "broker")
    rows = [[cleaned(row[name] or "") for name in names] for row in (described(cls) for cls in classes)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(names))]
    if look.columns is None or sum(width + 2 for width in widths if width) <= look.columns + 2:
        look.table(("event", "type", "goes to", "key", "broker"), rows)
        return
    for event, kind, route, key, broker in rows:  # A line that is cut would hide what is asked for.
        look.say(event, "title")
        facts = [(kind, "type"), (route, "goes to"), (key, "key"), (broker, "broker")]
        for text, name in facts:
            if text:
                look.say(f"  {look.paint(name.ljust(7), 'faint')}  {text}")


def described(cls: type[EventBase]) -> dict[str, str | None]:
    """Where events of a class go, in words."""
    route = cls.__route__
    texts = dict(string_fields(route))
    destination = texts.pop(route.destination_field or next(iter(texts), ""), "")
    more = "".join(f" {name}={value}" for name, value in texts.items() if value)
    key = cls.__ordering_key__
    return {
        "event": f"{cls.__module__}.{cls.__qualname__}",
        "type": event_type(cls),
        "transport": route.transport,
        "route": f"{route.kind or route.transport} {destination}{more}",
        "key": key if key is not None else getattr(cls.__backend_config__, "partition_key", None),
        "broker": cls.__broker__,
    }


# -- diff ------------------------------------------------------------------------------------------------------------


def compared(given: Mapping[str, Any], look: Look) -> int:
    """Show what has changed; return the exit code. Raises ConfigurationError for what cannot be read."""
    changes = diff(_read(given["old"]), _read(given["new"]))
    if given.get("json"):
        for change in changes:
            look.say(json_line(change._asdict()))
    elif not changes:
        look.say("No difference.", "good")
    else:
        _show(changes, look)
    return BREAKS if any(change.breaking for change in changes) else 0


def _show(changes: Sequence[Change], look: Look) -> None:
    breaking = [change for change in changes if change.breaking]
    for change in changes:
        mark = look.paint("breaking", "bad") if change.breaking else look.paint("fine    ", "good")
        place = ": ".join(part for part in (change.event, change.where) if part)
        look.say(f"{mark}  {look.paint(cleaned(place), 'title')}")  # A document may come from anybody's branch.
        look.say(f"          {cleaned(change.what)}")
    look.say("")
    fine = len(changes) - len(breaking)
    others = f"; {fine} other{'' if fine == 1 else 's'}" if fine else ""
    if breaking:
        plural = len(breaking) > 1
        look.say(f"{len(breaking)} change{'s break' if plural else ' breaks'} consumers{others}.", "bad")
    else:
        look.say(f"No change breaks a consumer{others}.", "good")


def _read(path: str) -> Mapping[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} cannot be read: it is no text in UTF-8") from exc
    except OSError as exc:
        here = [each.name for each in Path(path).parent.glob("*")] if Path(path).parent.is_dir() else []
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror}{nearest(Path(path).name, here)}") from exc
    found: object
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        found = _from_yaml(path, text, exc)
    document = cast("Mapping[str, Any]", found)
    if not isinstance(found, Mapping) or not str(document.get("asyncapi", "")).startswith("3."):
        raise ConfigurationError(f"{path} is no AsyncAPI 3 document; write one with `catalog MODULE -o events.json`")
    return document


def _from_yaml(path: str, text: str, exc: Exception) -> object:
    try:
        import yaml
    except ModuleNotFoundError as missing:
        if missing.name != "yaml":
            raise
        if Path(path).suffix.lower() in _YAML:
            raise MissingExtraError(f"{path}, a document in YAML,", extra="cli", package="PyYAML") from missing
        raise ConfigurationError(f"{path} is no JSON: {exc}") from exc
    try:
        found = cast("object", yaml.load(text, Loader=_loader(yaml.SafeLoader)))  # noqa: S506 - a safe one
        if _size(found, {}) > _MOST:
            raise ValueError("what its anchors repeat is more than a catalogue can have")
    except RecursionError:
        raise ConfigurationError(f"{path} is neither JSON nor YAML: it is nested without end") from None
    except (yaml.YAMLError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise ConfigurationError(f"{path} is neither JSON nor YAML: {told}") from None
    return found


_MOST = 10_000_000
"""Values of a document, those of anchors as often as they are used."""


def _loader(safe: type[Any]) -> Any:
    """PyYAML's, but fields that are called on, yes or no are text, as YAML 1.2 has it, and so are dates."""
    bool_, timestamp = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
    loader: Any = type("_Loader", (safe,), {})
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in (bool_, timestamp)]
        for first, found in safe.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver(bool_, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
    return loader


def _size(value: object, known: dict[int, int]) -> int:
    """How many values it has when it is written out. Raises ValueError for one that holds itself."""
    inner = [*mapping(value).values(), *sequence(value)]
    if not inner:
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    if not known[id(value)]:
        raise ValueError("an anchor holds itself")
    return known[id(value)]
