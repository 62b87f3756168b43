"""A small payments domain: four topics, six handlers.

Run it with `consumer run handlers:app`. An application imports from `consumer` alone. Importing a module of handlers
registers them. `handlers.shop` is an application of its own: a payment page (`make shop`), which is not imported here
and needs the extra `shop`.
"""

from handlers import audit, clicks, ledger, payments, refunds
from handlers.application import app

__all__ = ["app", "audit", "clicks", "ledger", "payments", "refunds"]
