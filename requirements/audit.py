"""Ask the advisory service about every locked version. Exit code 0: nothing known, or nobody to ask; 1: a finding; 2: cannot tell.

Knows pip-audit's exit codes, its JSON, and how it says that it reached nobody. What it does not know: holes that nobody has
published. Its argument is the Python that has pip-audit (`make audit` installs it); the tests give a command that answers like it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCKS = ("runtime.lock", "dev.lock", "build.lock", "docs.lock")
_SECONDS = 60
# What requests and urllib3 call it, as pip-audit passes it on.
_AWAY = (
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "Max retries exceeded",
    "Could not connect",
    "Name or service not known",
)
_AWAY += (
    "Temporary failure in name resolution",
    "Connection refused",
    "ProxyError",
    "SSLError",
    "403",
    "502",
    "503",
    "504",
)


def command(python: str) -> list[str]:
    files = [part for name in LOCKS for part in ("-r", str(HERE / name))]
    options = [
        "--disable-pip",
        "--require-hashes",
        "--vulnerability-service",
        "osv",
        "--timeout",
        "5",
        "--format",
        "json",
    ]
    return [python, "-m", "pip_audit", *options, "--progress-spinner", "off", *files]


def main(python: str) -> int:
    if not Path(python).exists():
        print("audit: pip-audit could not be installed: nothing was audited")
        return 0
    try:
        done = subprocess.run(command(python), capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"audit: no answer within {_SECONDS} s: nothing was audited")
        return 0
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(each in done.stderr for each in _AWAY):
            print("audit: the advisory service cannot be reached from here: nothing was audited")
            return 0
        print(f"audit: pip-audit could not tell: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return 2
    holes = [(each["name"], each["version"], hole) for each in found for hole in each.get("vulns", [])]
    for name, version, hole in holes:
        fixed = ", ".join(hole.get("fix_versions", [])) or "no version yet"
        print(
            f"audit: {name} {version}: {hole['id']}, fixed in {fixed}: change pyproject.toml if need be, then `make lock`"
        )
    if not holes:
        print(f"audit: nothing is known against the {len(found)} locked versions")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
