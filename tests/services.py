"""Apache Kafka for the tests, from its own jars: one KRaft node, started once a run. The other servers are consumer/embedded.py's.

Needs Java 17 and the jars that `make kafka` copies with Maven.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from consumer.embedded import EmbeddedUnavailable, Server, free_port, kafka_answers

JARS = Path(__file__).resolve().parent.parent / ".cache" / "kafka"

_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT
listeners=PLAINTEXT://127.0.0.1:{port},SASL://127.0.0.1:{sasl},CONTROLLER://127.0.0.1:{controller}
sasl.enabled.mechanisms=PLAIN
listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_alice="right";
log.dirs={directory}/data
auto.create.topics.enable=false
log.cleaner.backoff.ms=200
log.initial.task.delay.ms=100
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.coordinator.rebalance.protocols=classic,consumer
"""


class Kafka(Server):
    """Apache Kafka 4.3. `bootstrap_servers` for plain text, `sasl_servers` for SASL PLAIN (alice, right)."""

    name = "kafka"

    def prepare(self) -> None:
        if shutil.which("java") is None or not any(JARS.glob("kafka-server-4.3.*.jar")):
            raise EmbeddedUnavailable("the tests need Java 17 and Kafka's jars: `make kafka` brings them")
        self._controller = free_port()
        self._sasl = free_port()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sasl_servers(self) -> str:
        return f"127.0.0.1:{self._sasl}"

    def command(self) -> Sequence[str | Path]:
        properties = self.directory / "server.properties"
        properties.write_text(
            _PROPERTIES.format(port=self.port, controller=self._controller, sasl=self._sasl, directory=self.directory)
        )
        if not (self.directory / "data").exists():
            subprocess.run(
                [
                    *self._java("64m"),
                    "kafka.tools.StorageTool",
                    "format",
                    "-t",
                    uuid.uuid4().hex[:22],
                    "-c",
                    properties,
                ],
                check=True,
                capture_output=True,
                env=self.environment(),
            )
        return [*self._java("512m"), "kafka.Kafka", properties]

    def _java(self, heap: str) -> list[str | Path]:
        return ["java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-cp", f"{JARS}/*"]

    def answers(self) -> bool:
        return kafka_answers(self.port)
