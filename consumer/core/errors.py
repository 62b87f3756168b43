"""Every error that the framework raises, one branch per reaction.

    ConsumerError
      Misconfigured          stop at start: one line for the person at the terminal, exit code 2
        RegistrationError    a handler or an App that cannot work, found where it is written
        ServiceUnavailable   a service that did not answer within --wait
      Unreadable             the message's own fault before its handler ran: a dead letter, never retried
      CannotTell             a replay ended before it had an answer, exit code 2
      TransactionMisuse      a handler asked its Tx for something that would break the guarantee
      Reject                 raised by handlers: a dead letter at once
      RunAgain               raised by handlers: no failure; tried again and not counted
        NotDone              raised by calls of effects: the other system has done nothing
        CallNotMade          an effect's result is needed, and the other system was not called

It has nothing of the drivers' exceptions: `sqlstate.py` classifies those.
"""

from __future__ import annotations


class ConsumerError(Exception):
    """Base of every error raised by this package."""


class Misconfigured(ConsumerError):
    """The configuration is unusable; the text says what to change."""


class RegistrationError(Misconfigured):
    """A declaration of a handler or an App cannot work.

    Raised at import, before anything runs.
    """


class ServiceUnavailable(Misconfigured):
    """Kafka or PostgreSQL did not answer in the time given by ``--wait``."""


class Unreadable(ConsumerError):
    """A message that cannot be identified or decoded.

    `reason` is one of `outcome.Reason`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class CannotTell(ConsumerError):
    """A replay ended before it had an answer.

    The text says why, how far it came, and what was changed (mostly nothing).
    """


class TransactionMisuse(ConsumerError):
    """A handler controlled its transaction, or used a Tx too late.

    Too late means after the handler has returned.
    """


class Reject(ConsumerError):
    """Raise it in a handler to make the message a dead letter.

    That happens at once, without a retry. The text is kept with the dead letter. Nothing that the handler wrote for
    this message is stored.
    """


class RunAgain(ConsumerError):
    """Raise it in a handler to try the message again, uncounted.

    Everything the handler wrote for the message is undone, later messages of its unit of order wait behind it, and the
    pauses grow as the handler's retry policy says (at least 50 ms). There is no limit: a handler whose messages must
    not wait for ever catches the cause, looks at the age of its message, and raises `Reject`.
    """


class NotDone(RunAgain):
    """Raise it in an effect's call where nothing was done outside.

    For example where the connection was refused. The message is tried again, uncounted. Any other exception means that
    the other system may have done what it was asked for, and that only it can say so.
    """


class CallNotMade(RunAgain):
    """An effect's message ran without the result of its call.

    A worker makes the call; a replay and a rebuild call no other system.
    """
