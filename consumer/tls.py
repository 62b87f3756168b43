"""Requires verified TLS for services on other machines.

Knows settings, hosts and the standard library's TLS; knows no driver, and opens no connection. Limitations: the
addresses that Kafka advertises are unknown here; the same TLS and the same checks hold there.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from consumer.core import hosts
from consumer.core.errors import Misconfigured
from consumer.settings import Settings

_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Options of a DSN that the driver reads only when it creates its TLS context itself.
_VERIFYING = ("verify-ca", "verify-full")
# Options of libpq alone: the driver would send them to the server, which says that it has no such parameter.
_OF_LIBPQ = frozenset(
    {
        "channel_binding",
        "connect_timeout",
        "fallback_application_name",
        "gssdelegation",
        "gssencmode",
        "hostaddr",
        "keepalives",
    }
    | {"keepalives_count", "keepalives_idle", "keepalives_interval", "load_balance_hosts", "max_protocol_version"}
    | {
        "min_protocol_version",
        "replication",
        "require_auth",
        "requirepeer",
        "requiressl",
        "sslcertmode",
        "sslcompression",
    }
    | {"sslcrldir", "sslkeylogfile", "sslsni", "tcp_user_timeout"}
)
_UNREAD = ("sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version")


def check_kafka(settings: Settings) -> None:
    """Raise Misconfigured for Kafka without TLS on another machine.

    Unless CONSUMER_ALLOW_INSECURE allows it.
    """
    if settings.kafka_security_protocol in ("PLAINTEXT", "SASL_PLAINTEXT"):
        _refuse(
            "kafka",
            hosts.of_kafka(settings.kafka_bootstrap_servers),
            settings,
            "set CONSUMER_KAFKA_SECURITY_PROTOCOL=SSL or SASL_SSL",
        )


def check_http(settings: Settings) -> tuple[str, int] | None:
    """Return the host and port to serve on; None without CONSUMER_HTTP.

    Raises Misconfigured for an address that other machines reach, unless CONSUMER_ALLOW_INSECURE allows it: there is
    neither TLS nor a password.
    """
    address = settings.http_address
    if address is not None and not hosts.is_local(address[0]) and "http" not in settings.insecure:
        raise Misconfigured(
            f"CONSUMER_HTTP={settings.http}: it would answer other machines without TLS; serve on 127.0.0.1, or allow it with "
            "CONSUMER_ALLOW_INSECURE=http"
        )
    return address


def redis_url(settings: Settings) -> str | None:
    """Return Redis's address as text, with its CA file; None without one.

    Raises Misconfigured for another machine without TLS, or with TLS that does not verify the server.
    """
    if settings.redis_url is None or not settings.redis_url.get_secret_value():
        return None
    url = settings.redis_url.get_secret_value()
    try:
        parts = urlsplit(url)
        addresses = [parts.hostname or "localhost"]
        options = {(name, value.lower()) for name, value in parse_qsl(parts.query)}
    except ValueError:
        return url  # the client says what is wrong with it
    if parts.scheme in ("redis", "rediss") and not re.fullmatch(r"/?[0-9]{0,9}", parts.path):
        raise Misconfigured(
            "CONSUMER_REDIS_URL: what follows the host is the number of a database, as in redis://host:6379/0; write one, or "
            "percent-encode special characters of the password"
        )
    if parts.scheme == "redis":
        _refuse("redis", addresses, settings, "write rediss:// in CONSUMER_REDIS_URL")
    if parts.scheme == "rediss":
        checks = {option for option in options if option[0] in ("ssl_cert_reqs", "ssl_check_hostname")}
        if checks - {("ssl_cert_reqs", "required"), ("ssl_check_hostname", "true")}:
            _refuse(
                "redis", addresses, settings, "leave ssl_cert_reqs and ssl_check_hostname out of CONSUMER_REDIS_URL"
            )
        if settings.redis_ca_file is not None:
            if not Path(settings.redis_ca_file).is_file():  # the client would only say that Redis is away
                raise Misconfigured(f"CONSUMER_REDIS_CA_FILE: no file {settings.redis_ca_file}; correct the path")
            url += ("&" if parts.query else "?") + urlencode({"ssl_ca_certs": settings.redis_ca_file})
    return url


def postgres_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context for PostgreSQL; None where the DSN alone decides.

    For other machines it always verifies the certificate's signature and host name (libpq's verify-full), unless
    CONSUMER_ALLOW_INSECURE names postgres. The driver's default would fall back to a connection without TLS, its
    `require` accepts any certificate, and its `verify-full` does not use the system's certificates (asyncpg 0.32).

    Raises Misconfigured for a weaker sslmode and for certificates that cannot be read, and ValueError for anything but
    a DSN.
    """
    addresses, options = hosts.of_postgres(settings.dsn, os.environ.get("PGHOST", ""))
    if any("@" in host for host in addresses):
        raise ValueError("a password that is not percent-encoded: the host would quote a part of it")
    mode = options.get("sslmode") or os.environ.get("PGSSLMODE")
    if mode not in (None, *_MODES):
        raise Misconfigured(f"CONSUMER_POSTGRES_DSN: sslmode is unknown; use one of {', '.join(_MODES)}")
    if unread := sorted(options.keys() & _OF_LIBPQ):
        hint = "; --wait says how long to try" if unread[0] == "connect_timeout" else ""
        raise Misconfigured(
            f"CONSUMER_POSTGRES_DSN: {unread[0]} is an option of libpq, which is not used here; leave it out{hint}"
        )
    away = hosts.elsewhere(addresses)
    if "service" in options or (os.environ.get("PGSERVICE") and addresses == ["/"]):
        raise Misconfigured("CONSUMER_POSTGRES_DSN: service files are not read; write the host into the address")
    if settings.postgres_ca_file is None and mode not in _VERIFYING and (not away or "postgres" in settings.insecure):
        return None
    if away and mode not in (None, "verify-full") and "postgres" not in settings.insecure:
        raise Misconfigured(
            f"PostgreSQL at {away[0]} with sslmode={mode}: refused, since it does not verify the server; write sslmode=verify-full "
            "into CONSUMER_POSTGRES_DSN (CONSUMER_POSTGRES_CA_FILE names a CA of your own), or allow it with "
            "CONSUMER_ALLOW_INSECURE=postgres"
        )
    if unread := [option for option in _UNREAD if option in options]:
        raise Misconfigured(
            f"CONSUMER_POSTGRES_DSN: {unread[0]} is not supported together with verify-full; leave it out"
        )
    root = settings.postgres_ca_file or options.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    try:
        context = ssl.create_default_context(cafile=None if root in (None, "", "system") else root)
        if certificate := options.get("sslcert") or os.environ.get("PGSSLCERT"):
            # A key with a passphrase would ask for it at the terminal.
            context.load_cert_chain(certificate, options.get("sslkey") or os.environ.get("PGSSLKEY"), lambda: "")
        if revoked := options.get("sslcrl") or os.environ.get("PGSSLCRL"):
            context.load_verify_locations(cafile=revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    except (OSError, ssl.SSLError) as error:
        raise Misconfigured(
            f"CONSUMER_POSTGRES_CA_FILE, or sslrootcert, sslcert, sslkey or sslcrl of the DSN: it cannot be used ({error}); name files that can be read"
        ) from None
    if mode == "verify-ca":  # refused above for other hosts, unless that is allowed
        context.check_hostname = False
    context.set_alpn_protocols(["postgresql"])  # which a direct TLS connection needs
    return context


def _refuse(service: str, addresses: list[str], settings: Settings, instead: str) -> None:
    away = hosts.elsewhere(addresses)
    if away and service not in settings.insecure:
        raise Misconfigured(
            f"{service} at {away[0]}: another machine, reached without verifying the server; {instead}, or allow it with "
            f"CONSUMER_ALLOW_INSECURE={service}"
        )
