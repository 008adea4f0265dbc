"""Every error this package raises, as one tree.

    DispytchError
    ├── ConfigurationError            a setting is wrong; all problems of a start-up are told at once
    │   ├── MissingExtraError         a client library is not installed    (also ImportError)
    │   └── SettingsError             Django's settings                    (there also ImproperlyConfigured)
    ├── TransactionError              no commit that an event could wait for (there also Django's, SQLAlchemy's)
    ├── RouteError                    a route, key or its `{field}` parts  (also ValueError)
    ├── HeaderError                   a header that cannot be sent         (also ValueError)
    ├── SerializationError            an event that cannot become bytes    (also ValueError)
    ├── StartupError                  a broker was not reached in time     (also ConnectionError)
    ├── NotStartedError               emit before start or after stop      (also RuntimeError)
    ├── WrongLoopError                used from another event loop         (also RuntimeError)
    ├── WrongProcessError             used after a fork                    (also RuntimeError)
    └── DeliveryError                 the broker did not take a message
        ├── BrokerUnavailableError    not reachable: nothing was sent      (also ConnectionError)
        ├── NotAttemptedError         not sent: one before it in its order failed
        ├── UnroutableError           no queue, topic or exchange takes it
        ├── PermanentFailure          refused, and would be refused again
        │   └── MessageTooLargeError
        └── UnconfirmedError          sent, no answer: it may have been delivered
            └── ProducerTimeout       not confirmed before the deadline    (also TimeoutError)

Catch `DeliveryError` around an emit to handle whatever a broker can do to a message; the others are mistakes in
the program or its settings. No message of these errors holds a password, a token or a payload.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BrokerUnavailableError",
    "ConfigurationError",
    "DeliveryError",
    "DispytchError",
    "HeaderError",
    "MessageTooLargeError",
    "MissingExtraError",
    "NotAttemptedError",
    "NotStartedError",
    "PermanentFailure",
    "ProducerTimeout",
    "RouteError",
    "SerializationError",
    "SettingsError",
    "StartupError",
    "TransactionError",
    "UnconfirmedError",
    "UnroutableError",
    "WrongLoopError",
    "WrongProcessError",
]


class DispytchError(Exception):
    """The root of the tree: `except DispytchError` catches whatever this package raises."""


class ConfigurationError(DispytchError):
    """One or several settings are wrong; the message lists them all, each with what to write.

    `problems`: list[str], one sentence each. A single string is a list of one.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} settings are wrong:{lines}")


class MissingExtraError(ConfigurationError, ImportError):
    """A client library is not installed; the message is the pip line.

    `what`: what needs it, as the user wrote it ("kafka://"); `extra`: the extra of this package that brings it
    ("kafka"); `package`: the library's name on PyPI, by default the extra's.
    """

    def __init__(self, what: str, *, extra: str, package: str | None = None) -> None:
        self.extra = extra
        super().__init__(f"{what} needs {package or extra}: pip install 'dispytch-integrations[{extra}]'")


class SettingsError(ConfigurationError):
    """Something in a framework's settings is wrong. Raised as `dispytch_integrations.django.errors.SettingsError`."""


class TransactionError(DispytchError):
    """There is no commit that an event could wait for, or it is not clear which one.

    Raised as `TransactionError` of `dispytch_integrations.django.errors` or of `dispytch_integrations.sqlalchemy`, both
    of which are errors of their frameworks as well.
    """


class RouteError(DispytchError, ValueError):
    """A route, key or header template is wrong, or a value must not stand in it."""


class HeaderError(DispytchError, ValueError):
    """A header has a reserved name or a value that cannot be sent."""


class SerializationError(DispytchError, ValueError):
    """The serializer could not turn the event into bytes; the cause is chained."""


class StartupError(DispytchError, ConnectionError):
    """A required broker was not reached within `startup_timeout`; names each broker and its last error."""


class NotStartedError(DispytchError, RuntimeError):
    """The emitter's connection was never opened, or is closed; names the likely cause and the fix."""


class WrongLoopError(DispytchError, RuntimeError):
    """The connection belongs to another event loop than the one that is running."""


class WrongProcessError(DispytchError, RuntimeError):
    """The connection was opened before a fork and belongs to the parent process."""


class DeliveryError(DispytchError):
    """The broker did not take the message. Without arguments it says just that."""


class BrokerUnavailableError(DeliveryError, ConnectionError):
    """The broker cannot be reached; the message was not handed to it. An outage, not the message's fault."""


class NotAttemptedError(DeliveryError):
    """The message was not sent, since one before it in its order was not confirmed, or the time was up."""

    def __init__(
        self, told: str = "not sent: one before it in its order was not confirmed, or the time was up"
    ) -> None:
        super().__init__(told)


class UnroutableError(DeliveryError):
    """The broker was reached, but there is no topic, exchange or queue that takes the message."""


class PermanentFailure(DeliveryError):
    """The broker refused the message and would refuse it again: retrying is of no use."""


class MessageTooLargeError(PermanentFailure):
    """The message exceeds the broker's or the client's size limit."""


class UnconfirmedError(DeliveryError):
    """The message was sent but not confirmed: it may have been delivered, or not."""


class ProducerTimeout(UnconfirmedError, TimeoutError):
    """Not confirmed before the deadline: the event may have been delivered, now or later.

    A producer of your own raises it (without arguments if you like) to say the same.
    """
