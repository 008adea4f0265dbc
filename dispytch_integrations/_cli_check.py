"""`check`: can each broker be used, what is it, and what is wrong?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dispytch_integrations._cli_look import Look, cleaned
from dispytch_integrations._cli_versions import Server, server_of
from dispytch_integrations.backend import Backend, scrub
from dispytch_integrations.errors import ConfigurationError, DispytchError
from dispytch_integrations.settings import aliases, load_brokers

__all__ = ["ALL_UP", "SOME_DOWN", "WRONG", "Answer", "check", "exit_code", "shown"]

ALL_UP, SOME_DOWN, WRONG = 0, 1, 2

_STOP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known about one broker. `address`: without secrets; empty where the URL cannot be read."""

    alias: str
    address: str
    transport: str | None
    state: Literal["up", "down", "wrong"]
    """"down": it does not answer; "wrong": it, or its client, refuses the settings."""
    server: str | None = None
    version: str | None = None
    details: str | None = None
    milliseconds: float | None = None
    error: str | None = None


async def check(config: Mapping[str, Any] | str | None, timeout: float) -> list[Answer]:
    """Ask all brokers at once, each at most `timeout` seconds; one attempt, so that a refusal is told at once.

    Raises ConfigurationError when there is no broker.
    """
    settings = aliases(config)
    return list(await asyncio.gather(*(_ask(alias, each, timeout) for alias, each in settings.items())))


async def _ask(alias: str, settings: Mapping[str, Any], timeout: float) -> Answer:
    try:
        [spec] = load_brokers({alias: dict(settings)}, {})
    except ConfigurationError as exc:
        told = "; ".join(problem.removeprefix(f"broker {alias!r}: ") for problem in exc.problems)
        return Answer(alias, "", None, "wrong", error=told)
    except Exception as exc:
        # A function that gives the URL; its words may repeat it, and with it the password.
        return Answer(alias, "", None, "wrong", error=f"the function that gives the URL raised {type(exc).__name__}")
    backend = spec.backend
    state: Literal["up", "down", "wrong"] = "down"
    server, error, milliseconds = Server(), None, None
    try:
        async with asyncio.timeout(timeout):
            await backend.start()
            started = time.perf_counter()
            await backend.ping()
            milliseconds = round((time.perf_counter() - started) * 1000, 1)
            server = await server_of(backend)
        state = "up"
    except ConfigurationError as exc:
        state, error = "wrong", _told(backend, exc, timeout)
    except Exception as exc:
        error = _told(backend, exc, timeout)
    finally:
        await _stop(backend)
    return Answer(
        alias,
        backend.address,
        backend.transport,
        state,
        server.name,
        server.version,
        server.details,
        milliseconds if state == "up" else None,
        error,
    )


def _told(backend: Backend, error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError) and not isinstance(error, DispytchError):
        return f"does not answer within {timeout:g} s; is it up, is a firewall in between, or is --timeout too short?"
    text = cleaned(scrub(str(error) or type(error).__name__, backend.secrets), keep="\n")
    text = text.removeprefix(f"{backend.address} ").removeprefix(f"cannot connect to {backend.address}: ")
    return (
        text
        if isinstance(error, ConfigurationError)
        else f"{text.rstrip('.')}; is it running, and are host and port right?"
    )


async def _stop(backend: Backend) -> None:
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await backend.stop()
    except Exception:  # It was asked; how it says goodbye is of no interest.
        return


def exit_code(answers: Sequence[Answer]) -> int:
    """0: all can be used; 1: some do not answer; 2: a setting is wrong."""
    if any(answer.state == "wrong" for answer in answers):
        return WRONG
    return SOME_DOWN if any(answer.state == "down" for answer in answers) else ALL_UP


def shown(answers: Sequence[Answer], screen: Look, *, as_json: bool, named: bool = False) -> int:
    """Show the answers; return the exit code. What is wrong stands below the table, whole.

    `named`: with their aliases; False: if they were given some.
    """
    if as_json:
        screen.say(json.dumps([asdict(answer) for answer in answers], indent=2))
        return exit_code(answers)
    named = named or any(answer.alias != "default" and not answer.alias.isdecimal() for answer in answers)
    rows = [
        (
            answer.alias if named else "",
            answer.address or ("?" if named else _numbered(answer)),
            answer.state,
            cleaned(" ".join(part for part in (answer.server, answer.version) if part)),
            "" if answer.milliseconds is None else f"{answer.milliseconds:.1f} ms",
            cleaned(answer.details or ""),
        )
        for answer in answers
    ]
    columns = [index for index in range(6) if index in (1, 2) or any(row[index] for row in rows)]
    titles = ("alias", "broker", "state", "server", ">answered in", "details")
    screen.table([titles[index] for index in columns], [[row[index] for index in columns] for row in rows])
    for answer in answers:
        if answer.error is not None:
            screen.say("")
            screen.say(f"{answer.alias if named else answer.address or _numbered(answer)}: {answer.error}", "bad")
    return exit_code(answers)


def _numbered(answer: Answer) -> str:
    """What a URL is called that cannot be read, and may hold a secret."""
    return "URL 1" if answer.alias == "default" else f"URL {answer.alias}"
