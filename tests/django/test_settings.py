"""The setting DISPYTCH: what may stand in it, what is refused, and that a mistake is told before an event is lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings
from pytest_django import Settings

from dispytch_integrations import EventBase
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.django import aemit, conf, emit, emit_on_commit, get_emitter
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.lifecycle import open_brokers
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, ProducerTimeout
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from dispytch_integrations.serialization import JSONSerializer, Serializer
from tests.support.brokers import free_port
from tests.support.proxy import TCPProxy

ROOT = Path(__file__).parents[2]


class Told(EventBase):
    __route__ = RedisStreamEventRoute(stream="told")

    number: int = 0


class Heard(EventBase):
    __route__ = RedisEventRoute(channel="{channel}")

    channel: str


class Mark(Hook):
    """Named in settings by its path."""

    seen: list[str] = []

    def before_send(self, message: Message) -> None:
        self.seen.append(message.destination)


class Shouting(Serializer):
    content_type = "text/plain"

    def serialize(self, payload: dict[str, Any]) -> bytes:
        return b"LOUD"


shouting = Shouting()
mark = Mark()
timed_out: list[EventBase] = []


def note_timeout(event: EventBase) -> None:
    timed_out.append(event)


HERE = __name__


def problems(broker: Any) -> list[tuple[str, str]]:
    """What is wrong with a broker called "default": (id, text), the text without the place."""
    return [(problem.id, str(problem)) for problem in read({"default": broker}).problems]


def read(value: Any) -> conf.Read:
    with override_settings(DISPYTCH=value):
        return conf.read()


def sent(alias: str = "default") -> list[Message]:
    """What the memory broker of this process has got."""
    producer = get_emitter().producers[alias]
    assert isinstance(producer, MemoryProducer)
    return producer.sent


# -- what may stand in it --------------------------------------------------------------------------------------------


def test_ours_are_in_upper_case_and_the_clients_in_options() -> None:
    """Who knows DATABASES, CACHES and TASKS knows where each option belongs."""
    found = read(
        {
            "default": {
                "URL": "kafka://localhost:9092",
                "TIMEOUT": 2,
                "STARTUP_TIMEOUT": 3,
                "SHUTDOWN_TIMEOUT": 4,
                "REQUIRED": False,
                "SOURCE": "/shop",
                "CLOUDEVENTS": False,
                "PREFIX": "staging.",
                "TOPICS": ["orders"],
                "OPTIONS": {"acks": "all", "linger_ms": 5},
            },
            "alerts": {"URL": "redis://localhost:6379", "PASSWORD": "hunter2", "OPTIONS": {"socket_timeout": 7}},
        }
    )
    assert found.problems == ()
    options: Any = found.specs["default"].options
    assert (options.timeout, options.startup_timeout, options.shutdown_timeout) == (2, 3, 4)
    assert (options.required, options.source, options.cloudevents) == (False, "/shop", False)
    assert (options.prefix, options.topics, options.client) == ("staging.", ["orders"], {"acks": "all", "linger_ms": 5})
    assert found.specs["alerts"].options.client == {"socket_timeout": 7}


def test_a_name_of_ours_and_the_clients_is_ours_above_and_the_clients_in_options() -> None:
    """`timeout` is aio-pika's, too, for its connection: whoever writes it into OPTIONS means that one."""
    found = read({"default": {"URL": "amqp://h", "TIMEOUT": 2, "OPTIONS": {"timeout": 7}}})
    options: Any = found.specs["default"].options
    assert found.problems == ()
    assert (options.timeout, options.client) == (2, {"timeout": 7})


def test_ours_alone_may_stand_in_options_too() -> None:
    """`connect("...", timeout=2)` copied into OPTIONS means what it meant."""
    found = read({"default": {"URL": "redis://h", "OPTIONS": {"timeout": 2, "hooks": [f"{HERE}.Mark"]}}})
    assert found.problems == ()
    assert found.specs["default"].options.timeout == 2
    assert isinstance(found.specs["default"].options.hooks[0], Mark)


def test_an_option_that_is_given_twice_is_refused() -> None:
    """One of the two would count for nothing."""
    (problem,) = read({"default": {"URL": "redis://h", "TIMEOUT": 2, "OPTIONS": {"timeout": 3}}}).problems
    assert (problem.id, problem.message) == (
        "dispytch.E003",
        "DISPYTCH['default'] has 'TIMEOUT' and OPTIONS['timeout']; leave one of them out.",
    )


@pytest.mark.parametrize("transport", ["", "kafka", "rabbitmq"])
def test_the_url_alone_is_another_one_in_a_test(transport: str) -> None:
    """What is there for the real broker has no effect on memory://, and is no error."""
    given: dict[str, Any] = {"URL": f"memory://{transport}", "TIMEOUT": 2, "OPTIONS": {"timeout": 7}}
    if transport != "rabbitmq":
        given |= {"TOPICS": ["orders"], "SASL_MECHANISM": "PLAIN", "OPTIONS": {"acks": "all", "linger_ms": 5}}
    found = read({"default": given})
    assert found.problems == ()
    assert found.specs["default"].options.timeout == 2
    (problem,) = read({"default": {**given, "OPTIONS": {"ackss": "all"}}}).problems
    assert "ackss" in problem.message


@pytest.mark.parametrize(
    "url", ["memory://", BrokerURL.parse("memory://"), lambda: "memory://", "memory://?timeout=3"],
    ids=["text", "BrokerURL", "function", "with a query"],
)  # fmt: skip
def test_an_event_arrives_whatever_form_the_url_has(url: Any, settings: Settings) -> None:
    """From a secret store, an environment library or a literal: all give a URL."""
    settings.DISPYTCH = {"default": {"URL": url}}
    emit(Told(number=1))
    assert [message.destination for message in sent()] == ["told"]


def test_an_alias_may_be_its_url_alone(settings: Settings) -> None:
    """`{"default": env("BROKER_URL")}` is all that most projects need."""
    settings.DISPYTCH = {"default": "memory://"}
    emit(Told(number=1))
    assert len(sent()) == 1


def test_a_url_that_is_a_function_is_called_when_connecting_and_not_before(settings: Settings) -> None:
    """`manage.py migrate` must not ask the secret store, and a rotated password counts at the next start."""
    called: list[str] = []

    def url() -> str:
        called.append("called")
        return "memory://"

    settings.DISPYTCH = {"default": {"URL": url}}
    assert connections.settings().problems == ()
    assert called == []
    emit(Told())
    assert called == ["called"]


@pytest.mark.parametrize("path", ["shouting", "Shouting"])
def test_a_serializer_is_named_by_its_path(path: str, settings: Settings) -> None:
    """Settings name things and import nothing of the project: it would be imported before its apps are ready."""
    settings.DISPYTCH = {"default": {"URL": "memory://", "SERIALIZER": f"{HERE}.{path}"}}
    emit(Told())
    assert (sent()[0].payload, sent()[0].content_type) == (b"LOUD", "text/plain")


@pytest.mark.parametrize("serializer", [shouting, Shouting, JSONSerializer()], ids=["object", "class", "ours"])
def test_a_serializer_may_be_an_object_or_a_class(serializer: Any) -> None:
    """Who has it at hand need not spell it."""
    found = read({"default": {"URL": "memory://", "SERIALIZER": serializer}})
    assert found.problems == ()
    assert isinstance(found.specs["default"].options.serializer, Serializer)


def test_hooks_are_named_by_their_path(settings: Settings) -> None:
    """As MIDDLEWARE: a list of paths, of classes or of objects."""
    Mark.seen.clear()
    settings.DISPYTCH = {"default": {"URL": "memory://", "HOOKS": [f"{HERE}.Mark", f"{HERE}.mark", Mark, mark]}}
    emit(Told())
    assert Mark.seen == ["told"] * 4


async def test_what_to_do_on_a_timeout_is_named_by_its_path(redis_url: str, unique: str, settings: Settings) -> None:
    """A handler lives in the project, which settings cannot import."""
    timed_out.clear()
    address = urlsplit(redis_url)
    async with TCPProxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        settings.DISPYTCH = {"default": {"URL": url, "TIMEOUT": 0.3, "ON_TIMEOUT": f"{HERE}.note_timeout"}}
        await asyncio.to_thread(open_brokers)
        await proxy.stall()
        event = Heard(channel=unique)
        await aemit(event)
        assert timed_out == [event]
        await proxy.resume()
        await asyncio.to_thread(connections.reset)


@pytest.mark.parametrize("value", ["raise", "log", note_timeout])
def test_on_timeout_takes_words_and_functions(value: Any) -> None:
    """The two words of `connect()` are no paths."""
    found = read({"default": {"URL": "memory://", "ON_TIMEOUT": value}})
    assert found.problems == ()
    assert found.specs["default"].options.on_timeout == value


def test_max_pending_is_by_broker() -> None:
    """A slow broker of mails may hold less than the one of orders."""
    found = read({"default": "memory://", "alerts": {"URL": "memory://", "MAX_PENDING": 50}})
    assert found.problems == ()
    assert found.max_pending == {"default": conf.DEFAULT_MAX_PENDING, "alerts": 50}


def test_none_as_timeout_waits_without_end() -> None:
    """None means in settings what it means in `connect()`."""
    found = read({"default": {"URL": "memory://", "TIMEOUT": None}})
    assert (found.problems, found.specs["default"].options.timeout) == ((), None)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broker", "id", "expected"),
    [
        ({"URL": "memory://", "TIMEUOT": 2}, "E002", "unknown key 'TIMEUOT'. Did you mean 'TIMEOUT'?"),
        ({"URL": "kafka://h", "TOPIC": []}, "E002", "Did you mean 'TOPICS'?"),
        ({"URL": "memory://", "MAX_PENDIN": 2}, "E002", "Did you mean 'MAX_PENDING'?"),
        ({"URL": "memory://", "OPTION": {}}, "E002", "Did you mean 'OPTIONS'?"),
        ({"URL": "memory://", "timeout": 2}, "E002", "Keys are in upper case: 'TIMEOUT'."),
        ({"url": "memory://"}, "E002", "Keys are in upper case: 'URL'."),
        ({"URL": "redis://h", "EXCHANGES": []}, "E002", "'OPTIONS'; ours are"),
        ({"URL": "memory://", 3: 4}, "E002", "unknown key 3"),
        ({"URL": "redis://h", "socket_timeout": 2}, "E002", "write 'OPTIONS': {'socket_timeout': ...}"),
        ({"URL": "redis://h", "SOCKET_TIMEOUT": 2}, "E002", "write 'OPTIONS': {'socket_timeout': ...}"),
        ({"URL": "redis://h", "OPTIONS": {"socket_timeuot": 2}}, "E002", "OPTIONS: 'socket_timeuot' (did you mean 'so"),
        ({"URL": "redis://h?socket_timeuot=2"}, "E002", "unknown option 'socket_timeuot' (did you mean 'socket_timeou"),
        ({"URL": lambda: "memory://", "timeuot": 2}, "E002", "Did you mean 'TIMEOUT'?"),
        ({}, "E003", "has no 'URL'"),
        ({"URL": ""}, "E003", "has no 'URL'"),
        ({"URL": None}, "E003", "has no 'URL'"),
        ({"URL": 3}, "E003", "has no 'URL'"),
        ({"URL": "kafak://h"}, "E003", "['URL']: nobody serves kafak:// (did you mean 'kafka'?)"),
        ({"URL": "localhost:9092"}, "E003", "write scheme://host:port"),
        ({"URL": "memory://", "TIMEOUT": "soon"}, "E003", "DISPYTCH['default']['TIMEOUT']: "),
        ({"URL": "memory://", "TIMEOUT": 0}, "E003", "DISPYTCH['default']['TIMEOUT']: "),
        ({"URL": "memory://?timeout=soon"}, "E003", "timeout: "),
        ({"URL": "memory://", "MAX_PENDING": 0}, "E003", "['MAX_PENDING'] must be a whole number above 0, not 0"),
        ({"URL": "memory://", "MAX_PENDING": True}, "E003", "not True"),
        ({"URL": "memory://", "MAX_PENDING": None}, "E003", "not None"),
        ({"URL": "memory://", "OPTIONS": ["acks"]}, "E003", "['OPTIONS'] is a list; it must be a dict"),
        ({"URL": "memory://", "HOOKS": "shop.hooks.Tenant"}, "E003", "['HOOKS'] is a str; it must be a list"),
        ({"URL": "memory://", "HOOKS": ["nowhere.Tenant"]}, "E003", "['HOOKS']: 'nowhere.Tenant' cannot be imported"),
        ({"URL": "memory://", "SERIALIZER": f"{__name__}.Nope"}, "E003", "['SERIALIZER']: "),
        ({"URL": "memory://", "ON_TIMEOUT": "nowhere.handle"}, "E003", "['ON_TIMEOUT']: 'nowhere.handle' cannot be im"),
        ({"URL": "memory://", "ON_TIMEOUT": "explode"}, "E003", "['ON_TIMEOUT']: 'explode' cannot be imported"),
        (3, "E001", "DISPYTCH['default'] is a int, not a dict"),
        (None, "E001", "DISPYTCH['default'] is a NoneType, not a dict"),
    ],
)
def test_a_mistake_is_told_once_with_what_to_write(broker: Any, id: str, expected: str) -> None:
    """A misspelt option that is ignored is a surprise in production; one told twice is looked for twice."""
    [(found, text)] = problems(broker)
    assert found == f"dispytch.{id}"
    assert expected in text


def test_a_value_that_may_be_of_several_kinds_is_told_under_its_key() -> None:
    """What pydantic calls the branches of a union is no name that stands in the settings."""
    found = problems({"URL": "memory://", "CLOUDEVENTS": []})
    assert [text.partition(": ")[0] for _, text in found] == ["DISPYTCH['default']['CLOUDEVENTS']"] * 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, "DISPYTCH is empty"),
        ([], "DISPYTCH is a list"),
        ("kafka://localhost", "DISPYTCH is a str"),
        (None, "DISPYTCH is missing"),
        ({"": "memory://"}, "alias ''"),
        ({3: "memory://"}, "alias 3"),
    ],
)
def test_no_brokers_are_an_error_and_never_a_silent_nothing(value: Any, expected: str) -> None:
    """A project that emits to nowhere looks as healthy as one that works."""
    [problem] = read(value).problems
    assert problem.id == "dispytch.E001"
    assert expected in problem.message


@pytest.mark.parametrize("use", [lambda: emit(Told()), lambda: emit_on_commit(Told()), open_brokers])
def test_a_missing_setting_is_raised_at_the_first_use(use: Callable[[], object], settings: Settings) -> None:
    """Servers run no system checks, and a forgotten setting must not lose events there."""
    del settings.DISPYTCH
    connections.reset()  # Django tells nobody of a setting that is deleted.
    with pytest.raises(SettingsError, match="DISPYTCH is missing") as caught:
        use()
    assert 'DISPYTCH = {"default": {"URL": "kafka://localhost:9092"}}' in str(caught.value)
    assert isinstance(caught.value, (ImproperlyConfigured, ConfigurationError))


@override_settings(
    INSTALLED_APPS=["dispytch_integrations", "tests.django.project.shop"], DISPYTCH={"default": {"URL": "memory://"}}
)
def test_the_app_that_is_not_installed_is_told_at_the_first_use() -> None:
    """Everything would seem to work, but no check runs, and a Celery worker loses what it has left to the loop."""
    with pytest.raises(SettingsError, match=r"Write INSTALLED_APPS \+= \['dispytch_integrations\.django'\]"):
        emit(Told())


def test_all_that_is_wrong_is_told_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One deployment per typo is what this spares."""
    monkeypatch.setitem(sys.modules, "aiokafka", None)
    settings.DISPYTCH = {
        "default": {"URL": "kafka://h", "TIMEUOT": 2, "OPTIONS": {"acks": "all"}},
        "two": {"URL": "memory://", "MAX_PENDING": 0, "TIMEOUT": "soon", "HOOKS": ["nowhere.Tenant"], "topics": []},
        "three": {"URL": "kafak://h"},
        "four": 4,
        "five": "memory://",
    }
    with pytest.raises(SettingsError) as caught:
        emit(Told())
    assert [problem.partition("'")[2].partition("'")[0] for problem in caught.value.problems] == [
        "default", "default", "two", "two", "two", "two", "three", "four",
    ]  # fmt: skip
    for expected in ("pip install", "'TIMEOUT'", "MAX_PENDING", "nowhere.Tenant", "topics", "nobody serves kafak"):
        assert expected in str(caught.value)


def test_what_only_the_start_can_find_is_raised_in_the_settings_words(settings: Settings) -> None:
    """A URL from a function is read when connecting: the error names the setting all the same."""
    settings.DISPYTCH = {"default": {"URL": lambda: "kafak://h"}, "two": {"URL": lambda: "memory://", "TIMEOOT": 3}}
    with pytest.raises(SettingsError) as caught:
        emit(Told())
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["DISPYTCH", "DISPYTCH"]
    assert "nobody serves kafak" in str(caught.value)
    assert "timeoot" in str(caught.value)


def test_a_missing_extra_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run after `pip install` says what else to install."""
    monkeypatch.setitem(sys.modules, "aiokafka", None)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert problems("kafka://h") == [
        (
            "dispytch.E004",
            "DISPYTCH['default']: kafka:// needs aiokafka: pip install 'dispytch-integrations[kafka]'",
        )
    ]
    [(found, text)] = problems(
        {"URL": "memory://", "SERIALIZER": "dispytch_integrations.serialization.MessagePackSerializer"}
    )
    assert found == "dispytch.E004"
    assert "pip install 'dispytch-integrations[msgpack]'" in text


def test_without_django_the_package_says_what_to_install() -> None:
    """Who followed the documentation without the extra reads the pip line, and not that a module is missing."""
    code = (
        "import sys; sys.modules['django'] = None\n"
        "try: import dispytch_integrations.django\n"
        "except ImportError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert "pip install 'dispytch-integrations[django]'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "broker",
    [
        {"URL": "redis://app:hunter2@h:99999"},
        {"URL": "redis://app:hunter2@h/0?socket_timeuot=3"},
        {"URL": "redis://app:hun/ter2@hunter2/0"},
        {"URL": "kafak://app:hunter2@h"},
        {"URL": "redis://h", "PASSWORD": "hunter2", "TIMEUOT": "hunter2"},
        {"URL": "redis://h", "PASSWORD": ["hunter2"]},
        {"URL": "redis://h", "TIMEOUT": "hunter2", "OPTIONS": {"pasword": "hunter2"}},
        "kafka//app:hunter2@h",
    ],
)
def test_no_secret_is_told(broker: Any) -> None:
    """What `manage.py check` prints ends in the log of a CI that many can read."""
    found = problems(broker)
    assert found
    assert "hunter2" not in str(found)
    assert "hunter2" not in repr(read({"default": broker}).problems)


def test_no_secret_is_told_by_a_connection_that_fails(settings: Settings) -> None:
    """An outage is logged and reported by everybody; the password is not."""
    settings.DISPYTCH = {
        "default": {
            "URL": f"redis://app:hunter2@127.0.0.1:{free_port()}/0",
            "TIMEOUT": 0.2,
            "STARTUP_TIMEOUT": 0.2,
        }
    }
    with pytest.raises(Exception, match="127") as started:
        open_brokers()
    with pytest.raises((BrokerUnavailableError, ProducerTimeout)) as emitted:
        emit(Told())
    for error in (started.value, emitted.value):
        assert "hunter2" not in f"{error} {error!r} {error.__cause__!r}"


# -- settings that change --------------------------------------------------------------------------------------------


def test_override_settings_counts_from_the_next_emit_on(settings: Settings) -> None:
    """A test that changes DISPYTCH is about its own brokers, and leaves none behind."""
    settings.DISPYTCH = {"default": "memory://", "first": "memory://kafka"}
    emit(Told(number=1))
    first = get_emitter().producers
    with override_settings(DISPYTCH={"default": "memory://", "second": "memory://kafka"}):
        emit(Told(number=2))
        assert set(get_emitter().producers) == {"default", "second"}
        assert len(sent()) == 1
    emit(Told(number=3))
    assert set(get_emitter().producers) == {"default", "first"}
    assert len(sent()) == 1
    assert get_emitter().producers["default"] is not first["default"]


def test_override_settings_closes_what_was_open(settings: Settings) -> None:
    """Otherwise every test of a run would keep a connection."""
    settings.DISPYTCH = {"default": "memory://"}
    emit(Told())
    session = connections.session
    assert session is not None
    with override_settings(DISPYTCH={"default": "memory://"}):
        assert connections.session is None
        assert session.brokers.brokers["default"].state == "stopped"


def test_other_settings_leave_the_brokers_alone(settings: Settings) -> None:
    """A test run changes settings thousands of times."""
    emit(Told())
    session = connections.session
    settings.DEBUG = not settings.DEBUG
    assert connections.session is session


def test_wrong_settings_in_one_test_do_not_stay(settings: Settings) -> None:
    """What was refused once is read again once it is mended."""
    with override_settings(DISPYTCH={}), pytest.raises(SettingsError):
        emit(Told())
    emit(Told())
