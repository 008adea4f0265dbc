"""The setting DISPYTCH_OUTBOX: read, checked, and told in Django's words. All of it has defaults.

DISPYTCH_OUTBOX = {
    "DATABASES": ["default"],
    "EMBEDDED": False,
    "MAX_ATTEMPTS": 10,
}

DATABASES      aliases of the databases that have an outbox. Default: "default" alone; with DATABASE_ROUTERS each
               database that they let its tables into, replicas for tests (MIRROR) left out
EMBEDDED       does each server process relay, woken by its commits? False: `manage.py dispytch relay` does
DIRECT_EMITS   may a process whose outbox is relayed elsewhere connect to the brokers, at its first `emit`?
               False: such an emit raises NotStartedError
CODEC          changes payloads on their way into the table: an object, or its dotted path
NOTIFY         let PostgreSQL wake the relays at each commit
BATCH_SIZE, LEASE, POLL_INTERVAL, MAX_ATTEMPTS, BACKOFF, MAX_BACKOFF, KEEP_SENT, KEEP_DEAD: see `RelayOptions`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, router
from django.db import connections as databases
from django.utils.module_loading import import_string

from dispytch_integrations._templates import nearest
from dispytch_integrations.django.conf import Problem
from dispytch_integrations.outbox.options import MOST, RelayOptions
from dispytch_integrations.settings import BrokerSpec

__all__ = ["APP", "FITS", "LABEL", "OutboxSettings", "installed", "not_installed", "read", "too_slow"]

APP = "dispytch_integrations.django.outbox"
"""What stands in INSTALLED_APPS."""
LABEL = "dispytch_outbox"
"""The app's label."""

FITS = 0.75
"""How much of a lease a delivery may take, at most: it is renewed each quarter."""

_EXAMPLE = 'DISPYTCH_OUTBOX = {"DATABASES": ["default"], "EMBEDDED": False}'
_DEFAULTS = RelayOptions()
_OPTIONS = frozenset(field.name.upper() for field in fields(RelayOptions))
_OURS = ("DATABASES", "DIRECT_EMITS", "EMBEDDED")
_WHOLE = ("BATCH_SIZE", "MAX_ATTEMPTS")
_RETENTION = ("KEEP_DEAD", "KEEP_SENT")
_SWITCHES = ("DIRECT_EMITS", "EMBEDDED", "NOTIFY")


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """DISPYTCH_OUTBOX, read; defaults where something is wrong.

    `problems`: what is wrong, with the ids of the system checks; `databases`: aliases of those that have an outbox;
    `embedded`: does a server process relay?; `direct_emits`: may it connect where another process relays?; `options`:
    of the relay, codec and notify are the writers', too; `named`: are the databases those that DATABASES names?
    """

    problems: tuple[Problem, ...] = ()
    databases: tuple[str, ...] = (DEFAULT_DB_ALIAS,)
    embedded: bool = False
    direct_emits: bool = False
    options: RelayOptions = _DEFAULTS
    named: bool = False

    @property
    def keep_dead(self) -> float | None:
        """Seconds after which dead rows are deleted; None: never."""
        return self.options.keep_dead


def installed() -> bool:
    """Is the outbox in INSTALLED_APPS? While Django is not set up yet: no."""
    config = apps.app_configs.get(LABEL)
    return config is not None and config.name == APP


def read() -> OutboxSettings:
    """Read DISPYTCH_OUTBOX. Raises nothing: what is wrong is in `problems`. Opens no connection."""
    given: object = getattr(settings, "DISPYTCH_OUTBOX", None)
    reader = _Reader()
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        told = f"The setting DISPYTCH_OUTBOX is a {type(given).__name__}; it must be a dict."
        reader.wrong("E008", told, f"Write {_EXAMPLE}.")
        given = {}
    return reader.read(cast("Mapping[object, Any]", given))


def not_installed() -> tuple[Problem, ...]:
    """The problem of a project that has the setting, and not the app; nothing while Django is not set up yet."""
    if installed() or not apps.apps_ready or getattr(settings, "DISPYTCH_OUTBOX", None) is None:
        return ()
    told = f"DISPYTCH_OUTBOX is set, and {APP!r} is not in INSTALLED_APPS: no event would be stored."
    return (Problem("dispytch.E010", told, f"Write INSTALLED_APPS += [{APP!r}], or remove the setting."),)


def too_slow(specs: Mapping[str, BrokerSpec], options: RelayOptions) -> tuple[Problem, ...]:
    """The problems of brokers whose timeout does not fit into the lease: a relay could never send."""
    found: list[Problem] = []
    for alias, spec in specs.items():
        timeout, where = spec.options.timeout, f"DISPYTCH[{alias!r}]['TIMEOUT']"
        if timeout is None:
            told = f"{where} is None, and a relay must know when a delivery is over."
            found.append(Problem("dispytch.E011", told, 'Write "TIMEOUT": 5.'))
        elif timeout > options.lease * FITS:
            told = (
                f"{where} is {timeout:g} s, and the outbox's LEASE {options.lease:g} s, which is renewed each "
                f"{options.lease / 4:g} s: a relay could never send."
            )
            hint = f'Write "LEASE": {timeout * 2:g} in DISPYTCH_OUTBOX, or a shorter TIMEOUT.'
            found.append(Problem("dispytch.E011", told, hint))
    return tuple(found)


class _Reader:
    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def wrong(self, code: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"dispytch.{code}", message, hint))

    def read(self, given: Mapping[object, Any]) -> OutboxSettings:
        taken: dict[str, Any] = {}
        for key, value in given.items():
            name = str(key)
            if key in _SWITCHES:
                self._take(taken, name, value, isinstance(value, bool), "True or False")
            elif key in _WHOLE:
                self._take(taken, name, value, _is_whole(value) and value > 0, "a whole number above 0")
            elif key in _RETENTION:
                right = value is None or (_is_number(value) and value >= 0)
                self._take(taken, name, value, right, "a number of seconds, 0 or more, or None")
            elif key == "CODEC":
                self._take_codec(taken, value)
            elif key == "DATABASES":
                self._take_databases(taken, value)
            elif key in _OPTIONS:
                right = _is_number(value) and 0 < value < float("inf")
                self._take(taken, name, value, right, "a number of seconds above 0")
            else:
                self._unknown(key)
        named: tuple[str, ...] | None = taken.get("DATABASES")
        aliases = self._routed() if named is None else named
        if taken.get("NOTIFY"):
            self._notified(taken, aliases)
        options = {name.lower(): value for name, value in taken.items() if name in _OPTIONS}
        return OutboxSettings(
            problems=tuple(self.problems),
            databases=aliases,
            embedded=taken.get("EMBEDDED", False),
            direct_emits=taken.get("DIRECT_EMITS", False),
            options=RelayOptions(**options),
            named=named is not None,
        )

    def _unknown(self, key: object) -> None:
        known = sorted({*_OPTIONS, *_OURS})
        text = str(key)
        if text.upper() in known:
            hint = f"Keys are in upper case: {text.upper()!r}."
        elif near := nearest(text.upper(), known):
            hint = f"Did you mean {near.removeprefix(' (did you mean ').removesuffix('?)')}?"
        else:
            hint = f"There are {', '.join(known)}."
        self.wrong("E008", f"DISPYTCH_OUTBOX has the unknown key {key!r}.", hint)

    def _take(self, taken: dict[str, Any], key: str, value: Any, right: bool, wanted: str) -> None:
        if right and value is not None and value > MOST.get(key.lower(), value):
            told = f"DISPYTCH_OUTBOX[{key!r}] is {value!r}, which is more than a database can count."
            self.wrong("E009", told, "Write less.")
        elif right:
            taken[key] = value
        else:
            self.wrong("E009", f"DISPYTCH_OUTBOX[{key!r}] must be {wanted}, not {value!r}.")

    def _take_codec(self, taken: dict[str, Any], value: Any) -> None:
        where = "DISPYTCH_OUTBOX['CODEC']"
        hint = "Write the dotted path of an object with encode(payload) and decode(stored), or the object itself."
        codec = value
        if isinstance(value, str):
            try:
                codec = import_string(value)
            except Exception as exc:  # The module is the project's: whatever it raises at its import.
                self.wrong("E009", f"{where}: {value!r} cannot be imported: {type(exc).__name__}: {exc}.", hint)
                return
        if isinstance(codec, type):
            try:
                codec = codec()
            except Exception as exc:
                self.wrong("E009", f"{where}: {codec.__name__}() raised {type(exc).__name__}: {exc}.", hint)
                return
        if codec is None or all(callable(getattr(codec, name, None)) for name in ("encode", "decode")):
            taken["CODEC"] = codec
            return
        self.wrong("E009", f"{where} is a {type(codec).__name__}, which does not have both encode and decode.", hint)

    def _take_databases(self, taken: dict[str, Any], value: object) -> None:
        where, known = "DISPYTCH_OUTBOX['DATABASES']", list(databases)
        if not isinstance(value, (list, tuple)) or not value:
            told = "is an empty list" if value in ([], ()) else f"is {value!r}"
            self.wrong("E009", f"{where} {told}; it must be a list of aliases.", 'Write "DATABASES": ["default"].')
            return
        found: dict[str, None] = {}
        for alias in cast("Sequence[object]", value):
            if isinstance(alias, str) and alias in known:
                found[alias] = None
                continue
            near = nearest(alias, known) if isinstance(alias, str) else ""
            listed = ", ".join(repr(each) for each in known)
            self.wrong("E009", f"{where} names {alias!r}, which is no database{near}.", f"DATABASES has {listed}.")
        if found:
            taken["DATABASES"] = tuple(found)

    def _routed(self) -> tuple[str, ...]:
        """The databases that have an outbox where the setting names none."""
        if not settings.DATABASE_ROUTERS:
            return (DEFAULT_DB_ALIAS,)
        # Before the models are there, routers that look at them cannot be asked with them.
        hints = {"model": apps.get_model(LABEL, "OutboxEvent")} if apps.models_ready and installed() else {}
        allow = cast("Callable[..., bool]", router.allow_migrate)
        try:
            routed = [
                alias
                for alias in databases
                if not databases.settings[alias].get("TEST", {}).get("MIRROR")
                and allow(alias, LABEL, model_name="outboxevent", **hints)
            ]
        except Exception as exc:  # The project's own code.
            told = f"A router could not say where the outbox's tables go: {type(exc).__name__}: {exc}."
            self.wrong("E009", told, 'Write "DATABASES": ["default"] in DISPYTCH_OUTBOX, or correct allow_migrate.')
            routed = []
        return tuple(routed) or (DEFAULT_DB_ALIAS,)

    def _notified(self, taken: dict[str, Any], aliases: tuple[str, ...]) -> None:
        others: list[str] = []
        for alias in aliases:
            try:
                vendor = databases[alias].vendor
            except ImproperlyConfigured:
                continue  # Its driver is missing: Django says so itself.
            if vendor != "postgresql":
                others.append(f"{alias!r} is {vendor}")
        if others:
            del taken["NOTIFY"]
            self.wrong(
                "E009", f"DISPYTCH_OUTBOX['NOTIFY'] is PostgreSQL's, and {' and '.join(others)}.", "Leave it out."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
