"""What a managed connection must implement: a broker's client and its producer, opened and closed by us."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qsl, quote, unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from dispytch_integrations._parts import wrong_hooks, wrong_serializer
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError
from dispytch_integrations.producer import Producer

__all__ = ["Backend", "BrokerOptions", "BrokerURL", "Secret", "read_secret", "scrub"]

Secret = str | Callable[[], str] | Path
"""A password or token: the text, a function that returns it, or the path of a file that holds it."""


class BrokerOptions(BaseModel):
    """What can be set for every broker; keywords of `connect`, keys of the mapping, or the URL's query.

    Transports derive from it. What is not declared here or there is an option of the underlying client.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    timeout: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Seconds an emit waits for the broker's confirmation; default 5. None waits without end: not advised."""
    startup_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds during which a broker that does not answer is tried again, before the start fails; default 30."""
    shutdown_timeout: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    """Seconds that events in flight get when the app stops; default 10."""
    required: bool | None = None
    """Does the app fail to start without this broker? False: it starts, and the connection is made when it can be.
    None: True, unless an outbox is relayed to the broker: its events wait there, and the app starts after the first
    attempt that is not answered; what the broker refuses (a password) still fails the start."""
    on_timeout: Literal["raise", "log"] | Callable[[Any], object] = "raise"
    """What an emit that is not confirmed in time does: raise ProducerTimeout, log a warning, or call with the event."""
    source: str | None = None
    """CloudEvents `source`, a URI-reference; None: "/" and the top-level package of the event's class."""
    cloudevents: bool | str = True
    """CloudEvents attributes as headers; False: none; a string: their prefix instead of the transport's own."""
    prefix: str = ""
    """Goes in front of every topic, exchange, channel and stream: "staging."."""
    max_size: int | None = Field(default=None, gt=0)
    """Bytes that an event's body may have; a larger one is refused at the call, before it is stored in an outbox, too.
    None: what the client would refuse (Kafka's `max_request_size`, 1 MiB); else the broker decides."""
    hooks: Sequence[Any] = ()
    """Objects with `before_send`, `sent` and `failed`: see `dispytch_integrations.hooks`."""
    serializer: Any = None
    """How events become bytes; None: JSON."""
    client: Mapping[str, Any] = Field(default_factory=dict, repr=False)
    """Options of the underlying client whose names are ours, too."""

    @field_validator("cloudevents", mode="before")
    @classmethod
    def _boolean_words(cls, value: object) -> object:
        # From a URL's query all is text, and "false" is no prefix.
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("timeout", "startup_timeout", "shutdown_timeout", "max_size", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(f"{value} is no number")
        return value

    @field_validator("on_timeout", mode="before")
    @classmethod
    def _is_called_or_known(cls, value: object) -> object:
        if value not in ("raise", "log") and not callable(value):
            raise ValueError("write 'raise', 'log', or a function that is called with the event")
        return value

    @field_validator("hooks", "serializer", mode="before")
    @classmethod
    def _can_be_called(cls, value: object, info: ValidationInfo) -> object:
        problems = (wrong_hooks if info.field_name == "hooks" else wrong_serializer)(value)
        if told := "; ".join(problems):
            raise ValueError(told)
        return value

    @field_validator("source")
    @classmethod
    def _is_no_default(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("it is empty; write a URI-reference such as /shop, or leave it out")
        return value

    @field_validator("source", "cloudevents", "prefix")
    @classmethod
    def _can_be_sent(cls, value: object) -> object:
        # They stand in headers and names of every message, which refuse these in what an event gives.
        if isinstance(value, str) and _CONTROL.search(value):
            raise ValueError("it holds a control character; leave that out")
        return value


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?"
)


@dataclass(frozen=True, slots=True)
class BrokerURL:
    """A broker's URL, taken apart. `str()` and `repr()` give it without user, password and query."""

    scheme: str
    hosts: tuple[tuple[str, int | None], ...]
    """(host, port) pairs; port None: the transport's default. IPv6 addresses without brackets."""
    path: str = ""
    """With its leading slash, percent-decoded not yet."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    query: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def parse(cls, url: str) -> BrokerURL:
        """Take a URL apart: `scheme://user:password@host1:port,host2/path?option=value`.

        Raises ConfigurationError, without repeating the URL: it may hold a password.
        """
        url = url.strip()
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigurationError(
                "a broker's URL is not readable; write scheme://host:port, for example kafka://localhost:9092 "
                "(and %23 for #, %2F for / in a password)"
            )
        if match["authority"] and "@" in url[len(match["scheme"]) + 3 + len(match["authority"]) :]:
            # A / or ? in a password: its parts would be taken for host, path and options, and be told in errors.
            raise ConfigurationError(
                "a broker's URL has an @ in its path or options; write %2F for /, %3F for ? and %40 for @ in a user "
                "or password, and %40 for any other @"
            )
        credentials, at, hosts = match["authority"].rpartition("@")
        if "@" in credentials and "," in credentials:
            raise ConfigurationError(
                "a broker's URL has a user and password for each host; write one for all, in front: "
                "scheme://user:password@host1,host2 (and %40 for @, %2C for , in a user or password)"
            )
        username, colon, password = credentials.partition(":")
        try:
            pairs = parse_qsl(match["query"] or "", keep_blank_values=True, strict_parsing=bool(match["query"]))
        except ValueError:
            # Without the cause: it repeats a part of the query, which may be a password.
            raise ConfigurationError("a broker's URL has a query that is not option=value&option=value") from None
        query = dict(pairs)
        if len(query) < len(pairs):
            raise ConfigurationError("a broker's URL gives an option twice; leave one of them out")
        return cls(
            scheme=match["scheme"].lower(),
            hosts=tuple(_host(text) for text in hosts.split(",")) if hosts else (),
            path=match["path"],
            username=unquote(username) if at and username else None,
            password=unquote(password) if colon else None,
            query=query,
        )

    def __str__(self) -> str:
        hosts = ",".join(
            (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
            for host, port in self.hosts
        )
        return f"{self.scheme}://{hosts}{self.path}"

    def __repr__(self) -> str:
        return f"<BrokerURL {self}>"


def _host(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(
        r"(?:\[(?P<six>[0-9A-Fa-f:.%]+)\]|(?P<name>[^:\[\]\s]+))(?::(?P<port>[0-9]{1,5}))?", text.strip()
    )
    if match is None or _CONTROL.search(text) or (match["port"] is not None and not 0 < int(match["port"]) < 65536):
        raise ConfigurationError(
            "a broker's URL has a host that is not readable; write host:port, or [::1]:port for IPv6"
        )
    return match["six"] or match["name"], None if match["port"] is None else int(match["port"])


def read_secret(value: Secret) -> str:
    """The secret itself: a file is read (its last newline does not count), a function called.

    Raises ConfigurationError when the file cannot be read, or the function gives no str; BrokerUnavailableError, which
    is tried again, when the function raises.
    """
    if isinstance(value, Path):
        try:
            return value.read_text().rstrip("\r\n")
        except OSError as exc:
            raise ConfigurationError(f"the secret's file {value} cannot be read: {exc.strerror}") from exc
    if not callable(value):
        return value
    name = getattr(value, "__qualname__", type(value).__name__)
    try:
        secret = value()
    except Exception as exc:
        # Without the cause's text: it may repeat the secret.
        raise BrokerUnavailableError(
            f"the secret's function {name} raised {type(exc).__name__}; it is chained"
        ) from exc
    if not isinstance(secret, str):
        if isinstance(secret, Coroutine):
            secret.close()
        raise ConfigurationError(f"the secret's function {name} gave a {type(secret).__name__}; it must return a str")
    return secret


def scrub(text: str, secrets: Sequence[str]) -> str:
    """`text` with every secret in it replaced by stars, also as it is written in a URL or in a repr."""
    forms = {form for secret in secrets if secret for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):  # One may be a part of another.
        text = text.replace(form, "***")
    return text


def _forms(secret: str) -> tuple[str, ...]:
    data = secret.encode(errors="replace")
    return secret, quote(data, safe=""), quote(data), repr(secret)[1:-1], repr(data)[2:-1]


class Backend(ABC):
    """Owns the connection to one broker, and its producer. Constructed without I/O, from any thread.

    After `stop` it may be started again, on the same event loop or another: nothing of the old connection is used.
    """

    transport: ClassVar[str]
    """"kafka", "rabbitmq", "redis", "memory"."""
    options_type: ClassVar[type[BrokerOptions]] = BrokerOptions
    modules: ClassVar[tuple[str, ...]] = ()
    """What connecting and sending import; it is imported when the start begins.

    A process that forks while another thread imports a module leaves it locked in the child for ever.
    """

    producer: Producer
    """The same object throughout; raises NotStartedError on delivery unless the backend is started."""

    max_size: int | None = None
    """Bytes of a payload that the client refuses in any case; None: there is no such limit."""

    @abstractmethod
    def __init__(self, url: BrokerURL, options: Any, client_options: Mapping[str, Any]) -> None:
        """`options`: an instance of `options_type`; `client_options`: what the client is to get, checked by name.

        Raises ConfigurationError for what does not fit together.
        """

    @classmethod
    def require_client(cls) -> None:
        """Raise MissingExtraError when the client library is not installed."""

    @classmethod
    def client_option_names(cls, url: BrokerURL) -> Mapping[str, Any]:
        """The options of the underlying client: name to default value (None: unknown; else its type is used to read
        a URL's text)."""
        return {}

    @classmethod
    def advice_for(cls, url: BrokerURL, name: str) -> str:
        """What to write in place of an option that this URL does not have; "": nothing better than the nearest name."""
        return ""

    @classmethod
    def ignored_option_names(cls, url: BrokerURL) -> Collection[str]:
        """Options that are taken and have no effect: those of the transport that it stands in for."""
        return ()

    @abstractmethod
    async def start(self) -> None:
        """One attempt to connect; the caller tries again and sets the deadline.

        Raises BrokerUnavailableError (or any exception) when it failed, leaving nothing open; ConfigurationError
        when trying again would be of no use.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Flush what is pending and close. The caller bounds the time by cancelling; then close without flushing.

        Harmless when not started.
        """

    @abstractmethod
    async def ping(self) -> None:
        """Ask the broker for an answer; raise when it does not come. The caller sets the deadline.

        Where the client would go on using a dead connection, this makes it open a new one.
        """

    @property
    def secrets(self) -> Sequence[str]:
        """Texts that must not appear in an error or a log line."""
        return ()

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it connects to, without secrets: "kafka://localhost:9092"."""
