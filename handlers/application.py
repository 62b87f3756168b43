"""The App, and what its handlers share beside the database."""

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from consumer import App


class Clicks:
    """Clicks of this worker process by page, logged when it stops. Lost when it is killed: that is what an opt-out means."""

    def __init__(self) -> None:
        self.pages: Counter[str] = Counter()


@asynccontextmanager
async def resources(app: App) -> AsyncIterator[dict[str, object]]:
    """Made once in each worker process, before its first message; handlers name what they want of it."""
    clicks = Clicks()
    yield {"clicks": clicks}
    if clicks.pages:
        logging.getLogger("handlers").info("clicks counted", extra={"fields": {"count": clicks.pages.total()}})


app = App("billing", lifespan=resources)
