"""What `dispytch-integrations` works on: the outbox and the brokers of its options, or the app's own."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from dispytch_integrations._cli_import import config_of, imported, or_traceback
from dispytch_integrations._cli_options import relay_options
from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import scrub
from dispytch_integrations.brokers import Brokers, connect
from dispytch_integrations.errors import ConfigurationError, MissingExtraError
from dispytch_integrations.outbox._running import run_relay
from dispytch_integrations.outbox.options import RelayOptions
from dispytch_integrations.outbox.runner import Runner
from dispytch_integrations.outbox.store import OutboxStore

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox

__all__ = ["make_runner", "relay", "stores_of"]

_DRIVERS: Mapping[str, tuple[str, ...]] = {
    "postgresql": ("asyncpg", "psycopg", "psycopg2"),
    "mysql": ("asyncmy", "aiomysql", "pymysql", "mysqldb"),
    "mariadb": ("asyncmy", "aiomysql", "pymysql", "mysqldb"),
    "sqlite": ("aiosqlite", "pysqlite"),
}
"""SQLAlchemy's names of the drivers of a database, those that need no thread first."""
_MODULES = {"mysqldb": "MySQLdb", "pysqlite": "sqlite3"}
_PACKAGES = {"mysqldb": "mysqlclient", "psycopg_async": "psycopg", "psycopg2": "psycopg2-binary"}
_ASYNC = {"asyncpg", "psycopg", "psycopg_async", "asyncmy", "aiomysql", "aiosqlite"}


def relay(given: Mapping[str, Any]) -> int:
    """Run the relay; return the exit code."""
    _refuse_both(given)
    return run_relay(
        partial(make_runner, dict(given)),
        given,
        sys.stdout,
        terminal=sys.stdout.isatty(),
        color="NO_COLOR" not in os.environ,
    )


def make_runner(given: Mapping[str, Any]) -> Runner:
    """The relay's process, as the options say; in each worker's process, too."""
    if given.get("app"):
        brokers, outbox = _app(given["app"])
        options = relay_options(given, outbox.options)
    else:
        options = relay_options(given, RelayOptions())
        outbox = _outbox(given, options)
        brokers = connect(config_of(given.get("broker_url") or ()))
    return Runner(brokers, {"default": outbox.store}, options, on_end=partial(_dispose, outbox.engine))


def stores_of(given: Mapping[str, Any]) -> tuple[dict[str, Callable[[], OutboxStore]], Callable[[], Awaitable[None]]]:
    """What the operations work on, and what closes it."""
    _refuse_both(given)
    outbox = _app(given["app"])[1] if given.get("app") else _outbox(given, RelayOptions())
    return {"default": outbox.store}, partial(_dispose, outbox.engine)


def _refuse_both(given: Mapping[str, Any]) -> None:
    both = [f"--{name.replace('_', '-')}" for name in ("database_url", "broker_url", "schema") if given.get(name)]
    if given.get("app") and both:
        raise ConfigurationError(f"--app brings its own brokers and outbox; leave out {' and '.join(both)}")


# -- from URLs -------------------------------------------------------------------------------------------------------


def _outbox(given: Mapping[str, Any], options: RelayOptions) -> SQLAlchemyOutbox:
    url = given.get("database_url") or os.environ.get("DATABASE_URL", "").strip()
    if not url:
        raise ConfigurationError(
            "there is no database: write --database-url postgresql://user@host/name, or set DATABASE_URL, or --app"
        )
    if find_spec("sqlalchemy") is None:
        raise MissingExtraError("dispytch-integrations", extra="sqlalchemy")
    from dispytch_integrations._sqlalchemy_outbox import SQLAlchemyOutbox

    return SQLAlchemyOutbox(engine_of(url), "external", schema=given.get("schema"), options=options)


def engine_of(text: str) -> Engine | AsyncEngine:
    """An engine for a URL, with an installed driver where the URL names none. Raises ConfigurationError."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        # Without the cause: it may repeat the URL, and its password.
        raise ConfigurationError(
            "the database's URL is not readable; write postgresql://user:password@host:5432/name (and %40 for @, %2F "
            "for / in a password)"
        ) from None
    url = _with_driver(url)
    # The store keeps its connection, and nobody else needs one.
    make = create_async_engine if url.get_driver_name() in _ASYNC else create_engine
    try:
        return make(url, poolclass=NullPool)
    except Exception as exc:  # Whatever the dialect makes of the URL: some read their options here.
        told = scrub(str(exc).partition("\n")[0], [text, str(url.password or "")])
        raise ConfigurationError(f"SQLAlchemy makes no engine of {url.drivername}://...: {told}") from None


def _with_driver(url: URL) -> URL:
    name = "postgresql" if url.drivername == "postgres" else url.drivername
    backend, plus, driver = name.partition("+")
    if backend not in _DRIVERS:
        raise ConfigurationError(
            f"the outbox needs PostgreSQL, MySQL, MariaDB or SQLite, not {backend}; write postgresql://user@host/name"
        )
    if not plus:
        driver = next((each for each in _DRIVERS[backend] if _installed(_MODULES.get(each, each))), "")
        if not driver:
            raise ConfigurationError(f"{backend}:// needs a driver: pip install {_DRIVERS[backend][0]}")
    elif not _installed(_MODULES.get(driver, driver.removesuffix("_async"))):
        known = _DRIVERS[backend]
        if driver.removesuffix("_async") not in known:  # No pip line for a slip of the keyboard.
            raise ConfigurationError(
                f"{name}:// names the driver {driver!r}{nearest(driver, known)}, which is not installed; write "
                f"{backend}:// for the one that is"
            )
        raise ConfigurationError(f"{name}:// needs its driver: pip install {_PACKAGES.get(driver, driver)}")
    url = url.set(drivername=f"{backend}+{driver}")
    if driver == "asyncpg" and "sslmode" in url.query:
        # As libpq spells it, and as hosts of databases hand it out.
        url = url.update_query_dict({"ssl": url.query["sslmode"]}).difference_update_query(["sslmode"])
    return url


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # No name of a module to be found: __main__.
        return False


# -- from the app ----------------------------------------------------------------------------------------------------


def _app(path: str) -> tuple[Brokers, SQLAlchemyOutbox]:
    """The brokers and the outbox of `module:name`. Raises ConfigurationError for what is neither."""
    found = imported("--app", path, "shop.main:brokers", _candidates)
    if inspect.isroutine(found):
        found = _called(path, cast("Callable[[], object]", found))
    if not isinstance(found, Brokers):
        raise ConfigurationError(
            f"--app {path} is a {type(found).__name__}; name what connect(url, outbox=...) returned, or a function "
            f"without arguments that returns it{_candidates(path)}"
        )
    outbox: Any = found.outbox
    if outbox is None:
        raise ConfigurationError(
            f"--app {path} has no outbox; write connect(url, outbox=SQLAlchemyOutbox(engine, relay='external'))"
        )
    if not hasattr(outbox, "store"):
        raise ConfigurationError(f"the outbox of --app {path} is a {type(outbox).__name__}, which has no store()")
    return found, outbox


def _called(path: str, function: Callable[[], object]) -> object:
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise ConfigurationError(f"--app {path} takes arguments; name a function without any") from None
    except ValueError:
        pass  # A builtin without a signature.
    found = or_traceback(f"--app {path}", function)
    if inspect.iscoroutine(found):
        found.close()
        raise ConfigurationError(f"--app {path} is a coroutine function; name a plain one")
    return found


def _candidates(path: str) -> str:
    """What the module has that would do."""
    module = path.partition(":")[0]
    names = [name for name, value in vars(sys.modules[module]).items() if isinstance(value, Brokers) and value.outbox]
    return f"; {module} has {' and '.join(f'--app {module}:{name}' for name in names)}" if names else ""


async def _dispose(engine: Engine | AsyncEngine) -> None:
    disposed = engine.dispose()
    if disposed is not None:
        await disposed
