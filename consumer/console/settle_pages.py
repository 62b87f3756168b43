"""Retries, edits and discards of dead letters, and their jobs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from consumer.admin import dead_letters
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.console.jobs import Job
from consumer.console.tokens import is_form_id
from consumer.postgres.protocol import Connection

_SELECTED_MAX = 1000
_VERBS = ("retry", "discard")
_SHOWN_MAX = 200
NO_SELECTION = "no dead letter is selected; go back and select some, or choose a group"


def _selection(page: Page, numbers: list[str], group: str | None) -> tuple[list[int], str | None]:
    """Return numbers, or a group. Raises Refused."""
    letters = list(dict.fromkeys(page.number(number, "letter") for number in numbers))
    if len(letters) > _SELECTED_MAX:
        raise Refused(400, f"more than {_SELECTED_MAX:,} are selected; choose a group instead")
    if not letters and not group:
        raise Refused(400, NO_SELECTION)
    return letters, None if letters else group


def _verb(text: str | None) -> str:
    if text not in _VERBS:
        raise Refused(400, f"do: one of {', '.join(_VERBS)}")
    return text


async def confirm(console: Console, request: Request) -> Response:
    """Say what would be settled, and ask for the reason."""
    page = Page(console, request)
    verb = _verb(page.given("do"))
    letters, group = _selection(page, request.query_params.getlist("letter"), page.given("group"))

    async def ask(connection: Connection) -> dead_letters.OpenCounts:
        return await dead_letters.count_open(connection, console.app.name, letters or None, group)

    counts = await page.ask(ask)
    return page.render("settle.html", verb=verb, letters=letters, group=group, counts=counts)


async def settle(console: Console, request: Request) -> Response:
    """Start the retry or discard of the selected dead letters."""
    page = Page(console, request)
    verb = _verb(page.field("do"))
    letters, group = _selection(page, list(page.form.get("letter", ())), page.field("group"))
    if verb == "retry" and letters:
        counts = await page.ask(lambda connection: dead_letters.count_open(connection, console.app.name, letters, None))
        if counts.unsure and page.field("unsure") != "yes":
            raise Refused(
                409, "some of them may have been applied already; go back, look, and say that they are to run anyway"
            )
    selected = [*map(str, letters)] if letters else [f"--group={group}"]
    title = f"{verb} {_count(letters)}" if letters else f"{verb} group {group}"
    return _started(page, title, [verb, "{APP}", *selected])


def _count(letters: list[int]) -> str:
    return f"dead letter {letters[0]}" if len(letters) == 1 else f"{len(letters):,} dead letters"


async def edit(console: Console, request: Request) -> Response:
    """Run one dead letter with another payload."""
    page = Page(console, request)
    number = page.number(request.path_params["number"], "letter")
    match page.field("id"):
        case "same":
            rule = ["--same-id"]
        case "new":
            rule = ["--new-id=auto"]
        case _:
            raise Refused(400, "the id is not clear: say whether it is the same intent, or another one")
    # A browser sends line breaks as CRLF, whatever the text area held.
    value = page.field("value").replace("\r\n", "\n").encode("utf-8", "surrogatepass")
    return _started(page, f"edit dead letter {number}", ["retry", "{APP}", str(number), "--value=-", *rule], value)


def _started(page: Page, title: str, arguments: list[str], given: bytes | None = None) -> Response:
    by = page.by()
    id = page.field("form")
    if not is_form_id(id):
        raise Refused(400, "the form has no id; load the page again")
    job = page.console.jobs.start(id, title, arguments, by, page.shard, given)
    return RedirectResponse(page.url(f"/jobs/{job.id}"), 303)


async def jobs(console: Console, request: Request) -> Response:
    """The jobs of this run of the console."""
    return Page(console, request).render("jobs.html", jobs=list(console.jobs))


def _job(page: Page) -> Job:
    job = page.console.jobs.get(page.request.path_params["id"])
    if job is None:
        raise Refused(404, "there is no such job in this run of the console; the audit has what it did")
    return job


async def job(console: Console, request: Request) -> Response:
    """How far a job is, and what became of each dead letter."""
    page = Page(console, request)
    return page.render("job.html", job=_job(page), shown_max=_SHOWN_MAX)


async def stop(console: Console, request: Request) -> Response:
    """Stop a job after the transaction in hand."""
    page = Page(console, request)
    job = _job(page)
    console.jobs.stop(job)
    return RedirectResponse(page.url(f"/jobs/{job.id}"), 303)
