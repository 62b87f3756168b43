"""OpenTelemetry's resource: the process that spans and metrics are of."""

from __future__ import annotations

from uuid import uuid4

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector, Resource

_INSTANCE = str(uuid4())  # two processes must not write one series


def resource_of(app: str) -> Resource:
    """Return this process's resource; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    own = Resource({SERVICE_NAME: app, SERVICE_INSTANCE_ID: _INSTANCE})
    return Resource.create().merge(own.merge(OTELResourceDetector().detect()))
