"""A package of an extra that is not there is told with the pip line, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dispytch_integrations._missing import is_missing

_START = "import asyncio; from dispytch_integrations import connect; asyncio.run(connect('{url}').start())"
_MODULE = "import dispytch_integrations.{name}"


@pytest.mark.parametrize(
    ("package", "code", "told"),
    [
        ("aiokafka", _START.format(url="kafka://h"), "kafka:// needs aiokafka"),
        ("aio_pika", _START.format(url="rabbitmq://h"), "rabbitmq:// needs aio-pika"),
        ("redis", _START.format(url="redis://h"), "redis:// needs redis"),
        ("redis", "from dispytch_integrations.redis import RedisProducer; RedisProducer(object())", "needs redis"),
        *(
            (name, _MODULE.format(name=name), f"pip install 'dispytch-integrations[{name}]'")
            for name in ("starlette", "fastapi", "django", "sqlalchemy")
        ),
        ("msgpack", "from dispytch_integrations.serialization import *; MessagePackSerializer()", "needs msgpack"),
        ("opentelemetry", _MODULE.format(name="opentelemetry"), "pip install 'dispytch-integrations[otel]'"),
    ],
)
def test_a_package_that_is_hidden_is_missing(package: str, code: str, told: str) -> None:
    """As tests of apps hide one: what Python then misses is a submodule of it."""
    program = f"""
import sys
sys.modules[{package!r}] = None
from dispytch_integrations.errors import MissingExtraError
try:
    {code}
except MissingExtraError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert told in done.stdout, done.stderr
    assert "pip install 'dispytch-integrations[" in done.stdout


def test_what_a_package_misses_itself_is_not_the_package() -> None:
    """A broken installation is told as it is: the pip line would not mend it."""
    assert is_missing(ModuleNotFoundError(name="nowhere"), "somewhere", "nowhere")
    assert not is_missing(ModuleNotFoundError(name="typing_extensions"), "pytest")
    assert not is_missing(ModuleNotFoundError(name="pytest.gone"), "pytest")
    assert not is_missing(ModuleNotFoundError(), "pytest")
