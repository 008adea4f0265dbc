"""No event is lost, whatever is killed: some rounds of what `make test-kill` does at length."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import OperationalError

from tests.conftest import _unavailable
from tests.kill.arena import Arena
from tests.support.brokers import BrokerMissing


@pytest.mark.parametrize(
    ("database", "broker", "rounds"),
    [
        pytest.param("postgresql", "kafka", 8, id="postgresql-kafka"),
        pytest.param("mariadb", "redis", 4, id="mariadb-redis"),
        pytest.param("sqlite", "rabbitmq", 4, id="sqlite-rabbitmq", marks=pytest.mark.xdist_group("rabbitmq")),
    ],
)
async def test_events_survive(database: str, broker: str, rounds: int) -> None:
    """A crash is when the outbox has to hold: all that was committed arrives, in order per key, and nothing else."""
    arena = Arena(database, broker)
    try:
        await arena.__aenter__()
    except (BrokerMissing, OperationalError) as exc:
        _unavailable(str(exc).splitlines()[0])
    async with arena:
        await arena.rounds(rounds)
        verdict = await arena.verdict()
    print(f"{database}, {broker}, seed {arena.seed}: {verdict}")
    assert verdict.is_good, f"seed {arena.seed}: {verdict}"
    # Duplicates are allowed: whole batches of a relay that was killed. Relays that did not keep out of each other's
    # way would send most things twice.
    assert verdict.duplicates < verdict.committed / 2, f"seed {arena.seed}: {verdict}"
