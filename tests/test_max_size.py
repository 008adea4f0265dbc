"""The size of an event: refused where it was made, and told with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from dispytch_integrations import EventBase, connect
from dispytch_integrations.errors import ConfigurationError, MessageTooLargeError
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.sqlalchemy import emit_on_commit


class Placed(EventBase):
    __route__ = KafkaEventRoute(topic="orders")

    text: str


async def test_an_event_that_is_too_large_is_refused_at_the_call(tmp_path: Path) -> None:
    """The error comes where the event was made, and not from a relay at night."""
    async with connect("memory://kafka", max_size=100) as emitter:
        await emitter.emit(Placed(text="x" * 50))
        with pytest.raises(
            MessageTooLargeError, match=r"200\d* bytes> is larger than the 100 bytes that broker 'default'"
        ):
            await emitter.emit(Placed(text="x" * 1990))
        with pytest.raises(ExceptionGroup, match="none was"):
            await emitter.emit_many([Placed(text="x"), Placed(text="x" * 100)])
        assert len(emitter.producer.sent) == 1  # type: ignore[attr-defined]
        engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
        with Session(engine) as session, pytest.raises(MessageTooLargeError):
            emit_on_commit(session, Placed(text="x" * 100), emitter=emitter)
        engine.dispose()


async def test_kafkas_limit_is_known_at_the_call() -> None:
    """What the client would refuse need not wait for it, nor for the relay of an outbox."""
    brokers = connect("kafka://127.0.0.1:1")
    brokers.load()
    brokers.emitter.prepare(Placed(text="x" * 1_048_000))
    with pytest.raises(MessageTooLargeError, match="1048576"):
        brokers.emitter.prepare(Placed(text="x" * 1_048_576))
    larger = connect("kafka://127.0.0.1:1?max_request_size=2000000")
    larger.load()
    larger.emitter.prepare(Placed(text="x" * 1_048_576))
    smaller = connect("kafka://127.0.0.1:1?max_size=10")
    smaller.load()
    with pytest.raises(MessageTooLargeError, match="10 bytes"):
        smaller.emitter.prepare(Placed(text="x"))
    for wrong in ("0", "-1", "many"):
        with pytest.raises(ConfigurationError, match="max_size"):
            connect(f"kafka://127.0.0.1:1?max_size={wrong}").load()
