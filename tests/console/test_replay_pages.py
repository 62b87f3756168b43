"""Reports of replays in the console: those of its directory alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console_client import Operator, small_app, text_of

from consumer.replay.html.page import render

pytestmark = pytest.mark.unit

REPORT = {"app": "billing", "mode": "check", "verdict": "no", "answer": "1 message is missing <b>"}


async def test_reports_are_listed_and_shown_without_postgresql(tmp_path: Path) -> None:
    directory = tmp_path / "reports"
    directory.mkdir()
    (directory / "night.json").write_text(json.dumps(REPORT))
    (directory / "odd.json").write_text("[1]")
    (directory / "broken.json").write_text("{")
    (directory / "other.txt").write_text("not listed")
    (tmp_path / "secret.json").write_text(json.dumps(REPORT))
    (directory / "link.json").symlink_to(tmp_path / "secret.json")
    client = Operator.of(small_app(), reports=directory)
    listed = await client.get("/replays")
    text = text_of(listed)
    assert listed.status == 200 and "Not known while PostgreSQL does not answer" in text
    assert "night.json" in text and "1 message is missing &lt;b&gt;" in text
    assert text.count("not the JSON of a replay") == 2
    assert "other.txt" not in text and "link.json" not in text
    page = await client.get("/replays/night.json")
    assert page.status == 200 and "<b>" not in page.body.decode()
    heading = "<h1>No: 1 message is missing &lt;b&gt;</h1>"
    assert heading in page.body.decode() and heading in render(REPORT)  # one page, written once
    assert " style=" not in page.body.decode() and "loads nothing" not in text_of(page)
    for name in ("odd.json", "broken.json", "link.json", "absent.json", "..%2Fsecret.json", "other.txt"):
        assert (await client.get(f"/replays/{name}")).status == 404, name


async def test_console_without_reports_says_how_to_have_some() -> None:
    assert "--reports DIRECTORY" in text_of(await Operator.of(small_app()).get("/replays"))
