"""`consumer run` with a configuration file and a secret's file.

Workers have both, and the secret is nowhere to be seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Place
from worker_service import Service, message


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows the environment of a process")
async def test_workers_get_the_file_and_the_secret(place: Place, tmp_path: Path) -> None:
    service = Service(place, await place.topic(2), tmp_path)
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "dsn").write_text(f"{place.worker_dsn}\n")
    (directory / "settings.toml").write_text(
        f'workers = 2\n[postgres]\ndsn_file = "dsn"\n[kafka]\nbootstrap_servers = "{place.kafka}"\n'
    )
    absent = {f"CONSUMER_{name}": "" for name in ("WORKERS", "POSTGRES_DSN", "KAFKA_BOOTSTRAP_SERVERS")}
    await place.send(service.topic, *(message(f"m{number}", number, partition=number % 2) for number in range(10)))
    async with service.run_with("--config", "settings.toml", **absent) as run:
        await service.opened(run, partitions=2, workers=2)
        pids = [run.process.pid, *run.worker_pids().values()]
        assert len(pids) == 3
        for pid in pids:
            shown = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
            assert place.worker_dsn.encode() not in shown
            assert str(directory / "dsn").encode() not in shown  # settings come through the pipe
        await service.settled()
        await service.stop(run)
        assert place.worker_dsn not in run.errors
    assert len(await place.effects()) == 2 * 10  # of two handlers
