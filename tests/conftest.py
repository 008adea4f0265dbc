"""Fixtures of all tests: brokers to share, brokers to break, names that nobody else uses."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import pytest
from hypothesis import settings

from tests.support.brokers import (
    AMQP_GREETING,
    REDIS_GREETING,
    Broker,
    BrokerMissing,
    RabbitMQ,
    Redis,
    Tansu,
    answers,
)

# Timing says nothing on a machine that runs brokers beside the tests; in CI the same examples every time.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")

_B = TypeVar("_B", bound=Broker)


def pytest_configure(config: pytest.Config) -> None:
    """End as after Ctrl-C when terminated: fixtures are torn down, no broker is left behind."""

    def terminated(number: int, frame: object) -> NoReturn:
        pytest.exit("terminated", returncode=143)

    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture
def unique() -> str:
    """A name for topics, exchanges, channels and keys: unique per test, letters and digits only."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def kafka_url() -> Iterator[str]:
    """A Kafka-compatible broker to share: KAFKA_URL, else Tansu."""
    given = os.environ.get("KAFKA_URL")
    if given:
        yield given
        return
    with _start(Tansu) as broker:
        yield broker.url


@pytest.fixture(scope="session")
def kafka_mock_url() -> Iterator[str]:
    """librdkafka's mock cluster of three brokers, in this process; it knows idempotent producers, unlike Tansu."""
    try:
        from confluent_kafka import Producer
    except ModuleNotFoundError:
        _unavailable("no mock Kafka cluster: pip install confluent-kafka")
    keeper = Producer({"test.mock.num.brokers": 3, "log_level": 2})
    brokers = keeper.list_topics(timeout=10).brokers.values()
    yield "kafka://" + ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
    del keeper  # The cluster lives as long as this producer.


@pytest.fixture(scope="session")
def rabbitmq_url(_rabbitmq_node: Callable[[], RabbitMQ]) -> str:
    """A RabbitMQ to share: RABBITMQ_URL, else the one running on this machine, else a node of our own."""
    given = os.environ.get("RABBITMQ_URL")
    if given:
        return given
    if answers(5672, AMQP_GREETING):
        return "amqp://guest:guest@127.0.0.1:5672/"
    return _rabbitmq_node().url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis to share: REDIS_URL, else the one running on this machine, else a server of our own."""
    given = os.environ.get("REDIS_URL")
    if given:
        yield given
    elif answers(6379, REDIS_GREETING):
        yield "redis://127.0.0.1:6379/0"
    else:
        with _start(Redis) as broker:
            yield broker.url


@pytest.fixture
def own_kafka() -> Iterator[Callable[[], Tansu]]:
    """A function that starts a Kafka-compatible broker for this test alone, to stop, pause and restart it."""
    yield from _factory(Tansu)


@pytest.fixture
def own_redis() -> Iterator[Callable[..., Redis]]:
    """A function that starts a Redis for this test alone; takes `password=` and `options={"maxmemory": "1mb"}`."""
    yield from _factory(Redis)


@pytest.fixture
def own_rabbitmq(_rabbitmq_node: Callable[[], RabbitMQ]) -> Callable[[], RabbitMQ]:
    """A function that gives a RabbitMQ node you may stop, pause, restart, and set alarms on with `.ctl(...)`.

    One node for all tests, since starting takes seconds: what a test broke is mended before the next one gets it.
    """
    return _rabbitmq_node


@pytest.fixture(scope="session")
def _rabbitmq_node() -> Iterator[Callable[[], RabbitMQ]]:
    nodes: list[RabbitMQ] = []

    def node() -> RabbitMQ:
        if not nodes:
            nodes.append(_start(RabbitMQ))
        broker = nodes[0]
        broker.resume()
        broker.start()
        broker.clear_alarms()
        return broker

    yield node
    for broker in nodes:
        broker.close()


def _factory(make: Callable[..., _B]) -> Iterator[Callable[..., _B]]:
    brokers: list[_B] = []

    def start(**options: object) -> _B:
        brokers.append(_start(make, **options))
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.close()


def _start(make: Callable[..., _B], **options: object) -> _B:
    for last in (False, False, True):
        broker = make(**options)
        try:
            broker.start()
        except BrokerMissing as exc:
            broker.close()
            _unavailable(str(exc))
        except RuntimeError:
            # Between choosing a port and using it somebody else may have come (a Redis cluster takes two).
            broker.close()
            if last:
                raise
        else:
            return broker
    raise AssertionError("unreachable")


def _unavailable(reason: str) -> NoReturn:
    # A skip is honest on a laptop; in CI it would be a hole that nobody sees.
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason} (CI=true: nothing is skipped)", pytrace=False)
    pytest.skip(reason)
