"""OpenTelemetry, with the extra `otel`: spans, and metrics by OTLP."""
