"""Queries Kafka's brokers in batches, and finds them again after an outage.

Knows metadata, ListOffsets and the leaders of partitions; knows no record and no group. aiokafka bootstraps only at
start, learns of one unknown topic in 100 ms, and sends requests on the connection on which a throttled fetch waits;
this module asks about any number of partitions at once, on a connection of its own. Limitations: an answer may be out
of date when it is read.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from aiokafka import client as client_module
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError, LeaderNotAvailableError, for_code
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from consumer.core.message import Partition
from consumer.kafka.protocol import Unsupported
from consumer.logs import describe, event

QUESTIONS = "questions"  # a connection group beside the client's own two: a quota holds up the one with the fetches
EARLIEST, LATEST = -2, -1
_CONNECT_SECONDS = 5.0
_ASK_SECONDS = 10.0
_ASK_ANYONE_SECONDS = 4.0
_RETRY_SECONDS = 0.1
_UNKNOWN = -1


async def _connect(host: str, port: int, **options: Any) -> AIOKafkaConnection:
    """Connect like the client's create_conn, with a short timeout.

    A host that does not answer must not hold up other connections, which wait for this one.
    """
    connection = AIOKafkaConnection(host, port, **options)
    usual = connection._request_timeout
    connection._request_timeout = min(usual, _CONNECT_SECONDS)
    await connection.connect()
    connection._request_timeout = usual
    return connection


client_module.create_conn = _connect


class Brokers:
    """The brokers as one client knows them."""

    def __init__(self, client: AIOKafkaClient) -> None:
        self._client = client
        # Learned for questions about topics that the client does not follow: to ask for each partition would be slow.
        self._leaders: dict[Partition, int] = {}
        self._learning = asyncio.Lock()
        self._update_from_known = client._metadata_update
        client._metadata_update = self._update

    # -- brokers that are gone ----------------------------------------------------------------------------------------

    async def _update(self, cluster: Any, topics: Collection[str]) -> bool:
        """Update the client's metadata.

        Asks the configured addresses if no known broker answers.
        """
        if await self._update_from_known(cluster, topics):
            self._leave_old_addresses()
            return True
        return await self._update_from_configured(cluster, topics)

    async def _update_from_configured(self, cluster: Any, topics: Collection[str]) -> bool:
        """Ask the configured addresses, with names resolved again.

        Never raises: the client's task would end.
        """
        hosts = list(self._client.hosts)
        random.shuffle(hosts)
        for host, port, _ in hosts:
            connection = None
            try:
                connection = await _connect(host, port, **self._options())
                answer = await asyncio.wait_for(connection.send(MetadataRequest(list(topics) or None)), _ASK_SECONDS)
                if not answer.brokers:
                    continue
                cluster.update_metadata(answer)
                if cluster is not self._client.cluster:
                    self._client.force_metadata_update()
                self._leave_old_addresses()
                event(logging.INFO, "kafka's brokers were asked for again", host=host, brokers=len(answer.brokers))
                return True
            except (KafkaError, OSError, TimeoutError) as error:
                event(logging.DEBUG, "no metadata from a configured address", host=host, error=describe(error))
            finally:
                if connection is not None:
                    connection.close()
        return False

    def _options(self) -> dict[str, Any]:
        client = self._client
        return {
            "client_id": client._client_id,
            "request_timeout_ms": client._request_timeout_ms,
            "ssl_context": client._ssl_context,
            "security_protocol": client._security_protocol,
            "sasl_mechanism": client._sasl_mechanism,
            "sasl_plain_username": client._sasl_plain_username,
            "sasl_plain_password": client._sasl_plain_password,
            "sasl_oauth_token_provider": client._sasl_oauth_token_provider,
        }

    def _leave_old_addresses(self) -> None:
        """Close connections to brokers that have moved.

        Requests there would wait for a machine that is gone.
        """
        for (node, _), connection in list(self._client._conns.items()):
            broker = self._client.cluster.broker_metadata(node)
            if broker is not None and (broker.host, broker.port) != (connection.host, connection.port):
                connection.close(reason=CloseReason.CONNECTION_BROKEN)

    # -- questions ----------------------------------------------------------------------------------------------------

    async def ask(self, node: int, request: Any, seconds: float = _ASK_SECONDS) -> Any:
        """One broker's answer. Raises KafkaError or TimeoutError."""
        return await asyncio.wait_for(self._client.send(node, request, group=QUESTIONS), seconds)

    async def ask_anyone(self, request: Any) -> Any:
        """Return the first answer that a broker gives.

        Raises the last error if none answers.
        """
        problem: Exception = KafkaConnectionError("no broker is known")
        for is_last in (False, True):
            nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
            random.shuffle(nodes)
            for node in nodes:
                try:
                    return await self.ask(node, request, _ASK_ANYONE_SECONDS)
                except Unsupported:
                    raise
                except (KafkaError, OSError, TimeoutError) as error:
                    problem = error
            if is_last or not await self._update_from_configured(self._client.cluster, self._client._topics):
                break
        raise problem

    async def partitions(self, topics: Iterable[str]) -> dict[str, dict[int, int]]:
        """Return topic -> partition -> leader (negative: none) of existing topics.

        Raises KafkaError, TimeoutError.
        """
        wanted = sorted(set(topics))
        if not wanted:
            return {}
        answer = await self.ask_anyone(MetadataRequest(wanted, allow_auto_topic_creation=False))
        by_topic = {
            topic: {partition[1]: partition[2] for partition in partitions}
            for error, topic, _, partitions in answer.topics
            if error in (0, LeaderNotAvailableError.errno)
        }
        for topic, leaders in by_topic.items():
            self._leaders |= {Partition(topic, number): leader for number, leader in leaders.items()}
        return by_topic

    async def topics(self) -> list[str]:
        """Return the topics that this Kafka user may see, in order.

        Raises KafkaError, TimeoutError.
        """
        answer = await self.ask_anyone(MetadataRequest(None, allow_auto_topic_creation=False))
        return sorted(topic for error, topic, *_ in answer.topics if error == 0)

    def leader(self, partition: Partition) -> int | None:
        """The leader as it is known without a question; None for none."""
        metadata = self._client.cluster._partitions.get(partition.topic, {}).get(partition.partition)
        leader = metadata.leader if metadata is not None else self._leaders.get(partition, -1)
        return leader if leader >= 0 else None

    async def leader_of(self, partition: Partition) -> int:
        """Return the leader; asks for it if unknown.

        Raises KafkaError or TimeoutError.
        """
        if (leader := self.leader(partition)) is not None:
            return leader
        async with self._learning:  # many may ask about one topic at once: the first answer serves all
            if self.leader(partition) is None:
                await self.partitions([partition.topic])
        leader = self._leaders.get(partition, -1)
        if leader < 0:
            raise LeaderNotAvailableError(f"{partition.topic}:{partition.partition}")
        return leader

    def forget_leader(self, partition: Partition) -> None:
        """Ask for the leader again the next time.

        The known one was wrong, or its broker does not answer.
        """
        self._leaders.pop(partition, None)

    async def offsets(
        self, wanted: Mapping[Partition, int], isolation_level: int, seconds: float = _ASK_SECONDS
    ) -> tuple[dict[Partition, int | None], dict[Partition, Exception]]:
        """Return offsets at times, and errors of partitions without an answer.

        A time is EARLIEST, LATEST, or milliseconds since 1970; None: no record of that time. Sends one request to each
        leader, and repeats it until the timeout. Raises KafkaError or TimeoutError when no broker answers.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        offsets: dict[Partition, int | None] = {}
        problems: dict[Partition, Exception] = {}
        left = dict(wanted)
        leaders = {partition: self.leader(partition) for partition in left}
        while True:
            if unknown := {partition.topic for partition in left if leaders[partition] is None}:
                known = await self.partitions(unknown)
                for partition in left:
                    leader = known.get(partition.topic, {}).get(partition.partition)
                    if partition.topic in unknown and leader is not None and leader >= 0:
                        leaders[partition] = leader
            by_leader: dict[int, dict[Partition, int]] = {}
            for partition, time in left.items():
                if (leader := leaders[partition]) is not None:
                    by_leader.setdefault(leader, {})[partition] = time
                else:
                    problems[partition] = LeaderNotAvailableError(f"{partition.topic}:{partition.partition}")
            asked = [
                self._offsets_of(leader, some, isolation_level, deadline - clock())
                for leader, some in by_leader.items()
            ]
            for some_found, some_problems in await asyncio.gather(*asked):
                offsets |= some_found
                problems |= some_problems
            left = {
                partition: time
                for partition, time in left.items()
                if partition not in offsets and _heals(problems[partition])
            }
            if not left or clock() + _RETRY_SECONDS > deadline:
                return offsets, {partition: why for partition, why in problems.items() if partition not in offsets}
            await asyncio.sleep(_RETRY_SECONDS)
            leaders = dict.fromkeys(left)

    async def _offsets_of(
        self, leader: int, wanted: Mapping[Partition, int], isolation_level: int, seconds: float
    ) -> tuple[dict[Partition, int | None], dict[Partition, Exception]]:
        by_topic: dict[str, list[tuple[int, int]]] = {}
        for partition, time in wanted.items():
            by_topic.setdefault(partition.topic, []).append((partition.partition, time))
        try:
            answer = await self.ask(
                leader, OffsetRequest(-1, isolation_level, list(by_topic.items())), max(_RETRY_SECONDS, seconds)
            )
        except (KafkaError, TimeoutError) as error:
            return {}, dict.fromkeys(wanted, error)
        offsets: dict[Partition, int | None] = {}
        problems: dict[Partition, Exception] = {}
        for topic, partitions in answer.topics:
            for number, code, *rest in partitions:
                partition = Partition(topic, number)
                if code:
                    problems[partition] = for_code(code)(f"{topic}:{number}")
                else:
                    at = rest[-1][0] if isinstance(rest[-1], list) else rest[-1]
                    offsets[partition] = None if at == _UNKNOWN else int(at)
        for partition in wanted:
            if partition not in offsets and partition not in problems:
                problems[partition] = KafkaError(f"no answer about {partition.topic}:{partition.partition}")
        return offsets, problems


def _heals(problem: Exception) -> bool:
    return isinstance(problem, TimeoutError) or bool(getattr(problem, "retriable", False))
