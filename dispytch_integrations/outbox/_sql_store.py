"""An OutboxStore over the outbox's SQL; a framework adds the way to its connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from dispytch_integrations.outbox._sql import Connection, SQLStore
from dispytch_integrations.outbox.store import Failure, Fetched, HeldUp, Lease, Query, Row, Selection, Stats, Waiting
from dispytch_integrations.outbox.threads import no_listener

__all__ = ["OutboxInSQL"]

_T = TypeVar("_T")


class OutboxInSQL(ABC):
    """Implements OutboxStore; `sql` is its SQL."""

    def __init__(self, sql: SQLStore) -> None:
        self.sql = sql

    @abstractmethod
    async def on_connection(self, function: Callable[[Connection], _T]) -> _T:
        """Call the function with a connection that commits each statement; one that has failed is thrown away."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The database for logs, without secrets."""

    @abstractmethod
    async def open(self) -> None:
        """As OutboxStore.open."""

    @abstractmethod
    async def close(self) -> None:
        """As OutboxStore.close."""

    async def listen(self, wake: Callable[[], None]) -> None:
        """As OutboxStore.listen; a database that has no NOTIFY is told so."""
        raise no_listener("another one")

    async def fetch(self, query: Query) -> Fetched:
        """As OutboxStore.fetch."""
        return await self.on_connection(lambda on: self.sql.fetch(on, query))

    async def held_up(self, shards: Sequence[int]) -> HeldUp:
        """As OutboxStore.held_up."""
        return await self.on_connection(lambda on: self.sql.held_up(on, shards))

    async def settle(self, sent: Sequence[int], failed: Sequence[Failure], action: Literal["delete", "keep"]) -> None:
        """As OutboxStore.settle."""
        await self.on_connection(lambda on: self.sql.settle(on, sent, failed, action))

    async def waiting(self, brokers: Sequence[str], format: int) -> Waiting:
        """As OutboxStore.waiting."""
        return await self.on_connection(lambda on: self.sql.waiting(on, brokers, format))

    async def leases(self) -> list[Lease]:
        """As OutboxStore.leases."""
        return await self.on_connection(self.sql.leases)

    async def renew(self, relay: str, seconds: float) -> None:
        """As OutboxStore.renew."""
        await self.on_connection(lambda on: self.sql.renew(on, relay, seconds))

    async def take(self, relay: str, shards: Sequence[int], seconds: float) -> None:
        """As OutboxStore.take."""
        await self.on_connection(lambda on: self.sql.take(on, relay, shards, seconds))

    async def want(self, relay: str, shards: Sequence[int], seconds: float) -> None:
        """As OutboxStore.want."""
        await self.on_connection(lambda on: self.sql.want(on, relay, shards, seconds))

    async def hand_over(self, relay: str, shards: Sequence[int], to: str | None, seconds: float) -> None:
        """As OutboxStore.hand_over."""
        await self.on_connection(lambda on: self.sql.hand_over(on, relay, shards, to, seconds))

    async def stats(self) -> Stats:
        """As OutboxStore.stats."""
        return await self.on_connection(self.sql.stats)

    async def rows(self, selection: Selection, limit: int) -> list[Row]:
        """As OutboxStore.rows."""
        return await self.on_connection(lambda on: self.sql.rows(on, selection, limit))

    async def count(self, selection: Selection) -> int:
        """As OutboxStore.count."""
        return await self.on_connection(lambda on: self.sql.count(on, selection))

    async def requeue(self, selection: Selection) -> int:
        """As OutboxStore.requeue."""
        return await self.on_connection(lambda on: self.sql.requeue(on, selection))

    async def discard(self, selection: Selection) -> int:
        """As OutboxStore.discard."""
        return await self.on_connection(lambda on: self.sql.discard(on, selection))
