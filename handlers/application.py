"""The App, and what its handlers share beside the database."""

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from consumer import App


class Clicks:
    """Counts clicks of a worker process; logs them when it ends.

    A killed process loses its counts: that is what an opt-out means.
    """

    def __init__(self) -> None:
        self.pages: Counter[str] = Counter()


@asynccontextmanager
async def resources(app: App) -> AsyncIterator[dict[str, object]]:
    """Open the resources of a worker process, before its first message.

    Handlers name what they want of them.
    """
    clicks = Clicks()
    yield {"clicks": clicks}
    if clicks.pages:
        logging.getLogger("handlers").info("clicks counted", extra={"fields": {"count": clicks.pages.total()}})


app = App("billing", lifespan=resources)
