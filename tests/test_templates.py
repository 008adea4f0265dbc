"""`{field}` parts: whatever a value holds, an event goes where its class says, or nowhere."""

from __future__ import annotations

import unicodedata
from datetime import date
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, computed_field

from dispytch_integrations._templates import Template, compile_key, compile_route_part, compile_text, nearest
from dispytch_integrations.errors import RouteError

DELIMITERS = ".:/*#>?[]{}"


class Address(BaseModel):
    city: str
    lines: list[str] = []


class Color(Enum):
    RED = "red"


class Size(StrEnum):
    BIG = "big"


class Level(IntEnum):
    HIGH = 3


class Person(BaseModel):
    name: str = "anna"
    age: int = 30
    nick: str | None = None
    born: date = date(2001, 2, 3)
    height: Decimal = Decimal("1.70")
    id: UUID = UUID(int=7)
    color: Color = Color.RED
    size: Size = Size.BIG
    level: Level = Level.HIGH
    address: Address = Address(city="Bern", lines=["first", "second"])
    second_home: Address | None = None
    labels: dict[str, str] = {"team": "blue"}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def initial(self) -> str:
        return self.name[:1]


def fill_route(text: str, value: Any, safe: str = "") -> Any:
    """The route `text` filled from an event whose `name` is `value`, unvalidated: the worst that can come."""
    template = Template(text, "Person.__route__: topic")
    template.check(Person, "Person.__route__: topic")
    return compile_route_part(template, safe, "topic")(Person.model_construct(name=value))


def fill(text: str, person: Person | None = None) -> Any:
    template = Template(text, "Person.__route__: topic")
    template.check(Person, "Person.__route__: topic")
    return compile_route_part(template, DELIMITERS, "topic")(person or Person())


# -- whatever the value ------------------------------------------------------------------------------------------------


@given(st.text())
@example("")
@example("a.b")
@example("\u202eevil")
@example("a\u200bb")
@example("\ud800")
@example("x" * 10_000 + ".")
def test_value_stands_in_the_route_unchanged_or_is_refused(value: str) -> None:
    """A tenant named "x.admin" must not reach the topic of x's admins, whatever the tenant's name is."""
    try:
        filled = fill_route("orders-{name}", value)
    except RouteError:
        return
    assert filled == f"orders-{value}"
    assert value
    assert not set(value) & set(DELIMITERS)
    assert not {unicodedata.category(character) for character in value} & {"Cc", "Cs", "Zs", "Zl", "Zp"}


@pytest.mark.parametrize(
    "character",
    ["\u00ad", "\u034f", "\u061c", "\u200b", "\u202e", "\u2028", "\u3164", "\ufe0f", "\ufeff", "\U000e0041"],
)
def test_invisible_characters_are_refused_in_a_route(character: str) -> None:
    """Two tenants whose names look the same must not have two topics, nor one pose as the other."""
    with pytest.raises(RouteError, match="invisible"):
        fill_route("{name}", f"acme{character}", safe=DELIMITERS)


@given(st.text(alphabet=st.characters(categories=["L", "N"]) | st.sampled_from("-_@+%&=!,;()$'"), min_size=1))
def test_names_of_every_language_are_taken(value: str) -> None:
    """The check must not refuse what is harmless: letters, digits, and the signs that no broker reads."""
    assert fill_route("{name}", value) == value


@given(st.sampled_from(DELIMITERS), st.sampled_from(DELIMITERS))
def test_safe_allows_exactly_what_it_names(allowed: str, used: str) -> None:
    """`safe="."` opens one door, not all of them."""
    if used == allowed:
        assert fill_route("{name}", f"a{used}b", safe=allowed) == f"a{used}b"
    else:
        with pytest.raises(RouteError, match="safe="):
            fill_route("{name}", f"a{used}b", safe=allowed)


@given(st.characters(categories=["Cc", "Cs"]))
def test_control_characters_are_refused_even_where_all_delimiters_are_safe(character: str) -> None:
    """A line feed or a lone surrogate in a topic is an attack or an accident, never a name."""
    with pytest.raises(RouteError):
        fill_route("{name}", f"a{character}b", safe=DELIMITERS)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])))
@example("bob@example.com")
@example("a.b/c d#*>")
def test_keys_and_headers_take_any_text_without_control_characters(value: str) -> None:
    """An e-mail address is a good key: what routes refuse leads nowhere in a key."""
    key = compile_key("{name}", Person, "Person.__ordering_key__")
    assert key(Person.model_construct(name=value)) == value


@given(st.characters(categories=["Cc", "Cs"]))
def test_keys_and_headers_refuse_control_characters(character: str) -> None:
    """A line feed in a header can forge a second header on the way."""
    key = compile_key("customer {name}", Person, "Person.__ordering_key__")
    with pytest.raises(RouteError, match="control character"):
        key(Person.model_construct(name=f"a{character}b"))


@given(st.text(alphabet="ab{}!:.[]0_ ", max_size=12))
def test_any_text_is_a_template_or_a_route_error(text: str) -> None:
    """A typing error in a route must be told as one, not as an IndexError from deep inside."""
    refusal = None
    try:
        Template(text, "Person.__route__: topic").check(Person, "Person.__route__: topic")
    except RouteError as error:
        refusal = str(error)
    assert refusal is None or "Person.__route__: topic" in refusal


@given(st.text())
def test_doubled_braces_are_literal(text: str) -> None:
    """As in `str.format`: whoever needs a brace can write it."""
    escaped = text.replace("{", "{{").replace("}", "}}")
    template = Template(escaped, "owner")
    assert template.literal == text
    assert compile_text(template, "header")(None) == text


@given(st.text(alphabet="abc.-{}", min_size=1, max_size=8), st.text(alphabet="abcXYZ09", min_size=1))
def test_constant_parts_may_hold_delimiters(around: str, value: str) -> None:
    """What the class's author wrote is meant; only values are checked."""
    escaped = around.replace("{", "{{").replace("}", "}}")
    assert fill_route(f"{escaped}{{name}}{escaped}", value) == f"{around}{value}{around}"


# -- what parts can say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("orders", "orders"),
        ("{name}", "anna"),
        ("{age}.{name}-x", "30.anna-x"),
        ("{age:05d}", "00030"),
        ("{born:%Y-%m}", "2001-02"),
        ("{height:.1f}", "1.7"),
        ("{id}", "00000000-0000-0000-0000-000000000007"),
        ("{name!s}", "anna"),
        ("{name:>6}", "  anna"),
        ("{color}", "red"),
        ("{size}", "big"),
        ("{level}", "3"),
        ("{address.city}", "Bern"),
        ("{address.lines[1]}", "second"),
        ("{labels[team]}", "blue"),
        ("{initial}", "a"),
        ("a{{b}}c", "a{b}c"),
    ],
)
def test_parts_are_filled_as_in_format_strings(text: str, filled: str) -> None:
    """Format specs, nested fields, items, enums by value, computed fields: what an author expects to work."""
    safe = DELIMITERS + " "
    template = Template(text, "owner")
    template.check(Person, "owner")
    assert compile_route_part(template, safe, "topic")(Person()) == filled


@pytest.mark.parametrize("text", ["{nick}", "x-{nick}", "{second_home.city}", "{name}"])
def test_none_and_empty_are_refused_in_a_route(text: str) -> None:
    """ "orders." or "orders.None" would be a topic that nobody reads."""
    with pytest.raises(RouteError, match=r"None|empty"):
        fill(text, Person(name=""))


def test_none_as_the_whole_of_a_key_is_no_key() -> None:
    """An optional key that is not set means: no order asked for; not the key "None", shared by all such events."""
    assert compile_key("{nick}", Person, "key")(Person()) is None
    assert compile_key("{second_home.city}", Person, "key")(Person()) is None
    assert compile_key("{nick}-{age}", Person, "key")(Person()) == "-30"


@pytest.mark.parametrize(
    "text", ["{name.upper}", "{address.lines[9]}", "{labels[nobody]}", "{name:d}", "{age:%Q}", "{address.lines:d}"]
)
def test_part_that_cannot_be_filled_is_a_route_error(text: str) -> None:
    """Whoever catches RouteError around an emit must get all of them, with the part's name."""
    with pytest.raises(RouteError, match=r"\{(address|labels|name|age)"):
        fill(text)


# -- what is refused when the class is declared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{nam}", "did you mean 'name'"),
        ("{address.ctiy}", "did you mean 'city'"),
        ("{second_home.town}", "no field of Address"),
        ("{}", "names no field"),
        ("{0}", "names no field"),
        ("{ name }", "no field"),
        ("{name", "literal braces"),
        ("name}", "literal braces"),
        ("{name!x}", "no conversion"),
        ("{name:{age}}", "format spec"),
        ("{__class__}", "private"),
        ("{address.__init__.__globals__}", "private"),
        ("{address._secret}", "private"),
        ("{address.}", "empty name"),
    ],
)
def test_wrong_part_is_found_at_declaration_and_says_what_to_write(text: str, said: str) -> None:
    """A typing error in a route shows at import, not with the first customer."""
    with pytest.raises(RouteError) as caught:
        Template(text, "Person.__route__: topic").check(Person, "Person.__route__: topic")
    assert said in str(caught.value)
    assert "Person.__route__: topic" in str(caught.value)


def test_refused_key_does_not_show_its_value() -> None:
    """Keys hold e-mail addresses and account numbers; error messages end in logs."""
    with pytest.raises(RouteError) as caught:
        compile_key("{name}", Person, "Person.__ordering_key__")(Person(name="secret\n"))
    assert "secret" not in str(caught.value)


def test_long_refused_value_is_cut() -> None:
    """An error must be readable when somebody puts a document into a topic's name."""
    with pytest.raises(RouteError) as caught:
        fill_route("{name}", "x" * 5000 + ".")
    assert len(str(caught.value)) < 400


def test_nearest_names_a_near_name_only() -> None:
    """A far-fetched suggestion is worse than none."""
    assert nearest("topik", ["topic", "exchange"]) == " (did you mean 'topic'?)"
    assert nearest("zzz", ["topic", "exchange"]) == ""
