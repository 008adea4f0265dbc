"""What a transport must implement to carry messages, and the names that go with it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from itertools import islice
from types import coroutine
from typing import Any, ClassVar

from dispytch_integrations._deadlines import Deadlines, Limit
from dispytch_integrations.errors import DispytchError, NotAttemptedError, ProducerTimeout
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.message import Message

__all__ = ["BackendConfig", "EventRoute", "Producer", "ProducerTimeout"]


class Producer(ABC):
    """Sends to one transport. Implement `send`, as in dispytch; override `deliver` to send many at once.

    class FileProducer(Producer):
        routes = (FileRoute,)

        async def send(self, payload, route, config=None):
            Path(route.path).write_bytes(payload)
    """

    routes: ClassVar[tuple[type[EventRoute], ...]] = (EventRoute,)
    """The routes it can send to; by default all."""

    immediate: ClassVar[bool] = False
    """True: a delivery waits for nothing, as memory's. What is handed over after a commit is then there when the commit
    returns, so that a test can look at once."""

    timeout: float | None = None
    """Seconds this producer wants for one emit; None: the emitter's default."""

    @abstractmethod
    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None:
        """Send one payload; return when it is confirmed.

        `route` and `config` are filled: no `{field}` parts are left. Raise ProducerTimeout when the confirmation
        does not come, UnroutableError when nobody takes it, another DeliveryError when it is refused.
        """

    async def deliver(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
        """Send messages, in order per destination and ordering key; return one outcome each: None or its error.

        A message's failure is its outcome and never raised; raised is what hinders all of them: NotStartedError,
        WrongLoopError. After `timeout` seconds (None: no limit) those still unconfirmed get
        ProducerTimeout. The default calls `send` for one after the other.
        """
        if len(messages) == 1:
            return [await self._send_one(messages[0], timeout)]
        outcomes: list[Exception | None] = []
        try:
            with self._deadlines.limit(timeout):
                for message in messages:
                    # One by one: what is confirmed when the time is up stays confirmed.
                    outcomes.append(await self._send_one(message, None))  # noqa: PERF401
        except TimeoutError:
            outcomes.extend(_timed_out(message, timeout) for message in messages[len(outcomes) :])
        return outcomes

    async def deliver_in_order(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[Exception | None]:
        """As `deliver`, and strict: of one destination and ordering key nothing is sent behind a message that failed.

        What was not sent for that reason, or since the time was up, gets NotAttemptedError. The outbox relay sends this
        way. The default delivers the first message of each key, then the second of each, and so on; a transport that
        can keep the order of many does better.
        """
        started = time.monotonic()
        outcomes: list[Exception | None] = [None] * len(messages)
        lanes: dict[object, list[int]] = {}
        for index, message in enumerate(messages):
            key = message.ordering_key
            lanes.setdefault(index if key is None else (message.destination, key), []).append(index)
        waiting = [iter(indexes) for indexes in lanes.values()]
        while True:
            wave = [(first, rest) for rest in waiting for first in islice(rest, 1)]
            if not wave:
                return outcomes
            left = None if timeout is None else timeout - (time.monotonic() - started)
            if left is not None and timeout is not None and left < timeout / 2:
                break  # What is sent with too little time looks like a failure, and is none.
            delivered = await self.deliver([messages[index] for index, _ in wave], timeout=left)
            waiting = list[Iterator[int]]()
            for (index, rest), error in zip(wave, delivered, strict=True):
                outcomes[index] = error
                if error is None:
                    waiting.append(rest)
                else:
                    _hold_back(outcomes, rest)
        for index, rest in wave:
            outcomes[index] = NotAttemptedError()
            _hold_back(outcomes, rest)
        return outcomes

    async def _send_one(self, message: Message, timeout: float | None) -> Exception | None:
        route = message.route
        if route is None:
            raise DispytchError(f"{message!r} has no route; {type(self).__name__} must implement deliver()")
        sending = self.send(b"" if message.payload is None else message.payload, route, message.config)
        limit: Limit | None = None
        try:
            # The first step by hand: a producer that need not wait needs no deadline.
            try:
                awaited = sending.send(None)
            except StopIteration:
                return None
            limit = self._deadlines.limit(timeout)
            with limit:
                await _resumed(sending, awaited)
        except TimeoutError as exc:
            if limit is None or not limit.expired:
                return exc
            timed_out = _timed_out(message, timeout)
            timed_out.__cause__ = exc
            return timed_out
        except Exception as exc:  # A message's failure is its outcome; the caller sees every one of them.
            return exc
        return None

    @property
    def _deadlines(self) -> Deadlines:
        # Not made in __init__: a producer written for dispytch does not call ours.
        try:
            return self.__deadlines
        except AttributeError:
            self.__deadlines: Deadlines = Deadlines()
            return self.__deadlines


def _hold_back(outcomes: list[Exception | None], indexes: Iterable[int]) -> None:
    for index in indexes:
        outcomes[index] = NotAttemptedError()


def _timed_out(message: Message, timeout: float | None) -> ProducerTimeout:
    return ProducerTimeout(f"{message!r} was not confirmed within {timeout} s: it may have been delivered")


@coroutine
def _resumed(started: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Await the rest of a coroutine whose first step, which gave `awaited`, is done."""
    while True:
        try:
            yield awaited
        except BaseException as exc:  # Whatever is thrown in belongs to the coroutine, as in `await`.
            try:
                awaited = started.throw(exc)
            except StopIteration:
                return
        else:
            yield from started
            return
