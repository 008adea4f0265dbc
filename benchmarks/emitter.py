"""The emitter alone: what an emit costs over a producer that does nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.harness import Row
from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.events import BackendConfig, EventRoute
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer

EMITS = 2_000
"""Per sample: short enough that some samples meet an idle machine."""
SAMPLES = 150


class UserCreated(EventBase):
    __route__ = KafkaEventRoute(topic="users")

    user_id: str
    value: int


class UserChanged(EventBase):
    __route__ = KafkaEventRoute(topic="users.{tenant}")
    __ordering_key__ = "{user_id}"

    tenant: str
    user_id: str
    value: int


class Null(Producer):
    """What a user would write: `send` alone."""

    async def send(self, payload: bytes, route: EventRoute, config: BackendConfig | None = None) -> None: ...


async def _confirmed(messages: Sequence[Message], *, timeout: float | None = None) -> list[Exception | None]:
    return [None] * len(messages)


async def microseconds(call: Callable[[], Awaitable[object]]) -> float:
    """Time of one call: the median of the fastest tenth of the samples, which other processes did not disturb."""
    times: list[float] = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        for _ in range(EMITS):
            await call()
        times.append((time.perf_counter() - started) / EMITS * 1e6)
    return statistics.median(sorted(times)[: SAMPLES // 10])


async def run() -> list[Row]:
    """The floor, a bare emitter, and managed ones with identity headers."""
    created = UserCreated(user_id="abc", value=3)
    changed = UserChanged(tenant="acme", user_id="abc", value=3)
    to_json: Any = UserCreated.__pydantic_serializer__.to_json

    async def null(payload: bytes) -> None: ...

    async def floor() -> None:
        await null(to_json(created))

    bare = EventEmitter(Null())
    rows = [
        Row(what="serialize and await a null producer: the floor", measured=await microseconds(floor), unit="us"),
        Row(
            what="bare emitter over a null producer",
            measured=await microseconds(lambda: bare.emit(created)),
            unit="us",
            reach="<= 2.5",
        ),
    ]
    async with connect("memory://kafka") as emitter:
        # The managed path whole, but for what memory:// does with the messages.
        setattr(emitter.producer, "deliver", _confirmed)  # noqa: B010
        rows.append(
            Row(
                what="managed emitter over a null producer, identity headers",
                measured=await microseconds(lambda: emitter.emit(created)),
                unit="us",
                reach="<= 6",
            )
        )
        rows.append(
            Row(
                what="the same with a field in the topic and an ordering key",
                measured=await microseconds(lambda: emitter.emit(changed)),
                unit="us",
            )
        )
    return rows
