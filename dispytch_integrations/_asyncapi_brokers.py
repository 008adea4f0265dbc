"""Brokers as a catalogue describes them: from their settings, without secrets, clients or connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dispytch_integrations import settings
from dispytch_integrations._asyncapi_schemas import mapping
from dispytch_integrations._broker import Broker
from dispytch_integrations._outlet import Outlet
from dispytch_integrations._prepare import MessageSettings
from dispytch_integrations.backend import BrokerOptions, BrokerURL
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.errors import ConfigurationError, RouteError
from dispytch_integrations.events import EventBase
from dispytch_integrations.memory import MemoryBackend, MemoryProducer

__all__ = ["Catalogued", "Destination", "Places", "places"]

Catalogued = Brokers | str | Mapping[str, Any] | Callable[[], "str | Mapping[str, Any]"] | None
"""What `connect` has returned, or takes; None: no brokers are known."""

_NO_KEYWORDS: Mapping[str, Any] = {}
_OURS = ("source", "cloudevents", "prefix", "serializer")
"""Options that change what a message looks like."""

_PROTOCOLS = {
    "kafka": "kafka",
    "kafka+ssl": "kafka-secure",
    "amqps": "amqps",
    "rediss": "rediss",
    "valkeys": "rediss",
    "memory": "memory",
}
_PLAIN = {"kafka": "kafka", "rabbitmq": "amqp", "redis": "redis"}
_PORTS = {
    "kafka": 9092, "kafka+ssl": 9092, "rabbitmq": 5672, "amqp": 5672, "amqps": 5671, "redis+sentinel": 26379,
    "redis": 6379, "rediss": 6379, "valkey": 6379, "valkeys": 6379, "redis+cluster": 6379,
}  # fmt: skip
_SASL = {"PLAIN": "plain", "SCRAM-SHA-256": "scramSha256", "SCRAM-SHA-512": "scramSha512", "GSSAPI": "gssapi"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where events of one class go, as far as it is known before they are emitted."""

    alias: str
    settings: MessageSettings
    server: bool
    """Is it one of the servers?"""
    exchanges: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of RabbitMQ: how exchanges are declared, by name without the prefix."""
    vhost: str = "/"
    """Of RabbitMQ."""
    problem: str | None = None
    """Why no broker takes them; None: one does."""


class _StandIn(MemoryBackend):
    """A broker of which only its settings count: takes the routes that it would take."""

    def __init__(self, url: BrokerURL, transport: str, options: BrokerOptions) -> None:
        memory = url if url.scheme == "memory" else BrokerURL.parse(f"memory://{transport}")
        super().__init__(memory, options, {})
        self._told = str(url)

    @property
    def address(self) -> str:
        """The URL that it stands in for."""
        return self._told


@dataclass(frozen=True, slots=True)
class _Known:
    broker: Broker
    server: dict[str, Any]
    exchanges: Mapping[str, Any]
    vhost: str


class Places:
    """The servers, and which of them takes an event."""

    def __init__(self, known: Mapping[str, _Known] | None) -> None:
        self._known = known
        self._routing = Brokers(None, {})
        self._routing._brokers = {alias: each.broker for alias, each in (known or {}).items()}

    @property
    def servers(self) -> dict[str, dict[str, Any]]:
        """AsyncAPI's server objects by alias."""
        return {alias: each.server for alias, each in (self._known or {}).items()}

    def destination(self, cls: type[EventBase]) -> Destination:
        """Where events of `cls` go; as an emit finds its broker."""
        alias = cls.__broker__ or "default"
        if self._known is None:
            return Destination(alias=alias, settings=_usual(alias), server=False)
        try:
            broker = self._routing.outlet_for(cls)
        except RouteError as exc:
            return Destination(alias=alias, settings=_usual(alias), server=False, problem=str(exc))
        known = self._known[broker.alias]
        return Destination(
            alias=broker.alias, settings=broker.settings, server=True, exchanges=known.exchanges, vhost=known.vhost
        )


def _usual(alias: str) -> MessageSettings:
    """What `connect` does unless it is told otherwise."""
    return Outlet(MemoryProducer(), alias=alias, timeout=None, cloudevents=True).settings


def places(brokers: Catalogued) -> Places:
    """Read the settings of `brokers`; of an object that `connect` has returned, those that it was given.

    No client is imported, so that only the options are checked that a catalogue shows. Raises ConfigurationError.
    """
    if brokers is None:
        return Places(None)
    config, keywords = (brokers._config, brokers._options) if isinstance(brokers, Brokers) else (brokers, _NO_KEYWORDS)
    problems: list[str] = []
    known: dict[str, _Known] = {}
    for alias, given in settings.aliases(config).items():
        try:
            known[alias] = _read(alias, given, keywords)
        except ConfigurationError as exc:
            problems.extend(f"broker {alias!r}: {problem}" for problem in exc.problems)
    if problems:
        raise ConfigurationError(problems)
    return Places(known)


def _read(alias: str, given: Mapping[str, Any], keywords: Mapping[str, Any]) -> _Known:
    url = settings.read_url(given.get("url"))
    transport = settings.backend_type_of(url).transport
    client = mapping(given.get("client", keywords.get("client")))
    values: dict[str, Any] = {**client, **keywords, **given, **url.query}
    problems: list[str] = []
    options = settings.validate(BrokerOptions, {name: values[name] for name in _OURS if name in values}, problems)
    if options is None:
        raise ConfigurationError(problems)
    broker = Broker(alias, _StandIn(url, transport, options), options)
    if transport == "memory" and url.hosts:
        transport = url.hosts[0][0].lower()
    return _Known(
        broker,
        _server(url, transport, values),
        mapping(values.get("exchanges")),
        url.path.removeprefix("/") or "/",
    )


def _server(url: BrokerURL, transport: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """AsyncAPI's server object. Only named parts of the URL get into it, none of its user, password or query."""
    default = _PORTS.get(url.scheme)
    hosts = [_host(host, port or default) for host, port in url.hosts]
    protocol = _PROTOCOLS.get(url.scheme) or _PLAIN[transport]
    if transport == "redis" and values.get("ssl") in (True, "true", "True", "yes", "1"):
        protocol = "rediss"
    if url.scheme == "memory":
        hosts = ["in-process"]
    elif not hosts:
        hosts = [_host("localhost", default)]
    server: dict[str, Any] = {"host": hosts[0], "protocol": protocol}
    if url.path.strip("/") and url.scheme != "memory":
        server["pathname"] = url.path
    security = _security(url, transport, values)
    if security:
        server["security"] = security
    server["x-dispytch-transport"] = transport
    server["x-dispytch-url"] = str(url)
    if len(hosts) > 1:
        server["x-hosts"] = hosts
    return server


def _host(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _security(url: BrokerURL, transport: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How one logs in, never with what."""
    if transport == "kafka":
        mechanism = _SASL.get(str(values.get("sasl_mechanism")))
        schemes = [] if mechanism is None else [{"type": mechanism}]
    else:
        given = url.password is not None or values.get("password") is not None
        schemes = [{"type": "userPassword"}] if given else []
    if values.get("certfile") is not None or values.get("ssl_certfile") is not None:
        schemes.append({"type": "X509"})
    return schemes
