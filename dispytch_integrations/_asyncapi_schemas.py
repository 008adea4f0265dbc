"""What is on the wire as JSON schemas: those of all events at once, so that equal names get names of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from pydantic_core.core_schema import DataclassField, DecimalSchema, ModelField, TypedDictField

from dispytch_integrations.events import EventBase

__all__ = ["REF", "Schema", "Schemas", "mapping", "name_in", "sequence", "told"]

Schema = dict[str, Any]
REF = "#/components/schemas/"

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by name."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONES = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip


class _Generator(GenerateJsonSchema):
    """Pydantic's, without the titles that repeat a field's name, and without warnings: they are the app's."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as in the base class

    def field_title_should_be_set(self, schema: Any) -> bool:
        """None says more than the name does."""
        return False


class _Wire(_Generator):
    """What consumers read: a field with a default is always there."""

    def field_is_required(self, field: ModelField | DataclassField | TypedDictField, total: bool) -> bool:
        """Is it in every body?"""
        if field.get("serialization_exclude_if") is not None:
            return False
        return field["type"] != "typed-dict-field" or field.get("required", total)

    def decimal_schema(self, schema: DecimalSchema) -> Schema:
        """A decimal number is a string in JSON, and not any."""
        made = super().decimal_schema(schema)
        return {"format": "decimal", **made} if made.get("type") == "string" else made


_GENERATORS: dict[JsonSchemaMode, type[GenerateJsonSchema]] = {"serialization": _Wire, "validation": _Generator}


class Schemas:
    """The schemas of some event classes, `of[cls]`, with what these refer to in `components`.

    `mode`: "serialization": of the body; "validation": of what the class is made from. `problems[cls]`: why there is
    none for a class: a type that JSON schema cannot tell.
    """

    def __init__(self, classes: Sequence[type[EventBase]], mode: Literal["serialization", "validation"]) -> None:
        self.of: dict[type[EventBase], Schema] = {}
        self.components: dict[str, Schema] = {}
        self.problems: dict[type[EventBase], str] = {}
        self._mode: Literal["serialization", "validation"] = mode
        try:
            self._generate(classes)
        except Exception:  # One class that has none hinders no other.
            self._generate([cls for cls in classes if self._has_schema(cls)])

    def _has_schema(self, cls: type[EventBase]) -> bool:
        try:
            cls.model_json_schema(mode=self._mode, schema_generator=_GENERATORS[self._mode])
        except Exception as exc:
            self.problems[cls] = told(exc)
            return False
        return True

    def _generate(self, classes: Sequence[type[EventBase]]) -> None:
        made, definitions = models_json_schema(
            [(cls, self._mode) for cls in classes],
            ref_template=REF + "{model}",
            schema_generator=_GENERATORS[self._mode],
        )
        self.components = {name: _draft_07(each) for name, each in definitions.get("$defs", {}).items()}
        for (cls, _), schema in made.items():
            self.of[cast("type[EventBase]", cls)] = _draft_07(schema)

    def inline(self) -> None:
        """Put the events' own schemas where they are used, but for those that others refer to."""
        used: dict[str, int] = {}
        for schema in self.components.values():
            for name in _references(schema):
                used[name] = used.get(name, 0) + 1
        inlined: set[str] = set()  # Two classes that are alike, down to their name, have one.
        for cls, schema in self.of.items():
            own = name_in(schema)
            if own is not None and len(schema) == 1 and not used.get(own):
                self.of[cls] = self.components[own]
                inlined.add(own)
        for own in inlined:
            del self.components[own]


def name_in(schema: Schema) -> str | None:
    """The component that a schema refers to; None: it is no reference."""
    reference = schema.get("$ref")
    return reference.removeprefix(REF) if isinstance(reference, str) and reference.startswith(REF) else None


def mapping(value: object) -> dict[str, Any]:
    """`value`, if it is a mapping; else an empty one."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """`value`, if it is a list; else an empty one."""
    return [*cast("Sequence[object]", value)] if isinstance(value, list) else []


def _draft_07(schema: object) -> Any:
    """A schema as AsyncAPI's own dialect has it, a superset of JSON schema draft 07."""
    if not isinstance(schema, dict):
        return schema
    made: Schema = {keyword: _map(keyword, value) for keyword, value in mapping(cast("object", schema)).items()}
    if "discriminator" in made and not isinstance(made["discriminator"], str):
        # A property's name in AsyncAPI, an object in OpenAPI.
        said = mapping(made["discriminator"])
        made["discriminator"] = said.get("propertyName", "")
        if "mapping" in said:
            made["x-dispytch-mapping"] = said["mapping"]
    if "prefixItems" in made:
        if "items" in made:
            made["additionalItems"] = made["items"]
        elif made.get("maxItems") == len(made["prefixItems"]):
            made["additionalItems"] = False
        made["items"] = made.pop("prefixItems") or {}
    if not isinstance(made.get("examples", []), list):
        del made["examples"]
    return made


def _map(keyword: str, value: object) -> Any:
    """The value of a schema's keyword, with the schemas in it as AsyncAPI has them."""
    if keyword in _MAPS:
        return {name: _draft_07(each) for name, each in mapping(value).items()}
    if keyword in _LISTS or keyword in _ONES:
        several = sequence(value)
        return [_draft_07(each) for each in several] if several else _draft_07(value)
    return value


def _references(schema: object) -> Iterator[str]:
    """Names of the components that a schema refers to, each as often as it does."""
    for each in sequence(schema):
        yield from _references(each)
    found = mapping(schema)
    name = name_in(found)
    if name is not None:
        yield name
    for keyword, value in found.items():
        if keyword in _MAPS:
            yield from _references(list(mapping(value).values()))
        elif keyword in _LISTS or keyword in _ONES:
            yield from _references(value)


def told(exc: Exception) -> str:
    """What an error says, in one line and without pydantic's link."""
    text = re.split(r"\n+For further information", str(exc))[0]
    return " ".join(text.split())[:400] or type(exc).__name__
