"""Export traces by OTLP over HTTP to the address in the standard OTEL_EXPORTER_OTLP_ variables."""

from vessa.errors import InvalidConfig
from vessa_server import __version__


def export_traces() -> None:
    """Set up the export of this process's spans. Raises InvalidConfig without the extra `otel`."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidConfig("VESSA_TRACES needs OpenTelemetry: pip install 'vessa-server[otel]'") from error
    about = Resource.create({"service.name": "vessa-annotator", "service.version": __version__})
    provider = TracerProvider(resource=about)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
