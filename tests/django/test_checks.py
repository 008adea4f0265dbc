"""System checks: what `manage.py check` finds, and that servers, which run none, raise the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.test import Client, override_settings
from pytest_django import Settings

from dispytch_integrations import EventBase
from dispytch_integrations.django import checks, emit, get_emitter
from dispytch_integrations.django._connections import connections
from dispytch_integrations.django.asgi import get_asgi_application
from dispytch_integrations.django.errors import SettingsError
from dispytch_integrations.django.middleware import EmitterMiddleware
from dispytch_integrations.django.testing import override_brokers
from dispytch_integrations.kafka import KafkaEventRoute
from dispytch_integrations.rabbitmq import RabbitMQEventRoute
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute

ROOT = Path(__file__).parents[2]


def found(*events: type[EventBase]) -> list[CheckMessage]:
    """What the checks say of the settings and of these events: those of other tests are still about."""
    return [each for each in run_checks(tags=[checks.TAG]) if each.obj is None or each.obj in events]


def told(message: CheckMessage) -> str:
    return f"{message.id} {message.msg} {message.hint or ''}"


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A port on which nobody should knock."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def nobody_knocked(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return True
    return False


# -- the settings ----------------------------------------------------------------------------------------------------


def test_a_project_that_is_right_passes(settings: Settings) -> None:
    """Checks that cry wolf are silenced."""
    settings.DEBUG = True
    settings.DISPYTCH = {"default": "kafka://h", "alerts": "redis://h", "memory": "memory://rabbitmq"}

    class Right(EventBase):
        __route__ = KafkaEventRoute(topic="orders")

    assert found(Right) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "dispytch.E001 The setting DISPYTCH is missing"),
        ({}, "dispytch.E001 DISPYTCH is empty"),
        ({"default": {"URL": "kafka://h", "TIMEUOT": 3}}, "dispytch.E002 DISPYTCH['default'] has the unknown key 'TIM"),
        ({"URL": "kafka://h"}, "dispytch.E001 DISPYTCH has a URL where its aliases are expected. Write DISPYTCH = {"),
        ({"default": {"URI": "kafka://h"}}, "dispytch.E003 DISPYTCH['default'] has no 'URL', but 'URI'. Write"),
        ({"default": "kafak://h"}, "dispytch.E003 DISPYTCH['default']['URL']: nobody serves kafak://"),
    ],
)
def test_a_wrong_setting_is_an_error_with_a_hint(value: Any, expected: str, settings: Settings) -> None:
    """CI runs `manage.py check`: the mistake is found before the deployment."""
    settings.DISPYTCH = value
    [message] = found()
    assert told(message).startswith(expected)
    assert message.is_serious()


def test_a_missing_client_library_is_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that was built without the extra is found in CI."""
    monkeypatch.setitem(sys.modules, "aiokafka", None)
    settings.DISPYTCH = {"default": "kafka://h"}
    [message] = found()
    assert message.id == "dispytch.E004"
    assert "pip install 'dispytch-integrations[kafka]'" in message.msg


def test_memory_in_production_is_a_warning(settings: Settings) -> None:
    """A default for development that reached production loses every event, and nothing fails."""
    settings.DISPYTCH = {"default": "memory://", "alerts": "redis://h", "third": "memory://kafka"}
    settings.DEBUG = False
    first, second = found()
    assert (first.id, second.id) == ("dispytch.W001", "dispytch.W001")
    assert "DISPYTCH['default'] is memory://" in first.msg
    assert "DISPYTCH['third'] is memory://" in second.msg
    assert not first.is_serious()
    settings.DEBUG = True
    assert found() == []


def test_brokers_that_a_test_puts_on_memory_are_not_warned_of(settings: Settings) -> None:
    """The warning is about what is deployed."""
    settings.DEBUG = False
    settings.DISPYTCH = {"default": "redis://h"}
    with override_brokers("memory"):
        assert found() == []


def test_manage_check_prints_all_of_it(settings: Settings) -> None:
    """All problems in one run, each with its number, which can be silenced as Django's own."""
    settings.DISPYTCH = {"default": {"URL": "memory://", "TIMEUOT": 3, "MAX_PENDING": 0}, "two": "kafak://h"}
    with pytest.raises(SystemCheckError) as caught:
        call_command("check", "--tag", "dispytch")
    for expected in ("(dispytch.E002)", "(dispytch.E003)", "Did you mean 'TIMEOUT'?", "MAX_PENDING", "nobody serves"):
        assert expected in str(caught.value)
    settings.SILENCED_SYSTEM_CHECKS = ["dispytch.E002", "dispytch.E003", "dispytch.W001"]
    assert [each for each in found() if not each.is_silenced()] == []


# -- the event classes -----------------------------------------------------------------------------------------------


def test_an_alias_that_does_not_exist_is_an_error(settings: Settings) -> None:
    """Renaming a broker in the settings must not be found out by the first event of a rare kind."""
    settings.DISPYTCH = {"default": "kafka://h", "alerts": "redis://h"}

    class Astray(EventBase):
        __route__ = RedisEventRoute(channel="alerts")
        __broker__ = "alert"

    [message] = found(Astray)
    assert message.id == "dispytch.E005"
    assert "Astray.__broker__ is 'alert'" in message.msg
    assert "did you mean 'alerts'?" in message.msg
    assert message.hint == "There are 'default', 'alerts'."
    assert message.obj is Astray


def test_a_route_that_no_broker_takes_is_an_error(settings: Settings) -> None:
    """An event whose broker was taken out of the settings can never be sent."""
    settings.DISPYTCH = {"default": "kafka://h", "alerts": "redis://app:hunter2@h"}

    class Nowhere(EventBase):
        __route__ = RabbitMQEventRoute(exchange="x", routing_key="y")

    [message] = found(Nowhere)
    assert message.id == "dispytch.E006"
    assert "Nowhere has a RabbitMQEventRoute, which no broker of DISPYTCH takes" in message.msg
    assert "'default' (kafka://h)" in (message.hint or "")
    assert "hunter2" not in told(message)


def test_a_route_that_its_broker_does_not_take_is_an_error(settings: Settings) -> None:
    """`__broker__` names the wrong one: found before the first event."""
    settings.DISPYTCH = {"default": "kafka://h", "alerts": "redis://h"}

    class Wrong(EventBase):
        __route__ = KafkaEventRoute(topic="orders")
        __broker__ = "alerts"

    [message] = found(Wrong)
    assert message.id == "dispytch.E006"
    assert "Wrong has a KafkaEventRoute, which its broker 'alerts' does not take" in message.msg


def test_a_route_that_several_brokers_take_is_an_error_unless_one_is_the_default(settings: Settings) -> None:
    """Which one it would be must not depend on the order in the settings."""

    class Either(EventBase):
        __route__ = RedisStreamEventRoute(stream="orders")

    settings.DISPYTCH = {"one": "redis://h", "two": "redis://h", "three": "kafka://h"}
    [message] = found(Either)
    assert message.id == "dispytch.E006"
    assert "Either has a RedisStreamEventRoute, which 'one' and 'two' would take" in message.msg
    assert "__broker__ = 'one'" in (message.hint or "")
    settings.DISPYTCH = {"one": "redis://h", "default": "redis://h", "three": "kafka://h"}
    assert found(Either) == []
    settings.DISPYTCH = {"one": "redis://h", "three": "kafka://h"}
    assert found(Either) == []
    Either.__broker__ = "two"
    settings.DISPYTCH = {"one": "redis://h", "two": "redis://h"}
    assert found(Either) == []


def test_two_events_of_one_type_are_an_error(settings: Settings) -> None:
    """Consumers tell events apart by their type."""
    settings.DEBUG = True

    class Placed(EventBase):
        __route__ = RedisStreamEventRoute(stream="orders")
        __event_type__ = "checks.order.placed"

    class Copied(EventBase):
        __route__ = RedisStreamEventRoute(stream="orders")
        __event_type__ = "checks.order.placed"

    [message] = found(Placed, Copied)
    assert message.id == "dispytch.E007"
    assert "Placed" in message.msg
    assert "Copied" in message.msg
    assert "'checks.order.placed'" in message.msg
    assert "__event_type__ = " in (message.hint or "")


def test_a_class_that_is_defined_again_is_no_duplicate(settings: Settings) -> None:
    """An autoreload, or a module that is imported by two paths of one name, is no mistake."""
    settings.DEBUG = True

    def define() -> type[EventBase]:
        class Again(EventBase):
            __route__ = RedisStreamEventRoute(stream="orders")
            __event_type__ = "checks.again"

        return Again

    both = [define(), define()]
    assert found(*both) == []


def test_events_are_not_judged_by_brokers_that_are_not_known(settings: Settings) -> None:
    """One mistake in a URL must not be followed by a page of errors that it causes."""

    class Sent(EventBase):
        __route__ = KafkaEventRoute(topic="orders")

    settings.DISPYTCH = {"default": "redis://h", "events": "kafak://h"}
    assert [message.id for message in found(Sent)] == ["dispytch.E003"]
    settings.DISPYTCH = {}
    assert [message.id for message in found(Sent)] == ["dispytch.E001"]
    settings.DISPYTCH = {"default": "redis://h", "events": {"URL": lambda: "kafka://h"}}
    assert found(Sent) == []


def test_events_of_every_app_are_discovered(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unique: str
) -> None:
    """Nobody has to import events.py: as admin.py and tasks.py, it is found."""
    app = tmp_path / f"app{unique}"
    app.mkdir()
    (app / "__init__.py").write_text("")
    (app / "events.py").write_text(
        "from dispytch_integrations import EventBase\n"
        "from dispytch_integrations.redis import RedisEventRoute\n"
        "class Found(EventBase):\n"
        "    __route__ = RedisEventRoute(channel='found')\n"
        "    __broker__ = 'nowhere'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with override_settings(INSTALLED_APPS=[*django_settings.INSTALLED_APPS, app.name]):
        messages = run_checks(tags=[checks.TAG])
    assert f"{app.name}.events.Found.__broker__ is 'nowhere', which is no alias of DISPYTCH." in [
        message.msg for message in messages
    ]
    sys.modules.pop(f"{app.name}.events")


# -- servers ---------------------------------------------------------------------------------------------------------


def view(request: Any) -> HttpResponse:
    return HttpResponse()


@pytest.mark.parametrize(
    "start",
    [
        lambda: EmitterMiddleware(view),
        get_wsgi_application,
        lambda: _without_middleware(get_asgi_application),
        lambda: Client().get("/process"),
        lambda: emit(_an_event()),
    ],
    ids=[
        "the middleware",
        "WSGI with the middleware",
        "our ASGI application without it",
        "a request",
        "the first emit",
    ],
)
def test_servers_raise_what_the_checks_say(start: Callable[[], object], settings: Settings) -> None:
    """gunicorn and uvicorn run no system checks: the app must not start, and lose events, with a wrong setting."""
    settings.DISPYTCH = {"default": {"URL": "memory://", "TIMEUOT": 3, "MAX_PENDING": 0}, "two": "kafak://h"}
    expected = [message.msg for message in found() if message.is_serious()]
    assert len(expected) == 3
    with pytest.raises(SettingsError) as caught:
        start()
    assert len(caught.value.problems) == 3
    assert all(text.startswith(message) for text, message in zip(caught.value.problems, expected, strict=True))


def _without_middleware(start: Callable[[], object]) -> None:
    with override_settings(MIDDLEWARE=[]):
        start()


def _an_event() -> EventBase:
    from tests.django.project.shop.events import OrderPlaced

    return OrderPlaced(number=1)


# -- nothing is opened -----------------------------------------------------------------------------------------------


def test_checks_and_what_starts_a_server_open_nothing(listening: socket.socket, settings: Settings) -> None:
    """`manage.py check` runs in builds that reach no broker, and a preloading server would fork what was opened."""
    settings.DISPYTCH = {"default": f"redis://127.0.0.1:{listening.getsockname()[1]}/0"}
    call_command("check", "--tag", "dispytch", "--tag", "models", "--fail-level", "CRITICAL")
    EmitterMiddleware(view)
    get_wsgi_application()
    get_asgi_application()
    get_emitter()
    get_emitter("default")
    Client().get("/process")
    assert connections.session is None
    assert nobody_knocked(listening)


def test_management_commands_open_nothing_and_start_no_thread(listening: socket.socket, tmp_path: Path) -> None:
    """`ready()` runs for each of them, in every deployment step, and in masters before their fork."""
    code = """
import sys, threading
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "check"])
execute_from_command_line(["manage.py", "migrate", "--verbosity", "0"])
execute_from_command_line(["manage.py", "shell", "--verbosity", "0", "-c", "import dispytch_integrations.django"])
execute_from_command_line(["manage.py", "dispytch", "events"])
print([thread.name for thread in threading.enumerate()], "redis" in sys.modules, "aiokafka" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.django.project.settings",
            "TEST_BROKER": f"kafka://127.0.0.1:{listening.getsockname()[1]}",
            "TEST_FOLDER": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("['MainThread'] False")
    assert nobody_knocked(listening)
