"""The setting DISPYTCH_OUTBOX: what a mistake in it says, and what is taken where nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings
from django.test.utils import override_settings

from dispytch_integrations.django.outbox import conf
from dispytch_integrations.outbox import RelayOptions


class Reversed:
    """A codec."""

    def encode(self, payload: bytes) -> bytes:
        return payload[::-1]

    def decode(self, stored: bytes) -> bytes:
        return stored[::-1]


class HalfACodec:
    def encode(self, payload: bytes) -> bytes:
        return payload


class Broken:
    def __init__(self) -> None:
        raise LookupError("no key in the environment")


class AllButDefault:
    """A router whose tables of the outbox are in "archive"."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db == "archive" if app_label == conf.LABEL else None


class Nowhere:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return False if app_label == conf.LABEL else None


class Failing:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        raise LookupError("no tenant")


def read(value: Any) -> conf.OutboxSettings:
    with override_settings(DISPYTCH_OUTBOX=value):
        return conf.read()


def problems(value: Any) -> list[str]:
    return [f"{problem.id} {problem}" for problem in read(value).problems]


def test_nothing_has_to_be_written() -> None:
    """Adding the app is all that most projects do: each option has its default."""
    taken = conf.read()
    assert not hasattr(settings, "DISPYTCH_OUTBOX")
    assert (taken.problems, taken.embedded, taken.direct_emits) == ((), False, False)
    assert taken.options == RelayOptions()
    assert taken == read({}) == read(None)


def test_options_of_the_relay_are_taken_in_upper_case() -> None:
    """What is written is what the relay works with."""
    written = {
        "DATABASES": ["archive", "default", "archive"],
        "EMBEDDED": True,
        "DIRECT_EMITS": True,
        "BATCH_SIZE": 10,
        "LEASE": 30,
        "POLL_INTERVAL": 0.5,
        "MAX_ATTEMPTS": 3,
        "BACKOFF": 2.0,
        "MAX_BACKOFF": 60,
        "KEEP_SENT": None,
        "KEEP_DEAD": 0,
        "NOTIFY": False,
    }
    taken = read(written)
    assert taken.problems == ()
    assert taken.databases == ("archive", "default")
    assert (taken.embedded, taken.direct_emits, taken.keep_dead) == (True, True, 0)
    assert taken.options == RelayOptions(
        batch_size=10, lease=30, poll_interval=0.5, max_attempts=3, backoff=2.0, max_backoff=60, keep_dead=0
    )


def test_all_mistakes_are_told_at_once() -> None:
    """One start of the server shows them all, each with what to write."""
    told = problems(
        {
            "EMBEDED": True,
            "batch_size": 10,
            "COLOUR": "red",
            "EMBEDDED": "yes",
            "BATCH_SIZE": 1.5,
            "MAX_ATTEMPTS": True,
            "LEASE": 0,
            "POLL_INTERVAL": "1",
            "KEEP_SENT": -1,
            "DATABASES": ["defualt", 7],
        }
    )
    known = ", ".join(
        sorted(["DATABASES", "DIRECT_EMITS", "EMBEDDED", *(name.upper() for name in RelayOptions.__slots__)])
    )
    assert told == [
        "dispytch.E008 DISPYTCH_OUTBOX has the unknown key 'EMBEDED'. Did you mean 'EMBEDDED'?",
        "dispytch.E008 DISPYTCH_OUTBOX has the unknown key 'batch_size'. Keys are in upper case: 'BATCH_SIZE'.",
        f"dispytch.E008 DISPYTCH_OUTBOX has the unknown key 'COLOUR'. There are {known}.",
        "dispytch.E009 DISPYTCH_OUTBOX['EMBEDDED'] must be True or False, not 'yes'.",
        "dispytch.E009 DISPYTCH_OUTBOX['BATCH_SIZE'] must be a whole number above 0, not 1.5.",
        "dispytch.E009 DISPYTCH_OUTBOX['MAX_ATTEMPTS'] must be a whole number above 0, not True.",
        "dispytch.E009 DISPYTCH_OUTBOX['LEASE'] must be a number of seconds above 0, not 0.",
        "dispytch.E009 DISPYTCH_OUTBOX['POLL_INTERVAL'] must be a number of seconds above 0, not '1'.",
        "dispytch.E009 DISPYTCH_OUTBOX['KEEP_SENT'] must be a number of seconds, 0 or more, or None, not -1.",
        (
            "dispytch.E009 DISPYTCH_OUTBOX['DATABASES'] names 'defualt', which is no database (did you mean "
            "'default'?). DATABASES has 'default', 'archive'."
        ),
        "dispytch.E009 DISPYTCH_OUTBOX['DATABASES'] names 7, which is no database. DATABASES has 'default', 'archive'.",
    ]


@pytest.mark.parametrize("value", [[], "default", {"default": {}}, None, 1])
def test_databases_are_a_list(value: Any) -> None:
    """A single alias as text would be read letter by letter."""
    [told] = problems({"DATABASES": value})
    assert told.startswith("dispytch.E009 DISPYTCH_OUTBOX['DATABASES'] is ")
    assert told.endswith('Write "DATABASES": ["default"].')


@pytest.mark.parametrize("value", [["default"], "default", True])
def test_the_setting_is_a_dict(value: Any) -> None:
    """As DISPYTCH and DATABASES are."""
    [told] = problems(value)
    assert told.startswith(f"dispytch.E008 The setting DISPYTCH_OUTBOX is a {type(value).__name__}; it must be a dict.")


@pytest.mark.parametrize("codec", [f"{__name__}.Reversed", Reversed, Reversed()])
def test_a_codec_is_named_by_its_path(codec: Any) -> None:
    """As serializers and hooks are: a class is called, an object taken as it is."""
    taken = read({"CODEC": codec})
    assert taken.problems == ()
    assert taken.options.codec is not None
    assert taken.options.codec.encode(b"ab") == b"ba"


@pytest.mark.parametrize(
    ("codec", "told"),
    [
        ("no_such_shop.codec", "'no_such_shop.codec' cannot be imported: ModuleNotFoundError"),
        (f"{__name__}.Reverse", "cannot be imported: ImportError"),
        (f"{__name__}.HalfACodec", "is a HalfACodec, which does not have both encode and decode"),
        (f"{__name__}.Broken", "Broken() raised LookupError"),
        (7, "is a int, which does not have both encode and decode"),
    ],
)
def test_a_codec_that_cannot_be_used_is_told(codec: Any, told: str) -> None:
    """Found at the start and not at the first order."""
    [problem] = problems({"CODEC": codec})
    assert problem.startswith("dispytch.E009 DISPYTCH_OUTBOX['CODEC']")
    assert told in problem


def test_without_routers_the_outbox_is_in_the_default_database() -> None:
    """The others belong to somebody else as far as anybody knows: `migrate` leaves them alone."""
    with override_settings(DATABASE_ROUTERS=[]):
        assert conf.read().databases == ("default",)


@pytest.mark.parametrize(
    ("router", "databases"),
    [("AllButDefault", ("archive",)), ("Nowhere", ("default",))],
)
def test_routers_say_which_databases_have_an_outbox(router: str, databases: tuple[str, ...]) -> None:
    """The tables are where `migrate` puts them."""
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.{router}"]):
        taken = conf.read()
    assert (taken.databases, taken.named, taken.problems) == (databases, False, ())


def test_a_router_that_fails_is_told() -> None:
    """It is the project's code, and `read` is called where nothing may be raised."""
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.Failing"]):
        [told] = problems({})
        assert "LookupError: no tenant" in told
        assert read({"DATABASES": ["archive"]}).problems == ()


def test_notify_is_for_postgresql() -> None:
    """What could only fail at the first emit is told at the start."""
    told = problems({"NOTIFY": True})
    if settings.DATABASES["default"]["ENGINE"].endswith("postgresql"):
        assert told == []
    else:
        assert "DISPYTCH_OUTBOX['NOTIFY'] is PostgreSQL's, and 'default' is " in told[0]


def test_installed_follows_installed_apps() -> None:
    """Nothing is stored because a module was imported."""
    assert not conf.installed()
    with override_settings(INSTALLED_APPS=[*settings.INSTALLED_APPS, conf.APP]):
        assert conf.installed()
    assert not conf.installed()
