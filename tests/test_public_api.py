"""The public names: sorted, complete, documented, importable, and light to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db.transaction import TransactionManagementError
from sqlalchemy.exc import InvalidRequestError

import dispytch_integrations
from dispytch_integrations import errors, sqlalchemy
from dispytch_integrations.django import errors as django_errors

PACKAGE = str(Path(dispytch_integrations.__file__).parent)
# Django is configured by pytest-django before this is read; without settings its part could not be imported.
MODULES = [
    "dispytch_integrations",
    *(
        each.name
        for each in pkgutil.walk_packages([PACKAGE], "dispytch_integrations.")
        # Django's to import: migrations have no names, and an admin needs the admin's app.
        if ".migrations" not in each.name and not each.name.endswith(".admin")
    ),
]
PUBLIC_MODULES = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]

HEAVY = [
    "aio_pika",
    "aiokafka",
    "aiormq",
    "anyio",
    "django",
    "fastapi",
    "httpx",
    "msgpack",
    "opentelemetry",
    "pamqp",
    "redis",
    "sqlalchemy",
    "starlette",
    "yarl",
]
"""Drivers and frameworks, with what they bring."""

# The contract: what users, examples and documentation import.
CONTRACT = {
    "dispytch_integrations": ["EventBase", "EventEmitter", "connect", "event_id"],
    "dispytch_integrations.kafka": ["KafkaEventConfig", "KafkaEventRoute", "KafkaProducer"],
    "dispytch_integrations.rabbitmq": ["RabbitMQEventConfig", "RabbitMQEventRoute", "RabbitMQProducer"],
    "dispytch_integrations.redis": ["RedisEventRoute", "RedisProducer", "RedisStreamEventRoute"],
    "dispytch_integrations.memory": ["MemoryProducer"],
    "dispytch_integrations.producer": ["BackendConfig", "EventRoute", "Producer", "ProducerTimeout"],
    "dispytch_integrations.serialization": ["JSONSerializer", "MessagePackSerializer", "Serializer"],
    "dispytch_integrations.blocking": ["connect_blocking"],
    "dispytch_integrations.fastapi": ["BlockingEmitterDep", "EmitterDep", "emitter_dependency", "emitter_lifespan"],
    "dispytch_integrations.sqlalchemy": ["SQLAlchemyOutbox", "bind", "emit_on_commit", "outbox_tables"],
    "dispytch_integrations.starlette": ["EmitterMiddleware", "emitter_lifespan", "get_emitter"],
    "dispytch_integrations.django": [
        "aemit",
        "aemit_many",
        "aemit_on_commit",
        "emit",
        "emit_many",
        "emit_on_commit",
        "emits",
        "get_emitter",
        "suppress_emits",
    ],
    "dispytch_integrations.django.middleware": ["EmitterMiddleware"],
    "dispytch_integrations.django.signals": ["broker_started", "broker_stopped", "event_emitted", "event_failed"],
    "dispytch_integrations.django.asgi": ["get_asgi_application"],
}


def _defined_here(module: ModuleType) -> Iterator[str]:
    """Public names that the module's own source assigns or defines at its top level."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [node.name]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id] if isinstance(node.target, ast.Name) else []
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def _ruff_order(name: str) -> tuple[int, str]:
    """As RUF022 sorts: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_every_name_is_there(name: str) -> None:
    """`__all__` is the list that users and documentation read; a name in it that is missing breaks `import *`."""
    module = importlib.import_module(name)
    names = module.__all__
    assert list(names) == sorted(set(names), key=_ruff_order)
    assert [each for each in names if not hasattr(module, each)] == []


@pytest.mark.parametrize("name", [each for each in PUBLIC_MODULES if each != "dispytch_integrations"])
def test_all_is_complete(name: str) -> None:
    """A class without an underscore that is not listed is public by accident: list it, or make it private."""
    module = importlib.import_module(name)
    # Loggers are no API; names that other modules of the package use are told apart by being functions or types.
    defined = {each for each in _defined_here(module) if isinstance(getattr(module, each), type)}
    assert sorted(defined - set(module.__all__)) == []


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_are_documented(name: str) -> None:
    """Who hovers over a name in an editor gets an answer: on modules, classes, their public methods, functions."""
    module = importlib.import_module(name)
    assert module.__doc__, name
    missing: list[str] = []
    for each in module.__all__:
        value = getattr(module, each)
        if not getattr(value, "__module__", "").startswith("dispytch_integrations"):
            continue
        # Functions of a module may be the methods of one object, as those of `dispytch_integrations.django`.
        if inspect.isroutine(value) and not inspect.getdoc(value):
            missing.append(each)
        if inspect.isclass(value):
            missing += [each] if not value.__dict__.get("__doc__") else []
            missing += [f"{each}.{member}" for member in _undocumented(value)]
    assert missing == []


def _undocumented(cls: type[Any]) -> Iterator[str]:
    for name, value in cls.__dict__.items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        is_ours = inspect.isfunction(function) or isinstance(value, property)
        # inspect.getdoc follows inheritance: an overridden method is documented where it was first declared.
        if is_ours and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield name


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_contract_names_can_be_imported(name: str) -> None:
    """Users' imports, examples and documentation rest on these names."""
    module = importlib.import_module(name)
    assert [each for each in CONTRACT[name] if not hasattr(module, each)] == []
    assert sorted(set(CONTRACT[name]) - set(module.__all__)) == []


@pytest.mark.parametrize("name", [each for each in CONTRACT if each.endswith((".kafka", ".rabbitmq", ".redis"))])
def test_routes_need_no_driver(name: str) -> None:
    """A package of shared event classes is imported by services that use another broker, or none."""
    assert _run(f"import {name}, sys; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_root_loads_no_driver_and_no_framework() -> None:
    """`import dispytch_integrations` costs a service nothing that it does not use."""
    names = "from dispytch_integrations import *; import sys"
    assert _run(f"{names}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_root_loads_nothing_before_it_is_used() -> None:
    """Every start of pytest and `dispytch-integrations --help` would wait a quarter of a second for pydantic."""
    loaded = _run("import dispytch_integrations, sys; print([m for m in ('pydantic', 'asyncio') if m in sys.modules])")
    assert loaded == "[]"


def test_root_loads_only_the_core() -> None:
    """Transports and integrations are imported by whoever uses them."""
    loaded = _run(
        "from dispytch_integrations import *; import sys;"
        "print(' '.join(sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('dispytch_integrations.'))))"
    ).split()
    assert not {"kafka", "rabbitmq", "redis", "memory", "blocking", "fastapi", "starlette", "django"} & set(loaded)


def test_the_django_part_needs_no_settings_and_loads_no_driver() -> None:
    """A settings module may import it, and a web process whose events go elsewhere carries no client."""
    others = [name for name in HEAVY if name != "django"]
    code = (
        f"import dispytch_integrations.django, dispytch_integrations.django.signals, sys;"
        f"from django.conf import settings;"
        f"print(settings.configured, [m for m in {others} if m in sys.modules])"
    )
    assert _run(code, DJANGO_SETTINGS_MODULE="") == "False []"


def test_every_error_is_in_one_tree() -> None:
    """`except DispytchError` catches all that the package raises; the tree in the docstring is the real one."""
    drawn: dict[str, str] = {}
    ancestors: list[str] = []
    for branch, name in re.findall(r"^    ((?:[│ ] {3}|[├└]── )*)(\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(branch) // 4
        del ancestors[depth:]
        drawn[name] = ancestors[-1] if ancestors else "Exception"
        ancestors.append(name)
    assert drawn == {name: getattr(errors, name).__mro__[1].__name__ for name in errors.__all__}


def test_errors_of_frameworks_are_caught_by_either_name() -> None:
    """Code that does not know the framework catches them, and the framework's own handlers do."""
    for ours, general, theirs in (
        (django_errors.SettingsError, errors.SettingsError, ImproperlyConfigured),
        (django_errors.TransactionError, errors.TransactionError, TransactionManagementError),
        (sqlalchemy.TransactionError, errors.TransactionError, InvalidRequestError),
    ):
        assert issubclass(ours, general)
        assert issubclass(ours, theirs)


def test_package_is_typed() -> None:
    """Without the marker, type checkers ignore every annotation of an installed package."""
    assert Path(PACKAGE, "py.typed").is_file()


def test_version_is_that_of_the_distribution() -> None:
    """A bug report names one version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("dispytch-integrations")
    except PackageNotFoundError:
        pytest.skip("not installed: run from .venv (make test)")
    assert installed == dispytch_integrations.__version__
