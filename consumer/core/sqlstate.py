"""What a database error means for the message that met it. Knows SQLSTATE codes; knows no driver.

The table follows PostgreSQL's own classes (documentation, appendix A) and its advice on which to retry (section 13.5).
"""

from __future__ import annotations

import re
from enum import Enum


class Meaning(Enum):
    """One reaction each."""

    CONFLICT = "conflict"  # run the batch again at once, with jitter: nobody's fault
    OUTAGE = "outage"  # drop the connection, wait, run again: never counted against a message
    MESSAGE = "message"  # counts as an attempt of the message
    DEPLOYMENT = "deployment"  # the schema or the rights do not fit the code


EXACT = {
    "40001": Meaning.CONFLICT,  # serialization_failure
    "40P01": Meaning.CONFLICT,  # deadlock_detected
    "55P03": Meaning.CONFLICT,  # lock_not_available: lock_timeout
    "57014": Meaning.CONFLICT,  # query_canceled: statement_timeout, pg_cancel_backend
    "25006": Meaning.OUTAGE,  # read_only_sql_transaction: a standby, or an old primary
    "25P03": Meaning.OUTAGE,  # idle_in_transaction_session_timeout
    "25P04": Meaning.OUTAGE,  # transaction_timeout
    "HV00N": Meaning.OUTAGE,  # fdw_unable_to_establish_connection
    "XX000": Meaning.OUTAGE,  # internal_error
}
# Every class of PostgreSQL's list, so that none is judged by accident: tests/core/test_sqlstate.py walks them all.
CLASSES = {
    "08": Meaning.OUTAGE,  # connection exception
    "53": Meaning.OUTAGE,  # insufficient resources: disk full, too many connections
    "57": Meaning.OUTAGE,  # operator intervention: shutdown, crash, cannot connect now
    "58": Meaning.OUTAGE,  # system error
    "XX": Meaning.OUTAGE,  # internal error, corruption
    "40": Meaning.CONFLICT,  # transaction rollback
    "28": Meaning.DEPLOYMENT,  # invalid authorization
    "3D": Meaning.DEPLOYMENT,  # invalid catalog name
    "3F": Meaning.DEPLOYMENT,  # invalid schema name
    "42": Meaning.DEPLOYMENT,  # syntax error or access rule violation
    "F0": Meaning.OUTAGE,  # configuration file error: the server's
    "72": Meaning.CONFLICT,  # snapshot too old
}
# What the statements of one message have met: its values, its rows, the states that it found, the code that it reached.
CLASSES |= dict.fromkeys(
    [
        "00",
        "01",
        "02",
        "03",
        "09",
        "0A",
        "0B",
        "0F",
        "0L",
        "0P",
        "0Z",
        "10",
        "20",
        "21",
        "22",
        "23",
        "24",
        "25",
        "26",
        "27",
        "2B",
        "2D",
        "2F",
        "34",
        "38",
        "39",
        "3B",
        "44",
        "54",
        "55",
        "HV",
        "P0",
    ],
    Meaning.MESSAGE,
)


def meaning(sqlstate: str) -> Meaning:
    """The meaning of a five-character SQLSTATE. One of a class that is not listed (an application's own, by RAISE) counts as the message's own fault."""
    return EXACT.get(sqlstate) or CLASSES.get(sqlstate[:2]) or Meaning.MESSAGE


def without_values(sqlstate: str, message: str) -> str:
    """A primary message without the values that a data exception (class 22) quotes: between quotes, or after a colon.

    The driver's own, of arguments that do not fit, are of that class too. Other messages quote names only; values of rows
    stand in their DETAIL, which is not part of this.
    """
    if not sqlstate.startswith("22"):
        return message
    return re.sub('".*"', '"…"', message.partition(": ")[0], flags=re.DOTALL)
