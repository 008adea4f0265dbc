"""Exchanges: declared or looked for, each on a channel of its own, since a refusal closes the channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiormq import exceptions as amqp
from aiormq.abc import AbstractConnection

from dispytch_integrations._rabbitmq_errors import tell
from dispytch_integrations.errors import ConfigurationError, UnroutableError

__all__ = ["Exchange", "declare", "exists"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """An exchange as it is to be; `type` None: it is only looked for."""

    name: str
    type: str | None
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


async def exists(connection: AbstractConnection, name: str) -> bool:
    """Is there an exchange of that name? Raises what the client raises when the connection is lost."""
    channel = await connection.channel(publisher_confirms=False)
    try:
        await channel.exchange_declare(name, passive=True)
    except amqp.ChannelNotFoundEntity:
        return False
    await channel.close()
    return True


async def declare(connection: AbstractConnection, exchanges: Sequence[Exchange], *, strict: bool) -> set[str]:
    """Declare the exchanges, or look for them; return the names of those that are there.

    `strict`: raise ConfigurationError when one is refused, UnroutableError when one is missing; else leave it out.
    """
    there: set[str] = set()
    problems: list[str] = []
    missing: list[str] = []
    for exchange in exchanges:
        if exchange.type is None:
            if await exists(connection, exchange.name):
                there.add(exchange.name)
            else:
                missing.append(exchange.name)
            continue
        channel = await connection.channel(publisher_confirms=False)
        try:
            await channel.exchange_declare(
                exchange.name,
                exchange_type=exchange.type,
                durable=exchange.durable,
                auto_delete=exchange.auto_delete,
                internal=exchange.internal,
                arguments=exchange.arguments,
            )
        except (amqp.ChannelClosed, amqp.ConnectionClosed) as exc:
            advice = f"write exchanges={{{exchange.name!r}: None}} to use it as it is"
            if isinstance(exc, amqp.ConnectionCommandInvalid):
                advice = "write 'direct', 'fanout', 'topic' or 'headers', or enable the plugin that brings this type"
            problems.append(f"the exchange {exchange.name!r} cannot be declared: {tell(exc)}; {advice}")
            if isinstance(exc, amqp.ConnectionClosed):
                break  # By an unknown type.
        else:
            there.add(exchange.name)
            await channel.close()
    if problems and strict:
        raise ConfigurationError(problems)
    if missing and strict:
        raise UnroutableError(
            f"there is no exchange {', '.join(map(repr, missing))}; declare it, or give its type: "
            f"exchanges={{{missing[0]!r}: 'topic'}}"
        )
    return there
