"""A small payments domain: four topics, six handlers. Run it with `consumer run handlers:app`.

An application imports from `consumer` alone. Importing a module of handlers registers them.
"""

from handlers import audit, clicks, ledger, payments, refunds
from handlers.application import app

__all__ = ["app", "audit", "clicks", "ledger", "payments", "refunds"]
