"""`{field}` parts in routes, keys and headers: parsed once per class, checked against the event, filled per event."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from inspect import isroutine
from operator import attrgetter
from string import Formatter
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dispytch_integrations.errors import RouteError

__all__ = [
    "Filler",
    "Template",
    "check_constant",
    "compile_key",
    "compile_route_part",
    "compile_text",
    "model_of",
    "nearest",
]

Filler = Callable[[Any], Any]
"""Fills a template from an event."""

_DELIMITERS = ".:/*#>?[]{}"
_CONTROL = "\x00-\x1f\x7f-\x9f\ud800-\udfff"  # lone surrogates too: they cannot be encoded
# Unicode's Default_Ignorable_Code_Point (soft hyphen, zero-width, direction marks, fillers, variation selectors, tags),
# line and paragraph separators, interlinear marks: two names that look the same must be the same.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_control = re.compile(f"[{_CONTROL}]")
_surrogate = re.compile("[\ud800-\udfff]")
_never_in_route = re.compile(f"[{_CONTROL}{_INVISIBLE}]")

_Step = tuple[bool, str | int]
"""(is an attribute, name or key or index)"""


class _Part:
    """One `{field.path!conversion:spec}`."""

    __slots__ = ("conversion", "get", "path", "plain", "spec", "steps", "text")

    def __init__(self, path: str, conversion: str | None, spec: str, steps: tuple[_Step, ...]) -> None:
        self.path = path
        self.conversion = conversion
        self.spec = spec
        self.steps = steps
        self.plain = not spec and not conversion
        self.text = "{" + path + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
        name = steps[0][1]
        self.get: Filler = attrgetter(str(name)) if len(steps) == 1 else self._walk

    def _walk(self, event: Any) -> Any:
        value = event
        for is_attribute, name in self.steps:
            if value is None:
                return None
            if isinstance(value, Mapping):
                value = cast("Mapping[object, Any]", value)[name]
            elif is_attribute or isinstance(value, BaseModel):
                value = getattr(cast("Any", value), str(name))
            else:
                value = value[name]
        if isroutine(value):
            raise TypeError("it is a method, not a field")
        return value

    def value(self, event: Any) -> Any:
        """The field's value, an Enum's own value in its place.

        Raises RouteError when a nested part is not there.
        """
        try:
            value = self.get(event)
        except (AttributeError, LookupError, TypeError) as exc:
            raise RouteError(
                f"{type(event).__qualname__} has no value for {self.text}: {type(exc).__name__}: {exc}"
            ) from exc
        return value.value if isinstance(value, Enum) else value

    def render(self, value: Any) -> str:
        """`value` as text, by conversion and format spec; None as "".

        Raises RouteError when the spec does not fit the value.
        """
        if value is None:
            return ""
        try:
            if self.plain and isinstance(value, (str, int)):
                return str(value)
            if self.conversion == "r":
                value = repr(value)
            elif self.conversion == "s":
                value = str(value)
            elif self.conversion == "a":
                value = ascii(value)
            if isinstance(value, bytes):
                value = value.decode()
            return format(value, self.spec)
        except Exception as exc:  # Values of any class may be here: whatever becomes of them as text.
            raise self.unfit(value, exc) from exc

    def unfit(self, value: object, exc: Exception) -> RouteError:
        """The error for a value that does not become text."""
        return RouteError(f"{self.text} cannot format a {type(value).__name__}: {exc}")


class Template:
    """A parsed string; `literal` is its text when it has no `{field}` parts, else None."""

    __slots__ = ("literal", "parts", "text")

    def __init__(self, text: str, owner: str) -> None:
        """Parse `text`; `owner` says in errors where it stands ("OrderPlaced.__route__: topic").

        Raises RouteError when the braces are wrong, or a part is empty or reaches for a private name.
        """
        self.text = text
        self.parts: list[str | _Part] = []
        if _surrogate.search(text):
            raise RouteError(f"{owner} {text[:60]!r}: half a surrogate pair cannot be sent; correct the text")
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as exc:
            raise RouteError(f"{owner} {text!r}: {exc}; write {{{{ and }}}} for literal braces") from exc
        literal = ""
        for before, path, spec, conversion in parsed:
            literal += before
            if path is None:
                continue
            if literal:
                self.parts.append(literal)
                literal = ""
            self.parts.append(_part(path, spec or "", conversion, text, owner))
        if literal:
            self.parts.append(literal)
        self.literal: str | None = None
        if all(isinstance(part, str) for part in self.parts):
            self.literal = "".join(part for part in self.parts if isinstance(part, str))

    def check(self, event_type: type[BaseModel], owner: str) -> None:
        """Raise RouteError when a part names a field that `event_type`, or a model nested in it, does not have."""
        for part in self.parts:
            if isinstance(part, _Part):
                _check_path(part, event_type, owner)


def _part(path: str, spec: str, conversion: str | None, text: str, owner: str) -> _Part:
    if not path or path[0].isdigit():
        raise RouteError(f"{owner} {text!r}: {{{path}}} names no field; write the name of a field of the event")
    if "{" in spec:
        raise RouteError(f"{owner} {text!r}: a format spec must not hold braces itself")
    if conversion not in (None, "r", "s", "a"):
        raise RouteError(f"{owner} {text!r}: !{conversion} is no conversion; !s, !r and !a are")
    steps = tuple(_steps(path, text, owner))
    return _Part(path, conversion, spec, steps)


def _steps(path: str, text: str, owner: str) -> list[_Step]:
    first, rest = _split_path(path)
    steps: list[_Step] = [(True, first)]
    for is_attribute, name in rest:
        steps.append((is_attribute, name))
    for _, name in steps:
        if isinstance(name, str) and (name.startswith("_") or not name):
            raise RouteError(f"{owner} {text!r}: {{{path}}} must not reach for a private or empty name")
    return steps


_token = re.compile(r"\.([^.\[\]]*)|\[([^\]]*)\]")
_index = re.compile("[0-9]{1,18}")


def _split_path(path: str) -> tuple[str, list[_Step]]:
    match = re.match(r"[^.\[]*", path)
    first = match.group() if match else ""
    rest: list[_Step] = []
    for token in _token.finditer(path, len(first)):
        attribute, key = token.groups()
        if attribute is not None:
            rest.append((True, attribute))
        else:
            rest.append((False, int(key) if _index.fullmatch(key) else key))
    return first, rest


def _check_path(part: _Part, event_type: type[BaseModel], owner: str) -> None:
    annotation: Any = event_type
    for index, (is_attribute, name) in enumerate(part.steps):
        model = model_of(annotation)
        if model is None:
            annotation = _below(annotation, is_attribute, name, part, owner)
        else:
            fields = model.__pydantic_fields__
            known = [*fields, *model.__pydantic_decorators__.computed_fields]
            if name not in known:
                if model.model_config.get("extra") == "allow":
                    return
                where = model.__qualname__ if index else "the event"
                raise RouteError(
                    f"{owner}: {part.text} is no field of {where}{nearest(str(name), known)}; "
                    f"it has {', '.join(known) or 'none'}"
                )
            annotation = fields[name].annotation if isinstance(name, str) and name in fields else None
        if annotation is None:
            return  # What lies below can only be seen in the value.


# These themselves, and not what is derived from them: that may have attributes which no class shows.
_MAPPINGS = (dict, Mapping, MutableMapping)
_SEQUENCES = (list, tuple, Sequence, MutableSequence)
_SCALARS = (str, int, float, bool, bytes, Decimal, UUID, date, datetime, time, timedelta)


def _below(annotation: Any, is_attribute: bool, name: str | int, part: _Part, owner: str) -> Any:
    """What a step leads to; None: only the value has it. Raises RouteError where it can lead nowhere."""
    annotation = _plain(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in _MAPPINGS:
        return arguments[1]
    if origin in _SEQUENCES:
        if is_attribute:
            raise RouteError(
                f"{owner}: {part.text} names {name!r} of a {origin.__name__}; one of its items is written with its "
                f"number in brackets: [0]"
            )
        return arguments[0] if arguments and arguments[1:] in ((), (Ellipsis,)) else None
    if annotation not in _SCALARS:
        return None
    if name not in dir(annotation) if is_attribute else "__getitem__" not in dir(annotation):
        raise RouteError(f"{owner}: {part.text} reaches for {name!r}, which a {annotation.__name__} does not have")
    return None


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The one model in an annotation such as `User | None`; None where it cannot be told."""
    model = _plain(annotation)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _plain(annotation: Any) -> Any:
    """The one type in an annotation such as `User | None`; None where it cannot be told."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = [candidate for candidate in candidates if candidate is not type(None)]
    return types[0] if len(types) == 1 else None


def check_constant(text: str, owner: str) -> None:
    """Raise RouteError when what the class itself says holds a control character."""
    if _control.search(text) is not None:
        raise RouteError(f"{owner} {text[:60]!r} holds a control character; leave that out")


def nearest(name: str, known: Sequence[str]) -> str:
    """`" (did you mean 'topic'?)"` when a known name is near, else nothing."""
    matches = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def compile_route_part(template: Template, safe: str, what: str) -> Filler:
    """A function that fills one string of a route and refuses values that would change where it leads.

    `safe`: delimiters that the values may hold; `what`: how errors name the place ("topic").
    """
    refused = "".join(character for character in _DELIMITERS if character not in safe)
    space = "" if any(character.isspace() for character in safe) else r"\s"
    pattern = re.compile(f"[{re.escape(refused)}{space}{_CONTROL}{_INVISIBLE}]")

    search = pattern.search

    def fill_part(part: _Part, event: Any) -> str:
        value = part.value(event)
        text = part.render(value)
        if not text:
            raise RouteError(
                f"{type(event).__qualname__}: the value of {part.text} in the {what} {template.text!r} is "
                f"{'None' if value is None else 'empty'}; give the field a value, or make it required"
            )
        found = search(text)
        if found is not None:
            raise _refusal(event, part, text, found.group(), what, template.text)
        return text

    return _assemble(template, fill_part)


def _refusal(event: Any, part: _Part, text: str, character: str, what: str, route: str) -> RouteError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    if _never_in_route.match(character):
        advice = "control and invisible characters are never allowed"
    elif character.isspace():
        advice = "clean or format the value"
    else:
        advice = f"if it is meant, write safe={character!r} on the route, else clean or format the value"
    return RouteError(
        f"{type(event).__qualname__}: the value of {part.text} in the {what} {route!r} is {shown!r}, "
        f"which holds {character!r}; {advice}"
    )


def compile_text(template: Template, what: str) -> Filler:
    """A function that fills a header or property: any text without control characters; None gives None or ''."""

    def fill_part(part: _Part, event: Any) -> str:
        text = part.render(part.value(event))
        if _control.search(text) is not None:
            raise refusal(part, event)
        return text

    def refusal(part: _Part, event: Any) -> RouteError:
        return RouteError(
            f"{type(event).__qualname__}: the value of {part.text} in the {what} {template.text!r} holds a "
            f"control character; clean the value"
        )

    if len(template.parts) == 1 and isinstance(template.parts[0], _Part):
        only, search = template.parts[0], _control.search
        get, plain = only.value, only.plain

        def fill_only(event: Any) -> str | None:
            value = get(event)
            if value.__class__ is str and plain and search(value) is None:
                return value  # The usual key, without a look at what else it could be.
            if value is None:
                return None
            if not plain or isinstance(value, str):
                return fill_part(only, event)
            try:
                text = _plain_text(value)
            except Exception as exc:  # As in `render`.
                raise only.unfit(value, exc) from exc
            if search(text) is not None:
                raise refusal(only, event)
            return text

        return fill_only
    return _assemble(template, fill_part)


def _plain_text(value: Any) -> str:
    """A value that is a key or header by itself, as text: as JSON has it, equal for equal dicts, dates in ISO 8601."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, (BaseModel, Mapping, list, tuple)):
        return json.dumps(to_jsonable_python(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, bytes):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return value.hex()
        return text if _control.search(text) is None else value.hex()  # Binary, which happens to be UTF-8.
    return str(value)


def compile_key(text: str, event_type: type[BaseModel], owner: str) -> Filler:
    """`compile_text` for a string that is still to be parsed and checked; a constant gives itself.

    Raises RouteError as `Template` and `Template.check` do.
    """
    template = Template(text, owner)
    template.check(event_type, owner)
    return compile_text(template, owner)


def _assemble(template: Template, fill_part: Callable[[_Part, Any], str]) -> Filler:
    if template.literal is not None:
        literal = template.literal
        return lambda event: literal
    if len(template.parts) == 1:
        only = template.parts[0]
        if isinstance(only, _Part):
            return lambda event: fill_part(only, event)
    parts = tuple(template.parts)

    def fill(event: Any) -> str:
        return "".join([part if isinstance(part, str) else fill_part(part, event) for part in parts])

    return fill
