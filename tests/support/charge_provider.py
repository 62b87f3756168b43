"""A payment provider behind HTTP: `charge_provider.py JOURNAL`. It prints its port.

It writes each charge to its journal before it answers: that is the truth. It knows idempotency keys. The field `how` of an
order says what it does at the first request: `late` answers after a while, `fails` answers 500 after acting, `down` closes
the connection without acting, `forgets` no longer knows the key afterwards.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

LATE_SECONDS = 3.0


class Provider:
    """Charges orders, once for each key that it knows."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._receipts: dict[str, str] = {}
        self._asked: dict[str, int] = {}
        self._number = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close the connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            answer: tuple[int, str] | None
            if method == "GET":
                answer = self._find(path.rpartition("/")[2])
            else:
                answer = await self._charge(headers["idempotency-key"], json.loads(body))
            if answer is not None:
                status, text = answer
                writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone
        finally:
            writer.close()

    def _find(self, key: str) -> tuple[int, str]:
        for line in self._journal.read_text("utf-8").splitlines():
            if (charge := json.loads(line))["key"] == key:
                return 200, charge["receipt"]
        return 404, ""

    async def _charge(self, key: str, order: dict[str, str]) -> tuple[int, str] | None:
        asked = self._asked[key] = self._asked.get(key, 0) + 1
        how = order["how"]
        if how == "down" and asked <= 2:
            return None
        if key in self._receipts:
            return 200, self._receipts[key]
        self._number += 1
        receipt = f"receipt-{self._number}"
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"order": order["id"], "key": key, "receipt": receipt}) + "\n")
        if how != "forgets":
            self._receipts[key] = receipt
        if how == "late":
            await asyncio.sleep(LATE_SECONDS)
        return (500, "") if how == "fails" else (200, receipt)


async def main() -> None:
    server = await asyncio.start_server(Provider(Path(sys.argv[1])).serve, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)  # until the test ends, or is killed


if __name__ == "__main__":
    asyncio.run(main())
