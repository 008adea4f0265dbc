"""What RabbitMQ answers or its client raises, as our errors. Importing this needs aio-pika."""

from __future__ import annotations

from aiormq import exceptions as amqp

from dispytch_integrations.errors import (
    BrokerUnavailableError,
    DeliveryError,
    DispytchError,
    MessageTooLargeError,
    PermanentFailure,
    ProducerTimeout,
    UnconfirmedError,
    UnroutableError,
)
from dispytch_integrations.message import Message

__all__ = ["CONNECTION_FAULTS", "TRANSLATIONS", "is_message_fault", "tell", "translate", "unroutable"]

_DOUBT = "it may have been delivered"

TRANSLATIONS: tuple[tuple[type[Exception], type[DispytchError], str], ...] = (
    (amqp.ChannelNotFoundEntity, UnroutableError, "declare the exchange, or look for a typing error in the route"),
    (amqp.ChannelAccessRefused, PermanentFailure, "allow this user to write to it; an internal exchange takes nothing"),
    (amqp.ChannelPreconditionFailed, PermanentFailure, "see the broker's words"),
    (amqp.ChannelClosed, DeliveryError, "see the broker's words"),
    (amqp.DeliveryError, DeliveryError, "the broker answered with a nack: a queue is full, or it could not store it"),
    (amqp.ChannelInvalidStateError, BrokerUnavailableError, "the channel is closed; nothing was sent"),
    (amqp.ConnectionClosed, UnconfirmedError, _DOUBT),
    (amqp.AMQPConnectionError, UnconfirmedError, _DOUBT),
    (amqp.AMQPError, DeliveryError, ""),
    (TimeoutError, ProducerTimeout, _DOUBT),
    (OSError, UnconfirmedError, _DOUBT),
)
"""(what the client raises, our error, what it means or what to do); the specific ones first."""

CONNECTION_FAULTS = (
    amqp.ConnectionFrameError,
    amqp.ConnectionSyntaxError,
    amqp.ConnectionCommandInvalid,
    amqp.ConnectionUnexpectedFrame,
    amqp.ConnectionNotAllowed,
    amqp.ConnectionNotImplemented,
    amqp.ConnectionInternalError,
)
"""The broker closed the connection because of what it read: sending it again would close it again."""


def is_message_fault(error: BaseException | None) -> bool:
    """Was the channel or the connection closed because of one of the messages, and not by a cut or a restart?"""
    if isinstance(error, CONNECTION_FAULTS):
        return True
    # Without a code it was closed by us.
    return isinstance(error, amqp.ChannelClosed) and not (len(error.args) == 2 and error.args[0] is None)


def translate(what: str, error: BaseException) -> DispytchError:
    """Our error for the client's, about `what` ("<Message ...> was not taken"), the original chained as its cause."""
    if isinstance(error, DispytchError):
        return error
    if isinstance(error, amqp.ChannelPreconditionFailed) and "size" in str(error):
        found: DispytchError = MessageTooLargeError(
            f"{what}: {tell(error)}; send less, or raise max_message_size of the broker"
        )
    elif type(error) is Exception:
        # aiormq's word for what was in flight when its user closed the channel.
        found = UnconfirmedError(f"{what}: the connection was closed; {_DOUBT}")
    elif isinstance(error, CONNECTION_FAULTS):
        found = PermanentFailure(f"{what}: the broker could not read it: {tell(error)}")
    else:
        for theirs, ours, hint in TRANSLATIONS:
            if isinstance(error, theirs):
                found = ours(f"{what}: {tell(error)}" + (f"; {hint}" if hint else ""))
                break
        else:
            found = DeliveryError(f"{what}: {tell(error)}")
    found.__cause__ = error
    return found


def unroutable(message: Message, words: str | None) -> UnroutableError:
    """The error for a message that the broker gave back, with its `words` ("NO_ROUTE")."""
    exchange = f"the exchange {message.destination!r}" if message.destination else "the default exchange"
    return UnroutableError(
        f"{message!r} was returned ({words or 'NO_ROUTE'}): {exchange} has no queue for the routing key "
        f"{message.properties.get('routing_key', '')!r}; bind one, or write mandatory=False on the route"
    )


def tell(error: BaseException) -> str:
    """What an error of the client says: the broker's or the system's own words where it has them."""
    if isinstance(error, amqp.DeliveryError):
        return "refused"
    words = [argument for argument in error.args if isinstance(argument, str) and argument]
    if isinstance(error, TimeoutError) and not words:
        return "no answer in time"
    return words[0] if words else type(error).__name__
