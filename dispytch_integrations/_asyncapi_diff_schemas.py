"""What has changed between two JSON schemas of one thing, as its consumers see it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dispytch_integrations._asyncapi_schemas import Schema, mapping, sequence

__all__ = ["Difference", "compare_schemas", "shown"]

Resolve = Callable[[object], Schema]


class Difference(NamedTuple):
    """One difference: is it breaking, where is it, and what has changed?"""

    breaking: bool
    where: str
    what: str


_GONE = "consumers that read it find nothing"
_ABSENT = "was always there, and may be absent now: consumers rely on it"
_REQUIRED = "is required now: messages of before may lack it"
_NULL = "may be null now: consumers do not expect that"
_NOT_NULL = "is no longer null: messages of before may hold null"
_NEW_VALUES = "consumers get values that they do not know"
_OLD_VALUES = "messages of before hold values that are refused now"
_OTHER = "consumers read it in another way"

_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_LIMITS = (*_LOWER, *_UPPER)
_EXACT = ("format", "pattern", "multipleOf", "uniqueItems", "contentEncoding", "contentMediaType", "discriminator")
_DEEPEST = 64


def compare_schemas(old: object, new: object, where: str, old_at: Resolve, new_at: Resolve) -> list[Difference]:
    """The differences, in the order of the schemas. `old_at` and `new_at` follow the references of each document."""
    return list(_Comparison(old_at, new_at).differences(old, new, where))


def shown(value: object) -> str:
    """A value of a document in one line, shortened."""
    if value is None:
        return "nothing"
    text = _json(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


class _Comparison:
    def __init__(self, old_at: Resolve, new_at: Resolve) -> None:
        self._old_at, self._new_at = old_at, new_at
        self._seen: set[tuple[str, str]] = set()

    def differences(self, old: object, new: object, where: str, depth: int = 0) -> Iterator[Difference]:
        """What differs between two schemas of the same place."""
        if depth > _DEEPEST:
            return
        before, after = _alternatives(old, self._old_at), _alternatives(new, self._new_at)
        yield from _annotations(_flat(old, self._old_at), _flat(new, self._new_at), where)
        if before.nullable != after.nullable:
            yield Difference(True, where, _NULL if after.nullable else _NOT_NULL)
        yield from self._matched(before.schemas, after.schemas, where, depth)

    def _matched(self, old: list[Schema], new: list[Schema], where: str, depth: int) -> Iterator[Difference]:
        if len(old) == 1 and len(new) == 1:
            yield from self._one(old[0], new[0], where, depth)
            return
        left = list(new)
        for schema in old:
            found = _best(schema, left)
            if found is None:
                yield Difference(True, where, f"is no longer {_kind(schema)}: {_OLD_VALUES}")
                continue
            left.remove(found)
            yield from self._one(schema, found, where, depth)
        for schema in left:
            yield Difference(True, where, f"may be {_kind(schema)} now: {_NEW_VALUES}")

    def _one(self, old: Schema, new: Schema, where: str, depth: int) -> Iterator[Difference]:
        """Two schemas without alternatives."""
        if _AT in old and _AT in new:
            pair = str(old[_AT]), str(new[_AT])
            if pair in self._seen:
                return  # A model that holds itself, or one that was compared elsewhere: told once.
            self._seen.add(pair)
        types = old.get("type"), new.get("type")
        if types[0] != types[1]:
            yield Difference(True, where, _type_change(old, new))
            return
        yield from _values(old, new, where)
        yield from _limits(old, new, where)
        if types[0] == "object" or "properties" in old or "properties" in new:
            yield from self._object(old, new, where, depth)
        if types[0] == "array":
            yield from self._array(old, new, where, depth)

    def _object(self, old: Schema, new: Schema, where: str, depth: int) -> Iterator[Difference]:
        before, after = mapping(old.get("properties")), mapping(new.get("properties"))
        required = [set(map(str, sequence(schema.get("required")))) for schema in (old, new)]
        for name, schema in before.items():
            place = f"{where}.{name}"
            if name not in after:
                yield Difference(True, place, f"removed: {_GONE}")
                continue
            if (name in required[0]) != (name in required[1]):
                yield Difference(True, place, _ABSENT if name in required[0] else _REQUIRED)
            yield from self.differences(schema, after[name], place, depth + 1)
        for name, schema in after.items():
            if name not in before:
                yield Difference(False, f"{where}.{name}", f"new ({self._told(schema)})")
        keys = old.get("propertyNames"), new.get("propertyNames")
        if keys[0] is not None and keys[1] is not None:
            yield from self.differences(keys[0], keys[1], f"{where}[key]", depth + 1)
        elif keys[0] != keys[1]:
            why = _NEW_VALUES if keys[1] is None else _OLD_VALUES
            yield Difference(True, f"{where}[key]", f"keys were {shown(keys[0])}, are {shown(keys[1])}: {why}")
        patterns = mapping(old.get("patternProperties")), mapping(new.get("patternProperties"))
        for pattern in {**patterns[0], **patterns[1]}:
            if pattern in patterns[0] and pattern in patterns[1]:
                yield from self.differences(patterns[0][pattern], patterns[1][pattern], f"{where}[*]", depth + 1)
            else:
                yield Difference(True, f"{where}[key]", f"keys like {shown(pattern)} came or went: {_OTHER}")
        extra = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if extra[0] is not False and extra[1] is not False:
            yield from self.differences(extra[0], extra[1], f"{where}[*]", depth + 1)

    def _told(self, schema: object) -> str:
        found = _alternatives(schema, self._new_at)
        kinds = [_kind(each) for each in found.schemas] + (["null"] if found.nullable else [])
        return " or ".join(dict.fromkeys(kinds)) or "null"

    def _array(self, old: Schema, new: Schema, where: str, depth: int) -> Iterator[Difference]:
        items = old.get("items", True), new.get("items", True)
        tuples = sequence(items[0]), sequence(items[1])
        if bool(tuples[0]) != bool(tuples[1]):
            told = "a list of any length" if tuples[0] else "one of fixed places"
            yield Difference(True, where, f"is {told} now: {_OTHER}")
        elif tuples[0]:
            for index, (one, other) in enumerate(zip(tuples[0], tuples[1], strict=False)):
                yield from self.differences(one, other, f"{where}[{index}]", depth + 1)
            if len(tuples[0]) != len(tuples[1]):
                yield Difference(True, where, f"had {len(tuples[0])} places, has {len(tuples[1])}: {_OTHER}")
        else:
            yield from self.differences(items[0], items[1], f"{where}[]", depth + 1)


# -- one schema --------------------------------------------------------------------------------------------------------


class _Alternatives(NamedTuple):
    schemas: list[Schema]
    nullable: bool


_AT = "$at"
"""Where a schema has been referred to, in one whose references are followed."""


def _flat(schema: object, at: Resolve, above: frozenset[str] = frozenset()) -> Schema:
    """A schema with its references followed and its `allOf` merged. `above`: those that are being followed."""
    found = dict(at(schema))
    reference = mapping(schema).get("$ref")
    if reference is not None:
        found[_AT] = reference
        if str(reference) in above:
            return {_AT: reference}
        above |= {str(reference)}
    for each in sequence(found.get("allOf")) if len(above) < _DEEPEST else []:
        merged = _flat(each, at, above)
        properties = {**mapping(merged.get("properties")), **mapping(found.get("properties"))}
        required = [*sequence(merged.get("required")), *sequence(found.get("required"))]
        found = {**merged, **found}
        if properties:
            found["properties"] = properties
        if required:
            found["required"] = required
    found.pop("allOf", None)
    return found


def _alternatives(schema: object, at: Resolve, above: frozenset[str] = frozenset()) -> _Alternatives:
    """What a value may be: schemas of one type each. `True` and `{}` are one schema that takes anything.

    `above`: the references that are being followed; one that leads back adds nothing.
    """
    if schema is False:
        return _Alternatives([], False)
    found = _flat(schema, at)
    several = sequence(found.get("anyOf")) or sequence(found.get("oneOf"))
    reference = found.get(_AT)
    if reference is not None and several:
        if str(reference) in above:
            return _Alternatives([], False)
        above |= {str(reference)}
    if several:
        parts = [_alternatives(each, at, above) for each in several]
        schemas = [part for each in parts for part in each.schemas]
        return _Alternatives(schemas, any(part.nullable for part in parts))
    types = found.get("type")
    names = sequence(types) or ([types] if types is not None else [])
    values = [found["const"]] if "const" in found else sequence(found.get("enum")) or None
    if values is not None:
        found = {**found, "enum": values}
        found.pop("const", None)
        names = names or list(dict.fromkeys(_type_of(value) for value in values))
    nullable = "null" in names and (values is None or None in values)
    names = [name for name in names if name != "null"]
    if not names:
        return _Alternatives([] if nullable else [found], nullable)
    return _Alternatives([{**found, "type": name} for name in names], nullable)


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) else "number"
    return "array" if isinstance(value, list) else "object"


def _kind(schema: Schema) -> str:
    """A schema in a word or two."""
    name = schema.get("title") or schema.get("format") or schema.get("type") or "anything"
    values = schema.get("enum")
    return f"{name}" if not values or schema.get("title") else f"one of {shown(values)}"


def _best(schema: Schema, candidates: list[Schema]) -> Schema | None:
    """The candidate that is most likely the same alternative; None: there is none of its type."""
    same = [each for each in candidates if each.get("type") == schema.get("type")]
    for name in ("title", "enum", "format"):
        exact = [each for each in same if schema.get(name) is not None and each.get(name) == schema.get(name)]
        if exact:
            return exact[0]
    if schema.get("title") and any(each.get("title") for each in same):
        return next((each for each in same if not each.get("title")), None)
    return next((each for each in same if each == schema), same[0] if same else None)


def _type_change(old: Schema, new: Schema) -> str:
    told = f"was {_kind(old)}, is {_kind(new)}"
    types = old.get("type"), new.get("type")
    if types == ("integer", "number") or types[1] is None:
        return f"{told}, which is wider: {_NEW_VALUES}"
    if types == ("number", "integer") or types[0] is None:
        return f"{told}, which is narrower: {_OLD_VALUES}"
    return f"{told}: {_OTHER}"


def _values(old: Schema, new: Schema, where: str) -> Iterator[Difference]:
    """Enum and const."""
    before, after = (sequence(schema.get("enum")) or None for schema in (old, new))
    if before is None and after is None:
        return
    if before is None:
        yield Difference(True, where, f"is one of {shown(after)} now, could be anything: {_OLD_VALUES}")
        return
    if after is None:
        yield Difference(True, where, f"was one of {shown(before)}, can be anything now: {_NEW_VALUES}")
        return
    known = {_json(value) for value in before}, {_json(value) for value in after}
    gone = [value for value in before if _json(value) not in known[1]]
    came = [value for value in after if _json(value) not in known[0]]
    if len(before) == 1 and len(after) == 1 and gone:
        yield Difference(True, where, f"was {shown(before[0])}, is {shown(after[0])}: {_NEW_VALUES}")
        return
    if gone:
        yield Difference(True, where, f"{', '.join(map(shown, gone))} removed: {_OLD_VALUES}")
    if came:
        yield Difference(True, where, f"{', '.join(map(shown, came))} added: {_NEW_VALUES}")


def _limits(old: Schema, new: Schema, where: str) -> Iterator[Difference]:
    for name in _LIMITS:
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        wider = after is None
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            wider = (after < before) == (name in _LOWER)
        yield Difference(
            True, where, f"{name} was {shown(before)}, is {shown(after)}: {_NEW_VALUES if wider else _OLD_VALUES}"
        )
    for name in _EXACT:
        if old.get(name) != new.get(name):
            why = _NEW_VALUES if new.get(name) is None else _OLD_VALUES if old.get(name) is None else _OTHER
            yield Difference(True, where, f"{name} was {shown(old.get(name))}, is {shown(new.get(name))}: {why}")


def _annotations(old: Schema, new: Schema, where: str) -> Iterator[Difference]:
    """What tells readers something, and changes no message."""
    if bool(old.get("deprecated")) != bool(new.get("deprecated")):
        yield Difference(False, where, "is deprecated now" if new.get("deprecated") else "is no longer deprecated")
    if old.get("description") != new.get("description"):
        yield Difference(False, where, "description changed")
    if old.get("default") != new.get("default"):
        yield Difference(False, where, f"default was {shown(old.get('default'))}, is {shown(new.get('default'))}")
