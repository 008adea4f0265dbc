"""What a newcomer writes instead: each mistake is answered with what to write."""

from __future__ import annotations

import asyncio
import copy
import inspect
from functools import wraps
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.blocking import connect_blocking
from dispytch_integrations.django import aemit, emit, suppress_emits
from dispytch_integrations.errors import ConfigurationError, HeaderError, NotStartedError, RouteError
from dispytch_integrations.events import EventRoute
from dispytch_integrations.fastapi import emitter_lifespan
from dispytch_integrations.hooks import Hook
from dispytch_integrations.kafka import KafkaEventConfig, KafkaEventRoute
from dispytch_integrations.memory import MemoryProducer
from dispytch_integrations.message import Message
from dispytch_integrations.producer import Producer
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute
from dispytch_integrations.testing import override_brokers

# -- what connect() returns, taken for something else ------------------------------------------------------------------


async def test_brokers_taken_for_their_emitter_name_the_missing_async_with() -> None:
    """`emitter = connect(url)` is the first thing that somebody writes who knows other clients."""
    brokers: Any = connect("memory://")
    with pytest.raises(NotStartedError, match=r"write `async with connect\(...\) as emitter:`"):
        await brokers.emit("event")
    with pytest.raises(AttributeError, match="'Brokers' object has no attribute 'whatever'"):
        _ = brokers.whatever
    assert not hasattr(brokers, "emit")
    with pytest.raises(TypeError, match=r"connect\(\) is not awaited: write `async with connect"):
        await brokers
    with pytest.raises(TypeError, match=r"write `with connect_blocking\(...\) as emitter:`"), brokers:
        pass


def test_blocking_brokers_taken_for_their_emitter_name_the_missing_with() -> None:
    """The same for scripts."""
    brokers: Any = connect_blocking("memory://")
    with pytest.raises(NotStartedError, match=r"write `with connect_blocking\(...\) as emitter:`"):
        brokers.emit("event")
    assert not hasattr(brokers, "emit")


async def test_blocking_brokers_in_a_coroutine_name_the_async_ones() -> None:
    """`async with connect_blocking()` is a slip of one word."""
    brokers: Any = connect_blocking("memory://")
    with pytest.raises(TypeError, match=r"write `async with connect\(...\) as emitter:`"):
        async with brokers:
            pass
    with pytest.raises(TypeError, match=r"connect_blocking\(\) is not awaited"):
        await brokers


def test_brokers_taken_for_a_lifespan_name_emitter_lifespan() -> None:
    """`FastAPI(lifespan=connect(url))` reads well, and is not it."""
    brokers: Any = connect("memory://")
    for lifespan in (brokers, emitter_lifespan("memory://", lifespan=brokers)):
        with (
            pytest.raises(TypeError, match=r"write lifespan=emitter_lifespan\("),
            TestClient(FastAPI(lifespan=lifespan)),
        ):
            pass


async def test_brokers_taken_for_a_url_are_no_function_to_be_called() -> None:
    """`connect(connect(url))` is a mistake in the settings like another."""
    brokers: Any = connect("memory://")
    with pytest.raises(ConfigurationError, match="a Brokers configures no broker; give a URL"):
        await connect(brokers).start()


# -- what is given to emit ---------------------------------------------------------------------------------------------


class MistakesPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders")

    order_id: int = 1


async def test_the_class_instead_of_an_event_says_to_make_one() -> None:
    """ "a ModelMetaclass is not an event" is about pydantic, and the mistake is two missing parentheses."""
    given: Any = MistakesPlaced
    wanted = r"the class MistakesPlaced is not an event; write emit\(MistakesPlaced\(...\)\)"
    async with connect("memory://") as emitter:
        with pytest.raises(RouteError, match=wanted):
            await emitter.emit(given)
    with override_brokers("memory"), pytest.raises(RouteError, match=wanted):
        await aemit(given)
    with suppress_emits(), pytest.raises(RouteError, match=wanted):
        await aemit(given)


def test_several_events_for_emit_say_emit_many() -> None:
    """Django's emit and the blocking emitter too; `emit_on_commit` takes both, so that the slip is near."""
    given: Any = [MistakesPlaced()]
    wanted = r"a list is not an event; for several of them write emit_many\(\[...\]\)"
    with connect_blocking("memory://") as emitter, pytest.raises(RouteError, match=wanted):
        emitter.emit(given)
    with override_brokers("memory"), pytest.raises(RouteError, match=wanted):
        emit(given)
    with (
        pytest.raises(RouteError, match="a generator is not an event; for several"),
        connect_blocking("memory://") as e,
    ):
        e.emit(event for event in given)  # type: ignore[arg-type]


# -- routes and configurations -----------------------------------------------------------------------------------------


def test_a_route_without_the_names_of_its_values_says_how_to_write_them() -> None:
    """ "BaseModel.__init__() takes 1 positional argument" is about pydantic."""
    for route, values, told in (
        (KafkaEventRoute, ("orders",), r"write KafkaEventRoute\(topic='orders'\)"),
        (RedisEventRoute, ("orders",), r"write RedisEventRoute\(channel='orders'\)"),
        (RabbitMQEventRoute, ("shop", "placed"), r"write RabbitMQEventRoute\(exchange='shop', routing_key='placed'\)"),
        (KafkaEventConfig, ("{order_id}",), r"write KafkaEventConfig\(partition_key='{order_id}'\)"),
    ):
        made: Any = route
        with pytest.raises(TypeError, match=told):
            made(*values)


def test_a_misspelt_part_of_a_route_is_told_with_the_nearest_name() -> None:
    """Still a ValidationError, which is what code around pydantic's models catches."""
    made: Any = KafkaEventRoute
    with pytest.raises(ValidationError) as caught:
        made(topik="orders")
    assert str(caught.value) == (
        "1 validation error for KafkaEventRoute\ntopik\n  a KafkaEventRoute has no 'topik' (did you mean 'topic'?); "
        "it has topic, safe [type=extra_forbidden]"
    )
    config: Any = KafkaEventConfig
    with pytest.raises(ValidationError, match=r"has no 'partitionkey' \(did you mean 'partition_key'\?\)"):
        config(partitionkey="{order_id}")
    with pytest.raises(ValidationError, match=r"(?s)2 validation errors.*has no 'name'; it has topic.*Field required"):
        made(name="orders")
    with pytest.raises(ValidationError, match=r"(?s)2 validation errors.*valid string.*Extra inputs"):
        made(topic=5, topik="orders")


def test_routes_are_the_models_that_they_were() -> None:
    """Editors show a route's fields, and tools that validate or copy one find nothing changed."""
    assert str(inspect.signature(KafkaEventRoute)) == "(*, safe: str = '', topic: str) -> None"
    route = KafkaEventRoute(topic="orders")
    assert KafkaEventRoute.model_validate({"topic": "orders"}) == route == copy.deepcopy(route)
    assert KafkaEventRoute.model_validate_json(route.model_dump_json()) == route


# -- brokers and hooks -------------------------------------------------------------------------------------------------


async def test_a_route_that_no_broker_takes_says_which_broker_to_add() -> None:
    """Or which route: one of the two is what was meant."""
    async with connect({"default": "memory://redis", "bus": "memory://rabbitmq"}) as emitter:
        with pytest.raises(RouteError) as caught:
            await emitter.emit(MistakesPlaced())
    assert str(caught.value) == (
        "MistakesPlaced has a KafkaEventRoute, which no broker takes; configured are 'default' (memory://redis), 'bus' "
        "(memory://rabbitmq): add a broker with a kafka:// URL, or give MistakesPlaced a RedisEventRoute or "
        "RedisStreamEventRoute or RabbitMQEventRoute"
    )


async def test_a_route_of_ones_own_that_no_broker_takes_has_no_scheme_to_add() -> None:
    """`custom://` would be served by nobody."""

    class OwnRoute(EventRoute):
        path: str

    class MistakesWritten(EventBase):
        __route__ = OwnRoute(path="orders.json")

    async with connect("memory://kafka") as emitter:
        with pytest.raises(RouteError, match=r"\(memory://kafka\): give .*MistakesWritten a KafkaEventRoute$"):
            await emitter.emit(MistakesWritten())


async def test_a_hook_without_its_list_says_to_write_one() -> None:
    """One hook is the usual number of them."""
    hook: Any = Hook()
    with pytest.raises(ConfigurationError, match=r"hooks: .*a list, not a Hook; write hooks=\[...\]"):
        await connect("memory://", hooks=hook).start()
    with pytest.raises(ConfigurationError, match=r"hooks are a list, not a Hook; write hooks=\[...\]"):
        EventEmitter(MemoryProducer(), hooks=hook)


# -- dispytch's own names, of a migration that is half done --------------------------------------------------------


def test_what_is_dispytchs_is_told_from_what_is_nothing() -> None:
    """'Write KafkaEventRoute(...)' is what stands there already: the import is what has to change."""
    theirs: Any = type("KafkaEventRoute", (), {"__module__": "dispytch.kafka.event"})
    with pytest.raises(RouteError, match=r"KafkaEventRoute is dispytch's: import that of dispytch_integrations\.kafka"):
        type("Old", (EventBase,), {"__module__": __name__, "__route__": theirs()})
    producer: Any = type("RabbitMQProducer", (), {"__module__": "dispytch.rabbitmq"})()
    with pytest.raises(ConfigurationError, match=r"RabbitMQProducer is dispytch's: .* dispytch_integrations.rabbitmq"):
        EventEmitter(producer)
    base: Any = type("EventBase", (BaseModel,), {"__module__": "dispytch.emitter.event"})
    old: Any = type("OldEvent", (base,), {"__module__": __name__})
    with pytest.raises(RouteError, match=r"EventBase is dispytch's: import that of dispytch_integrations$"):
        asyncio.run(EventEmitter(MemoryProducer()).emit(old()))


def test_a_send_that_nobody_could_await() -> None:
    """It has sent before the error of the await comes, and would be tried again."""

    class Plain(Producer):
        def send(self, payload: bytes, route: EventRoute, config: Any = None) -> None:  # type: ignore[override]
            raise AssertionError

    class Wrapped(Producer):
        @staticmethod
        async def sends(payload: bytes, route: EventRoute, config: Any = None) -> None:
            """What a decorator has covered, and still gives to whoever awaits."""

        @wraps(sends)
        def send(self, payload: bytes, route: EventRoute, config: Any = None) -> Any:  # type: ignore[override]
            return self.sends(payload, route, config)

    EventEmitter(Wrapped())
    with pytest.raises(ConfigurationError, match=r"Plain.send is no coroutine function.*write `async def send`"):
        EventEmitter(Plain())


# -- headers that hooks set ----------------------------------------------------------------------------------------


class Setting(Hook):
    """Sets headers as it is told."""

    def __init__(self, **headers: Any) -> None:
        self.headers = headers

    def before_send(self, message: Message) -> None:
        message.headers.update(self.headers)


class HookedPlaced(EventBase):
    __route__ = KafkaEventRoute(topic="orders")


class HookedTold(EventBase):
    __route__ = RedisEventRoute(channel="orders")


@pytest.mark.parametrize(
    ("headers", "cls", "told"),
    [
        ({"tenant": "acme"}, HookedTold, "a RedisEventRoute carries no headers"),
        ({"ce_id": "mine"}, HookedPlaced, "is made by the emitter"),
        ({"tenant": object()}, HookedPlaced, "'tenant' cannot be sent"),
        ({"tenant": "a\nb"}, HookedPlaced, "control character"),
    ],
)
async def test_a_hooks_headers_are_checked_as_the_callers_are(
    headers: dict[str, Any], cls: type[EventBase], told: str
) -> None:
    """They vanished on a transport without headers, and failed in the client on others."""
    async with connect("memory://", hooks=[Setting(**headers)]) as emitter:
        with pytest.raises(HeaderError) as caught:
            await emitter.emit(cls())
    assert told in str(caught.value)
    assert "(a hook has set it, in before_send)" in str(caught.value)


async def test_a_hooks_headers_become_text_as_the_callers_do() -> None:
    """A number, and a None, which is no header."""
    async with connect("memory://", hooks=[Setting(number=3, nothing=None)]) as emitter:
        await emitter.emit(HookedPlaced())
        producer: Any = emitter.producer
        [message] = producer.sent
    assert message.headers["number"] == "3"
    assert "nothing" not in message.headers


async def test_the_content_type_is_the_emitters_on_every_transport() -> None:
    """RabbitMQ has a property for it, which a header of that name would contradict."""

    class Queued(EventBase):
        __route__ = RabbitMQEventRoute(exchange="", routing_key="q")

    async with connect("memory://rabbitmq") as emitter:
        with pytest.raises(HeaderError, match="Content-Type"):
            await emitter.emit(Queued(), headers={"Content-Type": "text/plain"})
