"""Whatever is given, by users or by a damaged row: it works, or an error of ours says why, soon and without secrets.

`FUZZ=5000` in the environment (`make fuzz`) raises the number of examples, and draws new ones each time. Bugs that were
found so have plain tests beside them; it is one long file since all of it is made of the same values.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dispytch_integrations import EventBase, connect
from dispytch_integrations._cli_import import config_of
from dispytch_integrations._cli_options import above_zero, duration, relay_options, state, whole
from dispytch_integrations._cli_relay import engine_of
from dispytch_integrations._outlet import Outlet
from dispytch_integrations._templates import Template, compile_text
from dispytch_integrations.backend import BrokerOptions, BrokerURL
from dispytch_integrations.errors import ConfigurationError, DispytchError, HeaderError, RouteError, SerializationError
from dispytch_integrations.kafka import KafkaBackend, KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryBackend, MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.record import ENCODED, Record, message_of, record_of
from dispytch_integrations.rabbitmq import RabbitMQBackend, RabbitMQEventConfig, RabbitMQEventRoute
from dispytch_integrations.redis import RedisBackend, RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.settings import load_brokers
from tests.support.outboxes import message

T = TypeVar("T")
SECRET = "Zq7hush"
SECONDS = 2.0
FUZZ = int(os.environ.get("FUZZ", "0"))

# Slow strategies are no mistake here, and with FUZZ each run is to find something new.
fuzz = settings(
    max_examples=FUZZ or 60,
    derandomize=bool(os.environ.get("CI")) and not FUZZ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def outcome(run: Callable[[], T], *also: type[Exception], secret: bool = False) -> T | None:
    """What `run` gives; None where it raises an error of ours, or one of `also`. With `secret`: SECRET is told nowhere.

    The processor's time counts, not the clock's: other tests run beside this one.
    """
    began = time.thread_time()
    found = None
    try:
        found = run()
    except (DispytchError, *also) as exc:  # type: ignore[misc]
        told = "".join(traceback.format_exception(exc)) + repr(exc) + str(exc)
    else:
        told = repr(found) if secret else ""
    assert not secret or SECRET not in told, told
    assert time.thread_time() - began < SECONDS
    return found


# -- values of all kinds -----------------------------------------------------------------------------------------------

_TEXT = st.text() | st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "\n",
        "�",
        "\u202e",
        "²",
        "٣",
        "a" * 300,
        "é" * 200,
        "true",
        "none",
        "nan",
        "inf",
        "1e400",
        "-1",
        "0",
        "9" * 5000,
        "{",
        "}",
        "{x}",
        "%00",
        "%2F",
        "a,b",
        "a.b",
        "[",
        '{"$bytes":1}',
        "$bytes",
        "default",
    ]
)
_NUMBERS = (
    st.integers() | st.floats() | st.booleans() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e300, 1e-300])
)
_SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | _NUMBERS
    | _TEXT
    | st.binary(max_size=20)
    | st.decimals()
    | st.datetimes()
    | st.dates()
    | st.timedeltas()
    | st.uuids()
    | st.builds(object)
    | st.sampled_from([int, str, print, Path("/nowhere"), {1, 2}, re.compile("a"), json])
)
_ANYTHING: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(_TEXT | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def kind(value: object) -> str:
    """What a test is called after, where the value itself cannot be written."""
    return type(value).__name__


def cyclic() -> Any:
    """A list that holds itself."""
    value: list[Any] = []
    value.append(value)
    return value


# -- brokers' URLs -----------------------------------------------------------------------------------------------------

_SCHEMES = {
    "kafka": KafkaBackend, "kafka+ssl": KafkaBackend, "rabbitmq": RabbitMQBackend, "amqp": RabbitMQBackend,
    "amqps": RabbitMQBackend, "redis": RedisBackend, "rediss": RedisBackend, "unix": RedisBackend,
    "valkey": RedisBackend, "valkeys": RedisBackend, "redis+sentinel": RedisBackend, "redis+cluster": RedisBackend,
    "memory": MemoryBackend,
}  # fmt: skip
_SECRETS = ("password", "sasl_plain_password", "keyfile_password", "sentinel_password", "ssl_password")


def options_of(scheme: str) -> list[str]:
    """The names of all options that a URL of this scheme may have."""
    backend: Any = _SCHEMES[scheme]
    return [*backend.options_type.model_fields, *backend.client_option_names(BrokerURL(scheme, ()))]


OPTIONS = {scheme: options_of(scheme) for scheme in _SCHEMES}
_HOSTS = (
    st.just("h")
    | st.sampled_from(
        [
            "",
            "h",
            "localhost:9092",
            "h:0",
            "h:65536",
            "h:٣",
            "[::1]",
            "[::1]:6379",
            "[::1",
            "::1",
            "h1,h2:1",
            "h,",
            ",",
            "kafka",
            "redis",
            "a b",
            "h\x00",
            "h�",
            "%41",
            "x" * 300,
        ]
    )
    | st.text(max_size=8)
)
_PATHS = st.just("") | st.sampled_from(
    ["/", "/0", "/x", "//", "/mymaster/0", "/mymaster/x", "/%2F", "/" + "9" * 5000, "/٣", "/²"]
)
_CREDENTIALS = st.sampled_from(["", f"u:{SECRET}@", f":{SECRET}@", f"u:{SECRET}%2F%40@", f"u:a:{SECRET}@", "u@"]) | (
    st.text(max_size=4).map(lambda text: f"u:{text}{SECRET}{text}@")
)


@st.composite
def urls(draw: st.DrawFn) -> str:
    """A URL whose parts are known ones, or nearly."""
    scheme = draw(st.sampled_from(list(_SCHEMES)) | st.text("kafredis+:/", max_size=8))
    known = OPTIONS.get(scheme, ["timeout"])
    query = draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=5), _TEXT, max_size=3))
    for name in _SECRETS:
        if name in query:
            query[name] = SECRET
    encoded = urlencode(query, errors="replace")
    return f"{scheme}://{draw(_CREDENTIALS)}{draw(_HOSTS)}{draw(_PATHS)}" + (f"?{encoded}" if encoded else "")


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A URL of which some characters are others."""
    url = draw(urls())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(url)))
        url = (
            url[:at]
            + draw(st.sampled_from(["", "@", "/", ":", "?", "#", "%", "&", "=", "[", "]", ",", "\n", "\ud800"]))
            + url[at + draw(st.integers(0, 1)) :]
        )
    return url


def told_apart(url: str) -> bool:
    """Is the secret in this URL still in the place of a password?"""
    return SECRET not in url or re.search(rf"\A\s*[A-Za-z][^:/]*://[^@]*{SECRET}[^@]*@[^@]*\Z", url) is not None


@fuzz
@given(_TEXT | urls() | mutated())
def test_any_text_is_a_url_or_a_configuration_error(text: str) -> None:
    parsed = outcome(lambda: BrokerURL.parse(text))
    if parsed is not None:
        outcome(lambda: BrokerURL.parse(str(parsed)))


@fuzz
@given(urls() | mutated())
@example("redis://h/" + "9" * 5000)
def test_any_url_is_loaded_or_refused_and_tells_no_password(url: str) -> None:
    secret = told_apart(url)
    outcome(lambda: load_brokers(url, {}), secret=secret)
    brokers = connect(url)
    outcome(brokers.load, secret=secret)
    assert not secret or SECRET not in repr((brokers, brokers.brokers))


def test_a_password_in_a_query_that_is_not_readable_is_not_told() -> None:
    """`?password:...` is a slip of the keyboard, and tracebacks with their causes end in logs."""
    with pytest.raises(ConfigurationError) as caught:
        BrokerURL.parse(f"redis://h?password:{SECRET}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("host", ["h\0", "h\x1b[2J", "h\ud800"])
def test_a_host_holds_no_control_characters(host: str) -> None:
    """Hosts stand in errors and logs, where such characters hide or forge lines."""
    with pytest.raises(ConfigurationError, match="host"):
        BrokerURL.parse(f"redis://{host}:6379")


@pytest.mark.parametrize("option", ["source", "prefix", "cloudevents"])
@pytest.mark.parametrize("value", ["a\nb", "\ud800"])
def test_what_stands_in_every_message_holds_no_control_characters(option: str, value: str) -> None:
    """What an event's own headers and names may not hold, settings may not either: it would forge a header."""
    with pytest.raises(ConfigurationError, match=f"{option}.*control character"):
        load_brokers("memory://", {option: value})


# -- mappings of settings ----------------------------------------------------------------------------------------------

_WORKING = {name: {"url": f"{name}://h"} for name in _SCHEMES} | {
    "memory": {"url": "memory://"},
    "unix": {"url": "unix:///run/redis.sock"},
    "redis+sentinel": {"url": "redis+sentinel://h/mymaster"},
}
_NOT_CALLED = st.functions(like=lambda *args: None, returns=st.just(SECRET), pure=True)


@st.composite
def option_mappings(draw: st.DrawFn) -> tuple[str, dict[Any, Any]]:
    """A scheme, and options of any type; those that are secrets hold SECRET."""
    scheme = draw(st.sampled_from(list(_SCHEMES)))
    names = st.sampled_from(OPTIONS[scheme]) | _TEXT | st.integers() | st.none()
    given: dict[Any, Any] = draw(st.dictionaries(names, _ANYTHING, max_size=3))
    if draw(st.booleans()):
        given["client"] = draw(st.dictionaries(names, _ANYTHING, max_size=3))
    mappings: list[dict[Any, Any]] = [each for each in (given, given.get("client")) if isinstance(each, dict)]
    for mapping in mappings:
        for name in _SECRETS:
            if name in mapping or draw(st.integers(0, 9)) == 0:
                mapping[name] = draw(
                    st.sampled_from([SECRET, [SECRET], {SECRET: SECRET}, SECRET.encode(), lambda: SECRET])
                )
    return scheme, given


@fuzz
@given(option_mappings(), st.booleans())
@example(("memory", {3: 4}), True)
@example(("redis", {"client": {3: 4}}), True)
@example(("kafka", {"sasl_mechanism": "PLAIN", "username": "u", "client": {"sasl_plain_password": SECRET}}), True)
def test_any_options_are_taken_or_refused_and_tell_no_password(given: tuple[str, dict[Any, Any]], near: bool) -> None:
    scheme, options = given
    keywords = {} if near else {str(name): value for name, value in options.items()}
    config = {"default": {**_WORKING[scheme], **(options if near else {})}}
    specs = outcome(lambda: load_brokers(config, keywords), secret=True)
    brokers = outcome(lambda: connect(config, **keywords), TypeError, secret=True)
    if brokers is not None:
        outcome(brokers.load, secret=True)
    for spec in specs or ():
        assert SECRET not in repr((spec, spec.options, spec.backend, spec.backend.address))


@fuzz
@given(_ANYTHING | st.dictionaries(_TEXT, _ANYTHING | urls()))
def test_anything_is_a_configuration_or_an_error(config: Any) -> None:
    outcome(lambda: load_brokers(config, {}))


@fuzz
@given(option_mappings())
@example(("kafka", {"timeout": float("inf")}))
@example(("kafka", {"timeout": 1e300}))
def test_what_was_taken_gives_a_client_its_options_or_is_a_configuration_error(
    given: tuple[str, dict[Any, Any]],
) -> None:
    scheme, options = given
    specs = outcome(lambda: load_brokers({"default": {**_WORKING[scheme], **options}}, {}))
    for spec in specs or ():
        backend: Any = spec.backend
        if isinstance(backend, KafkaBackend):
            made = outcome(backend._client_options)
            timeout = 0 if made is None else made.get("request_timeout_ms")
            assert not isinstance(timeout, int) or timeout < 2**31 or "request_timeout_ms" in str(options)


# -- routes, keys and headers ------------------------------------------------------------------------------------------

_REFUSED = ".:/*#>?[]{}"


class Word(Enum):
    PLAIN = "plain"
    DOTTED = "a.b"
    NOTHING = ""
    BYTES = b"\n"
    NUMBER = 1.5


class Level(IntEnum):
    HIGH = 3


class Person(BaseModel):
    name: Any = "anna"
    nick: Any = None


class Anything(EventBase):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    a: Any = None
    b: Any = None
    person: Person = Person()
    things: Any = {}


class Text(str):
    """A text that is not a `str` alone."""


_VALUES: st.SearchStrategy[Any] = (
    _ANYTHING
    | st.sampled_from([*Word, Level.HIGH, Text("a.b"), Text("a\nb"), "a\x7f", b"a\nb", b"\xff"])
    | st.builds(Person, name=_SCALARS, nick=_SCALARS)
    | st.text("ab.\n\ud800 ", max_size=5)
)
_EVENTS = {
    "a": _VALUES,
    "b": _VALUES,
    "name": _VALUES,
    "things": st.dictionaries(st.text("ab", max_size=1), _VALUES) | _VALUES,
}
_LITERALS = st.text("ab.-:", max_size=3) | st.sampled_from(["", "{{", "}}", "\ud800", "\n", " ", "é", "x" * 250])
_FIELDS = st.sampled_from(
    [
        "{a}",
        "{b}",
        "{a}",
        "{b}",
        "{person.name}",
        "{person.nick}",
        "{person[name]}",
        "{things[a]}",
        "{things[0]}",
        "{a!r}",
        "{a!s}",
        "{a!a}",
        "{a:>5}",
        "{a:.2f}",
        "{a:c}",
        "{a:x}",
        "{a:%Y}",
        "{a:f}",
        "{a:,}",
        "{a.real}",
        "{a.value}",
        "{c}",
        "{a:%�}",
        "{things[²]}",
        "{things[-1]}",
        "{things." + "a." * 50 + "a}",
        "{things[" + "9" * 5000 + "]}",
        "{",
        "}",
    ]
) | st.text("ab{}[].!:0", max_size=6)
_PIECES = st.lists(_LITERALS | _FIELDS, max_size=4)
_SAFE = st.sampled_from(["", "", ".", " ", _REFUSED]) | st.text(max_size=3)
_HEADERS = st.dictionaries(_TEXT | st.sampled_from(["data", "ce_id", "X"]), _VALUES, max_size=3) | _VALUES


@st.composite
def declared(draw: st.DrawFn) -> tuple[list[str], str, Callable[[], type[Anything]]]:
    """The pieces of a route's text, what is safe in it, and what declares the event's class."""
    pieces, safe = draw(_PIECES), draw(_SAFE)
    text, other = "".join(pieces), "".join(draw(_PIECES))
    key = draw(st.none() | _PIECES.map("".join))
    value: Any = draw(st.none() | _PIECES.map("".join) | _VALUES)
    kind = draw(st.sampled_from(["kafka", "rabbitmq", "redis", "stream"]))
    name: Any = draw(st.sampled_from([None, None, "shop.placed", "", "a\nb", "\ud800", "x" * 300, 3]))
    config = draw(st.booleans())

    def declare() -> type[Anything]:
        made: dict[str, Any] = {"__module__": __name__, "__ordering_key__": key, "__annotations__": {}}
        if name is not None:
            made["__event_type__"] = name
        if kind == "kafka":
            made["__route__"] = KafkaEventRoute(topic=text, safe=safe)
            if config:
                made["__backend_config__"] = KafkaEventConfig(partition_key=value, headers={"given": value})
        elif kind == "rabbitmq":
            made["__route__"] = RabbitMQEventRoute(exchange=text, routing_key=other, safe=safe)
            if config:
                made["__backend_config__"] = RabbitMQEventConfig(
                    correlation_id=other, headers={"given": value}, expiration=value, timestamp=value
                )
        elif kind == "redis":
            made["__route__"] = RedisEventRoute(channel=text, safe=safe)
        else:
            made["__route__"] = RedisStreamEventRoute(stream=text, safe=safe)
        return type("Declared", (Anything,), made)

    return pieces, safe, declare


@fuzz
@given(
    declared(),
    st.fixed_dictionaries(_EVENTS),
    _HEADERS | st.none(),
    st.booleans() | _TEXT,
    st.none() | _TEXT,
    st.just("") | _TEXT,
)
def test_an_event_goes_where_its_class_says_or_nowhere(
    declaration: tuple[list[str], str, Callable[[], type[Anything]]],
    values: dict[str, Any],
    headers: Any,
    cloudevents: bool | str,
    source: str | None,
    prefix: str,
) -> None:
    pieces, safe, declare = declaration
    # pydantic's own errors tell of a configuration that is none, and are ValueErrors.
    cls = outcome(declare, ValidationError)
    if cls is None:
        return
    event = cls.model_construct(
        a=values["a"],
        b=values["b"],
        things=values["things"],
        person=Person.model_construct(name=values["name"], nick=None),
    )

    def prepare() -> Message:
        options = BrokerOptions(cloudevents=cloudevents, source=source, prefix=prefix)
        outlet = Outlet(
            MemoryProducer(), timeout=5, prefix=options.prefix, cloudevents=options.cloudevents, source=options.source
        )
        return outlet.compile(cls)(event, headers)

    prepared = outcome(prepare, ValidationError)
    if prepared is None:
        return
    refused = "".join(re.escape(character) for character in _REFUSED if character not in safe)
    space = "" if any(character.isspace() for character in safe) else r"\s"
    filled = f"[^{refused}{space}\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
    text = re.sub(r"\{\{|\}\}|\{[^{}]*\}", lambda found: "\0" + found.group(), "".join(pieces))
    expected = "".join(
        ""
        if not part
        else (
            re.escape(part[0]) + re.escape(part[2:])
            if part[:2] in ("{{", "}}")
            else filled + re.escape(part.partition("}")[2])
        )
        if number
        else re.escape(part)
        for number, part in enumerate(text.split("\0"))
    )
    # RabbitMQ's default exchange, "", has no name to put a prefix before.
    assert re.fullmatch(re.escape(prefix if prepared.destination else "") + expected, prepared.destination, re.DOTALL)
    check_sendable(prepared)


def check_sendable(prepared: Message) -> None:
    """Nothing in it breaks the transport: every text can be encoded, no key or header holds a control character."""
    for text in (prepared.destination, prepared.ordering_key or "", prepared.type, *prepared.headers):
        text.encode()
    control = re.compile("[\x00-\x1f\x7f-\x9f]")
    assert control.search(prepared.ordering_key or "") is None
    for name, value in prepared.headers.items():
        assert control.search(name) is None
        assert not isinstance(value, str) or control.search(value) is None
    check_texts(prepared.headers)
    check_texts(prepared.properties)
    again = outcome(lambda: message_of(record_of(prepared)))
    if again is not None:
        assert (again.destination, again.ordering_key, again.payload) == (
            prepared.destination,
            prepared.ordering_key,
            prepared.payload,
        )


def check_texts(value: Any) -> None:
    """Every text in a header or property can be encoded."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        check_texts(list(value) + list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_texts(item)


class Keyed(EventBase):
    __route__ = RabbitMQEventRoute(exchange="", routing_key="orders")
    __ordering_key__ = "{key}"

    key: Any = Field(default=None, exclude=True)


def prepared(event: EventBase, headers: Any = None) -> Message:
    return Outlet(MemoryProducer(), timeout=5).compile(type(event))(event, headers)


@pytest.mark.parametrize("key", [Text("a\nb"), Path("a\nb"), ["\x7f"], ["\ud800"], Person(name="\x9f")])
def test_a_key_of_any_type_holds_no_control_characters(key: Any) -> None:
    """A key that is no `str` reaches the broker as text all the same, and is looked at as such."""
    with pytest.raises(RouteError):
        prepared(Keyed(key=key))


def test_a_binary_key_is_text_or_its_digits() -> None:
    """Ids of sixteen bytes are UTF-8 now and then: they are keys like the others, and not refused."""
    assert prepared(Keyed(key=b"abc")).ordering_key == "abc"
    assert prepared(Keyed(key=b"\xff\x00")).ordering_key == "ff00"
    assert prepared(Keyed(key=b"\x00\n")).ordering_key == "000a"


@pytest.mark.parametrize("key", [10**5000, deep(20_000), cyclic(), object], ids=kind)
def test_a_value_that_does_not_become_text_is_a_route_error(key: Any) -> None:
    """Whoever catches RouteError around an emit gets all that is wrong with a route or key."""
    outcome(lambda: prepared(Keyed(key=key)))
    for spec in ("", "!r", ":c", ":f", ":>5"):
        filler = compile_text(Template("{key" + spec + "}", "owner"), "key")
        outcome(partial(filler, Keyed(key=key)))


@pytest.mark.parametrize("value", [deep(20_000), cyclic(), ["\ud800"], {"\ud800": 1}, {"a": {"b": "\udfff"}}], ids=kind)
def test_a_header_that_cannot_be_written_is_refused_at_the_call(value: Any) -> None:
    """In the relay it would be too late, and dead after its attempts."""
    with pytest.raises(HeaderError):
        prepared(Keyed(), {"given": value})


@pytest.mark.parametrize("text", ["a\nb", "\ud800", "a{key}\x7f"])
@pytest.mark.parametrize("place", ["__route__", "__ordering_key__", "__event_type__"])
def test_what_a_class_says_holds_no_control_characters(text: str, place: str) -> None:
    """Else each emit fails, at the broker or in its database, and not the import."""
    value: Any = RedisEventRoute(channel=text) if place == "__route__" else text
    with pytest.raises(RouteError):
        type("Declared", (Keyed,), {"__module__": __name__, place: value})


def test_an_event_type_is_a_text() -> None:
    with pytest.raises(RouteError, match="__event_type__ is a int"):
        type("Declared", (Keyed,), {"__module__": __name__, "__event_type__": 3})


def test_an_index_is_a_number_that_python_reads() -> None:
    """`"²".isdigit()` is true, and `int("²")` an error."""
    for text in ("{key[²]}", "{key[" + "9" * 5000 + "]}"):
        compiled = compile_text(Template(text, "owner"), "key")
        with pytest.raises(RouteError):
            compiled(Keyed(key=[1]))


@pytest.mark.parametrize("given", [{"timestamp": float("inf")}, {"timestamp": 1e300}, {"expiration": datetime.min}])
def test_a_time_that_amqp_cannot_hold_is_refused_where_it_is_written(given: Any) -> None:
    """With the class, and not with its first event."""
    with pytest.raises(ValidationError):
        RabbitMQEventConfig(**given)


@pytest.mark.parametrize("given", [{"partition": 2**31}, {"timestamp_ms": 2**63}])
def test_a_number_that_kafka_cannot_hold_is_refused_where_it_is_written(given: Any) -> None:
    """With the class, and not with its first event."""
    with pytest.raises(ValidationError):
        KafkaEventConfig(**given)


# -- payloads ----------------------------------------------------------------------------------------------------------


class Body(EventBase):
    __route__ = RedisEventRoute(channel="bodies")

    text: str = ""
    raw: bytes = b""
    number: int = 0
    real: float | None = 0.0
    exact: Decimal = Decimal(0)
    at: datetime | None = None
    day: date | None = None
    span: timedelta | None = None
    id: UUID | None = None
    level: Level = Level.HIGH
    word: Word = Word.PLAIN
    tree: JsonValue = None
    by_number: dict[int, str | None] = {}
    both: int | str | list[Decimal] = Field(default=0, alias="and-so")

    model_config = ConfigDict(populate_by_name=True)


class Dumped(Body):
    """Goes the longer way, by `JSONSerializer.serialize`."""

    def model_dump(self, **given: Any) -> dict[str, Any]:
        return super().model_dump(**given)


@fuzz
@given(
    st.sampled_from([Body, Dumped]),
    st.fixed_dictionaries(
        {},
        optional={
            "text": _TEXT,
            "raw": st.binary(),
            "number": st.integers(),
            "real": st.floats(),
            "exact": st.decimals(allow_nan=False, allow_infinity=False),
            "at": st.datetimes(timezones=st.none() | st.just(UTC)),
            "day": st.dates(),
            "span": st.timedeltas(timedelta(days=-9999), timedelta(days=9999)),
            "id": st.uuids(),
            "tree": st.recursive(
                st.none() | st.booleans() | st.integers(-(2**60), 2**60) | _TEXT,
                # In keys pydantic's model_dump replaces what is no text.
                lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
            )
            | st.integers(1, 40).map(deep),
            "by_number": st.dictionaries(st.integers(), st.none() | _TEXT),
            "both": st.integers() | _TEXT | st.lists(st.decimals(allow_nan=False, allow_infinity=False)),
        },
    ),
)
@example(Dumped, {"real": float("nan")})
def test_a_payload_is_json_that_the_class_reads_back(cls: type[Body], values: dict[str, Any]) -> None:
    """Whatever pydantic takes. Numbers that JSON does not know are null; text that is none is refused."""
    try:
        event = cls(**values)
    except ValidationError:
        return
    made = outcome(lambda: prepared(event))
    if made is None:
        return
    assert made.payload is not None

    def no_json(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads(made.payload, parse_constant=no_json)
    again = cls.model_validate_json(made.payload)
    if event.real is None or again.real is None:
        again.real = event.real
    assert again == event


def test_a_payload_that_is_nested_too_deeply_is_refused() -> None:
    """A crash of the interpreter would take the process along."""
    for cls in (Body, Dumped):
        with pytest.raises(SerializationError):
            prepared(cls.model_construct(tree=deep(20_000)))


# -- rows of an outbox -------------------------------------------------------------------------------------------------

_NEARLY_JSON = st.sampled_from(
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        "{}{}",
        '{"a":' * 10000,
        "[" * 10000,
        '{"a":' + "[" * 10000 + "]" * 10000 + "}",
        '{"a":' * 10000 + "1" + "}" * 10000,
        '{"a":' + "9" * 5000 + "}",
        '{"a":1e400}',
        '{"a":"\\ud800"}',
        '{"a":NaN}',
        '{"a":{"$object":' * 100 + "1" + "}}" * 100,
    ]
)
_TAGGED = st.dictionaries(
    _TEXT,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["$bytes", "$datetime", "$decimal", "$object", "$new", "a"]), inner, max_size=2
            )
        ),
        max_leaves=6,
    ),
    max_size=3,
).map(json.dumps)
_COLUMNS: st.SearchStrategy[Any] = _TAGGED | _NEARLY_JSON | _TEXT | _SCALARS


class Doubling:
    """A codec that gives back what it is told to."""

    def __init__(self, given: Any = b"") -> None:
        self.given = given

    def encode(self, payload: bytes) -> bytes:
        return payload * 2

    def decode(self, stored: bytes) -> bytes:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given  # type: ignore[no-any-return]


@fuzz
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(Record.__slots__, _COLUMNS)),
    st.none() | st.builds(Doubling, _SCALARS | st.sampled_from([KeyError("lost"), RecursionError()])),
    st.booleans(),
)
def test_a_damaged_row_is_read_or_refused(columns: dict[str, Any], codec: Doubling | None, encoded: bool) -> None:
    row = record_of(message(1, headers={"a": b"b"}, properties={"c": [1]}))
    if encoded:
        row.format = ENCODED
    for name, value in columns.items():
        setattr(row, name, value)
    read = outcome(lambda: message_of(row, codec))
    if read is not None:
        assert isinstance(read.headers, dict)
        assert isinstance(read.properties, dict)


_EXACT: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**300, -0.0, 5e-324, 1.7976931348623157e308])
    | st.floats()
    | _TEXT
    | st.binary()
    | st.decimals()
    | st.datetimes(timezones=st.timezones() | st.just(UTC))
    | st.dates()
    | st.uuids()
    | st.sampled_from(
        [Level.HIGH, Word.PLAIN, Text("a"), object(), Decimal("1E+999999"), timezone(timedelta(seconds=1))]
    )
    | st.integers(1, 40).map(deep),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_TEXT | st.integers(), inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=6,
)


@fuzz
@given(st.dictionaries(_TEXT, _EXACT, max_size=3), st.dictionaries(_TEXT, _EXACT, max_size=3), st.none() | st.binary())
def test_what_is_stored_is_read_again(
    headers: dict[str, Any], properties: dict[str, Any], payload: bytes | None
) -> None:
    made = message(1, headers=headers, properties=properties, payload=payload)
    row = outcome(lambda: record_of(made))
    if row is None:
        return
    again = message_of(row)
    for name in ("id", "type", "broker", "destination", "ordering_key", "payload", "content_type"):
        assert getattr(again, name) == getattr(made, name)
    assert (plain(again.headers), plain(again.properties)) == (plain(headers), plain(properties))


def plain(value: Any) -> Any:
    """As it comes back: tuples as lists; a not-a-number equal to itself."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Decimal) and not value.is_finite():
        return str(value)
    return value.astimezone(UTC) if isinstance(value, datetime) else value


@pytest.mark.parametrize(
    "value", [deep(190), deep(300), deep(20_000), cyclic(), 10**5000, "\ud800", ["\ud800"], {"\udfff": 1}], ids=kind
)
def test_what_could_not_be_read_again_is_not_stored(value: Any) -> None:
    """Else the transaction is committed, and the relay finds a row that it has to give up."""
    row = outcome(lambda: record_of(message(1, headers={"given": value})))
    if row is not None:
        assert message_of(row).headers == {"given": value}


@pytest.mark.parametrize("given", [None, "text", 3])
def test_a_codec_that_gives_no_bytes_is_an_error_and_no_tombstone(given: Any) -> None:
    """A null payload deletes its key in a compacted topic."""
    row = record_of(message(1), Doubling())
    with pytest.raises(SerializationError, match="TypeError"):
        message_of(row, Doubling(given))


@pytest.mark.parametrize(
    "name", ["batch_size", "max_attempts", "lease", "backoff", "max_backoff", "keep_sent", "keep_dead"]
)
@pytest.mark.parametrize("value", [10**400, 2**63, float("inf"), float("nan")])
def test_a_number_that_no_database_counts_is_no_option_of_a_relay(name: str, value: float) -> None:
    """It would fail at the first statement, or after the first failure."""
    with pytest.raises(ConfigurationError, match=name):
        RelayOptions(**{name: value})  # type: ignore[arg-type]


# -- command lines -----------------------------------------------------------------------------------------------------

_TYPED = _TEXT | st.from_regex(r"\A[0-9]{1,3}(\.[0-9])? ?[a-zA-Z]{0,3}\Z") | st.from_regex(r"\A[0-9.]{1,400}[dw]\Z")


@fuzz
@given(_TYPED)
@example("9" * 400 + "s")
def test_any_text_is_a_value_of_an_option_or_a_value_error(text: str) -> None:
    readers: tuple[Callable[[str], Any], ...] = (whole, duration, above_zero, state)
    for read in readers:
        value: Any = outcome(partial(read, text), ValueError)
        if value is None or read is state:
            continue
        assert 0 <= value < float("inf")
        names = ("batch_size", "max_attempts") if read is whole else ("keep_sent", "keep_dead")
        outcome(partial(relay_options, dict.fromkeys(names, value), RelayOptions()))


@fuzz
@given(st.lists(_TEXT | urls() | mutated() | urls().map("alerts={}".format), max_size=3))
def test_any_broker_urls_of_the_command_line_are_a_configuration_or_an_error(given_urls: list[str]) -> None:
    secret = all(told_apart(url.removeprefix("alerts=")) for url in given_urls)
    outcome(lambda: load_brokers(config_of(tuple(given_urls)), {}), secret=secret)


_DATABASES = st.builds(
    "{}{}{}{}{}{}".format,
    st.sampled_from(["postgresql", "postgres", "mysql", "mariadb", "sqlite", "oracle", "mssql", "", "Postgresql"])
    | st.text(max_size=4),
    st.sampled_from(
        ["", "", "+", "+asyncpg", "+psycopg", "+psycopg2", "+pymysql", "+asyncmy", "+aiosqlite", "+pysqlite"]
    )
    | st.sampled_from(["+os", "+__main__", "+a+b", "+psycopg_async", "+tests", "+pg8000", "+sqlite3", "+.", "+..a"]),
    st.sampled_from(["://", ":", ":///", "://"]),
    st.sampled_from(
        [
            "",
            f"u:{SECRET}@h",
            f"u:{SECRET}@h:1",
            f"u:{SECRET}@h:x",
            f"u:a{SECRET}%2F@[::1]",
            f"u:{SECRET}@h:99999",
            "h1,h2",
        ]
    )
    | st.text(max_size=3).map(lambda text: f"u:{SECRET}{text}@h"),
    st.sampled_from(["", "/", "/d", "/:memory:", "/\0", "/d/e"]),
    st.sampled_from(
        [
            "",
            "?",
            "?sslmode=require",
            "?sslmode=a&sslmode=b",
            "?timeout=x",
            "?plugin=x",
            "?a=b&a=c",
            "?host=h:1&host=k:2",
            "?cache=x",
        ]
    )
    | st.dictionaries(st.text(max_size=4), _TEXT, max_size=2).map(
        lambda query: "?" + urlencode(query, errors="replace")
    ),
)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@fuzz
@given(_TEXT | _DATABASES)
@example("sqlite://?timeout=soon")
@example("postgresql+__main__://h/d")
def test_any_database_url_makes_an_engine_or_a_configuration_error(text: str) -> None:
    outcome(
        lambda: engine_of(text),
        secret=SECRET not in text or re.search(f"://[^:/@]*:[^@]*{SECRET}[^@]*@", text) is not None,
    )
