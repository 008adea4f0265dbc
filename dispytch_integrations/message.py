"""A message: an event made ready to be sent. Plain data; what is handed between threads, stored and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dispytch_integrations._identity import event_id, uuid7

if TYPE_CHECKING:
    from dispytch_integrations.events import BackendConfig, EventBase, EventRoute

__all__ = ["Message", "log_fields"]


def log_fields(event_type: str, event_id: str, broker: str, destination: str) -> dict[str, str]:
    """What a log record of an event carries beside its text, as `extra`."""
    return {"event_type": event_type, "event_id": event_id, "broker": broker, "destination": destination}


class Message:
    """An event made ready, synchronously, in the caller's context.

    It is complete: sending it needs neither the event nor its class. Two messages are never equal; compare ids.
    """

    __slots__ = (
        "_id",
        "broker",
        "config",
        "content_type",
        "destination",
        "event",
        "headers",
        "ordering_key",
        "payload",
        "properties",
        "route",
        "trace",
        "type",
    )

    type: str
    """`__event_type__` of the event's class."""
    broker: str
    """Alias of the broker it goes to."""
    destination: str
    """Topic, exchange, channel or stream, with the broker's prefix."""
    ordering_key: str | None
    """Messages of one destination and key are delivered in order; None: no order asked for."""
    headers: dict[str, Any]
    """Metadata beside the payload, CloudEvents attributes included; str values unless the event's config says else."""
    properties: dict[str, Any]
    """What only this transport knows: partition, routing_key, priority, maxlen..."""
    payload: bytes | None
    """The body; None is a Kafka tombstone."""
    content_type: str
    """Media type of the payload."""
    event: EventBase | None
    """The event itself; None for a message that was read back from an outbox."""
    route: EventRoute | None
    """The filled route; only for producers that implement `send` and not `deliver`."""
    config: BackendConfig | None
    """The filled backend configuration; as `route`."""
    trace: Any
    """What a hook keeps with it in this process, as long as it is under way; neither stored nor sent."""

    def __init__(
        self,
        id: str | None,
        type: str,
        broker: str,
        destination: str,
        ordering_key: str | None,
        headers: dict[str, Any],
        properties: dict[str, Any],
        payload: bytes | None,
        content_type: str = "application/json",
        event: EventBase | None = None,
        route: EventRoute | None = None,
        config: BackendConfig | None = None,
    ) -> None:
        self._id = id
        self.type = type
        self.broker = broker
        self.destination = destination
        self.ordering_key = ordering_key
        self.headers = headers
        self.properties = properties
        self.payload = payload
        self.content_type = content_type
        self.event = event
        self.route = route
        self.config = config
        self.trace = None

    @property
    def id(self) -> str:
        """The event's identity: the same each time this event is emitted; consumers drop duplicates by it."""
        if self._id is None:
            self._id = uuid7() if self.event is None else event_id(self.event)
        return self._id

    def __repr__(self) -> str:
        size = "tombstone" if self.payload is None else f"{len(self.payload)} bytes"
        key = f", ordering_key={self.ordering_key!r}" if self.ordering_key is not None else ""
        return f"<Message {self.type} id={self.id} to {self.broker}:{self.destination}{key}, {size}>"
