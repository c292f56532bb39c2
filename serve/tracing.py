"""The OpenTelemetry exporter that Ray Serve's tracing sends traces of requests to.

    RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=serve.tracing:exporter RAY_SERVE_TRACING_SAMPLING_RATIO=1 \\
        OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 make serve

Set the variables where Ray is started, because its proxies and replicas are Ray's processes.
A request with a `traceparent` continues that trace. The ratio is Serve's own setting, 0.01 by
default.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def exporter() -> list[SpanProcessor]:
    """Return the processors for Serve. OTEL_EXPORTER_OTLP_* set the address and the headers."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
