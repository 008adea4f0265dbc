"""What kind of server a broker is, and of which version, as far as it tells its clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from dispytch_integrations.backend import Backend
    from dispytch_integrations.kafka import KafkaBackend
    from dispytch_integrations.rabbitmq import RabbitMQBackend
    from dispytch_integrations.redis import RedisBackend

__all__ = ["Server", "server_of"]


@dataclass(frozen=True, slots=True)
class Server:
    """A server. `version` None: it does not tell; `details` may say more."""

    name: str | None = None
    version: str | None = None
    details: str | None = None


async def server_of(backend: Backend) -> Server:
    """The server behind a backend that is started. Raises what its client raises when the connection is lost."""
    if backend.transport == "kafka":
        return _kafka(cast("KafkaBackend", backend))
    if backend.transport == "rabbitmq":
        return _rabbitmq(cast("RabbitMQBackend", backend))
    if backend.transport == "redis":
        return await _redis(cast("RedisBackend", backend))
    return Server(backend.transport)


def _kafka(backend: KafkaBackend) -> Server:
    """Kafka tells its clients which requests it understands, and no version."""
    client = backend._client
    if client is None:
        return Server("Kafka")
    count = len(client.cluster.brokers())
    facts = [f"{count} broker{'' if count == 1 else 's'}"]
    controller: Any = client.cluster.controller
    if controller is not None:
        facts.append(f"controller {controller.nodeId}")
    return Server("Kafka", None, f"{', '.join(facts)}; tells no version")


def _rabbitmq(backend: RabbitMQBackend) -> Server:
    link = backend._producer.link
    connection = None if link is None else link._connection
    told: Any = {} if connection is None else connection.server_properties
    return Server(_text(told.get("product")) or "RabbitMQ", _text(told.get("version")), _text(told.get("cluster_name")))


async def _redis(backend: RedisBackend) -> Server:
    from redis.exceptions import NoPermissionError, ResponseError

    from dispytch_integrations._tail_redis import client_of

    client = client_of(backend, "")
    try:
        told: dict[str, Any] = await cast("Any", client).info("server")
    except (NoPermissionError, ResponseError):
        return Server("Redis", None, "this user may not ask for INFO")
    finally:
        await client.aclose()
    mode = told.get("server_mode") or told.get("redis_mode")
    details = None if mode in (None, "standalone") else str(mode)
    if told.get("server_name") == "valkey" or "valkey_version" in told:
        return Server("Valkey", _text(told.get("valkey_version")), details)
    return Server("Redis", _text(told.get("redis_version")), details)


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else str(value)
