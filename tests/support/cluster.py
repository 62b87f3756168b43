"""Apache Kafka on several brokers: lost leaders, lost coordinators, other clusters.

Each node is broker and controller. Needs what tests/support/services.py needs.
"""

from __future__ import annotations

import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services import JARS

from consumer.local_servers import LocalServer, free_port, kafka_answers

_PROPERTIES = """
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
log.dirs={directory}/data
auto.create.topics.enable=false
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=2
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1000
replica.lag.time.max.ms=3000
"""


class Node(LocalServer):
    """One broker of a Cluster.

    After `kill`, `run` and `wait` it is back with its data.
    """

    name = "kafka-node"

    def __init__(self, number: int, cluster: Cluster) -> None:
        super().__init__()
        self.number = number
        self.cluster = cluster
        self.controller = free_port()
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="consumer-kafka-node-", dir=self.place()))

    def configure(self) -> None:
        """Write its properties, also again for another port."""
        properties = self.directory / "server.properties"
        cluster = self.cluster
        properties.write_text(
            _PROPERTIES.format(
                number=self.number,
                voters=",".join(f"{node.number}@127.0.0.1:{node.controller}" for node in cluster.nodes),
                port=self.port,
                controller=self.controller,
                directory=self.directory,
                replicas=len(cluster.nodes),
            )
        )

    def format(self) -> None:
        """Write its properties, and make its storage."""
        self.configure()
        properties = self.directory / "server.properties"
        subprocess.run(
            [*self._java("64m"), "kafka.tools.StorageTool", "format", "-t", self.cluster.id, "-c", properties],
            check=True,
            capture_output=True,
            env=self.environment(),
        )

    def command(self) -> Sequence[str | Path]:
        return [*self._java("256m"), "kafka.Kafka", self.directory / "server.properties"]

    def _java(self, heap: str) -> list[str | Path]:
        return ["java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"]

    def answers(self) -> bool:
        return kafka_answers(self.port)


class Cluster:
    """Some nodes, started together. `bootstrap_servers` names all of them."""

    def __init__(self, size: int = 3) -> None:
        self.id = uuid.uuid4().hex[:22]
        self.nodes: list[Node] = []
        self.nodes = [Node(number, self) for number in range(1, size + 1)]

    def __enter__(self) -> Cluster:
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Node.format, self.nodes))
            self.run()
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            if node.process is not None:
                node.process.kill()  # nothing of it is kept
            node.stop()

    def run(self) -> None:
        """Start all nodes, also after `kill`.

        Call it from the main thread: the nodes end with the thread that started them.
        """
        for node in self.nodes:
            node.run()

    def wait(self) -> None:
        """Wait until they answer."""
        for node in self.nodes:
            node.wait()

    def node(self, number: int) -> Node:
        """The node with a broker's id."""
        return self.nodes[number - 1]

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
