"""Other packages' outboxes on the same events. As a program: one of them, in a process of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

    from benchmarks.harness import Row
    from tests.support.outboxes import Database

__all__ = ["peers", "rabbitmq_with_stomp"]

EVENTS = 1000 if os.environ.get("BENCH_QUICK") else 5000
"""How many each peer is given: enough, at their rates."""


async def peers(url: str, stomp: str, database: Database, table: str) -> AsyncIterator[Row]:
    """A row for each peer; `table` holds the events. `stomp`: host and port of a RabbitMQ."""
    from benchmarks.harness import Row

    location = database.url("postgresql")
    where = [location.host, location.port, location.username, location.password or "", location.database, table]
    what = f"outbox, backlog of {EVENTS:,}, peers on the same rows"
    python = os.environ.get("RELIABLE_OUTBOX_PYTHON")
    if python is None and importlib.util.find_spec("reliable_outbox") is not None:
        python = sys.executable
    name = f"{what}: django-reliable-outbox to Kafka"
    if python is None:
        note = "needs Python 3.12; RELIABLE_OUTBOX_PYTHON names one that has it"
        yield Row(what=name, measured=float("nan"), unit="k/s", note=note)
    else:
        seconds = await _measured(python, "reliable_outbox", url.removeprefix("kafka://"), *where)
        note = "one worker; order per key kept, one message at a time"
        yield Row(what=name, measured=EVENTS / seconds / 1000, unit="k/s", note=note)
    seconds = await _measured(sys.executable, "django_outbox_pattern", stomp, *where)
    name = f"{what}: django-outbox-pattern to RabbitMQ"
    note = "STOMP without confirms; no order; all in one transaction"
    yield Row(what=name, measured=EVENTS / seconds / 1000, unit="k/s", note=note)


@contextmanager
def rabbitmq_with_stomp() -> Generator[tuple[str, str], None, None]:
    """A node of our own: its URL, and host and port of its STOMP."""
    from tests.support.brokers import RabbitMQ, free_port

    node, port = RabbitMQ(), free_port()
    (node.directory / "plugins").write_text("[rabbitmq_stomp].\n")
    with (node.directory / "rabbitmq.conf").open("a") as file:
        file.write(f"stomp.listeners.tcp.1 = 127.0.0.1:{port}\n")
    with node:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield node.url, f"127.0.0.1:{port}"


async def _measured(python: str, peer: str, broker: str, *where: object) -> float:
    process = await asyncio.create_subprocess_exec(
        *(python, __file__, peer, broker, *map(str, where)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return float(out.decode().split()[-1])


# -- in the process ------------------------------------------------------------------------------------------------


def _main() -> None:
    peer, broker, host, port, user, password, name, table = sys.argv[1:]
    _configure(peer, broker, host, port, user, password, name)
    seconds = _reliable_outbox(table) if peer == "reliable_outbox" else _outbox_pattern(table)
    print(seconds)


def _configure(peer: str, broker: str, host: str, port: str, user: str, password: str, name: str) -> None:
    import django
    from django.conf import settings
    from django.core.management import call_command

    database = {"HOST": host, "PORT": port, "USER": user, "PASSWORD": password, "NAME": name}
    stomp_host, _, stomp_port = broker.rpartition(":")
    settings.configure(
        SECRET_KEY="benchmark",
        INSTALLED_APPS=[peer],
        USE_TZ=True,
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **database}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        RELIABLE_OUTBOX={
            "BATCH_SIZE": 100,
            "DESTINATIONS": {
                "default": {
                    "BACKEND": "reliable_outbox.destinations.kafka.KafkaDestination",
                    "OPTIONS": {
                        "topic": "bench-outbox",
                        # Not idempotent, as we are: the broker here knows no idempotent producers.
                        "config": {"bootstrap.servers": broker, "enable.idempotence": False, "acks": "all"},
                    },
                }
            },
        },
        DJANGO_OUTBOX_PATTERN={
            "DEFAULT_STOMP_HOST_AND_PORTS": [(stomp_host, stomp_port)],
            "DEFAULT_PRODUCER_WAITING_TIME": 0,
        },
    )
    django.setup()
    call_command("migrate", verbosity=0)


def _source(table: str) -> list[Any]:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"select ordering_key, headers, payload from {table} limit {EVENTS}")
        return [(key, json.loads(headers), json.loads(bytes(payload))) for key, headers, payload in cursor.fetchall()]


def _reliable_outbox(table: str) -> float:
    from reliable_outbox.models import OutboxMessage  # type: ignore[import-not-found]
    from reliable_outbox.worker import Worker  # type: ignore[import-not-found]

    OutboxMessage.objects.bulk_create(
        OutboxMessage(
            name="Stored", payload=payload, headers=headers, key=key, destination="default", max_attempts=10,
            backoff="exponential",
        )
        for key, headers, payload in _source(table)
    )  # fmt: skip
    _analyze()
    started = time.perf_counter()
    Worker().run(burst=True)
    seconds = time.perf_counter() - started
    left = OutboxMessage.objects.filter(status="pending").count()
    if left:
        raise SystemExit(f"{left} events were not sent")
    return seconds


def _outbox_pattern(table: str) -> float:
    from django_outbox_pattern.factories import factory_producer  # type: ignore[import-untyped]
    from django_outbox_pattern.models import Published  # type: ignore[import-untyped]

    Published.objects.bulk_create(
        Published(destination="/queue/bench-outbox", body=payload, headers=headers)
        for _, headers, payload in _source(table)
    )
    _analyze()
    started = time.perf_counter()
    factory_producer().publish_message_from_database()
    seconds = time.perf_counter() - started
    left = Published.objects.exclude(status=2).count()
    if left:
        raise SystemExit(f"{left} events were not sent")
    return seconds


def _analyze() -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("analyze")


if __name__ == "__main__":
    _main()
