"""Values for examples: what a string of a format, or a number within limits, may look like. The same in every run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from dispytch_integrations._asyncapi_patterns import matching
from dispytch_integrations._asyncapi_schemas import Schema

__all__ = ["numbers", "texts"]

_UUID = "6f1c2d9e-0b7a-{version}c3e-9d52-1a2b3c4d5e{index:02x}"

_FORMATS: dict[str, tuple[str, ...]] = {
    # With a zone, without, and what is in the future or in the past wherever it is asked for.
    "date-time": (
        "2026-01-31T12:00:00Z", "2026-01-31T12:00:00", "2999-01-31T12:00:00Z", "2999-01-31T12:00:00",
        "2001-01-31T12:00:00Z", "2001-01-31T12:00:00",
    ),
    "date": ("2026-01-31", "2999-01-31", "2001-01-31"),
    "time": ("12:00:00", "12:00:00Z"),
    "duration": ("PT1H", "P1D", "PT0S"),
    "email": ("user@example.com",),
    "idn-email": ("user@example.com",),
    "name-email": ("User <user@example.com>",),
    "hostname": ("example.com",),
    "uri": (
        "https://example.com/", "ftp://example.com/", "file:///example", "ws://example.com/",
        "redis://example.com:6379/0", "amqp://example.com:5672/", "kafka://example.com:9092", "nats://example.com:4222",
    ),
    "multi-host-uri": ("postgresql://user@example.com:5432/name", "mongodb://example.com:27017/name"),
    "ipv4": ("192.0.2.1",),
    "ipv6": ("2001:db8::1",),
    "ipvanyaddress": ("192.0.2.1",),
    "ipv4network": ("192.0.2.0/24",),
    "ipv6network": ("2001:db8::/32",),
    "ipvanynetwork": ("192.0.2.0/24",),
    "ipv4interface": ("192.0.2.1/24",),
    "ipv6interface": ("2001:db8::1/32",),
    "ipvanyinterface": ("192.0.2.1/24",),
    "path": ("name.txt",),
    "file-path": ("name.txt",),
    "directory-path": ("/",),
    "regex": ("^[a-z]+$",),
    "color": ("#102030",),
    "phone": ("tel:+1-202-555-0123", "+12025550123"),
    "json-pointer": ("/name",),
    "decimal": ("9.99", "1", "0.5", "100", "-1"),
    "base64": ("dGV4dA==",),
    "base64url": ("dGV4dA==",),
    "zoneinfo": ("UTC",),
}  # fmt: skip


def texts(schema: Schema, name: str, index: int) -> Iterator[str]:
    """Strings for a schema, the likeliest first; `name`: of the field; `index`: another one for each."""
    if "format" in schema:
        yield from _of_format(schema, index)
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        shortest = schema.get("minLength")
        found = matching(pattern, shortest if isinstance(shortest, int) else 0)
        if found is not None:
            yield found
    if schema.get("contentEncoding") == "base64":
        yield "dGV4dA=="
    word = _NO_WORD.sub("-", name.lower()).strip("-") or "text"
    if index:
        word = f"{word}-{index + 1}"
    for text in (word, str(index + 1), word.upper()):
        yield _fitted(text, schema)


_NO_WORD = re.compile(r"[^a-z0-9]+")


def _of_format(schema: Schema, index: int) -> Iterator[str]:
    name = schema.get("format")
    if not isinstance(name, str):
        return
    if (version := re.fullmatch(r"uuid([1-8]?)", name)) is not None:
        yield _UUID.format(version=version[1] or "4", index=(0x6F + index) % 256)
    for text in _FORMATS.get(name, ()):
        yield re.sub(r"\d(?=\D*$)", str((index + int(re.findall(r"\d", text)[-1])) % 10), text) if index else text


def _fitted(text: str, schema: Schema) -> str:
    """`text`, made as long as is asked for."""
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    if isinstance(shortest, int) and len(text) < shortest <= 10_000:
        text = (text * (shortest // len(text) + 1))[:shortest] if text else "x" * shortest
    return text[:longest] if isinstance(longest, int) else text


def numbers(schema: Schema, index: int, *, whole: bool) -> list[Any]:
    """Numbers for a schema, the likeliest first."""
    step = schema.get("multipleOf")
    step = step if isinstance(step, (int, float)) and step > 0 else None
    lowest, highest = _limit(schema, "minimum"), _limit(schema, "maximum")
    unit = 1 if whole else 0.01
    above = _limit(schema, "exclusiveMinimum")
    below = _limit(schema, "exclusiveMaximum")
    low = max((each for each in (lowest, None if above is None else above + unit) if each is not None), default=None)
    high = min((each for each in (highest, None if below is None else below - unit) if each is not None), default=None)
    wanted: list[float] = [*([] if whole else [index + 9.99]), index + 1]
    ends = [each for each in (low, high) if each is not None]
    if above is not None and below is not None:
        ends.append((above + below) / 2)
    if low is not None:
        wanted.append(low + index)
    fitting = [each for each in wanted if _fits(each, low, high)]
    made: list[Any] = []
    for each in [*fitting, *ends]:
        value: float = each if step is None else math.ceil(each / step) * step
        made.append(int(value) if whole or value == int(value) else round(value, 10))
    return list(dict.fromkeys([*made, 0]))


def _limit(schema: Schema, name: str) -> float | None:
    value = schema.get(name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


def _fits(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
