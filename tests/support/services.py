"""Apache Kafka for the tests: one KRaft node, started once a run.

The other servers are those of consumer/local_servers.py.

Needs Java 17 and the jars that `make kafka` copies with Maven.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from certificates import Authority

from consumer.local_servers import EmbeddedUnavailable, LocalServer, free_port, kafka_answers

JARS = Path(__file__).resolve().parent.parent.parent / ".cache" / "kafka"

_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL,EXPIRED:SSL,TLSSASL:SASL_SSL
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},SASL://127.0.0.1:{sasl},TLS://127.0.0.1:{tls},\
  EXPIRED://127.0.0.1:{expired},TLSSASL://127.0.0.1:{tls_sasl},PROXIED://127.0.0.1:{proxied}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL://127.0.0.1:{sasl},TLS://localhost:{tls},\
  EXPIRED://localhost:{expired},TLSSASL://localhost:{tls_sasl},PROXIED://127.0.0.1:{proxy}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:alice;User:carol
sasl.enabled.mechanisms=PLAIN
listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_alice="right" user_carol="{canary}" user_dave="listed";
listener.name.tls.ssl.keystore.type=PEM
listener.name.tls.ssl.keystore.location={directory}/localhost.pem
listener.name.expired.ssl.keystore.type=PEM
listener.name.expired.ssl.keystore.location={directory}/expired.pem
listener.name.tlssasl.ssl.keystore.type=PEM
listener.name.tlssasl.ssl.keystore.location={directory}/localhost.pem
listener.name.tlssasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512,OAUTHBEARER
listener.name.tlssasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_alice="right";
listener.name.tlssasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.tlssasl.oauthbearer.sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule \
  required unsecuredLoginStringClaim_sub="broker";
listener.name.tlssasl.oauthbearer.connections.max.reauth.ms=2000
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


class Kafka(LocalServer):
    """Apache Kafka 4.3.

    `bootstrap_servers` for plain text, `sasl_servers` for SASL PLAIN in clear (alice, right), `tls_servers` for TLS with a
    certificate of `ca` for localhost, `expired_servers` with one of yesterday, `tls_sasl_servers` for PLAIN, SCRAM-SHA-512
    (alice, right) and OAUTHBEARER with unsigned tokens, which end their session after 2 s. `stranger` signed none of them.
    Clients that begin at port `proxy` stay there, so a proxy from there to `proxied` sees all that they say.
    Everybody may do everything but for dave (listed, at `sasl_servers`), who may do what `acls` has given him.
    """

    name = "kafka"
    start_seconds = 120.0  # a JVM on a machine that is busy with other tests
    canary = "canarykafka7a"  # carol's password, where alice may

    def prepare(self) -> None:
        if shutil.which("java") is None or not any(JARS.glob("kafka-server-4.3.*.jar")):
            raise EmbeddedUnavailable("the tests need Java 17 and Kafka's jars: `make kafka` brings them")
        self._controller = free_port()
        self._sasl, self._tls, self._expired, self._tls_sasl, self.proxied, self.proxy = (free_port() for _ in range(6))
        authority = Authority(self.directory, "ca")
        authority.issue("localhost", "localhost")
        authority.issue("expired", "localhost", expires=-timedelta(days=1))
        self.ca, self.stranger = authority.file, Authority(self.directory, "stranger").file

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def sasl_servers(self) -> str:
        return f"127.0.0.1:{self._sasl}"

    @property
    def tls_servers(self) -> str:
        return f"localhost:{self._tls}"

    @property
    def expired_servers(self) -> str:
        return f"localhost:{self._expired}"

    @property
    def tls_sasl_servers(self) -> str:
        return f"localhost:{self._tls_sasl}"

    def command(self) -> Sequence[str | Path]:
        properties = self.directory / "server.properties"
        properties.write_text(
            _PROPERTIES.format(
                port=self.port,
                controller=self._controller,
                sasl=self._sasl,
                tls=self._tls,
                expired=self._expired,
                tls_sasl=self._tls_sasl,
                canary=self.canary,
                proxied=self.proxied,
                proxy=self.proxy,
                directory=self.directory,
            )
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
                    "--add-scram",
                    "SCRAM-SHA-512=[name=alice,password=right]",
                ],
                check=True,
                capture_output=True,
                env=self.environment(),
            )
        return [*self._java("512m"), "kafka.Kafka", properties]

    def acls(self, arguments: Sequence[str]) -> None:
        """What `kafka-acls.sh` does with these arguments."""
        command = [
            *self._java("64m"),
            "org.apache.kafka.tools.AclCommand",
            "--bootstrap-server",
            self.bootstrap_servers,
        ]
        subprocess.run([*command, *arguments], check=True, capture_output=True, env=self.environment())

    def _java(self, heap: str) -> list[str | Path]:
        # Compiled once and quickly: it does not live long enough for more to pay off, which is half of its CPU time.
        return ["java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*"]

    def answers(self) -> bool:
        return kafka_answers(self.port)
