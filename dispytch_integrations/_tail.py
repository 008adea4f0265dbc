"""Events as they arrive: where from, and how a lost connection is made again.

What an arrival is stands in `_tail_arrival`, how they are read in `_tail_kafka`, `_tail_rabbitmq` and `_tail_redis`.

Nobody's consumers are disturbed: nothing is taken from a queue, committed, or left behind.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dispytch_integrations._tail_arrival import Arrival
from dispytch_integrations.backend import Backend, scrub
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, DispytchError

__all__ = ["LostError", "MissingError", "Request", "Source", "follow", "source_of"]

_LONGEST_DELAY = 5.0
_FIRST_DELAY = 0.25
_CLOSE_SECONDS = 1.0


class MissingError(ConfigurationError):
    """There is no topic, exchange or stream of that name (yet)."""


class LostError(BrokerUnavailableError):
    """The connection was lost, or what was read from is gone."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be shown. `name`: without the broker's prefix; `routing_key` None: all, where the exchange has that;
    `kind`: of Redis, "stream" or "channel"; None: what is there."""

    name: str
    from_beginning: bool = False
    routing_key: str | None = None
    kind: str | None = None


# -- where they come from ----------------------------------------------------------------------------------------------


class Source(ABC):
    """A place that is listened to. Opened again after a connection was lost: it goes on where it was, if it can."""

    resumes: bool = False
    """Is what comes while there is no connection read afterwards?"""

    def __init__(self, backend: Backend, request: Request, name: str) -> None:
        self.backend = backend
        self.request = request
        self.name = name
        """What is listened to, with the broker's prefix."""

    @abstractmethod
    async def open(self) -> str:
        """Connect and listen; return in words what it listens to.

        Raises MissingError, ConfigurationError, or whatever its client raises when there is no connection.
        """

    @abstractmethod
    async def read(self) -> Sequence[Arrival]:
        """What has come; waits a few seconds for the first. What was returned before is done with.

        Raises LostError.
        """

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind. Called after a failed `open`, too. The caller bounds the time."""

    def told(self, error: BaseException) -> str:
        """What an error says, without secrets."""
        if isinstance(error, TimeoutError) and not isinstance(error, DispytchError):
            return "no answer in time"
        return scrub(str(error) or type(error).__name__, self.backend.secrets)


def source_of(backend: Backend, request: Request, prefix: str = "") -> Source:
    """The source for a broker that is not connected yet. Raises ConfigurationError for what its transport has not."""
    name = request.name if prefix and request.name.startswith(prefix) else prefix + request.name
    if backend.transport != "rabbitmq" and request.routing_key is not None:
        raise ConfigurationError(f"--routing-key is RabbitMQ's; leave it out with {backend.transport}://")
    if backend.transport != "redis" and request.kind is not None:
        raise ConfigurationError(f"--{request.kind} is Redis's; leave it out with {backend.transport}://")
    if not name and backend.transport != "rabbitmq":
        raise ConfigurationError("NAME is empty; write a topic, stream or channel")
    if backend.transport == "kafka":
        from dispytch_integrations._tail_kafka import KafkaSource

        return KafkaSource(backend, request, name)
    if backend.transport == "rabbitmq":
        from dispytch_integrations._tail_rabbitmq import RabbitMQSource

        return RabbitMQSource(backend, request, name)
    if backend.transport == "redis":
        from dispytch_integrations._tail_redis import RedisSource

        return RedisSource(backend, request, name)
    raise ConfigurationError(
        f"{backend.transport}:// lives inside of the process that emits: there is nothing to listen to from here; "
        f"write the URL of a broker"
    )


async def follow(
    source: Source,
    show: Callable[[Sequence[Arrival]], Awaitable[bool]],
    tell: Callable[[str], None],
    *,
    wait: bool = False,
    start_timeout: float = 10.0,
) -> None:
    """Hand all that arrives to `show`, until that returns False. What is read next waits until it has returned.

    `tell`: gets a line about the connection: listening, lost, waiting. `wait`: wait for what is not there at first.
    `start_timeout`: seconds for each attempt to connect.

    Raises MissingError and BrokerUnavailableError at the start, unless told to wait, and ConfigurationError.
    """
    patient, told, delay, lost = wait, "", _FIRST_DELAY, False
    while True:
        problem = ""
        try:
            listening, problem = await _opened(source, start_timeout, patient=patient)
            if not problem:
                tell(f"{'connected again, listening' if lost else 'listening'} to {listening}")
                patient, told, delay, lost = True, "", _FIRST_DELAY, False
                if not await _hand_over(source, show):
                    return
        except LostError as exc:
            gap = "" if source.resumes else "; what comes meanwhile is not shown"
            tell(f"lost: {source.told(exc)}; trying again{gap}")
            lost, told = True, source.told(exc)
        finally:
            await _close(source)
        if problem and problem != told:
            tell(f"waiting: {problem}")
            told = problem
        await asyncio.sleep(delay * random.uniform(0.75, 1.25))
        delay = min(delay * 2, _LONGEST_DELAY)


async def _opened(source: Source, timeout: float, *, patient: bool) -> tuple[str, str]:
    """What it listens to, and nothing; or nothing, and why it does not yet. Raises what is not worth waiting for."""
    try:
        async with asyncio.timeout(timeout):
            return await source.open(), ""
    except MissingError as exc:
        if not patient:
            raise
        return "", source.told(exc).partition("; ")[0]  # What to write else is for who does not wait.
    except ConfigurationError:
        raise
    except Exception as exc:
        problem = source.told(exc).removeprefix(f"cannot connect to {source.backend.address}: ")
        problem = f"{source.backend.address} does not answer: {problem.removeprefix('does not answer: ').rstrip('.')}"
        if not patient:
            raise BrokerUnavailableError(f"{problem}; write --wait to wait for it") from exc
        return "", problem


async def _hand_over(source: Source, show: Callable[[Sequence[Arrival]], Awaitable[bool]]) -> bool:
    task = asyncio.current_task()
    # asyncio.wait_for of Python 3.11, which clients use, forgets a cancellation that comes with the answer.
    while task is None or not task.cancelling():
        arrivals = await source.read()
        if arrivals and not await show(arrivals):
            return False
    raise asyncio.CancelledError


async def _close(source: Source) -> None:
    closing = asyncio.ensure_future(source.close())
    try:
        await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)
    finally:
        closing.cancel()
    if closing.done() and not closing.cancelled():
        closing.exception()  # Seen: the connection may be gone, and what is closed with it is closed.
