"""Which addresses are of other machines; what is wrong with a certificate.

Pure: it reads the text and resolves nothing. So the only name of this machine is `localhost`; `localhost.example` and a
name that resolves to 127.0.0.1 count as other machines.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import parse_qs, unquote, urlsplit

# OpenSSL's verify codes (x509_vfy.h), which Python gives as SSLCertVerificationError.verify_code.
_EXPIRED = {10}
_NOT_YET = {9}
_ISSUER = {2, 18, 19, 20, 21}
_NAME = {62, 64}


def is_local(host: str) -> bool:
    """Return whether a host is this machine.

    That is the path of a Unix socket, a loopback address, or `localhost`.
    """
    if host.startswith("/") or host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def of_kafka(servers: str) -> list[str]:
    """Return the hosts of `host:port,…`; IPv6 with or without brackets."""
    names = []
    for part in servers.split(","):
        text = part.strip()
        if text.startswith("["):
            names.append(text[1:].partition("]")[0])
        elif text.count(":") > 1:
            names.append(text)
        else:
            names.append(text.partition(":")[0])
    return names


def of_postgres(dsn: str, variable: str = "") -> tuple[list[str], dict[str, str]]:
    """Return the hosts that asyncpg tries for a DSN, and its options.

    variable: PGHOST, used when the DSN names no host; without either, asyncpg tries this machine's sockets. Raises
    ValueError for anything but a DSN. `tests/core/test_hosts.py` compares the answer with the driver's own reading.
    """
    parts = urlsplit(dsn)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("no postgresql:// address")
    options = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
    _, at, after = parts.netloc.partition("@")  # the first one, as the driver has it
    named = after if at else parts.netloc
    given = named or options.get("host") or variable
    names = [_without_port(part) for part in given.split(",")] if given else ["/"]
    return [unquote(name) for name in names] if named else names, options


def _without_port(spec: str) -> str:
    if spec.startswith("/"):
        return spec
    if spec.startswith("["):
        return spec[1:].partition("]")[0]
    return spec.partition(":")[0]


def elsewhere(hosts: Iterable[str]) -> list[str]:
    """Return the hosts that are not this machine."""
    return [host for host in hosts if not is_local(host)]


def certificate_fault(code: int, text: str, ca: str, address: str) -> str:
    """Return what is wrong with a server's certificate, and what to check.

    code, text: OpenSSL's. ca: the setting that names the CA file. address: the setting that names the host.
    """
    if code in _EXPIRED:
        return f"its certificate has expired ({text}); renew it on the server"
    if code in _NOT_YET:
        return f"its certificate is not valid yet ({text}); compare the clocks"
    if code in _NAME:
        return f"its certificate is for another host ({text}); check the host name in {address}"
    if code in _ISSUER:
        return f"its certificate has no trusted issuer ({text}); check {ca}"
    return f"its certificate is not accepted ({text}); check {ca}"
