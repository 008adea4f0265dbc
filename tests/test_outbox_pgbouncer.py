"""The outbox behind PgBouncer in transaction mode: each statement may go over another connection of the server."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from dispytch_integrations import EventBase, connect
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.sqlalchemy import SQLAlchemyOutbox, bind, emit_on_commit
from tests.support.brokers import free_port
from tests.support.outboxes import Database, eventually, temporary_database, unavailable


class Counted(EventBase):
    __route__ = KafkaEventRoute(topic="counted")
    __ordering_key__ = "{key}"
    key: int
    number: int


ARGUMENTS: dict[str, dict[str, Any]] = {
    "postgresql+asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
    "postgresql+psycopg": {"prepare_threshold": None},
    "postgresql+psycopg_sync": {"prepare_threshold": None},
}
"""What the documentation says to give each driver."""


@pytest.fixture
def database() -> Iterator[Database]:
    with temporary_database("postgresql") as database:
        yield database


@pytest.fixture
def pooler(database: Database) -> Iterator[URL]:
    """The database by way of a PgBouncer of our own, with two connections to the server."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        unavailable("no pgbouncer; it is a package of most distributions")
    server, port = database.url("postgresql+asyncpg"), free_port()
    with tempfile.TemporaryDirectory(prefix="dispytch-pgbouncer-") as directory:
        settings = Path(directory) / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n{server.database} = host={server.host} port={server.port} dbname={server.database} "
            f"user={server.username}{f' password={server.password}' if server.password else ''}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\npool_mode = transaction\n"
            f"default_pool_size = 2\nunix_socket_dir =\n"
            f"logfile = {directory}/log\npidfile = {directory}/pid\n"
        )
        command = [program, str(settings)]
        if os.geteuid() == 0:  # It refuses to run as root.
            shutil.chown(directory, "nobody")
            command = [program, "-u", "nobody", str(settings)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                _wait_for(port, process)
                yield server.set(host="127.0.0.1", port=port)
            finally:
                process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, "pgbouncer has ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            asyncio.run(asyncio.sleep(0.05))
        else:
            return
    raise AssertionError("pgbouncer does not answer")


@pytest.mark.parametrize("driver", ARGUMENTS)
async def test_writers_and_a_relay_behind_a_pooler(driver: str, pooler: URL, database: Database) -> None:
    """What most production databases stand behind: events arrive once, in order, from sessions side by side."""
    url, arguments = pooler.set(drivername=driver.removesuffix("_sync")), ARGUMENTS[driver]
    synchronous = driver.endswith("_sync")
    engine: Any = (create_engine if synchronous else create_async_engine)(url, connect_args=arguments, pool_size=8)
    factory: Any = (sessionmaker if synchronous else async_sessionmaker)(engine)
    outbox = SQLAlchemyOutbox(engine, options=RelayOptions(lease=12))
    bind(factory, outbox)

    async def write(key: int) -> None:
        for number in range(25):
            if synchronous:
                await asyncio.to_thread(write_one, key, number)
                continue
            async with factory.begin() as session:
                emit_on_commit(session, Counted(key=key, number=number))

    def write_one(key: int, number: int) -> None:
        with factory.begin() as session:
            emit_on_commit(session, Counted(key=key, number=number))

    brokers = connect("memory://", outbox=outbox)
    async with brokers as emitter:
        sent: Any = emitter.producer
        await asyncio.gather(*(write(key) for key in range(8)))
        await eventually(lambda: len(sent.sent) >= 200 and database.count() == 0, 20)
    arrived = [Counted.model_validate_json(message.payload) for message in sent.sent]
    for key in range(8):
        assert [each.number for each in arrived if each.key == key] == list(range(25))
    disposed = engine.dispose()
    if disposed is not None:
        await disposed
