"""`manage.py dispytch relay`: the relays of the project's outbox as a process, or several."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import django
from django.apps import apps
from django.core.management.base import BaseCommand, CommandError
from django.core.management.color import supports_color

from dispytch_integrations._cli_options import RELAY, relay_options
from dispytch_integrations.django._connections import _tell_broker, connections
from dispytch_integrations.django.management._options import given_of
from dispytch_integrations.django.management._outbox import DATABASE, exits, outbox_settings, stores_of
from dispytch_integrations.errors import ConfigurationError
from dispytch_integrations.outbox._running import run_relay
from dispytch_integrations.outbox.console import Stream
from dispytch_integrations.outbox.runner import DONE, LEFT, Runner

__all__ = ["make_runner", "relayed"]

_RECEIVERS_SECONDS = 5.0
"""How long the end waits for receivers of signals."""


def relayed(command: BaseCommand, options: Mapping[str, Any]) -> None:
    """Run the relay. Raises CommandError with the exit code of the help."""
    given = given_of(options, (DATABASE, *RELAY))
    colored = bool(options["force_color"]) or (not options["no_color"] and supports_color())
    terminal = command.stdout.isatty()
    stream = cast("Stream", command.stdout._out)

    def run() -> int:
        outbox_settings()
        if (given["workers"] or 1) > 1 and not os.environ.get("DJANGO_SETTINGS_MODULE"):
            raise ConfigurationError(
                "--workers starts processes that read the settings anew, and there is no DJANGO_SETTINGS_MODULE to "
                "read them from; set it, or start several relays"
            )
        make = partial(make_runner, given)
        return run_relay(make, given, stream, terminal=terminal, color=colored)

    code = exits(run)
    if code == LEFT:
        raise CommandError("not all that was there is delivered; see `manage.py dispytch outbox list`", returncode=LEFT)
    if code != DONE:
        raise SystemExit(code)


def make_runner(given: Mapping[str, Any]) -> Runner:
    """The relay's process, as options and settings say; in each worker's process, too. Raises SettingsError."""
    if not apps.ready:
        django.setup()
    settings = outbox_settings()
    brokers = connections.for_relay()
    brokers.on_change = partial(_tell_broker, connections.receivers, set[str]())
    return Runner(brokers, stores_of(given, settings), relay_options(given, settings.options), on_end=_end)


async def _end() -> None:
    """Let the receivers of signals come to an end."""
    await asyncio.to_thread(connections.receivers.flush, _RECEIVERS_SECONDS)
