"""OpenTelemetry spans of handlers' calls, with the extra `otel`."""
