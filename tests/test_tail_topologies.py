"""`tail` behind Sentinel, in a cluster, with TLS and with a password: what the client needs, tail needs, too."""

from __future__ import annotations

import pytest
from pydantic import Field

from dispytch_integrations import EventBase, connect
from dispytch_integrations._cli_check import check
from dispytch_integrations.redis import RedisEventRoute, RedisStreamEventRoute
from tests.test_redis_topologies import ClusterServers, SentinelServer, cluster, master_and_replica, sentinel
from tests.test_tail import tailing

__all__ = ["cluster", "master_and_replica", "sentinel"]

pytestmark = pytest.mark.timeout(120)


class TopologyStream(EventBase):
    __route__ = RedisStreamEventRoute(stream="{place}")

    place: str = Field(exclude=True)
    number: int


class TopologyChannel(EventBase):
    __route__ = RedisEventRoute(channel="{place}")

    place: str = Field(exclude=True)
    number: int


async def heard(url: str, place: str) -> None:
    """Streams and channels of several names, which a cluster keeps on several nodes."""
    async with connect(url) as emitter:
        for number in range(4):
            name = f"{place}{number}"
            await emitter.emit(TopologyStream(place=name, number=number))
            async with tailing(url, name, from_beginning=True) as tail:
                await emitter.emit(TopologyStream(place=name, number=number + 10))
                await tail.has(2)
                assert tail.numbers == [number, number + 10]
            async with tailing(url, f"c{name}") as tail:
                await emitter.emit(TopologyChannel(place=f"c{name}", number=number))
                await tail.has(1)
    [answer] = await check(url, 10.0)
    assert (answer.state, (answer.version or "").count(".")) == ("up", 2), answer


async def test_tail_behind_sentinel(sentinel: SentinelServer, unique: str) -> None:
    """The master of the moment is asked for, as by the emitter."""
    await heard(f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster/0?sentinel_password=sentinels-own", unique)


async def test_tail_in_a_cluster(cluster: ClusterServers, unique: str) -> None:
    """Each stream is on a node of its own; channels are heard on any."""
    await heard(cluster.url, unique)
