"""The settings DISPYTCH and DISPYTCH_REQUIRE_TRANSACTION: read, checked, and told in Django's words.

    DISPYTCH = {
        "default": {
            "URL": "kafka://localhost:9092",
            "TIMEOUT": 5,
            "OPTIONS": {"acks": "all"},
        },
    }

Ours are in upper case: URL, TIMEOUT, STARTUP_TIMEOUT, SHUTDOWN_TIMEOUT, REQUIRED, ON_TIMEOUT, SOURCE, CLOUDEVENTS,
PREFIX, MAX_SIZE, HOOKS, SERIALIZER, MAX_PENDING, and those of the transport (TOPICS of Kafka, EXCHANGES of RabbitMQ,
PASSWORD...). OPTIONS holds those of the underlying client.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from django.apps import apps
from django.conf import settings
from django.utils.module_loading import import_string

from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import Backend, BrokerURL
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.errors import ConfigurationError, MissingExtraError
from dispytch_integrations.settings import BrokerSpec, backend_type_of, load_brokers, read_url

__all__ = ["DEFAULT_MAX_PENDING", "Problem", "Read", "read", "require", "require_transaction"]

DEFAULT_MAX_PENDING = 10_000
"""Messages that may wait for a broker's confirmation after a commit, unless MAX_PENDING says else."""

_APP = "dispytch_integrations.django"
_EXAMPLE = 'DISPYTCH = {"default": {"URL": "kafka://localhost:9092"}}'
_DJANGOS = {"MAX_PENDING"}
"""Keys that mean something here alone."""
_MISSING: Any = object()
"""What could not be imported; it has been told."""
_CLIENT = "OPTIONS"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the settings. `id`: that of the system check ("dispytch.E002"); `hint`: what to write."""

    id: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return self.message + (f" {self.hint}" if self.hint else "")


@dataclass(frozen=True, slots=True)
class Read:
    """The settings, read.

    `config`: as `connect()` takes it; `max_pending`: by alias; `problems`: with any of them nothing can be connected;
    `specs`: by alias, of the brokers whose URL is no function and could be read.
    """

    config: Mapping[str, Mapping[str, Any]] = field(repr=False)
    max_pending: Mapping[str, int]
    problems: tuple[Problem, ...]
    specs: Mapping[str, BrokerSpec]


def require_transaction() -> bool:
    """The setting DISPYTCH_REQUIRE_TRANSACTION: must `emit_on_commit` find a transaction open? Default: no."""
    return bool(getattr(settings, "DISPYTCH_REQUIRE_TRANSACTION", False))


def require(problems: tuple[Problem, ...]) -> None:
    """Raise SettingsError with all problems, if there are any."""
    if problems:
        raise SettingsError([str(problem) for problem in problems])


def read() -> Read:
    """Read DISPYTCH. Raises nothing: what is wrong is in `problems`. No function is called, and nothing connected."""
    found = _read()
    # Where Django is not set up, nobody knows yet.
    if not apps.apps_ready or apps.is_installed(_APP):
        return found
    missing = Problem(
        "dispytch.E001",
        f"{_APP!r} is not in INSTALLED_APPS: its checks would not run, events.py of apps not be found, and workers of "
        f"Celery end before their events are sent.",
        f"Write INSTALLED_APPS += [{_APP!r}].",
    )
    return replace(found, problems=(missing, *found.problems))


def _read() -> Read:
    given: object = getattr(settings, "DISPYTCH", None)
    if not isinstance(given, Mapping):
        message = (
            "The setting DISPYTCH is missing, so there is no broker that events could go to."
            if given is None
            else f"The setting DISPYTCH is a {type(given).__name__}; it must be a dict of aliases."
        )
        return Read({}, {}, (Problem("dispytch.E001", message, f"Write {_EXAMPLE}."),), {})
    if not given:
        return Read({}, {}, (Problem("dispytch.E001", "DISPYTCH is empty.", f"Write {_EXAMPLE}."),), {})
    if any(str(alias).upper() == "URL" for alias in cast("Mapping[object, object]", given)):
        message = "DISPYTCH has a URL where its aliases are expected."
        return Read({}, {}, (Problem("dispytch.E001", message, f"Write {_EXAMPLE}."),), {})
    config: dict[str, Mapping[str, Any]] = {}
    max_pending: dict[str, int] = {}
    specs: dict[str, BrokerSpec] = {}
    problems: list[Problem] = []
    for alias, value in cast("Mapping[object, object]", given).items():
        broker = _Broker(alias, value)
        problems += broker.problems
        config[broker.alias] = broker.config
        max_pending[broker.alias] = broker.max_pending
        if broker.spec is not None:
            specs[broker.alias] = broker.spec
    return Read(config, max_pending, tuple(problems), specs)


class _Broker:
    """One alias of DISPYTCH."""

    def __init__(self, alias: object, value: object) -> None:
        self.alias = str(alias)
        self.where = f"DISPYTCH[{alias!r}]"
        self.problems: list[Problem] = []
        self.config: dict[str, Any] = {}
        self.max_pending = DEFAULT_MAX_PENDING
        self.spec: BrokerSpec | None = None
        self.client_missing = False
        if not isinstance(alias, str) or not alias:
            self._wrong("E001", f"The alias {alias!r} in DISPYTCH is no name; it must be a str such as 'default'.")
            return
        if isinstance(value, str):
            value = {"URL": value}
        if not isinstance(value, Mapping):
            self._wrong("E001", f"{self.where} is a {type(value).__name__}, not a dict.", f"Write {_EXAMPLE}.")
            return
        given = dict(cast("Mapping[str, Any]", value))
        if "URL" not in given and "url" in given:
            given["URL"] = given["url"]  # The key is told as a wrong one; what else is wrong is told with it.
        elif "URL" not in given and (near := [key for key in given if nearest(str(key).upper(), ["URL"])]):
            self._wrong("E003", f"{self.where} has no 'URL', but {near[0]!r}.", 'Write "URL".')
            return
        url = given.pop("URL", None)
        backend = self._backend(url)
        if backend is None:
            return
        self.config["url"] = url
        self._take(given, backend)
        if not callable(url) and not self.client_missing:
            self._load()

    def _backend(self, url: Any) -> type[Backend] | None:
        """The transport's backend; of a function's URL it is only known at start, and until then every key is right."""
        if callable(url):
            return Backend
        if not isinstance(url, (str, BrokerURL)) or not str(url).strip():
            self._wrong("E003", f"{self.where} has no 'URL'.", 'Write "URL": "kafka://localhost:9092".')
            return None
        backend = None
        try:
            backend = backend_type_of(url)
            backend.require_client()
        except MissingExtraError as exc:
            self.client_missing = True
            self._wrong("E004", f"{self.where}: {exc}")
        except ConfigurationError as exc:
            self._wrong("E003", f"{self.where}['URL']: {exc}")
        return backend

    def _take(self, given: dict[str, Any], backend: type[Backend]) -> None:
        known = [name.upper() for name in backend.options_type.model_fields if name != "client"]
        names = [*known, *_DJANGOS, _CLIENT, "URL"]
        clients, ignored = self._others(backend)
        for key, value in given.items():
            if key == _CLIENT:
                self._take_options(value, given, backend, clients)
            elif key == "MAX_PENDING":
                self._take_max_pending(value)
            elif key in known or (str(key).isupper() and (backend is Backend or key.lower() in ignored)):
                self._take_ours(key, value)
            else:
                self._unknown(key, names, clients)

    def _others(self, backend: type[Backend]) -> tuple[Mapping[str, Any], Collection[str]]:
        """The client's options, and those that have no effect, as far as they can be known."""
        if self.client_missing or backend is Backend:
            return {}, ()
        url = read_url(self.config["url"])
        return backend.client_option_names(url), backend.ignored_option_names(url)

    def _unknown(self, key: object, names: list[str], clients: Mapping[str, Any]) -> None:
        text = str(key)
        if text.upper() in names:
            hint = f"Keys are in upper case: {text.upper()!r}."
        elif text.lower() in clients:
            hint = f"It is an option of the client: write {_CLIENT!r}: {{{text.lower()!r}: ...}}."
        elif near := nearest(text.upper(), names):
            hint = f"Did you mean {near.removeprefix(' (did you mean ').removesuffix('?)')}?"
        else:
            hint = f"Options of the client go into {_CLIENT!r}; ours are {', '.join(sorted(names))}."
        self._wrong("E002", f"{self.where} has the unknown key {key!r}.", hint)

    def _take_options(
        self, value: object, given: Mapping[str, Any], backend: type[Backend], clients: Mapping[str, Any]
    ) -> None:
        if not isinstance(value, Mapping):
            self._wrong("E003", f"{self.where}['OPTIONS'] is a {type(value).__name__}; it must be a dict.")
            return
        options = dict(cast("Mapping[str, Any]", value))
        for name in list(options):
            # What only we know may stand among the client's; a name that both have is the client's here.
            ours = name in backend.options_type.model_fields and name != "client"
            if ours and backend is not Backend and name not in clients:
                option = options.pop(name)
                if name.upper() in given and backend.transport == "memory":
                    continue  # It is the client's, of the transport that memory:// stands in for.
                if name.upper() in given:
                    self._wrong(
                        "E003", f"{self.where} has {name.upper()!r} and OPTIONS[{name!r}]; leave one of them out."
                    )
                self._take_ours(name, option)
        self.config["client"] = options

    def _take_max_pending(self, value: object) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            self.max_pending = value
        else:
            self._wrong("E003", f"{self.where}['MAX_PENDING'] must be a whole number above 0, not {value!r}.")

    def _take_ours(self, key: str, value: Any) -> None:
        """An option of ours; what is named by its dotted path is imported, as Django's settings do."""
        name = key.lower()
        if name == "hooks":
            if not isinstance(value, (list, tuple)):
                self._wrong("E003", f"{self.where}['HOOKS'] is a {type(value).__name__}; it must be a list.")
                return
            instances = [self._instance(key, each) for each in cast("list[Any]", value)]
            value = [each for each in instances if each is not _MISSING]
        elif name == "serializer":
            value = self._instance(key, value)
        elif name == "on_timeout" and value not in ("raise", "log"):
            value = self._object(key, value)
        if value is not _MISSING:
            self.config[name] = value

    def _object(self, key: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return import_string(value)
        except ImportError as exc:
            self._wrong("E003", f"{self.where}[{key.upper()!r}]: {value!r} cannot be imported: {exc}.")
            return _MISSING
        except Exception as exc:  # The module is the project's: whatever it raises at its import.
            told = f"{type(exc).__name__}: {exc}"
            self._wrong("E003", f"{self.where}[{key.upper()!r}]: {value!r} cannot be imported: {told}.")
            return _MISSING

    def _instance(self, key: str, value: Any) -> Any:
        """Hooks and serializers are named by their class as well."""
        found = self._object(key, value)
        try:
            return found() if isinstance(found, type) else found
        except MissingExtraError as exc:  # MessagePack's
            self._wrong("E004", f"{self.where}[{key.upper()!r}]: {exc}")
            return _MISSING
        except Exception as exc:
            told = f"{found.__name__}() raised {type(exc).__name__}: {exc}"
            self._wrong("E003", f"{self.where}[{key.upper()!r}]: {told}.")
            return _MISSING

    def _load(self) -> None:
        try:
            [self.spec] = load_brokers({self.alias: self.config}, {})
        except MissingExtraError as exc:
            self._wrong("E004", f"{self.where}: {exc}")
        except ConfigurationError as exc:
            for text in exc.problems:
                told = text.removeprefix(f"broker {self.alias!r}: ")
                self._wrong("E002" if told.startswith("unknown option") else "E003", self._in_settings_words(told))

    def _in_settings_words(self, told: str) -> str:
        """A problem as `connect()` tells it, with the names that stand in the settings."""
        where, colon, rest = told.partition(": ")
        name = where.partition(".")[0]  # pydantic adds the branches of a union.
        if colon and name in self.config and name not in ("url", "client"):
            return f"{self.where}[{name.upper()!r}]: {rest}"
        return f"{self.where}: {told.replace('unknown option client=', 'unknown option in OPTIONS: ')}"

    def _wrong(self, code: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"dispytch.{code}", message, hint))
