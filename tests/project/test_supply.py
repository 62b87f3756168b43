"""Installed is what is locked: the locks are complete, hashed and used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent
LOCKS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def locked(name: str) -> dict[str, list[Version]]:
    """Package -> its versions, several where they depend on the platform.

    Fails for a line without a hash.
    """
    versions: dict[str, list[Version]] = {}
    for entry in re.sub(r"\\\n\s*", "", (LOCKS / name).read_text("utf-8")).splitlines():
        requirement, *hashes = entry.split("--hash=")
        parsed = Requirement(requirement.strip())
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64} ?", hash) for hash in hashes), entry
        [pin] = parsed.specifier
        assert pin.operator == "==" and parsed.url is None
        versions.setdefault(canonicalize_name(parsed.name), []).append(Version(pin.version))
    return versions


def wanted(extra: str | None) -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that an extra names."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    requirements = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            requirements += [one for name in sorted(requirement.extras) for one in wanted(name)]
        else:
            requirements.append(requirement)
    return requirements


def test_sessions_are_tested_on_both_minor_versions_of_sqlalchemy() -> None:
    [requirement] = wanted("sqlalchemy")
    [[version], [other]] = [locked(lock)["sqlalchemy"] for lock in ("dev.lock", "sqlalchemy.lock")]
    assert requirement.specifier.contains(version) and requirement.specifier.contains(other)
    assert {version.release[:2], other.release[:2]} == {(2, 0), (2, 1)}
    assert set(locked("sqlalchemy.lock")) == {"sqlalchemy"}


@pytest.mark.parametrize(
    ("lock", "extras"), [("runtime.lock", [None]), ("dev.lock", [None, "dev"]), ("docs.lock", ["docs"])]
)
def test_a_lock_fits_what_is_asked_for(lock: str, extras: list[str | None]) -> None:
    pins = locked(lock)
    for requirement in [one for extra in extras for one in wanted(extra)]:
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert versions and all(requirement.specifier.contains(one) for one in versions), (
            f"{requirement}: run `make lock`"
        )


def test_the_locks_agree_with_each_other_and_name_no_host() -> None:
    runtime, dev = locked("runtime.lock"), locked("dev.lock")
    assert {name: dev.get(name) for name in runtime} == runtime
    [build] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    asked = Requirement(build)
    assert all(asked.specifier.contains(version) for version in locked("build.lock")[asked.name])
    for path in LOCKS.iterdir():
        assert "://" not in path.read_text("utf-8"), path


def test_the_image_installs_nothing_else() -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "deploy" / "Dockerfile").read_text("utf-8"))
    installs = [part.split("&&")[0] for part in text.split("pip install ")[1:]]
    assert len(installs) == 3
    assert all("--require-hashes" in install or "--no-deps" in install for install in installs), installs
    assert "--no-build-isolation" in text  # else the builder would be fetched without a hash


STUB = """#!{python}
import sys
print({out!r})
print({err!r}, file=sys.stderr)
sys.exit({code})
"""
FINDING = {
    "dependencies": [
        {"name": "fine", "version": "1", "vulns": []},
        {"name": "holed", "version": "2", "vulns": [{"id": "GHSA-x", "fix_versions": ["3"], "description": "bad"}]},
    ]
}
CLEAN = {"dependencies": [{"name": "fine", "version": "1", "vulns": []}]}


@pytest.mark.parametrize(
    ("out", "err", "code", "expected", "says"),
    [
        (json.dumps(FINDING), "Found 1 known vulnerability", 1, 1, "holed 2: GHSA-x, fixed in 3"),
        (json.dumps(CLEAN), "No known vulnerabilities found", 0, 0, "nothing is known against the 1 locked versions"),
        ("", "ConnectionError: Max retries exceeded with url", 1, 0, "cannot be reached"),
        ("", "Could not connect to OSV's vulnerability feed", 1, 0, "cannot be reached"),
        ("", "invalid requirements input: dev.lock", 1, 2, "could not tell: invalid requirements input"),
    ],
)
def test_audit_distinguishes_a_finding_from_an_absence(
    tmp_path: Path, out: str, err: str, code: int, expected: int, says: str
) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, out=out, err=err, code=code))
    stub.chmod(0o755)
    script = LOCKS / "audit.py"
    done = subprocess.run([sys.executable, script, stub], capture_output=True, text=True, check=False)
    assert (done.returncode, says in done.stdout + done.stderr) == (expected, True), done
    missing = subprocess.run([sys.executable, script, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert missing.returncode == 0 and "could not be installed" in missing.stdout
