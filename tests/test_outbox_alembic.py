"""Alembic: `outbox_tables` beside one's own tables, and a migration that needs nothing of ours to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from dispytch_integrations._sqlalchemy_store import store_of
from tests.support.outboxes import FakeBackend, eventually, record, relaying, started, temporary_database
from tests.support.servers import ROOT

DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite+pysqlite"}

ENV = """
from alembic import context
from sqlalchemy import create_engine

from models import metadata

engine = create_engine({url!r})
with engine.connect() as connection:
    context.configure(
        connection=connection, target_metadata=metadata, compare_type=True, compare_server_default=True,
        render_as_batch={batch}, include_schemas=False,
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""

MODELS = """
from sqlalchemy import Column, Integer, MetaData, Table

from dispytch_integrations.sqlalchemy import outbox_tables

metadata = MetaData()
Table("orders", metadata, Column("id", Integer, primary_key=True))
outbox_tables(metadata)
"""


def _alembic(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _project(folder: Path, url: str, *, batch: bool) -> None:
    _alembic(folder, "init", "migrations")
    (folder / "migrations" / "env.py").write_text(ENV.format(url=url, batch=batch))
    (folder / "models.py").write_text(MODELS)


def _revision(folder: Path, name: str) -> str:
    _alembic(folder, "revision", "--autogenerate", "--message", name)
    [file] = (folder / "migrations" / "versions").glob(f"*_{name}.py")
    return file.read_text()


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "sqlite"])
async def test_a_migration_makes_the_tables_and_needs_nothing_of_ours(kind: str, tmp_path: Path) -> None:
    """Migrations are run for years, by versions of ours that know nothing of them; what they make can be relayed."""
    with temporary_database(kind, tmp_path) as database:
        database.run("drop table dispytch_outbox_event")
        database.run("drop table dispytch_outbox_shard")
        url = database.url(DRIVERS[kind]).render_as_string(hide_password=False)
        project = tmp_path / "project"
        project.mkdir()
        _project(project, url, batch=kind == "sqlite")

        first = _revision(project, "first")
        assert {"dispytch_outbox_event", "dispytch_outbox_shard"} <= set(re.findall(r"\w+", first))
        assert "dispytch_integrations" not in first
        # Without our package and the project's models, as in an image that only migrates.
        env = project / "migrations" / "env.py"
        with_models = env.read_text()
        env.write_text(with_models.replace("from models import metadata", "metadata = None"))
        (project / "dispytch_integrations.py").write_text("raise ImportError('a migration imports us')")
        _alembic(project, "upgrade", "head")
        (project / "dispytch_integrations.py").unlink()
        env.write_text(with_models)

        second = _revision(project, "second")
        assert re.search(r"def upgrade\(\).*?:\s+(?:\"\"\".*?\"\"\"\s+)?(?:#[^\n]*\n\s+)*pass", second), second

        database.insert([record(number, f"key {number % 3}") for number in range(10)])
        backend, engine = FakeBackend(), create_engine(url)
        async with started(default=backend) as brokers, relaying(store_of(engine), brokers):
            await eventually(lambda: database.count() == 0)
        assert sorted(backend.fake.numbers()) == list(range(10))
        engine.dispose()
        env.write_text(with_models.replace("from models import metadata", "metadata = None"))
        _alembic(project, "downgrade", "base")
