"""From URLs and mappings to backends with typed options. All that is wrong is told at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, cast

from pydantic import ValidationError

from dispytch_integrations._misuse import AsyncBlock, SyncBlock
from dispytch_integrations._overriding import overriding
from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import Backend, BrokerOptions, BrokerURL
from dispytch_integrations.errors import ConfigurationError

__all__ = [
    "BrokerSpec",
    "Config",
    "aliases",
    "backend_type_of",
    "load_brokers",
    "load_one",
    "read_url",
    "schemes",
    "transport_of",
    "validate",
]

Config = str | Mapping[str, Any] | Callable[[], "str | Mapping[str, Any]"] | None
"""A URL, a mapping of aliases to URLs or option mappings, a function that returns one of them; None: DISPYTCH_URL."""

_KAFKA = "dispytch_integrations.kafka:KafkaBackend"
_RABBITMQ = "dispytch_integrations.rabbitmq:RabbitMQBackend"
_REDIS = "dispytch_integrations.redis:RedisBackend"
_MEMORY = "dispytch_integrations.memory:MemoryBackend"

_SCHEMES = {
    "kafka": _KAFKA,
    "kafka+ssl": _KAFKA,
    "rabbitmq": _RABBITMQ,
    "amqp": _RABBITMQ,
    "amqps": _RABBITMQ,
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS,
    "valkey": _REDIS,
    "valkeys": _REDIS,
    "redis+sentinel": _REDIS,
    "redis+cluster": _REDIS,
    "memory": _MEMORY,
}


@dataclass(frozen=True, slots=True)
class BrokerSpec:
    """One broker, read from the settings and not yet connected."""

    alias: str
    backend: Backend
    options: BrokerOptions


def load_brokers(config: Config, keywords: Mapping[str, Any]) -> list[BrokerSpec]:
    """Read the settings of all brokers.

    `keywords` are defaults for every broker; a broker's own mapping comes before them, its URL's query before that:
    the nearer to the broker, the stronger.

    Raises ConfigurationError with everything that is wrong: no broker, an unknown scheme or option, a wrong value;
    MissingExtraError when a client library is missing and nothing else is wrong.
    """
    if overriding.load is not None:
        return overriding.load(config, keywords)
    problems: list[str] = []
    errors: list[ConfigurationError] = []
    specs: list[BrokerSpec] = []
    for alias, settings in aliases(config).items():
        try:
            specs.append(load_one(alias, settings, keywords))
        except ConfigurationError as exc:
            errors.append(exc)
            problems.extend(f"broker {alias!r}: {problem}" for problem in exc.problems)
    if len(errors) == 1 and len(problems) == 1 and type(errors[0]) is not ConfigurationError:
        raise errors[0]
    if problems:
        raise ConfigurationError(problems)
    return specs


def backend_type_of(url: str | BrokerURL) -> type[Backend]:
    """Who serves a URL. Raises ConfigurationError for one that is not readable, or that nobody serves."""
    return _backend_type(read_url(url).scheme)


def schemes() -> Collection[str]:
    """The schemes of URLs that are served; each transport's own name is among them."""
    return _SCHEMES.keys()


def transport_of(url: str) -> str:
    """The transport that a URL's scheme belongs to ("kafka"), without its client library.

    Raises ConfigurationError as `backend_type_of`.
    """
    return backend_type_of(url).transport


def aliases(config: Config, default: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Each alias with its settings, `url` among them. Raises ConfigurationError when there is no broker at all.

    `default`: what counts when nothing is given and DISPYTCH_URL is not set; None: that is an error.
    """
    if callable(config) and not isinstance(config, (AsyncBlock, SyncBlock)):
        config = config()
    if config is None:
        config = os.environ.get("DISPYTCH_URL", "").strip() or default
        if not config:
            raise ConfigurationError(
                "no broker is configured: pass a URL, as in connect('kafka://localhost:9092'), "
                "or set the environment variable DISPYTCH_URL"
            )
    if isinstance(config, str):
        if not config.strip():
            raise ConfigurationError("the broker's URL is empty; write for example 'kafka://localhost:9092'")
        return {"default": {"url": config}}
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"a {type(config).__name__} configures no broker; give a URL, a mapping of aliases, or a function "
            f"that returns one of them"
        )
    if not config:
        raise ConfigurationError("the mapping of brokers is empty; write {'default': 'kafka://localhost:9092'}")
    if any(isinstance(alias, str) and alias.lower() == "url" for alias in config):
        raise ConfigurationError(
            "the mapping starts with aliases, not with 'url'; write {'default': {'url': ..., 'timeout': 2.0}}"
        )
    return {alias: _settings_of(alias, value) for alias, value in config.items()}


def _settings_of(alias: object, value: object) -> dict[str, Any]:
    if not isinstance(alias, str) or not alias:
        raise ConfigurationError(f"a broker's alias is a str such as 'default', not {alias!r}")
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    return {"url": value}


def load_one(alias: str, settings: dict[str, Any], keywords: Mapping[str, Any]) -> BrokerSpec:
    """One broker of these settings, `url` among them. Raises as `load_brokers`."""
    for name in settings:
        if "url" not in settings and str(name).lower() == "url":
            raise ConfigurationError(f"there is no 'url', but {name!r}; options are in lower case: write 'url'")
    url = read_url(settings.pop("url", None))
    backend_type = _backend_type(url.scheme)
    backend_type.require_client()
    problems: list[str] = []
    query = _from_text(url, backend_type, problems)
    given = _without_ignored({**keywords, **settings, **query}, url, backend_type)
    ours, clients = _split(given, url, backend_type, problems)
    options = validate(backend_type.options_type, ours, problems)
    known = backend_type.client_option_names(url)
    client = ours.get("client")
    if isinstance(client, Mapping):
        advice = partial(backend_type.advice_for, url)
        problems.extend(_unknown(cast("Mapping[str, Any]", client), known, "client=", advice))
    if options is not None:
        named = {name: value for name, value in options.client.items() if name in known}
        try:
            backend = backend_type(url, options, {**clients, **named})
        except ConfigurationError as exc:
            problems.extend(exc.problems)
        else:
            if not problems:
                return BrokerSpec(alias, backend, options)
    raise ConfigurationError(problems)


def read_url(url: object) -> BrokerURL:
    """A URL, or what a function returns as one. Raises ConfigurationError."""
    if callable(url):
        url = url()
    if isinstance(url, BrokerURL):
        return url
    if url is None:
        raise ConfigurationError("there is no 'url'; write {'url': 'kafka://localhost:9092', ...}")
    if not isinstance(url, str):
        raise ConfigurationError(f"the URL is a {type(url).__name__}; write a str such as 'kafka://localhost:9092'")
    return BrokerURL.parse(url)


def _backend_type(scheme: str) -> type[Backend]:
    path = _SCHEMES.get(scheme)
    if path is None:
        raise ConfigurationError(
            f"nobody serves {scheme}://{nearest(scheme, list(_SCHEMES))}; write one of "
            + ", ".join(f"{known}://" for known in _SCHEMES)
        )
    module, _, name = path.partition(":")
    backend_type: type[Backend] = getattr(import_module(module), name)
    return backend_type


def _from_text(url: BrokerURL, backend_type: type[Backend], problems: list[str]) -> dict[str, Any]:
    """The URL's query, with the values of the client's options read by the type of their defaults."""
    ours = backend_type.options_type.model_fields
    defaults = backend_type.client_option_names(url)
    read: dict[str, Any] = {}
    for name, text in url.query.items():
        try:
            read[name] = text if name in ours or name not in defaults else _from_word(name, text, defaults[name])
        except ConfigurationError as exc:
            problems.extend(exc.problems)
    return read


_TEXTS = ("name", "id", "password", "user", "file", "path", "certs", "host")
"""How options end that are texts, whatever they look like; most clients have no default for them."""

_WORDS: dict[str, bool | None] = {"true": True, "yes": True, "false": False, "no": False, "none": None}


def _from_word(name: str, text: str, default: object) -> object:
    word = text.lower()
    if isinstance(default, str) or (default is None and name.endswith(_TEXTS)):
        return text
    if isinstance(default, bool):
        value = {**_WORDS, "1": True, "0": False}.get(word)
        if value is None:
            raise ConfigurationError(f"{name}={text} in the URL is not true or false")
        return value
    if word in _WORDS:
        return _WORDS[word]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if isinstance(default, (int, float)):
        raise ConfigurationError(f"{name}={text} in the URL is not a number")
    return text


def _without_ignored(given: dict[str, Any], url: BrokerURL, backend_type: type[Backend]) -> dict[str, Any]:
    """What has an effect; the names that do not are looked at last, since that may import clients."""
    ours = backend_type.options_type.model_fields
    ignored = backend_type.ignored_option_names(url)
    client = given.get("client")
    if isinstance(client, Mapping):
        client = cast("Mapping[str, Any]", client)
        given = {**given, "client": {name: value for name, value in client.items() if name not in ignored}}
    return {name: value for name, value in given.items() if name in ours or name not in ignored}


def _split(
    given: Mapping[str, Any], url: BrokerURL, backend_type: type[Backend], problems: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and the client's; names that neither has are problems."""
    ours = backend_type.options_type.model_fields
    clients = backend_type.client_option_names(url)
    problems.extend(_unknown(given, [*ours, *clients], "", partial(backend_type.advice_for, url)))
    return (
        {name: value for name, value in given.items() if name in ours},
        {name: value for name, value in given.items() if name in clients and name not in ours},
    )


def _unknown(
    given: Mapping[str, Any], known: Mapping[str, Any] | list[str], where: str, advice: Callable[[str], str]
) -> Iterator[str]:
    names = list(known)
    hints = names if where else [*names, "outbox"]  # It is a keyword of `connect` alone.
    for name in given:
        if name not in names:
            lower = str(name).lower()
            if told := advice(lower):
                hint = f" ({told})"
            else:
                hint = f" (write {lower!r})" if lower in hints else nearest(str(name), hints)
            yield f"unknown option {where}{name!r}{hint}"


def validate(options_type: type[BrokerOptions], values: dict[str, Any], problems: list[str]) -> BrokerOptions | None:
    """The options; None: the problems are in the list, without the values, which may be secrets."""
    try:
        return options_type.model_validate(values)
    except ValidationError as exc:
        # Without the input: it may be a secret.
        problems.extend(
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors(include_url=False, include_input=False)
        )
        return None
