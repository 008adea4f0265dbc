# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""The outbox: its relay, its operations, and what third parties may add."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import assert_type

from fastapi import FastAPI
from sqlalchemy import create_engine

from dispytch_integrations import connect
from dispytch_integrations.brokers import Brokers
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.outbox import Codec, OutboxStore, Relay, RelayOptions, Selection, State, Stats
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox


class Compressed:
    def encode(self, payload: bytes) -> bytes:
        return zlib.compress(payload)

    def decode(self, stored: bytes) -> bytes:
        return zlib.decompress(stored)


class OneWay:
    def encode(self, payload: bytes) -> bytes:
        return payload


def options() -> None:
    codec: Codec = Compressed()
    assert_type(RelayOptions(batch_size=100, lease=30, keep_sent=None, codec=codec, notify=True), RelayOptions)
    RelayOptions(codec=OneWay())  # type: ignore[arg-type]
    RelayOptions(lease="30s")  # type: ignore[arg-type]
    RelayOptions(retries=3)  # type: ignore[call-arg]


def apps() -> None:
    engine = create_engine("sqlite://")
    outbox = SQLAlchemyOutbox(engine, "external", schema=None, options=RelayOptions())
    assert_type(connect("kafka://localhost:9092", outbox=outbox), Brokers)
    FastAPI(lifespan=emitter_lifespan("kafka://localhost:9092", outbox=outbox))
    assert_type(outbox.relays, Sequence[Relay])
    SQLAlchemyOutbox("sqlite://")  # type: ignore[arg-type]
    SQLAlchemyOutbox(engine, "internal")  # type: ignore[arg-type]
    connect("kafka://localhost:9092", outbox=engine)  # type: ignore[arg-type]


async def relaying(store: OutboxStore, brokers: Brokers) -> None:
    relay = Relay(store, brokers.brokers, RelayOptions(), name="relay-1", on_beat=beat)
    await relay.run()
    relay.wake()
    relay.stop()
    assert_type(relay.name, str)
    Relay(brokers.brokers, store)  # type: ignore[arg-type]


def beat(relay: Relay) -> None: ...


async def operating(outbox: SQLAlchemyOutbox) -> None:
    store: OutboxStore = outbox.store()
    dead = Selection(states=[State.DEAD], older_than=3600)
    assert_type(await store.stats(), Stats)
    assert_type(await store.requeue(dead), int)
    Selection([1, 2])  # type: ignore[call-arg]
    Selection(states=["dead"])  # type: ignore[list-item]
