"""Brokers on memory, in a block or for a whole run, and what is emitted meanwhile."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

from dispytch_integrations import settings
from dispytch_integrations._decorating import Decorating
from dispytch_integrations._overriding import overriding
from dispytch_integrations._templates import nearest
from dispytch_integrations.backend import BrokerOptions, BrokerURL
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.hooks import Hook
from dispytch_integrations.memory import MemoryBackend
from dispytch_integrations.message import Message
from dispytch_integrations.settings import BrokerSpec, Config
from dispytch_integrations.testing._events import EmittedEvents
from dispytch_integrations.testing.brokers import shared_broker

__all__ = ["KEPT", "capture_events", "override_brokers"]

KEPT = ("timeout", "startup_timeout", "shutdown_timeout", "on_timeout", "source", "cloudevents", "prefix", "max_size",
        "hooks", "serializer")  # fmt: skip
"""Options that mean the same in memory."""


class _Recorder(Hook):
    """Tells all captures that are under way; on every outlet that is made while brokers are replaced."""

    def __init__(self) -> None:
        self.captures: list[EmittedEvents] = []

    def sent(self, message: Message) -> None:
        for capture in self.captures:
            capture._was_sent(message)

    def failed(self, message: Message, error: Exception) -> None:
        for capture in self.captures:
            capture._has_failed(message, error)

    def failure_of(self, message: Message) -> Exception | None:
        """The error that a test wants for this message."""
        for capture in self.captures:
            error = capture._failure_of(message)
            if error is not None:
                return error
        return None


_recorder = _Recorder()

Transport = Literal["kafka", "rabbitmq", "redis"]
Overriding = Literal["memory", "kafka", "rabbitmq", "redis"]

_prefix = f"t{secrets.token_hex(4)}."
"""Of this process: workers of pytest-xdist share a broker that the environment names."""


class override_brokers(Decorating[Sequence[Callable[[], object]]]):  # noqa: N801 - as Django's override_settings
    """Put every broker on memory: in a block, for a test, or for a whole run.

        with override_brokers("memory"): ...

        @override_brokers("memory")
        def test_something(): ...

        # conftest.py: the whole run
        @pytest.fixture(autouse=True, scope="session")
        def no_broker():
            with override_brokers("memory"):
                yield

    `connect`, `connect_blocking`, the lifespans of FastAPI and Starlette, EmitterMiddleware and Django read their
    settings as ever, then open `memory://kafka` instead of a Kafka. Each broker keeps its alias and its own options,
    and takes the routes that it would take. No client library is needed; without any setting (DISPYTCH_URL is not set)
    there is one broker for all routes. With an outbox events are stored in the transaction as ever, taken out of the
    table again before its commit, and sent to memory after it; no relay runs.

    "kafka", "rabbitmq" or "redis" instead of "memory": brokers of that transport are a real one, which is started for
    the tests (see `dispytch_integrations.testing.brokers`), the others are on memory. Names of topics and so on get a
    prefix of this process's own, so that tests that run side by side do not meet. Raises BrokerMissing.

    None: those of the settings, as if nothing was overridden: within a whole run on memory, for a test that has a
    broker of its own.

    What is open already stays as it is: enter it before the app starts.
    """

    def __init__(self, brokers: Overriding | None = "memory") -> None:
        known = get_args(Overriding)
        if brokers is not None and brokers not in known:
            raise ValueError(
                f"override_brokers({brokers!r}){nearest(str(brokers), known)}: write one of "
                f"{', '.join(map(repr, known))}, or None for those of the settings"
            )
        self._brokers: Overriding | None = brokers
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> Sequence[Callable[[], object]]:
        brokers = self._brokers
        url = None if brokers is None or brokers == "memory" else shared_broker(brokers)
        stack = ExitStack()
        self._stacks.append(stack)
        before = overriding.load
        overriding.load = None if brokers is None else partial(_loaded, brokers, url)
        stack.callback(setattr, overriding, "load", before)
        if _recorder not in overriding.hooks:
            overriding.hooks.append(_recorder)
            stack.callback(overriding.hooks.remove, _recorder)
        return [stack.enter_context(part()) for part in overriding.parts]

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stacks.pop().close()


@contextmanager
def capture_events(with_broker: Transport | None = None) -> Generator[EmittedEvents, None, None]:
    """Collect the events that are emitted inside the block, in whatever way; brokers are on memory meanwhile.

        with capture_events() as events:
            place_order()
        events.assert_emitted(OrderPlaced, order_id=1)

    Seen are the brokers that are opened inside the block, or inside an `override_brokers("memory")` around it, and
    every `EventEmitter(producer)` that is made there.

    `with_broker`: "kafka", "rabbitmq" or "redis": a real one instead of memory, see `override_brokers`; events are
    those that it has confirmed. None: memory. Raises BrokerMissing where its program is not installed.
    """
    known = get_args(Transport)
    if with_broker is not None and with_broker not in known:
        raise ValueError(
            f"with_broker={with_broker!r}{nearest(str(with_broker), known)}: write one of "
            f"{', '.join(map(repr, known))}, or None for memory"
        )
    with override_brokers(with_broker or "memory") as flushes:
        events = EmittedEvents(flushes)
        _recorder.captures.append(events)
        overriding.observers.append(events._waits)
        try:
            yield events
        finally:
            try:
                events._flush()
            finally:
                overriding.observers.remove(events._waits)
                _recorder.captures.remove(events)


def _loaded(brokers: Overriding, broker: str | None, config: Config, keywords: Mapping[str, Any]) -> list[BrokerSpec]:
    """In the place of `load_brokers`. `broker`: the URL of a real one. Raises ConfigurationError."""
    problems: list[str] = []
    specs: list[BrokerSpec] = []
    for alias, given in settings.aliases(config, {"default": {"url": "memory://"}}).items():
        try:
            specs.append(_spec(alias, given, keywords, brokers, broker))
        except ConfigurationError as exc:
            problems.extend(f"broker {alias!r}: {problem}" for problem in exc.problems)
    if problems:
        raise ConfigurationError(problems)
    return specs


def _spec(
    alias: str, given: dict[str, Any], keywords: Mapping[str, Any], brokers: Overriding, broker: str | None
) -> BrokerSpec:
    url = settings.read_url(given.pop("url", None))
    transport = settings.backend_type_of(url).transport
    if transport == "memory" and url.hosts:  # It stands in for one.
        transport = url.hosts[0][0].lower()
    values = {**keywords, **given, **url.query}
    problems: list[str] = []
    kept = {name: values[name] for name in KEPT if name in values}
    if transport == brokers and broker is not None:
        return settings.load_one(alias, {**kept, "url": broker, "prefix": _prefix + kept.get("prefix", "")}, {})
    options = settings.validate(BrokerOptions, kept, problems)
    if options is None:
        raise ConfigurationError(problems)
    memory = url if transport == "memory" else BrokerURL.parse(f"memory://{transport}")
    backend = MemoryBackend(memory, options, {})
    backend.fail(_recorder.failure_of)
    return BrokerSpec(alias, backend, options)
