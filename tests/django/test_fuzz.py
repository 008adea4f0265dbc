"""Whatever stands in DISPYTCH and DISPYTCH_OUTBOX: it is read, or told as a problem, without secrets."""

from __future__ import annotations

from typing import Any

import pytest
from django.test.utils import override_settings
from hypothesis import example, given
from hypothesis import strategies as st

from dispytch_integrations.django import conf
from dispytch_integrations.django.outbox import conf as outbox
from dispytch_integrations.django.outbox.conf import too_slow
from dispytch_integrations.outbox import RelayOptions
from tests.test_fuzz import _ANYTHING, _TEXT, SECRET, fuzz, mutated, option_mappings, outcome, told_apart, urls

_PATHS = st.sampled_from(
    [
        "",
        ".",
        "..",
        ".a",
        "..a.b",
        "a.",
        "a..b",
        "nowhere.at_all",
        "json.JSONDecoder",
        "json.dumps",
        "decimal.Decimal",
        "a\x00.b",
        "dispytch_integrations.serialization.Serializer",
        "dispytch_integrations.hooks.Hook",
        "datetime.datetime",
    ]
)


@st.composite
def brokers(draw: st.DrawFn) -> Any:
    """One alias of DISPYTCH."""
    scheme, options = draw(option_mappings())
    known = {
        str(name).upper() if draw(st.booleans()) else name: value for name, value in options.items() if name != "client"
    }
    known |= draw(st.dictionaries(st.sampled_from(["SERIALIZER", "ON_TIMEOUT"]), _PATHS))
    known |= draw(st.dictionaries(st.just("HOOKS"), st.lists(_PATHS | _ANYTHING, max_size=2) | _ANYTHING))
    known |= draw(st.dictionaries(st.sampled_from(["URL", "MAX_PENDING", "OPTIONS", "url"]), _ANYTHING, max_size=1))
    if "client" in options:
        known["OPTIONS"] = options["client"]
    known.setdefault("URL", draw(st.just(f"{scheme}://h/mymaster") | urls().filter(told_apart)))
    return known


@fuzz
@given(
    _ANYTHING | st.dictionaries(_TEXT | st.integers(), brokers() | _ANYTHING | mutated().filter(told_apart), max_size=2)
)
@example({"default": {"URL": "memory://", "SERIALIZER": "..a.b"}})
@example({"default": {"URL": "memory://", "SERIALIZER": "dispytch_integrations.serialization.Serializer"}})
@example({"default": {"URL": "memory://", "OPTIONS": {3: 4}}})
@example({"default": {"URL": f"redis://:{SECRET}@h"}})
def test_any_brokers_are_read_or_told(given: Any) -> None:
    """The checks of `manage.py check` must tell all that is wrong, and not end with the first surprise."""
    with override_settings(DISPYTCH=given):
        read = outcome(conf.read)
    assert read is not None
    assert SECRET not in repr(read)
    assert SECRET not in " ".join(map(str, read.problems))
    outcome(lambda: too_slow(read.specs, RelayOptions()))


@fuzz
@given(
    _ANYTHING
    | st.dictionaries(
        st.sampled_from([name.upper() for name in RelayOptions.__slots__] + ["DATABASES", "EMBEDDED", "DIRECT_EMITS"])
        | _TEXT
        | st.integers(),
        _ANYTHING | _PATHS | st.lists(st.sampled_from(["default", "archive"])),
        max_size=4,
    )
)
@example({"KEEP_SENT": float("inf")})
@example({"LEASE": 10**400})
def test_any_outbox_is_read_or_told(given: Any) -> None:
    """What is read is what a relay works with: it never has to refuse it."""
    with override_settings(DISPYTCH_OUTBOX=given):
        read = outcome(outbox.read)
    assert read is not None
    with override_settings(DISPYTCH={"default": {"URL": "memory://"}}):
        outcome(lambda: too_slow(conf.read().specs, read.options))


@pytest.mark.parametrize("name", ["SERIALIZER", "HOOKS", "ON_TIMEOUT"])
def test_a_path_that_raises_at_its_import_is_told(name: str) -> None:
    """The project's module may raise anything; the checks say where it is named."""
    path = "..a.b"
    broker = {"URL": "memory://", name: [path] if name == "HOOKS" else path}
    with override_settings(DISPYTCH={"default": broker}):
        [problem] = conf.read().problems
    assert name in str(problem)
