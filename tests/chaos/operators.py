"""Operators at work during a run.

They retry, discard and edit dead letters, look at positions, replay and purge. Each act is the command that a person
would type, as a process. What they change is kept, so that the judge can allow for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import prefork
from harness import ROOT

from chaos.invariants import Edit
from chaos.schedule import Fault
from chaos.workload import CANARY
from consumer import Settings

APP = "chaos.application:app"
_ATTEMPTS = 20  # of a command that cannot reach a server
_LETTERS = """
select d.dead_letter, h.name, convert_from(d.key, 'utf8'), d.topic, d.partition, d."offset"
from consumer.dead_letters d join consumer.handlers h using (handler)
where h.app = $1 and d.reason = 'failed' and d.state = 'dead' order by d.dead_letter
"""


class CommandFailed(Exception):
    """A command ended in a way that no outage explains."""


@dataclass
class Operators:
    """The operators of a run.

    edits: payloads that they gave dead letters under another id. acts: commands that completed.
    """

    app: str
    topic: str
    settings: Settings
    environment: Mapping[str, str]
    directory: Path
    edits: list[Edit] = field(default_factory=list)
    acts: int = 0

    async def act(self, fault: Fault, connection: asyncpg.Connection) -> str:
        """Do what the fault names.

        Raises CommandFailed if the command does not succeed in the end.
        """
        match fault.kind:
            case "retry letters":
                return await self._run("dlq", "retry", APP, "--all", "--yes")
            case "discard letters":
                numbers = [str(row[0]) for row in (await connection.fetch(_LETTERS, self.app))[: fault.size]]
                return await self._run("dlq", "discard", APP, *numbers, "--why", "chaos", "--yes") if numbers else "no letters"  # fmt: skip
            case "mend a letter":
                return await self._mend(connection, fault)
            case "look at positions":
                return await self._run("positions", APP)
            case "apply what is missing":
                return await self._run("replay", APP, self.topic, "--apply", "--until", "position")
            case "purge":
                return await self._run("purge", "--older-than", "1000")
        raise AssertionError(fault.kind)

    async def _mend(self, connection: asyncpg.Connection, fault: Fault) -> str:
        """Give a dead letter another payload under another id.

        That is another message, so the dead letter itself is discarded.
        """
        letters = await connection.fetch(_LETTERS, self.app)
        if not letters:
            return "no letters"
        number, handler, key, topic, partition, offset = letters[fault.size % len(letters)]
        edit = Edit(handler, str(uuid.uuid4()), key, 100 + fault.size, topic, partition, offset)
        value = {"key": key, "amount": edit.amount, "id": edit.id, "note": CANARY}
        path = self.directory / f"mended-{edit.id}.json"
        path.write_text(json.dumps(value))
        self.edits.append(edit)  # first: when the answer is lost, it may have been applied
        return await self._run("dlq", "retry", APP, str(number), "--value", str(path), "--new-id", edit.id, "--yes")

    async def _run(self, *arguments: str) -> str:
        """Run a command, again while servers are away.

        Exit code 1 is an answer, too: for example, dead letters are left.
        """
        errors = ""
        for _ in range(_ATTEMPTS):
            code, errors = await self._once(*arguments)
            if code in (0, 1):
                self.acts += 1
                return f"exit code {code}"
            if "rows for longer than" in errors:
                return "refused: the application wants its rows"
            if "Traceback" in errors:
                break
            if "not open" in errors or "no such dead letter" in errors or "is settled" in errors or "already" in errors:
                return "settled by somebody else"
            await asyncio.sleep(1)
        raise CommandFailed(f"{' '.join(arguments[:2])}: {errors[-300:]}")

    async def _once(self, *arguments: str) -> tuple[int, str]:
        path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'support'}"
        environment = {**os.environ, **self.settings.dump(), **self.environment, "PYTHONPATH": path}
        answer = await prefork.answer(["-m", "consumer", *arguments, "--json", "--wait", "5"], environment)
        return answer.returncode, answer.stderr


def settled(letters: Any) -> int:
    """How many dead letters operators have settled.

    They count twice: as dead letters, and as applied.
    """
    return sum(1 for letter in letters if letter.state in ("applied", "discarded"))
