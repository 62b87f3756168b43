"""What a database error means for the message that caused it.

Knows SQLSTATE codes; knows no driver.

The table follows PostgreSQL's own classes (documentation, appendix A) and its advice on which to retry (section 13.5).
"""

from __future__ import annotations

import re
from enum import Enum


class Meaning(Enum):
    """What an error may be. Evidence says what it is: see evidence.py."""

    CONFLICT = "conflict"  # two transactions met: run the batch again at once, with jitter
    LOCKED = "locked"  # another session holds a lock for too long
    OUTAGE = "outage"  # the server's state: drop the connection, wait, run again
    INTERNAL = "internal"  # a broken server, or one function or extension that reports its input so
    DEPLOYMENT = "deployment"  # the schema or the rights do not fit the code, or one message names a missing object
    STATE = "state"  # the database needs a repair, or one message asks for something impossible
    MESSAGE = "message"  # values and rows of the message
    CODE = "code"  # raised by the handler's own code, not by the database


EXACT = {
    "40001": Meaning.CONFLICT,  # serialization_failure
    "40P01": Meaning.CONFLICT,  # deadlock_detected
    "55P03": Meaning.LOCKED,  # lock_not_available: lock_timeout
    "57014": Meaning.CONFLICT,  # query_canceled: statement_timeout, pg_cancel_backend
    "25006": Meaning.OUTAGE,  # read_only_sql_transaction: a standby, or an old primary
    "25P03": Meaning.OUTAGE,  # idle_in_transaction_session_timeout
    "25P04": Meaning.OUTAGE,  # transaction_timeout
    "2200H": Meaning.STATE,  # sequence_generator_limit_exceeded: a used-up sequence
    "53100": Meaning.OUTAGE,  # disk_full
    "53300": Meaning.OUTAGE,  # too_many_connections
    "HV00N": Meaning.OUTAGE,  # fdw_unable_to_establish_connection
}
# Every class of PostgreSQL's list, so that each has a decision: tests/core/test_sqlstate.py compares.
CLASSES = {
    "08": Meaning.OUTAGE,  # connection exception
    "53": Meaning.INTERNAL,  # insufficient resources: one message may ask for too much memory
    "57": Meaning.OUTAGE,  # operator intervention: shutdown, crash, cannot connect now
    "58": Meaning.INTERNAL,  # system error: a failing disk, or a function whose library is missing
    "XX": Meaning.INTERNAL,  # internal error, corruption
    "40": Meaning.CONFLICT,  # transaction rollback
    "28": Meaning.DEPLOYMENT,  # invalid authorization
    "3D": Meaning.DEPLOYMENT,  # invalid catalog name
    "3F": Meaning.DEPLOYMENT,  # invalid schema name
    "42": Meaning.DEPLOYMENT,  # syntax error or access rule violation
    "0A": Meaning.STATE,  # feature not supported, by this table or server
    "0B": Meaning.STATE,  # invalid transaction initiation
    "0L": Meaning.STATE,  # invalid grantor
    "0P": Meaning.STATE,  # invalid role
    "26": Meaning.STATE,  # invalid SQL statement name: a pooler that is not declared as one
    "2B": Meaning.STATE,  # dependent privilege descriptors still exist
    "55": Meaning.STATE,  # object not in prerequisite state: a publication without replica identity
    "F0": Meaning.OUTAGE,  # configuration file error: the server's
    "HV": Meaning.STATE,  # foreign data wrapper: what another server says
    "72": Meaning.CONFLICT,  # snapshot too old
}
# Of the statements of one message: its values, its rows, the states it read, the code it called.
CLASSES |= dict.fromkeys(
    [
        "00",
        "01",
        "02",
        "03",
        "09",
        "0F",
        "0Z",
        "10",
        "20",
        "21",
        "22",
        "23",
        "24",
        "25",
        "27",
        "2D",
        "2F",
        "34",
        "38",
        "39",
        "3B",
        "44",
        "54",
        "P0",
    ],
    Meaning.MESSAGE,
)


def meaning(sqlstate: str) -> Meaning:
    """Return what an error with this SQLSTATE may be.

    An unlisted class (an application's own, by RAISE) is the message's.
    """
    return EXACT.get(sqlstate) or CLASSES.get(sqlstate[:2]) or Meaning.MESSAGE


def without_values(sqlstate: str, message: str) -> str:
    """Return an error's message without the values that it quotes.

    Data exceptions (class 22) quote values, between quotes or after a colon; the driver's errors about arguments are of
    that class too. Other messages quote names only; values of rows are in their DETAIL, which is not part of the
    message.
    """
    if not sqlstate.startswith("22"):
        return message
    return re.sub('".*"', '"…"', message.partition(": ")[0], flags=re.DOTALL)
