"""Outgoing messages: their ids, what may be published, and their order.

Promise: what a handler publishes is stored in the transaction of its message. It reaches Kafka at least once, always
under the same message id, in the order of its stream, and only if that transaction committed.

Everything here is pure and imports only core. `transaction/` buffers what handlers publish, `postgres/outbox.py` stores
it, and the worker's relay sends it.
"""
