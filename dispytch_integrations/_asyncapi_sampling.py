"""Values that fit a JSON schema, for examples. Deterministic: nothing random, no time of now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from dispytch_integrations._asyncapi_schemas import Schema, mapping, name_in, sequence
from dispytch_integrations._asyncapi_values import numbers, texts

__all__ = ["NoSampleError", "Sampler"]

_DEEPEST = 24
_MOST = 100
"""Items of a list."""
_MOST_PLACES = 3_000
"""Values in one example: models that hold each other in many ways have examples without end."""
_OMITTED: Any = object()

Path = tuple[str | int, ...]
_Option = Callable[[], Any]


class NoSampleError(Exception):
    """There is no value: the schema asks for too much, or refers to itself without end."""


class _EndlessError(Exception):
    """There is one, but nobody would read it. No other way is tried: there are too many of them."""


class Sampler:
    """Makes values for one schema; told where one was refused, the next has another there.

    The order at each place: the field's examples, its default (the field is left out), what is made from the schema.
    """

    def __init__(self, schema: Schema, components: Mapping[str, Schema]) -> None:
        self._schema = schema
        self._components = components
        self._attempts: dict[Path, int] = {}
        self._tried = 0
        self._places: dict[Path, bool] = {}  # Those of the last value, and: was it the last there is?

    def sample(self) -> Any:
        """A value. Raises NoSampleError."""
        self._places.clear()
        self._tried = 0
        return self._value(self._schema, (), "value", 0, ())

    def refuse(self, place: Sequence[str | int]) -> bool:
        """The value at `place`, as pydantic's errors name it, was refused. Return: may there be another one?"""
        paths = [path for path, last in self._places.items() if not last and _within(path, place)]
        if not paths:
            return False
        path = max(paths, key=len)
        self._attempts[path] = self._attempts.get(path, 0) + 1
        return True

    def _value(self, schema: object, path: Path, name: str, index: int, stack: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST:
            raise NoSampleError("it refers to itself without end")
        return self._first(self._options(schema, path, name, index, stack), path, name)

    def _first(self, options: Iterator[_Option], path: Path, name: str) -> Any:
        """The first value that is left at this place and can be made; when all were refused, the last one."""
        self._tried += 1
        if self._tried > _MOST_PLACES:
            raise _EndlessError(f"its models hold each other so often that an example has over {_MOST_PLACES:,} values")
        attempts = self._attempts.get(path, 0)
        refused = NoSampleError(f"no value for {name!r} is known")
        made: list[Any] = []
        self._places[path] = False
        for number, option in enumerate(options):
            try:
                made = [option()]
            except NoSampleError as exc:
                refused = exc
                continue
            if number >= attempts:
                return made[0]
        self._places[path] = True
        if made:
            return made[0]
        raise refused

    def _options(
        self, schema: object, path: Path, name: str, index: int, stack: tuple[str, ...], *, default: bool = True
    ) -> Iterator[_Option]:
        """Ways to a value, the best first."""
        if schema is False:
            return
        found, stack = self._resolved(mapping(schema), stack)
        if "examples" in found:
            yield from map(_given, sequence(found["examples"]))
        if default and "default" in found:
            yield _given(found["default"])
        if "const" in found:
            yield _given(found["const"])
            return
        values = sequence(found.get("enum"))
        branches = sequence(found.get("anyOf")) or sequence(found.get("oneOf"))
        type_ = found.get("type")
        if values:
            turned = index % len(values)
            yield from map(_given, [*values[turned:], *values[:turned]])
        elif branches:
            yield from self._branches(branches, path, name, index, stack)
        elif types := sequence(type_):
            for each in types:
                yield from self._of_type(each, found, path, name, index, stack)
        else:
            yield from self._of_type(type_, found, path, name, index, stack)

    def _branches(
        self, branches: list[Any], path: Path, name: str, index: int, stack: tuple[str, ...]
    ) -> Iterator[_Option]:
        """Of each alternative the best, then the others; what leads back to where we are comes last, null before it."""
        nulls = [each for each in branches if mapping(each).get("type") == "null"]
        back = [each for each in branches if each not in nulls and name_in(mapping(each)) in stack]
        ahead = [each for each in branches if each not in nulls and each not in back]
        made = [self._options(each, path, name, index, stack) for each in ahead]
        for options in made:
            yield from islice(options, 1)
        for options in made:
            yield from options
        yield from (_given(None) for _ in nulls)
        for each in back:
            yield from self._options(each, path, name, index, stack)

    def _of_type(
        self, type_: object, schema: Schema, path: Path, name: str, index: int, stack: tuple[str, ...]
    ) -> Iterator[_Option]:
        if type_ == "object" or (type_ is None and "properties" in schema):
            yield lambda: self._object(schema, path, stack)
        elif type_ == "array":
            yield lambda: self._array(schema, path, name, stack)
        elif type_ in ("integer", "number"):
            yield from map(_given, numbers(schema, index, whole=type_ == "integer"))
        elif type_ == "boolean":
            yield from map(_given, (True, False))
        elif type_ == "null":
            yield _given(None)
        elif schema.get("contentMediaType") == "application/json":
            yield lambda: _json(self._value(schema.get("contentSchema", {}), (*path, "[json]"), name, index, stack))
        else:
            yield from map(_given, texts(schema, name, index))

    def _object(self, schema: Schema, path: Path, stack: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        required = set(map(str, sequence(schema.get("required"))))
        for name, each in mapping(schema.get("properties")).items():
            value = self._property(each, (*path, name), name, stack, required=name in required)
            if value is not _OMITTED:
                made[name] = value
        extra = schema.get("additionalProperties")
        fewest = _whole(schema.get("minProperties"), 0)
        patterns = mapping(schema.get("patternProperties"))
        if len(made) < max(fewest, int("properties" not in schema)) and (patterns or extra not in (None, False)):
            if self._leads_back(extra, stack) and not fewest:
                return made
            keys = schema.get("propertyNames") or ({"type": "string", "pattern": next(iter(patterns), None)})
            for index in range(max(1, min(fewest, _MOST)) - len(made)):
                key = str(self._value(keys, (*path, "[key]"), "key", index, stack))
                held = next(iter(patterns.values()), extra)
                made[key] = self._value(held, (*path, key), "value", index, stack)
        return made

    def _property(self, schema: object, path: Path, name: str, stack: tuple[str, ...], *, required: bool) -> Any:
        """The value of a property, or that it is left out."""
        found, _ = self._resolved(mapping(schema), stack)
        # What is computed from the others is not given; of the body's schema all is required, defaults or not.
        if found.get("readOnly") or (not required and self._leads_back(schema, stack)):
            return _OMITTED
        defaulted = "default" in found
        first = [_given(_OMITTED)] if defaulted and not found.get("examples") else []
        last = [_given(_OMITTED)] if defaulted or not required else []
        made = self._options(schema, path, name, 0, stack, default=False)
        return self._first(chain(first, made, last), path, name)

    def _array(self, schema: Schema, path: Path, name: str, stack: tuple[str, ...]) -> list[Any]:
        places = sequence(schema.get("items"))
        if places:
            return [self._value(each, (*path, index), name, index, stack) for index, each in enumerate(places)]
        items = schema.get("items", {})
        fewest, most = _whole(schema.get("minItems"), 0), _whole(schema.get("maxItems"), _MOST)
        count = min(max(fewest, int(not self._leads_back(items, stack))), most, _MOST)
        singular = name[:-1] if name.endswith("s") and len(name) > 2 else name
        return [self._value(items, (*path, index), singular, index, stack) for index in range(count)]

    def _resolved(self, schema: Schema, stack: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """A schema with its references followed, and the components that it stands in."""
        for _ in range(_DEEPEST):
            name = name_in(schema)
            if name is None:
                break
            stack = (*stack, name)
            schema = {**self._components.get(name, {}), **{key: schema[key] for key in schema if key != "$ref"}}
        for each in sequence(schema.get("allOf")):
            merged, stack = self._resolved(mapping(each), stack)
            schema = {**merged, **{key: value for key, value in schema.items() if key != "allOf"}}
        return schema, stack

    def _leads_back(self, schema: object, stack: tuple[str, ...]) -> bool:
        """Does it hold, without another way, what is being made?"""
        return any(name in stack for name in _names_in(mapping(schema)))


def _names_in(schema: Schema) -> Iterator[str]:
    name = name_in(schema)
    if name is not None:
        yield name
    for keyword in ("anyOf", "oneOf", "allOf"):
        for each in sequence(schema.get(keyword)):
            yield from _names_in(mapping(each))
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from _names_in(mapping(schema[keyword]))


def _within(path: Path, place: Sequence[str | int]) -> bool:
    """Do the steps of `path` stand in `place`, in their order? That has steps more: of unions and of dicts' keys."""
    steps = iter(place)
    return all(any(step == each for each in steps) for step in path)


def _given(value: Any) -> _Option:
    return lambda: value


def _json(value: Any) -> str:
    return json.dumps(value)


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
