"""`tail` of Redis: streams by XREAD without a group, channels and patterns of channels by SUBSCRIBE."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from redis import asyncio as redis_asyncio
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import RedisError, ResponseError

from dispytch_integrations._redis_connections import Direct
from dispytch_integrations._redis_errors import reply_text
from dispytch_integrations._tail import LostError, MissingError, Request, Source
from dispytch_integrations._tail_arrival import Arrival, moment
from dispytch_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from dispytch_integrations._redis_cluster import Cluster
    from dispytch_integrations.backend import Backend
    from dispytch_integrations.redis import RedisBackend

__all__ = ["RedisSource", "client_of"]

_BATCH = 200
_BLOCK_SECONDS = 1.0
_LOOK_SECONDS = 0.25
"""How often it is asked whether a name has become a stream."""
_PING_SECONDS = 5.0
_SILENT_SECONDS = 12.0
_PATTERN = re.compile(r"[*?\[]")


def client_of(backend: RedisBackend, name: str) -> redis_asyncio.Redis:
    """A client with connections of its own to the server that a backend, which is started, talks to; in a cluster to
    the node of the key `name`. Close it."""
    connections = backend._connections
    if isinstance(connections, Direct):
        pool: Any = connections._pool
        kwargs = dict(pool.connection_kwargs)
        if isinstance(pool, SentinelConnectionPool):
            kwargs.pop("connection_pool", None)
            of: Any = pool
            found: Any = cast("Any", SentinelConnectionPool)(of.service_name, of.sentinel_manager, **kwargs)
        else:
            found = ConnectionPool(connection_class=pool.connection_class, **kwargs)
        return redis_asyncio.Redis.from_pool(found)
    client = cast("Cluster", connections)._client
    if client is None:
        raise LostError("the layout of the Redis cluster is not known")
    node: Any = client.get_node_from_key(name) if name else client.get_random_node()
    return redis_asyncio.Redis.from_pool(
        ConnectionPool(connection_class=node.connection_class, **node.connection_kwargs)
    )


class RedisSource(Source):
    """A stream, a channel, or the channels of a pattern."""

    def __init__(self, backend: Backend, request: Request, name: str) -> None:
        super().__init__(backend, request, name)
        self._client: Any = None
        self._pubsub: Any = None
        self._last: str | None = None  # Id of the entry that was read last; None: nothing was.
        self._heard = self._asked = 0.0
        self._undecided = False  # Nothing has that name yet: it may become a stream.

    async def open(self) -> str:
        """Find out what it is, and listen."""
        await self.backend.start()
        self._client = client_of(cast("RedisBackend", self.backend), self.name)
        kind = await self._kind()
        if kind == "stream":
            return await self._open_stream()
        if self.request.from_beginning:
            raise ConfigurationError(
                f"a channel keeps nothing, so there is no beginning; leave --from-beginning out, or write --stream if "
                f"{self.name!r} is to become a stream"
            )
        return await self._open_channel()

    async def _kind(self) -> str:
        if self.request.kind is not None:
            return self.request.kind
        if self._last is not None:
            return "stream"
        found = _text(await self._client.type(self.name))
        self._undecided = found == "none" and _PATTERN.search(self.name) is None and not self.request.from_beginning
        return "stream" if found == "stream" else "channel"

    async def _open_stream(self) -> str:
        self.resumes = True
        try:
            newest = await self._client.xrevrange(self.name, count=1)
        except ResponseError as exc:
            raise ConfigurationError(f"{self.name!r} is no stream: {reply_text(exc)}; leave --stream out") from exc
        if not newest and self._last is None and not await self._client.exists(self.name):
            self._last = "0-0"  # Whoever waits for it wants its first entry.
            raise MissingError(
                f"there is no stream {self.name!r} in {self.backend.address}; look for a typing error, or write --wait "
                f"to wait for its first entry"
            )
        if self._last is None:
            # Not "$", which means another moment at each call: what comes between two of them would be lost.
            self._last = "0-0" if self.request.from_beginning or not newest else _text(newest[0][0])
        return f"the stream {self.name!r}"

    async def _open_channel(self) -> str:
        self._pubsub = self._client.pubsub()
        pattern = _PATTERN.search(self.name) is not None
        subscribe = self._pubsub.psubscribe if pattern else self._pubsub.subscribe
        await subscribe(self.name)
        await self._pubsub.get_message(timeout=_BLOCK_SECONDS)  # The confirmation; before it nothing is heard.
        self._heard = self._asked = time.monotonic()
        if self._undecided:
            return f"the channel {self.name!r}, and to the stream of that name once there is one"
        return f"the channels {self.name!r}" if pattern else f"the channel {self.name!r}"

    async def read(self) -> Sequence[Arrival]:
        """Entries of the stream, or messages of the channels."""
        try:
            return await (self._read_stream() if self._pubsub is None else self._read_channel())
        except LostError:
            raise
        except (RedisError, OSError) as exc:
            raise LostError(f"the connection to {self.backend.address} ({reply_text(exc)})") from exc

    async def _read_stream(self) -> Sequence[Arrival]:
        block = round(_BLOCK_SECONDS * 1000)
        answer: Any = await self._client.xread({self.name: self._last}, count=_BATCH, block=block)
        if not answer:
            return ()
        arrivals = [self._entry(_text(entry), fields or {}) for entry, fields in _entries(answer)]
        self._last = arrivals[-1].position["entry"]
        return arrivals

    def _entry(self, entry: str, fields: dict[Any, Any]) -> Arrival:
        headers = {_text(name): _text(value) for name, value in fields.items()}
        payload: Any = fields.get(b"data", fields.get("data"))
        if payload is None:
            # Not one of ours: its fields are what it says.
            payload, headers = json.dumps(headers).encode(), {}
        elif isinstance(payload, str):
            payload = payload.encode()
        headers.pop("data", None)
        at = moment(int(entry.partition("-")[0]))
        return Arrival("redis", self.name, payload, headers, None, {"entry": entry}, stored_at=at)

    async def _read_channel(self) -> Sequence[Arrival]:
        found: list[Arrival] = []
        # What is there already, up to a batch: Redis drops a subscriber that reads too slowly.
        while len(found) < _BATCH:
            patience = _LOOK_SECONDS if self._undecided else _BLOCK_SECONDS
            message = await self._pubsub.get_message(timeout=0 if found else patience)
            if message is None:
                break
            self._heard = self._asked = time.monotonic()
            if message["type"] in ("message", "pmessage"):
                found.append(self._message(message))
        if not found:
            await self._ask()
            if self._undecided and await self._has_become_a_stream():
                pubsub, self._pubsub = self._pubsub, None
                await pubsub.aclose()
                self._last, self.resumes = "0-0", True
                return await self._read_stream()
        return found

    async def _has_become_a_stream(self) -> bool:
        try:
            async with asyncio.timeout(_BLOCK_SECONDS):
                return await self._kind() == "stream"
        except TimeoutError:  # Whether the connection is lost is found out by who listens.
            return False

    async def _ask(self) -> None:
        """Whoever hears nothing asks whether somebody is there."""
        now = time.monotonic()
        if now - self._heard > _SILENT_SECONDS:
            raise LostError(f"the connection to {self.backend.address} (silent for {now - self._heard:.1f} s)")
        if now - self._asked > _PING_SECONDS:
            self._asked = now
            await self._pubsub.ping()

    def _message(self, message: Any) -> Arrival:
        data: Any = message["data"]
        return Arrival("redis", _text(message["channel"]), data.encode() if isinstance(data, str) else data)

    async def close(self) -> None:
        """Close the connections."""
        pubsub, self._pubsub = self._pubsub, None
        client, self._client = self._client, None
        try:
            if pubsub is not None:
                await pubsub.aclose()
            if client is not None:
                await client.aclose()
        finally:
            await asyncio.shield(self.backend.stop())


def _entries(answer: Any) -> list[Any]:
    """Those of the only stream: RESP2 answers with pairs, RESP3 with a mapping of lists of entries."""
    if isinstance(answer, dict):
        [[entries]] = cast("dict[Any, list[Any]]", answer).values()
        return list(entries)
    return list(answer[0][1])


def _text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
