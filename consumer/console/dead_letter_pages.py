"""The pages of dead letters: groups, a list, one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from consumer.admin import dead_letters
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.core.dead_letters import DeadLetterState
from consumer.core.outcome import Reason
from consumer.postgres.protocol import Connection

_SHOWN_MAX = 100
_GROUPS_MAX = 50
_BEHIND_MAX = 50
_CHARACTERS_MAX = 64 << 10  # of a key, a header or a value
_OPEN = (DeadLetterState.DEAD.value, DeadLetterState.WAITING.value)
_STATES = {"open": _OPEN, "all": None, **{state.value: (state.value,) for state in DeadLetterState}}


async def overview(console: Console, request: Request) -> Response:
    """Kinds of errors, and the newest dead letters."""
    page = Page(console, request)
    given = {name: page.given(name) for name in ("handler", "reason", "group")}
    state = page.given("state") or "open"
    if state not in _STATES:
        raise Refused(400, f"state: one of {', '.join(_STATES)}")

    async def ask(connection: Connection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        filters: Any = (console.app.name, given["handler"], None, given["reason"])
        more: Any = {"group": given["group"], "states": _STATES[state]}
        return (
            await dead_letters.error_groups(connection, *filters, _GROUPS_MAX, **more),
            await dead_letters.dead_letters(connection, *filters, _SHOWN_MAX, **more),
        )

    groups, letters = await page.ask(ask)
    groups.sort(key=lambda row: row["reason"] == Reason.BEHIND)  # these follow by themselves
    return page.render(
        "dead_letters.html",
        groups=groups,
        letters=letters,
        limit=_SHOWN_MAX,
        given={**given, "state": state},
        handlers=sorted({*console.app.handlers, *(row["handler"] for row in groups)}),
        reasons=list(Reason),
        states=list(_STATES),
    )


async def one(console: Console, request: Request) -> Response:
    """One dead letter, without its message."""
    page = Page(console, request)
    number = page.number(request.path_params["number"], "letter")
    letter, behind = await page.ask(lambda connection: _read(connection, console.app.name, number))
    return page.render("dead_letter.html", letter=letter, behind=behind, message=None)


async def message(console: Console, request: Request) -> Response:
    """One dead letter with its message, which is recorded first."""
    page = Page(console, request)
    number = page.number(request.path_params["number"], "letter")

    async def ask(connection: Connection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if not await dead_letters.record_view(connection, console.app.name, number, page.operator):
            raise _unknown(number)
        return await _read(connection, console.app.name, number)

    letter, behind = await page.ask(ask)
    return page.render("dead_letter.html", letter=letter, behind=behind, message=message_of(letter))


async def _read(connection: Connection, app: str, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    letter = await dead_letters.dead_letter(connection, number)
    if letter is None or letter["app"] != app:
        raise _unknown(number)
    return letter, await dead_letters.waiting_behind(connection, number, _BEHIND_MAX)


def _unknown(number: int) -> Refused:
    return Refused(404, f"there is no dead letter {number} of this App")


class Shown(NamedTuple):
    """A key, header or value as text; None for null."""

    text: str | None
    is_base64: bool = False
    is_cut: bool = False


class ShownMessage(NamedTuple):
    """The message of a dead letter. is_whole: no part was cut."""

    key: Shown
    headers: list[tuple[Shown, Shown]]
    value: Shown
    is_whole: bool

    @property
    def may_be_edited(self) -> bool:
        """Whether a text area returns the payload as it is."""
        value = self.value
        is_text = value.text is not None and not value.is_base64 and not value.is_cut
        return is_text and "\r" not in (value.text or "") and "\0" not in (value.text or "")


def message_of(letter: dict[str, Any]) -> ShownMessage:
    """Return what the page shows of a message."""
    key, value = _shown(letter["key"]), _shown(letter["value"])
    headers = [(_shown(name), _shown(text)) for name, text in letter["headers"]]
    parts = [key, value, *(part for pair in headers for part in pair)]
    return ShownMessage(key, headers, value, not any(part.is_cut for part in parts))


def _shown(part: str | dict[str, str] | None) -> Shown:
    text = part["base64"] if isinstance(part, dict) else part
    is_cut = text is not None and len(text) > _CHARACTERS_MAX
    return Shown(None if text is None else text[:_CHARACTERS_MAX], isinstance(part, dict), is_cut)
