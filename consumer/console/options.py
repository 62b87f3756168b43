"""How a console is started, and what is refused.

Pure, apart from the settings it is given. Without `--auth` everyone who reaches the address is the operator, so that address
must be of this machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from consumer.core.errors import Misconfigured
from consumer.core.hosts import is_local
from consumer.settings import Settings

LISTEN = "127.0.0.1:9465"
PROXY = "proxy"
_SECRET_MIN = 16
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleOptions:
    """What `consumer console` was given.

    listen: HOST:PORT. actions: changes are allowed. auth: "proxy", "module:callable", or None. reports: a directory with
    answers of `consumer replay --json`.
    """

    listen: str = LISTEN
    actions: bool = False
    auth: str | None = None
    reports: Path | None = None

    def address(self, settings: Settings) -> tuple[str, int]:
        """Return host and port. Raises Misconfigured for what must not be served.

        Off this machine it needs `--auth`, and CONSUMER_ALLOW_INSECURE=http, since there is no TLS.
        """
        match = _ADDRESS.fullmatch(self.listen)
        if match is None or int(match[2]) > 65535:
            raise Misconfigured(f"--listen {self.listen[:80]!r}: not an address; write HOST:PORT, as {LISTEN}")
        host, port = match[1].strip("[]"), int(match[2])
        is_proxied = self.auth == PROXY
        if not is_local(host):
            if self.auth is None:
                raise Misconfigured(
                    f"--listen {self.listen}: other machines reach it, without saying who they are; add --auth proxy "
                    "or --auth module:callable, or listen on 127.0.0.1"
                )
            if "http" not in settings.insecure:
                raise Misconfigured(
                    f"--listen {self.listen}: it would answer other machines without TLS; serve on 127.0.0.1 behind a proxy, "
                    "or allow it with CONSUMER_ALLOW_INSECURE=http"
                )
            if is_proxied and settings.console_proxy_secret is None:
                raise Misconfigured(
                    f"--auth proxy on {self.listen}: every machine could name an operator; give it "
                    "CONSUMER_CONSOLE_PROXY_SECRET, which the proxy sends as X-Console-Secret, or listen on 127.0.0.1"
                )
        secret = settings.console_proxy_secret
        if is_proxied and secret is not None and len(secret.get_secret_value()) < _SECRET_MIN:
            raise Misconfigured(
                f"CONSUMER_CONSOLE_PROXY_SECRET: shorter than {_SECRET_MIN} characters; draw a longer one at random"
            )
        if self.reports is not None and not self.reports.is_dir():
            raise Misconfigured(f"--reports {self.reports}: no such directory; name the one with the JSON of replays")
        return host, port

    def hosts(self, host: str, port: int) -> frozenset[str] | None:
        """Return the values of the header Host that are answered; None: all.

        A page of another site could resolve its own name to this machine. With `--auth` its requests carry no
        credentials, so any name is right.
        """
        if self.auth is not None:
            return None
        names = {f"[{host}]" if ":" in host else host, "localhost", "127.0.0.1", "[::1]"}
        return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))
