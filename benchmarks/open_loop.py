"""Sends messages at a fixed rate, from a process of its own.

librdkafka sends from threads in C: at 1,000 messages a second aiokafka takes 0.6 of a core, which the worker then lacks.

    python open_loop.py BOOTSTRAP_SERVERS TOPIC PARTITIONS RATE TOTAL

Prints when the first message was due (Unix seconds), once a fifth is sent.
"""

from __future__ import annotations

import json
import sys
import time
import uuid

from confluent_kafka import KafkaException, Producer


def main() -> None:
    servers, topic, partitions, rate, total = (
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        float(sys.argv[4]),
        int(sys.argv[5]),
    )
    # No waiting for company, and as many requests in flight as Java's producer has: without that limit each message is a
    # request of its own at any rate, and the broker is what is measured.
    producer = Producer(
        {
            "bootstrap.servers": servers,
            "linger.ms": 0,
            "max.in.flight.requests.per.connection": 5,
            "queue.buffering.max.messages": 100_000,
            "acks": "all",
        }
    )
    producer.list_topics(topic, timeout=30)  # connects
    delivered = 0

    def on_delivery(error: object, _: object) -> None:
        nonlocal delivered
        if error is not None:
            raise KafkaException(error)
        delivered += 1

    start = time.time() + 0.1
    for number in range(total):
        due = start + number / rate
        while (left := due - time.time()) > 0:
            producer.poll(0)
            time.sleep(left)
        id = uuid.uuid4()
        # The note says when the message was due: a late one counts from then.
        payment = {"id": str(id), "account": number % 1000, "amount": 1, "note": f"{due!r:<110}"}
        while True:
            try:
                producer.produce(
                    topic,
                    json.dumps(payment).encode(),
                    key=b"%d" % (number % 1000),
                    partition=number % partitions,
                    headers=[("message-id", str(id).encode())],
                    on_delivery=on_delivery,
                )
                break
            except BufferError:
                producer.poll(0.01)
        producer.poll(0)
        if number == total // 5:
            print(repr(start), flush=True)
    producer.flush(60)
    if delivered != total:
        raise SystemExit(f"{delivered} of {total} messages were acknowledged")


if __name__ == "__main__":
    main()
