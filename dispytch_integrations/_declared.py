"""What users declare with keywords, routes and configurations: a slip is answered with what to write.

Type checkers see nothing of it: they know the keywords from the fields.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from dispytch_integrations._templates import nearest

__all__ = ["Declared"]


class Declared(BaseModel):
    """A model that is written with keywords.

    Raises TypeError for a value without its name, ValidationError for what is not a field or has a wrong value.
    """

    if not TYPE_CHECKING:
        # Wrapped, it is pydantic's own to pydantic: it validates as fast as ever, and the signature names the fields.
        @wraps(BaseModel.__init__)
        def __init__(self, /, *values: Any, **fields: Any) -> None:
            __tracebackhide__ = True
            if values:
                raise TypeError(_with_names(type(self), values))
            try:
                super().__init__(**fields)
            except ValidationError as exc:
                told = _with_nearest(type(self), exc)
                if told is None:
                    raise
                raise told from None


def _names(cls: type[BaseModel]) -> list[str]:
    """The fields as one would write them; those that all routes have come first in the class."""
    return sorted(cls.model_fields, key=lambda name: name == "safe")


def _with_names(cls: type[BaseModel], values: tuple[Any, ...]) -> str:
    pairs = zip(_names(cls), values, strict=False)
    written = ", ".join(f"{name}={value!r}" for name, value in pairs)
    return f"the values of a {cls.__qualname__} have names: write {cls.__qualname__}({written})"


def _with_nearest(cls: type[BaseModel], error: ValidationError) -> ValidationError | None:
    """The same error, with the nearest name for one that is no field; None: there is more to tell than such names."""
    details = error.errors(include_url=False, include_context=False)
    if not any(detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1 for detail in details):
        return None
    if any(detail["type"] not in ("extra_forbidden", "missing") or len(detail["loc"]) != 1 for detail in details):
        return None
    names = _names(cls)
    lines: list[InitErrorDetails] = []
    hints = ""
    for detail in details:
        if detail["type"] == "extra_forbidden":
            name = str(detail["loc"][0])
            hint = nearest(name, names)
            hints += hint
            told = f"a {cls.__qualname__} has no {name!r}{hint}; it has {', '.join(names)}"
            kind = PydanticCustomError("extra_forbidden", "{told}", {"told": told})
            lines.append(InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"]))
    # What is missing because it is misspelt was told.
    lines += [
        InitErrorDetails(type="missing", loc=detail["loc"], input=detail["input"])
        for detail in details
        if detail["type"] == "missing" and f"{detail['loc'][0]!r}?" not in hints
    ]
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)
