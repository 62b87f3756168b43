"""Options of every Kafka client, and starting one with a deadline.

Limitations: while it bootstraps, aiokafka reports every refusal as a broker that is down. `_explain_refusal` therefore
connects once more by itself and names the setting that is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import AIOKafkaConnection, collect_hosts
from aiokafka.errors import (
    AuthenticationFailedError,
    ClusterAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.helpers import create_ssl_context

from consumer import tls
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.core.hosts import certificate_fault
from consumer.kafka.oauth import TokenCache, TokenProvider, TokenUnavailable
from consumer.logs import event
from consumer.setting_sources import load_function
from consumer.settings import Settings

_ATTEMPT_SECONDS_MIN, _ATTEMPT_SECONDS_MAX = 0.5, 10
_EXPLAIN_SECONDS = 3
_PAUSE_SECONDS_MIN, _PAUSE_SECONDS_MAX = 0.2, 2.0


def client_id(settings: Settings, app: str | None = None, worker: str | None = None) -> str:
    """Return the client id that Kafka's quotas, logs and metrics show."""
    if settings.kafka_client_id is not None:
        return settings.kafka_client_id
    parts = [part for part in ("consumer", app, worker) if part]
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))


def connection_options(settings: Settings, app: str | None = None, worker: str | None = None) -> dict[str, Any]:
    """Return the options that every client of this broker needs.

    Raises Misconfigured for unusable certificates, missing credentials, and for a plaintext connection that is not allowed.
    """
    tls.check_kafka(settings)
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "client_id": client_id(settings, app, worker),
    }
    if "SSL" in settings.kafka_security_protocol.replace("SASL", ""):
        options["ssl_context"] = _ssl_context(settings)
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= _sasl_options(settings)
    return options


def _ssl_context(settings: Settings) -> ssl.SSLContext:
    try:
        return create_ssl_context(  # type: ignore[no-any-return]
            cafile=settings.kafka_security_ca_file,
            certfile=settings.kafka_security_cert_file,
            keyfile=settings.kafka_security_key_file,
        )
    except (OSError, ssl.SSLError) as error:
        raise Misconfigured(
            f"CONSUMER_KAFKA_SECURITY_CA_FILE, _CERT_FILE or _KEY_FILE: {error}; name files that can be read"
        ) from None


def _sasl_options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"sasl_mechanism": settings.kafka_sasl_mechanism}
    if settings.kafka_sasl_mechanism == "OAUTHBEARER":
        if settings.kafka_sasl_token_provider is None:
            raise Misconfigured(
                "SASL OAUTHBEARER: no token provider; set CONSUMER_KAFKA_SASL_TOKEN_PROVIDER=module:callable"
            )
        provider = TokenProvider(
            TokenCache(
                load_function(
                    f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER={settings.kafka_sasl_token_provider}",
                    settings.kafka_sasl_token_provider,
                )
            )
        )
        return options | {"sasl_oauth_token_provider": provider}
    if settings.kafka_sasl_username is None or settings.kafka_sasl_password is None:
        raise Misconfigured("SASL: no credentials; set CONSUMER_KAFKA_SASL_USERNAME and CONSUMER_KAFKA_SASL_PASSWORD")
    return options | {
        "sasl_plain_username": settings.kafka_sasl_username,
        "sasl_plain_password": settings.kafka_sasl_password.get_secret_value(),
    }


async def start_client(make: Callable[[], Any], settings: Settings, wait_seconds: float) -> Any:
    """Start a client, and wait until it is connected.

    Raises ServiceUnavailable after `wait_seconds`, and Misconfigured for what waiting does not heal: refused credentials, and
    a certificate that is not accepted.
    """
    servers = settings.kafka_bootstrap_servers
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_seconds
    pause, is_reported = _PAUSE_SECONDS_MIN, False
    while True:
        client = None
        try:
            client = make()
            async with asyncio.timeout(min(_ATTEMPT_SECONDS_MAX, max(_ATTEMPT_SECONDS_MIN, deadline - clock()))):
                await client.start()
            return client
        except ValueError as error:
            await _discard(client)
            raise Misconfigured(
                f"CONSUMER_KAFKA_BOOTSTRAP_SERVERS={servers}: {error}; write host:port, comma-separated"
            ) from None
        except ClusterAuthorizationFailedError:  # only idempotent producers ask for a right at start
            await _discard(client)
            raise Misconfigured(
                f"Kafka at {servers}: this user may not produce; give it the right Write on the topic, and before Kafka 2.8 "
                "IdempotentWrite on the cluster"
            ) from None
        except (KafkaError, OSError, AssertionError) as error:  # TimeoutError is an OSError
            await _discard(client)
            reason = await _explain_refusal(settings)
            if clock() + pause > deadline:
                raise ServiceUnavailable(
                    f"Kafka at {servers} did not answer within {wait_seconds:g} s: "
                    f"{reason or str(error) or type(error).__name__}"
                ) from None
        except BaseException:
            await _discard(client)
            raise
        if not is_reported:
            event(logging.WARNING, "waiting for kafka", servers=servers)
            is_reported = True
        await asyncio.sleep(pause)
        pause = min(_PAUSE_SECONDS_MAX, pause * 2)


async def _discard(client: Any) -> None:
    """Stop a client that did not start.

    Otherwise it warns when it is collected.
    """
    if client is not None:
        with suppress(Exception):
            await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())


async def _explain_refusal(settings: Settings) -> str:
    """Connect to each broker once, and return why it refuses.

    Empty if unknown. Raises Misconfigured for what waiting does not heal.
    """
    if settings.kafka_security_protocol == "PLAINTEXT":
        return ""
    options = {name: value for name, value in connection_options(settings).items() if name != "bootstrap_servers"}
    reason = ""
    for host, port, _ in collect_hosts(settings.kafka_bootstrap_servers):
        connection = AIOKafkaConnection(host, int(port), request_timeout_ms=_EXPLAIN_SECONDS * 1000, **options)
        try:
            await asyncio.wait_for(connection.connect(), _EXPLAIN_SECONDS)
            return ""
        except ConnectionRefusedError:
            continue
        except (KafkaError, OSError, TimeoutError) as error:
            reason = _explain(error, settings, f"{host}:{port}")
        finally:
            connection.close()
    return reason


def _explain(error: Exception, settings: Settings, broker: str) -> str:
    """Return what a connection error means for the settings.

    Raises Misconfigured for what waiting does not heal.
    """
    servers, protocol = settings.kafka_bootstrap_servers, settings.kafka_security_protocol
    match error:
        case ssl.SSLCertVerificationError():
            fault = certificate_fault(
                error.verify_code,
                error.verify_message,
                "CONSUMER_KAFKA_SECURITY_CA_FILE",
                "CONSUMER_KAFKA_BOOTSTRAP_SERVERS and in what the broker advertises",
            )
            raise Misconfigured(f"Kafka at {broker}: {fault}") from None
        case UnsupportedSaslMechanismError():
            raise Misconfigured(
                f"Kafka at {servers}: {settings.kafka_sasl_mechanism} is not offered there ({type(error).__name__}); "
                "set CONSUMER_KAFKA_SASL_MECHANISM to one that is"
            ) from None
        case AuthenticationFailedError() | SaslAuthenticationFailed() | IllegalSaslStateError():
            given = "_TOKEN_PROVIDER" if settings.kafka_sasl_mechanism == "OAUTHBEARER" else "_USERNAME, _PASSWORD"
            raise Misconfigured(
                f"Kafka at {servers}: the SASL credentials are refused ({type(error).__name__}); check CONSUMER_KAFKA_SASL{given}"
            ) from None
        case ssl.SSLError():
            return f"no TLS with {broker} ({error.reason}): is CONSUMER_KAFKA_SECURITY_PROTOCOL={protocol} right for this port?"
        case TokenUnavailable():
            return str(error)
        case _:
            return f"{type(error).__name__}: is CONSUMER_KAFKA_SECURITY_PROTOCOL={protocol} right for {broker}?"
