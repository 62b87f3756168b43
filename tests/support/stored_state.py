"""What a test's database holds: applied ids and positions."""

from __future__ import annotations

from harness import Place, query

from consumer import App


async def effect_ids(place: Place) -> list[str]:
    """The ids of all effects, in order, with repetitions."""
    return [row[0] for row in await place.effects()]


async def positions(place: Place, app: App) -> dict[int, int]:
    """Partition -> position, of the App's first topic."""
    rows = await query(
        place.dsn, "select partition, next_offset from consumer.positions where (app, topic) = ($1, $2)",
        app.name, app.topics[0],
    )  # fmt: skip
    return dict(rows)
