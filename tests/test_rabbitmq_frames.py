"""AMQP frames written by hand are read back by pamqp as what they were."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from dispytch_integrations._rabbitmq_frames import encode_table, publish_frames
from dispytch_integrations.errors import HeaderError, MessageTooLargeError
from dispytch_integrations.message import Message

_FRAME_MAX = 4096

_text = st.text(st.characters(exclude_categories=["Cs"]))
_short = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
_scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text
    | st.binary(max_size=40).map(bytearray)
    | st.datetimes(datetime(1970, 1, 1), datetime(2106, 1, 1), timezones=st.just(UTC)).map(
        lambda moment: moment.replace(microsecond=0)
    )
    | st.integers(-(2**31), 2**31 - 1).map(lambda number: Decimal(number).scaleb(-3))
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_short, inner, max_size=3), max_leaves=6
)


def _read(data: bytes) -> list[Any]:
    frames: list[Any] = []
    while data:
        used, channel, read = frame.unmarshal(data)
        assert channel == 3
        frames.append(read)
        data = data[used:]
    return frames


def _message(headers: dict[str, Any], properties: dict[str, Any], payload: bytes = b"{}") -> Message:
    return Message("id", "Event", "default", "exchange", None, headers, properties, payload)


@given(headers=st.dictionaries(_short, _values, max_size=4), payload=st.binary(max_size=3 * _FRAME_MAX))
def test_headers_and_body_are_read_back(headers: dict[str, Any], payload: bytes) -> None:
    """A wrong length or type would close the connection of everybody who shares it."""
    message = _message(headers, {"routing_key": "k", "mandatory": True}, payload)
    try:
        publish, header, *bodies = _read(publish_frames(3, message, "m1", _FRAME_MAX))
    except MessageTooLargeError:
        assert len(encode_table(headers)) > _FRAME_MAX - 300
        return
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("exchange", "k", True)
    assert isinstance(header, ContentHeader)
    assert (header.properties.headers or {}) == headers
    assert (header.properties.message_id, header.properties.delivery_mode) == ("m1", 2)
    assert header.properties.content_type == "application/json"
    assert header.body_size == len(payload)
    assert all(isinstance(body, ContentBody) for body in bodies)
    assert b"".join(body.value for body in bodies) == payload


@given(
    st.fixed_dictionaries(
        {"routing_key": _short, "mandatory": st.booleans()},
        optional={
            "content_type": _short, "content_encoding": _short, "correlation_id": _short, "reply_to": _short,
            "type": _short, "user_id": _short, "app_id": _short, "priority": st.integers(0, 255),
            "delivery_mode": st.sampled_from([1, 2]), "timestamp": st.integers(0, 2**32 - 1),
            "expiration": st.integers(0, 10**9).map(str),
        },
    )
)  # fmt: skip
def test_properties_are_read_back(properties: dict[str, Any]) -> None:
    """Flags and order of the properties are AMQP's: one bit off, and a priority is read as an expiration."""
    publish, header, _ = _read(publish_frames(3, _message({"a": "b"}, properties), "m1", _FRAME_MAX))
    assert (publish.routing_key, publish.mandatory) == (properties["routing_key"], properties["mandatory"])
    read = header.properties
    for name, value in properties.items():
        if name == "timestamp":
            assert read.timestamp == datetime.fromtimestamp(value, UTC)
        elif name not in ("routing_key", "mandatory"):
            assert getattr(read, "message_type" if name == "type" else name) == value
    for name in ("priority", "expiration", "correlation_id", "app_id"):
        if name not in properties:
            assert getattr(read, name) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n" * 129, ""),
        ("big", 2**63),
        ("object", object()),
        ("exact", Decimal("1e40")),
        ("nan", float("nan")),
        ("infinite", [float("-inf")]),
        ("old", datetime(1960, 1, 1, tzinfo=UTC)),
    ],
)
def test_what_amqp_cannot_carry_is_refused(name: str, value: Any) -> None:
    """pamqp cuts a long name without a word; an error says which header it is."""
    with pytest.raises(HeaderError, match=name[:3]):
        encode_table({name: value})
