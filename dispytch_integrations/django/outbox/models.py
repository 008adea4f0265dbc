"""The outbox's tables as models: for migrations, the admin, and queries of yours.

The outbox itself writes and reads them with SQL of its own, the same for Django and SQLAlchemy. Times are whole
milliseconds since 1970 by the database's clock.
"""

# Django carries no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import ClassVar

from django.db import models

from dispytch_integrations.outbox._sql import EVENTS, LEASES
from dispytch_integrations.outbox.record import MAX_NAME
from dispytch_integrations.outbox.store import State

__all__ = ["OutboxEvent", "OutboxShard"]

_STATES = [(State.WAITING.value, "waiting"), (State.DEAD.value, "dead"), (State.SENT.value, "sent")]


class OutboxEvent(models.Model):
    """An event that is to be sent; deleted once the broker has confirmed it, unless KEEP_SENT keeps it."""

    id = models.BigAutoField(primary_key=True)
    event_id = models.CharField(max_length=MAX_NAME)
    type = models.CharField(max_length=MAX_NAME)
    broker = models.CharField(max_length=MAX_NAME)
    destination = models.TextField()
    ordering_key = models.TextField(null=True, blank=True)
    headers = models.TextField()
    properties = models.TextField()
    payload = models.BinaryField(null=True, blank=True)
    content_type = models.CharField(max_length=MAX_NAME)
    format = models.SmallIntegerField()
    lane = models.BigIntegerField()
    shard = models.SmallIntegerField()
    created_ms = models.BigIntegerField()
    state = models.SmallIntegerField(choices=_STATES, default=State.WAITING.value)
    state_ms = models.BigIntegerField(default=0)
    attempts = models.IntegerField(default=0)
    next_try_ms = models.BigIntegerField(default=0)
    last_error = models.TextField(null=True, blank=True)

    class Meta:
        db_table = EVENTS
        verbose_name = "event"
        verbose_name_plural = "events"
        default_permissions = ("view", "change", "delete")
        permissions: ClassVar = [("view_payload", "Can view the payload of an event")]
        indexes: ClassVar = [models.Index(fields=["state", "id"], name=f"{EVENTS}_state")]
        # Not unique=True: PostgreSQL would get a second index for LIKE, and each event pay for it.
        constraints: ClassVar = [models.UniqueConstraint(fields=["event_id"], name=f"{EVENTS}_once")]

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"


class OutboxShard(models.Model):
    """A shard, and the relay that has a lease on it."""

    shard = models.SmallIntegerField(primary_key=True)
    owner = models.CharField(max_length=MAX_NAME, null=True, blank=True)
    until_ms = models.BigIntegerField()
    wanted_by = models.CharField(max_length=MAX_NAME, null=True, blank=True)
    wanted_ms = models.BigIntegerField()
    heartbeat_ms = models.BigIntegerField(null=True, blank=True)

    class Meta:
        db_table = LEASES
        verbose_name = "shard"
        verbose_name_plural = "shards"
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"shard {self.shard}"
