"""Connections to a Redis cluster: one lane per node, and following the slots when they move.

A command that was answered with a redirection was not executed, so it is sent again; one whose connection broke may
have been, so it is not. While the layout is read anew everything waits, and goes on in the order it came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisClusterException, RedisError, TryAgainError

from dispytch_integrations._redis_commands import Command, State
from dispytch_integrations._redis_connections import DEFAULT_PORT, Credentials, Diagnose, common_options, tls_trouble
from dispytch_integrations._redis_errors import reply_text
from dispytch_integrations._redis_pipeline import Lane
from dispytch_integrations.backend import BrokerURL
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError

if TYPE_CHECKING:
    from dispytch_integrations.redis import RedisOptions

__all__ = ["Cluster", "open_cluster"]

logger = logging.getLogger("dispytch_integrations.redis")

_MOST_REDIRECTIONS = 16
_DELAY = 0.05
"""Seconds between two looks at a layout that is still changing; the more redirections, the longer."""


class _NodeSource:
    """Connections to one node."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    async def acquire(self) -> AbstractConnection:
        """A connection to the node."""
        connection = self._node.acquire_connection()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            self._node.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Give it back to the node."""
        self._node.release(cast("Connection", connection))


class Cluster:
    """Sends each command to the node that has its slot. `make_client`: a new client, which reads the layout."""

    def __init__(self, make_client: Callable[[], RedisCluster], diagnose: Diagnose) -> None:
        self._make_client = make_client
        self._diagnose = diagnose
        self._client: RedisCluster | None = None
        self._lanes: dict[str, Lane] = {}
        self._parked: list[Command] = []
        self._stale = True
        self._problem: Exception | None = None
        self._settling: asyncio.Task[None] | None = None
        self._sequence = count(1)

    def submit(self, commands: Sequence[Command]) -> None:
        """Send commands, in order per destination."""
        for command in commands:
            command.sequence = next(self._sequence)
        if self._stale:
            self._parked += commands
            self._begin()
        else:
            self._route(commands)

    async def ping(self) -> None:
        """Ask every primary node; enough that one answers, since the others' slots may be moving to it.

        Raises the client's error when the layout cannot be read, DeliveryError when none answers.
        """
        if self._client is None or self._stale:
            self._begin()
            if self._settling is not None:
                await asyncio.shield(self._settling)
        if self._client is None or self._stale:
            if self._problem is not None and (wrong := await self._diagnose(self._problem)) is not None:
                raise ConfigurationError(wrong) from self._problem
            error = BrokerUnavailableError(f"the layout of the Redis cluster could not be read: {self._problem}")
            raise error from self._problem
        nodes = self._client.get_primaries()
        outcomes = await asyncio.gather(*(self._ping_node(node) for node in nodes), return_exceptions=True)
        failures = [outcome for outcome in outcomes if outcome is not None]
        if failures:
            self._stale = True
        if len(failures) == len(nodes):
            error = BrokerUnavailableError("no primary node of the Redis cluster answers")
            raise error from failures[0]

    async def _ping_node(self, node: ClusterNode) -> None:
        limit = node.connection_kwargs.get("socket_timeout")
        # Shorter than the caller's, who takes the whole cluster for dead otherwise.
        async with asyncio.timeout(None if limit is None else limit / 2):
            await self._lane(node).ping()

    async def drain(self) -> None:
        """Wait until everything is settled; cancelled, settle the rest as not confirmed."""
        try:
            while self._settling is not None or any(lane.busy for lane in self._lanes.values()):
                if self._settling is not None:
                    await asyncio.wait({self._settling})
                await asyncio.gather(*(lane.drain() for lane in self._lanes.values()))
        except asyncio.CancelledError:
            if self._settling is not None:
                self._settling.cancel()
            self._refuse(ConnectionError("the connection is being closed"))
            raise

    async def close(self) -> None:
        """Close the connections to all nodes."""
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.wait({self._settling})
        client, self._client = self._client, None
        self._stale = True
        if client is not None:
            await client.aclose()

    # -- where a command goes ------------------------------------------------------------------------------------

    def _route(self, commands: Sequence[Command]) -> None:
        client = self._client
        batches: dict[str, tuple[Lane, list[Command]]] = {}
        for command in commands:
            message = command.message
            if client is None or message is None or command.state is State.SETTLED:
                continue
            try:
                # A channel has no slot, but one node for each channel keeps the order and spreads the load.
                node = client.get_node_from_key(message.destination)
            except RedisClusterException:
                node = None
            if node is None:
                self._redirect(command)
                continue
            batches.setdefault(node.name, (self._lane(node), []))[1].append(command)
        for lane, batch in batches.values():
            lane.submit(batch)

    def _lane(self, node: ClusterNode) -> Lane:
        lane = self._lanes.get(node.name)
        if lane is None:
            lane = self._lanes[node.name] = Lane(_NodeSource(node), self._answered, self._lost)
        return lane

    def _answered(self, command: Command, reply: Any) -> bool:
        command.asking = False
        if not isinstance(reply, (AskError, TryAgainError, ClusterDownError)):  # A MovedError is an AskError.
            return False  # How many heard a publish is not told either: a node knows its own subscribers only.
        if command.state is State.SETTLED:
            return True
        if command.redirections >= _MOST_REDIRECTIONS:
            return False
        command.redirections += 1
        command.state = State.QUEUED
        if isinstance(reply, AskError) and not isinstance(reply, MovedError) and self._client is not None:
            node = self._client.get_node(*_address(reply))
            if node is not None:
                command.asking = True
                self._lane(node).submit([command])
                return True
        self._redirect(command)
        return True

    def _redirect(self, command: Command) -> None:
        self._parked.append(command)
        self._stale = True
        self._begin()

    def _lost(self) -> None:
        self._stale = True

    # -- reading the layout --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle(), name="dispytch redis cluster layout")

    async def _settle(self) -> None:
        """Read the layout anew, then send what waited for it."""
        try:
            # What is under way comes before what waits.
            while busy := [lane for lane in self._lanes.values() if lane.busy]:
                await asyncio.gather(*(lane.drain() for lane in busy))
            tries = max((command.redirections for command in self._parked), default=0)
            if tries > 1:
                await asyncio.sleep(_DELAY * tries)
            await self._read_layout()
        except (RedisError, RedisClusterException, OSError) as exc:
            self._problem = exc
            self._refuse(exc)
        finally:
            self._settling = None
        parked, self._parked = self._parked, []
        self._route(sorted(parked, key=lambda command: command.sequence))

    async def _read_layout(self) -> None:
        client = self._make_client()
        await client.initialize()
        old, self._client = self._client, client
        self._lanes = {}
        self._stale = False
        if old is not None:
            await old.aclose()

    def _refuse(self, exc: Exception) -> None:
        logger.debug("the layout of the Redis cluster could not be read", exc_info=exc)
        parked, self._parked = self._parked, []
        for command in parked:
            error = BrokerUnavailableError(f"{command} was not sent: {reply_text(exc)}")
            error.__cause__ = exc
            command.settle(error)


def _address(redirection: Any) -> tuple[str, int]:
    return redirection.host, redirection.port


def open_cluster(
    url: BrokerURL, options: RedisOptions, client_options: Mapping[str, Any], credentials: Credentials
) -> Cluster:
    """Connections for a redis+cluster:// URL, not connected yet. Raises the client's errors for its options."""
    kwargs: dict[str, Any] = {
        # A node that is gone must not keep the others from being used.
        "require_full_coverage": False,
        **common_options(options, client_options, credentials),
    }
    hosts = [(host, port or DEFAULT_PORT) for host, port in url.hosts]

    def make_client() -> RedisCluster:
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in hosts], **kwargs)

    make_client()  # What is wrong with the options shows here, once, and not at each new look at the layout.
    secure = bool(kwargs.get("ssl"))
    return Cluster(make_client, partial(tls_trouble, *hosts[0], secure, f"ssl={not secure}"))
