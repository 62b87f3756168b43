"""Audit: one handler on three topics keeps a digest of every message."""

import hashlib

from consumer import Message, Tx
from handlers.application import app


@app.handler("payments", "refunds", "ledger", order="none")
async def audit(message: Message[bytes], tx: Tx) -> None:
    """Store a digest of the bytes.

    Nothing is decoded, so a message that no other handler can read is in the trail, too.
    """
    tx.defer(
        "insert into audit_trail (topic, topic_partition, topic_offset, sha256) values ($1, $2, $3, $4)",
        message.topic,
        message.partition,
        message.offset,
        hashlib.sha256(message.value).digest(),
    )
