"""Messages as rows: what is read again is what was stored."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispytch_integrations.errors import HeaderError, SerializationError
from dispytch_integrations.outbox.record import message_of, record_of
from tests.support.outboxes import message

_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["{", '{"$bytes":1}', "[", "$bytes", '"'])
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT
    | st.binary()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_TEXT, _VALUES, max_size=4))
def test_headers_and_properties_come_back_as_they_were(values: dict[str, Any]) -> None:
    """Whatever a transport takes: bytes, dates, tables within tables, and texts that look like our own tags."""
    stored = record_of(message(1, headers=values, properties=values))
    again = message_of(stored)
    assert again.headers == values
    assert again.properties == values
    assert [type(value) for value in again.headers.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize("text", ["[1]", "1", '"x"', "nul", "", '{"a":{"$unknown":1}}', '{"a":{"$bytes":"%"}}'])
def test_what_cannot_be_read_says_so_without_repeating_it(text: str) -> None:
    """A damaged row is dead, and its error stands in logs and in the admin: nothing of its content does."""
    stored = record_of(message(1))
    stored.headers = text
    with pytest.raises(SerializationError) as caught:
        message_of(stored)
    assert stored.event_id in str(caught.value)
    assert len(text) < 3 or text not in str(caught.value)


@pytest.mark.parametrize("value", [object(), {1, 2}, {1: 2}, float("nan"), [object()]])
def test_what_cannot_be_stored_is_refused_at_the_call(value: object) -> None:
    """In the relay it would be too late: the transaction that it belongs to is committed."""
    with pytest.raises(HeaderError):
        record_of(message(1, headers={"given": value}))


def test_dates_without_a_zone_are_in_utc() -> None:
    """Else the relay, perhaps on a machine elsewhere, would send another time."""
    naive = datetime(2026, 5, 1, 12)
    again = message_of(record_of(message(1, headers={"at": naive, "price": Decimal("1.50")})))
    assert again.headers == {"at": naive.replace(tzinfo=UTC), "price": Decimal("1.50")}
