"""Deliveries share pipelines on one connection: what arrives while one is in flight goes with the next.

One pipeline is in flight at a time and there is no timer: alone, an emit is as fast as a plain command, and under
load the round trip is paid once for hundreds. Built on the client's connections, not on its pipelines: those
send everything again when a connection breaks, and do not tell what was written from what was not.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from redis import __version__ as _redis_version
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ReadOnlyError, RedisError

from dispytch_integrations._deadlines import Deadlines, Limit
from dispytch_integrations._redis_commands import ASKING, PING, Command, Delivery, State
from dispytch_integrations._redis_errors import is_reply, reply_text, translate
from dispytch_integrations.errors import BrokerUnavailableError, DispytchError, ProducerTimeout, UnconfirmedError

__all__ = ["ConnectionSource", "Lane", "PoolSource"]

_MOST_COMMANDS = 512
_MOST_BYTES = 1 << 20
"""Where a pipeline is cut: the confirmations of its first messages do not wait for megabytes behind them."""

# A time limit per reply costs more than reading it; ours is one per pipeline. Since 8.1 the client can be told.
_NO_TIMEOUT = math.inf if tuple(int(part) for part in _redis_version.split(".")[:2]) >= (8, 1) else None


class ConnectionSource(Protocol):
    """Where a lane gets its connection from."""

    async def acquire(self) -> AbstractConnection:
        """A connection that was opened, now or some time ago. Raises the client's errors."""
        ...

    async def release(self, connection: AbstractConnection) -> None:
        """Give it back, open or closed."""
        ...


class PoolSource:
    """Connections from a pool: of the user's client, of ours, of Sentinel."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def acquire(self) -> AbstractConnection:
        """A connection of the pool."""
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Give it back to the pool."""
        await self._pool.release(connection)


class Lane:
    """Writes commands over one connection, in order, and settles them as they are answered.

    `source`: its connection. `answered`: called with each command and its reply, an exception if it was refused;
    returns whether it takes the command over, to send it elsewhere. `broken`: called when the connection was lost.
    """

    def __init__(
        self,
        source: ConnectionSource,
        answered: Callable[[Command, Any], bool],
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._answered = answered
        self._broken = broken
        self._queue: deque[Command] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deadlines = Deadlines()
        self._limit: Limit | None = None

    def submit(self, commands: Iterable[Command]) -> None:
        """Send these with the next pipeline."""
        self._queue.extend(commands)
        self._begin()

    async def ping(self) -> None:
        """Ask for an answer on the connection that is in use, before all that waits.

        Raises DeliveryError. Cancelled, it drops a connection that does not answer.
        """
        delivery = Delivery()
        self._queue.appendleft(delivery.add(PING, None))
        self._begin()
        try:
            await delivery.done
        except asyncio.CancelledError:
            delivery.abandon()
            self.drop()
            raise
        if (error := delivery.commands[0].outcome) is not None:
            raise error

    def drop(self) -> None:
        """Give up the connection that is in use; what is written and not answered is unconfirmed."""
        if self._limit is not None and not self._limit.expired:
            self._limit.expire()

    async def drain(self) -> None:
        """Wait until everything is settled. Cancelled, it settles what is left as not confirmed."""
        task = self._task
        if task is None:
            return
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    @property
    def busy(self) -> bool:
        """Is anything not settled?"""
        return self._task is not None

    def _begin(self) -> None:
        if self._task is None and self._queue:
            self._task = asyncio.create_task(self._run(), name="dispytch redis")

    async def _run(self) -> None:
        try:
            while self._queue:
                connection = await self._connect()
                if connection is None:
                    continue
                try:
                    while connection.is_connected and (batch := self._take()):
                        await self._exchange(connection, batch)
                finally:
                    await self._source.release(connection)
        except Exception as exc:  # Whatever it is, nobody may wait for ever.
            self._refuse(exc)
        finally:
            self._task = None
            # Only a cancelled lane leaves something behind.
            self._refuse(ConnectionError("the connection is being closed"))

    async def _connect(self) -> AbstractConnection | None:
        """An open connection; None: there is none, and what waits was told."""
        self._limit = limit = self._deadlines.limit(None)
        try:
            with limit:
                connection = await self._source.acquire()
                try:
                    await _reopen(connection)
                except BaseException:
                    await self._source.release(connection)
                    raise
                return connection
        except (RedisError, OSError) as exc:  # TimeoutError is an OSError.
            self._broken()
            self._refuse(exc)
            return None
        finally:
            self._limit = None

    def _refuse(self, exc: Exception) -> None:
        while self._queue:
            command = self._queue.popleft()
            if command.state != State.SETTLED:
                what = "does not answer" if command.message is None else f"{command} was not sent"
                error = BrokerUnavailableError(f"{what}: {reply_text(exc)}")
                error.__cause__ = exc
                command.settle(error)

    def _take(self) -> list[Command]:
        batch: list[Command] = []
        queue, size = self._queue, 0
        while queue and len(batch) < _MOST_COMMANDS and size < _MOST_BYTES:
            command = queue.popleft()
            if command.state == State.QUEUED:
                command.state = State.WRITTEN
                batch.append(command)
                size += len(command.data)
        return batch

    async def _exchange(self, connection: AbstractConnection, batch: list[Command]) -> None:
        """Write one pipeline and settle its commands as the answers come."""
        self._limit = limit = self._deadlines.limit(connection.socket_timeout)
        finished = False
        try:
            with limit:
                await connection.send_packed_command(
                    [ASKING + command.data if command.asking else command.data for command in batch],
                    check_health=False,
                )
                for command in batch:
                    if command.asking:
                        await _read(connection)
                    reply = await _read(connection)
                    if not self._answered(command, reply):
                        command.settle(translate(reply, str(command)) if isinstance(reply, Exception) else None)
            finished = True
        except (RedisError, OSError) as exc:
            self._broken()
            _settle_unconfirmed(batch, exc, timed_out=limit.expired)
        finally:
            self._limit = None
            if not finished:
                # Answers may still come, and would be taken for those of the next pipeline.
                await connection.disconnect(nowait=True)
                _settle_unconfirmed(batch, ConnectionError("the connection is being closed"), timed_out=False)


async def _reopen(connection: AbstractConnection) -> None:
    """Open a connection again that the server has closed since its last use."""
    # redis-py 8 does not look for that with RESP3, its default, and not at all after a reset. There is no public way
    # to ask; where its stream is not found, the loss shows at the next command instead, as UnconfirmedError.
    reader: asyncio.StreamReader | None = getattr(connection, "_reader", None)
    if reader is not None and (reader.at_eof() or reader.exception() is not None):
        await connection.disconnect(nowait=True)
        await connection.connect()  # type: ignore[no-untyped-call]


async def _read(connection: Any) -> Any:
    """The next answer, an exception if the command was refused. Raises when the connection is lost."""
    try:
        reply: Any = await connection.read_response(timeout=_NO_TIMEOUT, disconnect_on_error=False)
    except RedisError as exc:
        if is_reply(exc):
            return exc
        if isinstance(exc.__context__, ReadOnlyError):
            # With Sentinel, a master that became a replica; the client has closed the connection already.
            return exc.__context__
        raise
    return reply


def _settle_unconfirmed(batch: list[Command], exc: Exception, *, timed_out: bool) -> None:
    for command in batch:
        if command.state == State.SETTLED:
            continue
        error: DispytchError
        if timed_out:
            error = ProducerTimeout(f"{command} was sent, but not answered in time: it may have been delivered")
        else:
            error = UnconfirmedError(
                f"{command} was sent, but the connection was lost before the answer; it may have been delivered "
                f"({reply_text(exc)})"
            )
        error.__cause__ = exc
        command.settle(error)
