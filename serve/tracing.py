"""Traces of served requests, by OpenTelemetry: what Ray Serve's own tracing is told to send them to.

    RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=serve.tracing:exporter RAY_SERVE_TRACING_SAMPLING_RATIO=1 \\
        OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 make serve

Set where Ray is started, for its proxies and replicas are Ray's processes. A request that comes with a `traceparent`
goes on with that trace. The ratio is Serve's: 0.01 unless it is set.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def exporter() -> list[SpanProcessor]:
    """For Serve. OTEL_EXPORTER_OTLP_* say where to, and with which headers."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
