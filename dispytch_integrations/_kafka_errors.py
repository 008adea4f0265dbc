"""What Kafka answers or its client raises, as our errors. Importing this needs aiokafka."""

from __future__ import annotations

from aiokafka import errors as kafka_errors  # type: ignore[import-untyped]

from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    DispytchError,
    MessageTooLargeError,
    NotStartedError,
    PermanentFailure,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)

__all__ = ["BEFORE_SENDING", "TRANSLATIONS", "Translations", "translate"]

Translations = tuple[tuple[type[Exception], type[DispytchError], str], ...]

_DOUBT = "it may have been delivered"
_SIZE = "send less, or raise max_request_size here and max.message.bytes of the topic"
_MISSING = "create the topic, or look for a typing error in the route"
_ACCESS = "allow this user to describe and write the topic (and to create it, if it is to be created)"
_UNREACHABLE = "nothing was sent; is the broker up, and does it advertise an address that is reachable from here?"

TRANSLATIONS: Translations = (
    (kafka_errors.KafkaTimeoutError, ProducerTimeout, "the client's queue was full until the end of its time"),
    (kafka_errors.RequestTimedOutError, ProducerTimeout, _DOUBT),
    (kafka_errors.MessageSizeTooLargeError, MessageTooLargeError, _SIZE),
    (kafka_errors.RecordListTooLargeError, MessageTooLargeError, _SIZE),
    (kafka_errors.RecordTooLargeError, MessageTooLargeError, _SIZE),
    (kafka_errors.UnknownTopicOrPartitionError, UnroutableError, _MISSING),
    (kafka_errors.InvalidTopicError, PermanentFailure, "the broker does not allow this topic's name"),
    (kafka_errors.TopicAuthorizationFailedError, DeliveryError, _ACCESS),
    (kafka_errors.ClusterAuthorizationFailedError, DeliveryError, _ACCESS),
    (kafka_errors.InvalidTimestampError, PermanentFailure, "timestamp_ms is outside of what the topic allows"),
    (kafka_errors.PolicyViolationError, PermanentFailure, "a policy of the broker forbids it"),
    (kafka_errors.UnsupportedForMessageFormatError, PermanentFailure, "the topic's message format is too old for it"),
    (kafka_errors.NotEnoughReplicasError, DeliveryError, "the topic has fewer replicas in sync than it demands"),
    (kafka_errors.NotEnoughReplicasAfterAppendError, UnconfirmedError, _DOUBT),
    (kafka_errors.ProducerClosed, NotStartedError, "the client was stopped before it took the event"),
    (kafka_errors.ProducerFenced, DeliveryError, "another producer uses the same transactional_id"),
    (kafka_errors.IllegalOperation, DeliveryError, "emit within `async with raw_kafka_producer.transaction():`"),
    # Connections break and leaders move between the attempts of one delivery: an earlier attempt may have arrived.
    (kafka_errors.KafkaConnectionError, UnconfirmedError, _DOUBT),
    (kafka_errors.NodeNotReadyError, UnconfirmedError, _DOUBT),
    (kafka_errors.NotLeaderForPartitionError, UnconfirmedError, _DOUBT),
    (kafka_errors.LeaderNotAvailableError, UnconfirmedError, _DOUBT),
    (kafka_errors.KafkaStorageError, UnconfirmedError, _DOUBT),
    (kafka_errors.OutOfOrderSequenceNumber, UnconfirmedError, _DOUBT),
    (kafka_errors.CorrelationIdError, UnconfirmedError, _DOUBT),
    (kafka_errors.KafkaError, DeliveryError, ""),
    (OSError, UnconfirmedError, _DOUBT),
)
"""(what the client raises, our error, what it means or what to do), once the message was handed to the client."""

BEFORE_SENDING: Translations = (
    (kafka_errors.RequestTimedOutError, BrokerUnavailableError, _UNREACHABLE),
    (kafka_errors.KafkaConnectionError, BrokerUnavailableError, _UNREACHABLE),
    (kafka_errors.NodeNotReadyError, BrokerUnavailableError, _UNREACHABLE),
    (kafka_errors.StaleMetadata, BrokerUnavailableError, _UNREACHABLE),
    (kafka_errors.LeaderNotAvailableError, BrokerUnavailableError, "the topic has no leader; nothing was sent"),
    (kafka_errors.CorrelationIdError, BrokerUnavailableError, _UNREACHABLE),
    (TimeoutError, BrokerUnavailableError, _UNREACHABLE),
    (OSError, BrokerUnavailableError, _UNREACHABLE),
    *TRANSLATIONS,
)
"""The same while the topic was being looked for: what would be in doubt later was certainly not sent."""


def translate(exc: Exception, what: str, table: Translations = TRANSLATIONS) -> DispytchError:
    """Our error for `exc`; `what`: whom it befell ("<Message OrderPlaced ...>"). The cause is chained."""
    if isinstance(exc, DispytchError):
        return exc
    kind, advice = _kind(exc, table)
    translated = kind(f"{what} was not confirmed: {_text(exc)}" + (f"; {advice}" if advice else ""))
    translated.__cause__ = exc
    return translated


def _kind(exc: Exception, table: Translations) -> tuple[type[DispytchError], str]:
    for raised, kind, advice in table:
        if isinstance(exc, raised):
            return kind, advice
    return DeliveryError, ""


def _text(exc: Exception) -> str:
    name = type(exc).__name__
    # The client's text for an answer of the broker is its number, name and a paragraph of the protocol's manual.
    if isinstance(exc, kafka_errors.BrokerResponseError):
        return name
    text = str(exc)
    return text if text.startswith(name) else f"{name}: {text}" if text else name
