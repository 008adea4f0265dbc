"""`manage.py dispytch check | emit | events | tail | catalog | relay | outbox`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from typing import Any

from django.core.management.base import BaseCommand

from dispytch_integrations.django.management._brokers import COMMANDS, add_brokers
from dispytch_integrations.django.management._outbox import add_outbox, add_relay, operated

__all__ = ["Command"]


class Command(BaseCommand):
    """What people ask first: does it connect, where do my events go, and does one arrive?"""

    help = "Ask the project's brokers, emit an event, see events as they arrive, list them. Run its outbox."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The subcommands and their arguments."""
        commands = parser.add_subparsers(
            dest="subcommand", required=True, metavar="{check,emit,events,tail,catalog,relay,outbox}"
        )
        add_brokers(commands)
        add_relay(commands)
        add_outbox(commands)

    def handle(self, *arguments: Any, subcommand: str, **options: Any) -> None:
        """Run the subcommand."""
        run: Mapping[str, Callable[[BaseCommand, Mapping[str, Any]], None]] = {
            **COMMANDS,
            "relay": _relay,
            "outbox": operated,
        }
        try:
            run[subcommand](self, options)
            self.stdout.flush()
        except BrokenPipeError:
            # What read us has seen enough, as `head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None


def _relay(command: BaseCommand, options: Mapping[str, Any]) -> None:
    from dispytch_integrations.django.management._relay import relayed

    relayed(command, options)
