"""Redis behind Sentinel and as a cluster: real ones, of our own, that fail over and move slots."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from dispytch_integrations import EventBase, EventEmitter, connect
from dispytch_integrations.errors import BrokerUnavailableError, ConfigurationError, DeliveryError, StartupError
from dispytch_integrations.redis import RedisEventRoute, RedisProducer, RedisStreamEventRoute
from tests.support.brokers import Redis as OwnRedis
from tests.support.brokers import free_port

SLOTS = 16384


class Order(EventBase):
    __route__ = RedisStreamEventRoute(stream="{stream}")

    stream: str
    number: int = 0


class Alert(EventBase):
    __route__ = RedisEventRoute(channel="{channel}")

    channel: str


class SentinelServer(OwnRedis):
    """A sentinel that watches one master."""

    def __init__(self, master: int, password: str | None = None) -> None:
        super().__init__()
        self._lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"sentinel monitor mymaster 127.0.0.1 {master} 1",
            "sentinel down-after-milliseconds mymaster 300",
            "sentinel failover-timeout mymaster 2000",
        ]
        if password is not None:
            self._lines.append(f"requirepass {password}")

    def command(self) -> list[str]:
        conf = self.directory / "sentinel.conf"
        conf.write_text("\n".join(self._lines) + "\n")
        return [self._program(), str(conf), "--sentinel"]


async def _numbers(port: int, stream: str) -> list[int]:
    client: Any = Redis(port=port)
    numbers = [json.loads(fields[b"data"])["number"] for _, fields in await client.xrange(stream)]
    await client.aclose()
    return numbers


async def _emit_until_confirmed(emitter: EventEmitter, event: EventBase, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while True:
            try:
                await emitter.emit(event)
                return
            except DeliveryError:
                await asyncio.sleep(0.1)


# -- Sentinel --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def master_and_replica(own_redis: Callable[..., OwnRedis]) -> tuple[OwnRedis, OwnRedis]:
    master, replica = await asyncio.gather(asyncio.to_thread(own_redis), asyncio.to_thread(own_redis))
    client: Any = Redis(port=replica.port)
    await client.execute_command("REPLICAOF", "127.0.0.1", str(master.port))
    async with asyncio.timeout(20):
        while (await client.info("replication"))["master_link_status"] != "up":
            await asyncio.sleep(0.05)
    await client.aclose()
    return master, replica


@pytest.fixture
async def sentinel(master_and_replica: tuple[OwnRedis, OwnRedis]) -> AsyncIterator[SentinelServer]:
    server = SentinelServer(master_and_replica[0].port, password="sentinels-own")
    await asyncio.to_thread(server.start)
    client: Any = Redis(port=server.port, password="sentinels-own")
    async with asyncio.timeout(20):  # It learns of the replica from the master.
        while not await client.execute_command("SENTINEL REPLICAS", "mymaster"):
            await asyncio.sleep(0.05)
    await client.aclose()
    yield server
    await asyncio.to_thread(server.close)


async def test_sentinel_failover_is_followed(
    master_and_replica: tuple[OwnRedis, OwnRedis], sentinel: SentinelServer, unique: str
) -> None:
    """Sentinel is there for the day the master dies: emits must find the new one by themselves."""
    master, replica = master_and_replica
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/mymaster/0"
    async with connect(url, sentinel_password="sentinels-own", timeout=2) as emitter:
        await asyncio.gather(*(emitter.emit(Order(stream=unique, number=number)) for number in range(100)))
        assert await _numbers(master.port, unique) == list(range(100))
        await asyncio.to_thread(master.kill)
        with pytest.raises(DeliveryError):
            await emitter.emit(Order(stream=unique, number=-1))
        await _emit_until_confirmed(emitter, Order(stream=unique, number=1000), 30)
        assert 1000 in await _numbers(replica.port, unique)


async def test_sentinel_that_knows_no_such_master_is_told(sentinel: SentinelServer) -> None:
    """A mistyped name must not look like an outage without a reason."""
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/othermaster"
    with pytest.raises(StartupError, match="othermaster"):
        async with connect(url, sentinel_password="sentinels-own", startup_timeout=0.3):
            pass


# -- cluster ---------------------------------------------------------------------------------------------------------


class ClusterServers:
    """Three primary nodes that know each other, with a third of the slots each."""

    def __init__(self, servers: list[OwnRedis]) -> None:
        self.servers = servers
        self.clients: list[Any] = [Redis(port=server.port) for server in servers]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    async def meet(self) -> None:
        for number, client in enumerate(self.clients):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            await client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            await client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            await self.clients[0].execute_command("CLUSTER MEET", "127.0.0.1", self.servers[number].port)
        async with asyncio.timeout(30):
            for client in self.clients:
                while b"cluster_known_nodes:3" not in (info := await self._info(client)) or b"state:ok" not in info:
                    await asyncio.sleep(0.05)

    async def _info(self, client: Any) -> bytes:
        answer = await client.execute_command("CLUSTER INFO")
        if isinstance(answer, dict):
            return "\n".join(f"{name}:{value}" for name, value in answer.items()).encode()
        return bytes(answer)

    async def node_id(self, number: int) -> str:
        answer = await self.clients[number].execute_command("CLUSTER MYID")
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    async def slot_of(self, key: str) -> int:
        return int(await self.clients[0].execute_command("CLUSTER KEYSLOT", key))

    async def length(self, stream: str) -> list[int]:
        """Entries of the stream on the node that has it, as numbers."""
        owner = await self.slot_of(stream) * 3 // SLOTS
        return await self.numbers(owner, stream)

    async def numbers(self, number: int, stream: str) -> list[int]:
        entries = await self.clients[number].xrange(stream)
        return [json.loads(fields[b"data"])["number"] for _, fields in entries]


@pytest.fixture
async def cluster(own_redis: Callable[..., OwnRedis]) -> AsyncIterator[ClusterServers]:
    options = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": "2000",
        "cluster-require-full-coverage": "no",
    }
    servers = [await asyncio.to_thread(own_redis, options=options) for _ in range(3)]
    cluster = ClusterServers(servers)
    await cluster.meet()
    yield cluster
    for client in cluster.clients:
        await client.aclose()


async def test_cluster_takes_events_for_every_slot_in_order(cluster: ClusterServers, unique: str) -> None:
    """Streams live on different nodes: concurrent emits go to all of them, each stream in its order."""
    streams = [f"{unique}-{number}" for number in range(9)]
    events = [Order(stream=stream, number=number) for number in range(200) for stream in streams]
    async with connect(cluster.url) as emitter:
        await asyncio.gather(*(emitter.emit(event) for event in events))
        await emitter.emit_many(events)
        producer = emitter.producer
        await emitter.emit(Alert(channel=unique))
    for stream in streams:
        assert await cluster.length(stream) == [*range(200), *range(200)]
    owners = {await cluster.slot_of(stream) * 3 // SLOTS for stream in streams}
    assert owners == {0, 1, 2}, "the names hit one node alone: this test tests little"
    assert isinstance(producer, RedisProducer)
    assert producer.unheard == 0, "a node knows its own subscribers only: there is nothing to count"


async def test_cluster_publishes_reach_subscribers_of_any_node(cluster: ClusterServers, unique: str) -> None:
    """Pub/sub in a cluster is told from node to node."""
    async with connect(cluster.url) as emitter:
        for client in cluster.clients:
            pubsub = client.pubsub()
            await pubsub.subscribe(unique)
            await pubsub.get_message(timeout=5)
            message = None
            for _ in range(
                5
            ):  # Nodes that are busy drop the link between them, and what is told over it, for a moment.
                await emitter.emit(Alert(channel=unique))
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=2)
                if message is not None:
                    break
            await pubsub.aclose()
            assert message is not None


async def test_cluster_slot_that_moved_is_followed(cluster: ClusterServers, unique: str) -> None:
    """Resharding goes on while apps run: nothing is lost, nothing doubled, and the order is kept."""
    slot = await cluster.slot_of(unique)
    old = slot * 3 // SLOTS
    new = (old + 1) % 3
    async with connect(cluster.url) as emitter:
        await emitter.emit(Order(stream=unique, number=0))
        new_id, old_id = await cluster.node_id(new), await cluster.node_id(old)
        source, target = cluster.clients[old], cluster.clients[new]
        await target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", old_id)
        await source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", new_id)
        await source.execute_command("MIGRATE", "127.0.0.1", cluster.servers[new].port, unique, 0, 5000)
        # The key is on the other node already, the slot not yet: ASK.
        await asyncio.gather(*(emitter.emit(Order(stream=unique, number=number)) for number in range(1, 50)))
        for client in (target, source, cluster.clients[3 - old - new]):
            await client.execute_command("CLUSTER SETSLOT", slot, "NODE", new_id)
        # Now the slot is: MOVED.
        await asyncio.gather(*(emitter.emit(Order(stream=unique, number=number)) for number in range(50, 300)))
    assert await cluster.numbers(new, unique) == list(range(300))


async def test_cluster_without_one_node_serves_the_others(cluster: ClusterServers, unique: str) -> None:
    """A dead node takes its own slots with it, not the rest of the app."""
    streams = [f"{unique}-{number}" for number in range(12)]
    owners = {stream: await cluster.slot_of(stream) * 3 // SLOTS for stream in streams}
    alive = next(stream for stream in streams if owners[stream] == 1)
    dead = next(stream for stream in streams if owners[stream] == 2)
    async with connect(cluster.url, timeout=2) as emitter:
        await emitter.emit_many([Order(stream=stream) for stream in streams])
        await asyncio.to_thread(cluster.servers[2].kill)
        with pytest.raises(DeliveryError):
            await emitter.emit(Order(stream=dead))
        await _emit_until_confirmed(emitter, Order(stream=alive, number=1))
        await asyncio.to_thread(cluster.servers[2].start)
        await _emit_until_confirmed(emitter, Order(stream=dead, number=2))
    assert 1 in await cluster.numbers(1, alive)


async def test_cluster_addressed_as_one_server_is_told(cluster: ClusterServers, unique: str) -> None:
    """redis:// to a node of a cluster works for a third of the names: the error must say what to write."""
    streams = [f"{unique}-{number}" for number in range(9)]
    async with connect(f"redis://127.0.0.1:{cluster.servers[0].port}") as emitter:
        with pytest.raises(ExceptionGroup) as caught:
            await emitter.emit_many([Order(stream=stream) for stream in streams])
    assert all("redis+cluster://" in str(error) for error in caught.value.exceptions)


async def test_cluster_url_to_a_single_server_is_refused(redis_url: str) -> None:
    """The other way round, trying again would be of no use."""
    url = redis_url.replace("redis://", "redis+cluster://")
    with pytest.raises(ConfigurationError, match="luster"):
        async with connect(url, startup_timeout=1):
            pass


async def test_cluster_that_is_gone_is_an_outage() -> None:
    """No node answers: the start is tried again, then fails with the reason."""
    with pytest.raises((StartupError, BrokerUnavailableError), match="cluster"):
        async with connect(f"redis+cluster://127.0.0.1:{free_port()}", startup_timeout=0.5):
            pass
