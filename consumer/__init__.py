"""Consume at-least-once Kafka topics; apply each message's effects in PostgreSQL exactly once.

Start here: an `App` holds handlers; `consumer run module:app` runs them. A batch of messages is fetched
(kafka/consumer.py), checked against Redis (precheck/client.py), and settled in one transaction with the claims, the
handlers' effects and the positions (transaction/apply.py, postgres/session.py). Then it is marked in Redis, and its
offsets are committed to Kafka (worker/worker.py).
"""

TYPE_CHECKING = False  # like typing.TYPE_CHECKING, without the slow import of typing
if TYPE_CHECKING:
    from consumer.app import App
    from consumer.core.effect import Call
    from consumer.core.errors import (
        CannotTell,
        ConsumerError,
        Misconfigured,
        NotDone,
        RegistrationError,
        Reject,
        RunAgain,
        TransactionMisuse,
    )
    from consumer.core.handler_options import EffectOptions, HandlerOptions
    from consumer.core.message import Message
    from consumer.core.retry import Retry
    from consumer.outbox.new_ids import new_message_id
    from consumer.replay.findings import Findings
    from consumer.replay.verify import verify
    from consumer.settings import Settings
    from consumer.transaction.dry_run_guard import is_dry_run
    from consumer.transaction.tx import Tx

__all__ = [
    "App",
    "Call",
    "CannotTell",
    "ConsumerError",
    "EffectOptions",
    "Findings",
    "HandlerOptions",
    "Message",
    "Misconfigured",
    "NotDone",
    "RegistrationError",
    "Reject",
    "Retry",
    "RunAgain",
    "Settings",
    "TransactionMisuse",
    "Tx",
    "is_dry_run",
    "new_message_id",
    "verify",
]


_MODULES = {
    "App": "app",
    "Call": "core.effect",
    "CannotTell": "core.errors",
    "ConsumerError": "core.errors",
    "EffectOptions": "core.handler_options",
    "Findings": "replay.findings",
    "HandlerOptions": "core.handler_options",
    "Message": "core.message",
    "Misconfigured": "core.errors",
    "NotDone": "core.errors",
    "RegistrationError": "core.errors",
    "Reject": "core.errors",
    "Retry": "core.retry",
    "RunAgain": "core.errors",
    "Settings": "settings",
    "TransactionMisuse": "core.errors",
    "Tx": "transaction.tx",
    "is_dry_run": "transaction.dry_run_guard",
    "new_message_id": "outbox.new_ids",
    "verify": "replay.verify",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import a name on first use: Ctrl-C must work during imports."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"consumer.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
