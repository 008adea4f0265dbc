"""The event that all of these files emit."""

from __future__ import annotations

from dispytch_integrations import EventBase
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute

__all__ = ["OrderPlaced"]


class OrderPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders.{tenant}")
    __backend_config__ = KafkaEventConfig(partition_key="{order_id}")
    __ordering_key__ = "{order_id}"

    tenant: str
    order_id: int
