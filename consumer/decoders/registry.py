"""Schemas of one registry, fetched before they are needed and kept.

A schema never changes under its id. Requests run in threads, never in the event loop. A registry that is down is an
outage: what needs a schema waits. An id that the registry does not know twice, some seconds apart, is the message's fault:
a follower of a registry may lag behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from consumer.core.errors import RunAgain, ServiceUnavailable
from consumer.core.models import Unfit
from consumer.decoders.registry_client import RegistryClient, RegistryUnavailable, Schema, SchemaUnknown
from consumer.decoders.wire_format import SchemaKey
from consumer.logs import event
from consumer.settings import Settings

CONFIRM_SECONDS = 5.0  # after which an unknown id is asked for again, and believed
_UNKNOWN_SECONDS = 60.0  # for which an unknown id is not asked for again
_PAUSE_SECONDS_MAX = 10.0  # between requests to a registry that does not answer
_LOG_SECONDS = 30.0
_UNKNOWN_MAX = 10_000  # ids kept as unknown


class SchemaNotFetched(RunAgain):
    """A value was decoded before its schema was fetched.

    It is decoded again.
    """


@dataclass(slots=True)
class _Wanted:
    """A schema that is being fetched."""

    task: asyncio.Task[None] | None = None
    unknown_at: float | None = None  # monotonic: when the registry first said that it knows none


@dataclass(slots=True, eq=False)
class Registry:
    """The schemas of one registry.

    client: asks for them. error: why the registry gives no answer now; empty while it does.
    """

    client: RegistryClient
    error: str = ""
    _schemas: dict[SchemaKey, Schema] = field(default_factory=dict)
    _unknown: dict[SchemaKey, float] = field(default_factory=dict)  # until when, monotonic
    _wanted: dict[SchemaKey, _Wanted] = field(default_factory=dict)
    _failures: int = 0
    _logged_at: float = float("-inf")

    def needs(self, key: SchemaKey) -> bool:
        """Return whether a schema must be fetched before it is used."""
        return key not in self._schemas and self._unknown.get(key, 0.0) < time.monotonic()

    def is_fetching(self, key: SchemaKey) -> bool:
        """Return whether a schema was asked for and has not come yet."""
        return key in self._wanted

    def schema(self, key: SchemaKey) -> Schema:
        """Return a schema that was fetched.

        Raises Unfit for one that the registry does not know, and SchemaNotFetched.
        """
        schema = self._schemas.get(key)
        if schema is not None:
            return schema
        if key in self._unknown:
            raise Unfit(
                f"schema {key} is unknown to the registry; register it, or check that CONSUMER_SCHEMA_REGISTRY_URL is the "
                "producer's registry, then retry"
            )
        raise SchemaNotFetched(f"schema {key} is not fetched yet")

    async def fetch(self, keys: Iterable[SchemaKey], seconds: float) -> bool:
        """Fetch schemas; return whether all are settled after so many seconds.

        What is not goes on being fetched.
        """
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        for key in keys:
            if self.needs(key):
                wanted = self._wanted.setdefault(key, _Wanted())
                if wanted.task is None or wanted.task.done() or wanted.task.get_loop() is not loop:
                    wanted.task = loop.create_task(self._fetch(key, wanted))
                tasks.add(wanted.task)
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        return all(task.done() for task in tasks)

    async def fetch_all(self, keys: Iterable[SchemaKey], seconds: float) -> None:
        """Fetch schemas. Raises ServiceUnavailable after so many seconds."""
        if not await self.fetch(keys, seconds):
            raise ServiceUnavailable(
                f"schema registry: {self.error or 'it does not answer'}, for {seconds:g} s; check "
                "CONSUMER_SCHEMA_REGISTRY_URL, or raise --wait"
            )

    async def latest(self, subject: str, seconds: float) -> Schema | None:
        """Return the newest schema of a subject; None where there is none.

        Raises ServiceUnavailable after so many seconds.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                return await self._ask(self.client.latest, subject)
            except SchemaUnknown:
                return None
            except RegistryUnavailable as error:
                if time.monotonic() >= until:
                    raise ServiceUnavailable(
                        f"schema registry: {error}; check CONSUMER_SCHEMA_REGISTRY_URL, or raise --wait"
                    ) from None
                await asyncio.sleep(self._pause())

    async def _fetch(self, key: SchemaKey, wanted: _Wanted) -> None:
        """Fetch a schema, however long that takes."""
        while True:
            try:
                self._schemas[key] = await self._ask(self.client.schema, key)
            except RegistryUnavailable:
                await asyncio.sleep(self._pause())
                continue
            except SchemaUnknown:
                now = time.monotonic()
                if wanted.unknown_at is None:
                    wanted.unknown_at = now
                if now - wanted.unknown_at < CONFIRM_SECONDS:
                    await asyncio.sleep(CONFIRM_SECONDS)
                    continue
                if len(self._unknown) >= _UNKNOWN_MAX:
                    self._unknown.clear()
                self._unknown[key] = now + _UNKNOWN_SECONDS
            del self._wanted[key]
            return

    async def _ask(self, ask: Callable[[Any], Schema], what: Any) -> Schema:
        """Ask in a thread; note whether the registry answers."""
        try:
            schema = await asyncio.to_thread(ask, what)
        except RegistryUnavailable as error:
            self._failures += 1
            self.error = str(error)
            if time.monotonic() - self._logged_at >= _LOG_SECONDS:
                self._logged_at = time.monotonic()
                event(logging.WARNING, "waiting for the schema registry", error=self.error)
            raise
        except SchemaUnknown:
            self._answers()
            raise
        self._answers()
        return schema

    def _answers(self) -> None:
        if self._failures:
            event(logging.INFO, "the schema registry answers again", failures=self._failures)
        self._failures, self.error, self._logged_at = 0, "", float("-inf")

    def _pause(self) -> float:
        return float(min(_PAUSE_SECONDS_MAX, 0.2 * 2.0 ** min(self._failures, 10)))


_registries: dict[tuple[object, ...], Registry] = {}


def registry_for(settings: Settings) -> Registry:
    """Return the registry that the settings name.

    The same settings have one in a process.

    Raises Misconfigured.
    """
    secrets = (settings.schema_registry_password, settings.schema_registry_token)
    key = (
        settings.schema_registry_url,
        settings.schema_registry_username,
        settings.schema_registry_ca_file,
        settings.allow_insecure,
        *(None if secret is None else secret.get_secret_value() for secret in secrets),
    )
    if key not in _registries:
        _registries[key] = Registry(RegistryClient(settings))
    return _registries[key]
