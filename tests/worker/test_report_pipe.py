"""The pipe to the supervisor: no wait, no cut line."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator

import pytest

from consumer.worker.report_pipe import ReportPipe

pytestmark = pytest.mark.unit


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for end in (read, write):
        try:
            os.close(end)
        except OSError:
            pass


def read_lines(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    parts = []
    try:
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    except BlockingIOError:
        pass
    return b"".join(parts)


async def test_a_full_pipe_refuses_whole_reports(ends: tuple[int, int]) -> None:
    read, write = ends
    pipe = ReportPipe(write)
    report = {"text": "x" * 3000}
    sent = 0
    while pipe.send({**report, "number": sent}):
        sent += 1
    assert sent > 10 and not pipe.send(report)
    text = read_lines(read)
    for _ in range(3):  # the loop writes what was left of the last line
        await asyncio.sleep(0)
    lines = (text + read_lines(read)).split(b"\n")
    assert [json.loads(line)["number"] for line in lines[:-1]] == list(range(sent)) and lines[-1] == b""
    assert pipe.send(report)


async def test_a_report_larger_than_the_pipe_arrives_whole(ends: tuple[int, int]) -> None:
    read, write = ends
    pipe = ReportPipe(write)
    large = {"text": "y" * 500_000}
    assert pipe.send(large) and not pipe.send({"small": 1})
    text = b""
    while not text.endswith(b"\n"):
        text += read_lines(read)
        await asyncio.sleep(0)
    assert json.loads(text) == large
    assert pipe.send({"small": 1}) and json.loads(read_lines(read)) == {"small": 1}


async def test_a_report_beyond_the_limit_and_a_closed_pipe_are_refused(ends: tuple[int, int]) -> None:
    read, write = ends
    pipe = ReportPipe(write)
    assert not pipe.send({"text": "z" * (1 << 20)})
    os.close(read)
    assert not pipe.send({"small": 1})
