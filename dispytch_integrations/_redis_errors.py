"""What Redis answers or its client raises, as our errors. Importing this needs redis."""

from __future__ import annotations

from redis import exceptions as redis_errors

from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    MessageTooLargeError,
    PermanentFailure,
    UnroutableError,
)

__all__ = [
    "CODES",
    "TRANSLATIONS",
    "is_reply",
    "refuses_credentials",
    "refuses_settings",
    "reply_text",
    "translate",
]

_OUTAGE = "the broker takes nothing at the moment; the event was not sent"
_ACCESS = "check the password, and that the user may write there (ACL SETUSER)"
_CLUSTER = "this is a Redis cluster: connect with redis+cluster://host1:6379,host2:6379"

TRANSLATIONS: tuple[tuple[type[Exception], type[DeliveryError], str], ...] = (
    (redis_errors.OutOfMemoryError, BrokerUnavailableError, _OUTAGE),
    (redis_errors.ReadOnlyError, BrokerUnavailableError, "this is a replica: connect to its master, or by Sentinel"),
    (redis_errors.BusyLoadingError, BrokerUnavailableError, _OUTAGE),
    (redis_errors.ClusterDownError, BrokerUnavailableError, _OUTAGE),  # and MasterDownError
    (redis_errors.TryAgainError, BrokerUnavailableError, _OUTAGE),
    (redis_errors.AuthenticationError, BrokerUnavailableError, _ACCESS),
    (redis_errors.NoPermissionError, PermanentFailure, _ACCESS),
    (redis_errors.MovedError, UnroutableError, _CLUSTER),
    (redis_errors.AskError, UnroutableError, _CLUSTER),
    (redis_errors.MaxConnectionsError, BrokerUnavailableError, "give RedisProducer a client of its own"),
    (redis_errors.ConnectionError, BrokerUnavailableError, ""),
    (redis_errors.TimeoutError, BrokerUnavailableError, ""),
    (OSError, BrokerUnavailableError, ""),
)
"""(what the client raises, our error, what to do); a class comes before its bases."""

CODES: tuple[tuple[str, type[DeliveryError], str], ...] = (
    ("WRONGTYPE", PermanentFailure, "the key is no stream; choose another name, or delete the key"),
    ("MISCONF", BrokerUnavailableError, _OUTAGE),
    ("NOREPLICAS", BrokerUnavailableError, _OUTAGE),
    ("BUSY ", BrokerUnavailableError, _OUTAGE),
    ("ERR max number of clients", BrokerUnavailableError, _OUTAGE),
    ("ERR unknown command", PermanentFailure, "this broker does not know the command; streams need Redis 5 or newer"),
    ("ERR Protocol error: invalid bulk length", MessageTooLargeError, "raise proto-max-bulk-len, or send less"),
    ("ERR string exceeds maximum allowed size", MessageTooLargeError, "raise proto-max-bulk-len, or send less"),
)
"""(how a reply starts that the client has no class for, our error, what to do)."""


def is_reply(exc: Exception) -> bool:
    """Is this the broker's answer to one command, and not the loss of the connection?"""
    # The client's AuthenticationError and BusyLoadingError are ConnectionErrors, though they answer one command.
    answers = (redis_errors.ResponseError, redis_errors.AuthenticationError, redis_errors.BusyLoadingError)
    return isinstance(exc, answers)


def translate(exc: Exception, what: str) -> DeliveryError:
    """Our error for `exc`; `what`: whom it befell ("<Message OrderPlaced ...>"). The cause is chained."""
    text = reply_text(exc)
    kind, advice = _kind(exc, text)
    translated = kind(f"{what} was refused: {text}" + (f"; {advice}" if advice else ""))
    if text == str(exc):
        # Else the cause repeats what was cut off: a payload.
        translated.__cause__ = exc
    return translated


def _kind(exc: Exception, text: str) -> tuple[type[DeliveryError], str]:
    for start, kind, advice in CODES:
        if text.startswith((start, start.removeprefix("ERR "))):
            return kind, advice
    for raised, kind, advice in TRANSLATIONS:
        if isinstance(exc, raised):
            return kind, advice
    return DeliveryError, ""


def reply_text(exc: BaseException) -> str:
    """What the broker or the client said, without the arguments that an unknown command is answered with.

    Nor the clients of the sentinels, each with all its options, where none of them names a master.
    """
    text = str(exc) or type(exc).__name__
    return text.partition(", with args beginning")[0].partition(" : <redis.")[0]


def refuses_credentials(exc: BaseException) -> BaseException | None:
    """The client's error behind `exc` that says the user or password is wrong; None: it says something else."""
    return _behind(exc, (redis_errors.AuthenticationError,))


def refuses_settings(exc: BaseException) -> BaseException | None:
    """The broker's answer behind `exc` that stays the same however often one connects; None: trying again may help."""
    passing = (redis_errors.ClusterDownError, redis_errors.ConnectionError, redis_errors.TimeoutError)
    if _behind(exc, passing) is not None:
        return None
    return _behind(exc, (redis_errors.ResponseError, redis_errors.DataError))


def _behind(exc: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    found: BaseException | None = exc
    while found is not None and not isinstance(found, kinds):
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return found
