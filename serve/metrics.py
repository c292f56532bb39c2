"""Prometheus metrics of one ingress process, served at GET /metrics."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Other paths are counted as one, or strangers could add a time series with every request.
KNOWN_PATHS = {
    "/", "/static/page.css", "/static/page.js",
    "/healthz", "/readyz", "/metrics", "/openapi.json",
    "/v1/defaults", "/v1/models", "/v1/edits", "/v1/images/edits", "/v1/feedback",
}  # fmt: skip


class Metrics:
    """Counters and histograms. `in_flight` returns the number of edits in flight when scraped."""

    def __init__(self, in_flight: Callable[[], float]):
        self.registry = CollectorRegistry()
        self._requests = self._add(Counter, "requests", "answers by path and status", "path", "status")
        self._edits = self._add(Counter, "edits", "completed edits", "version")
        self._retries = self._add(Counter, "retries", "edits retried after their engine died", "version")
        self._seconds = self._add(Histogram, "edit_seconds", "admission to image", "version")
        self._waited = self._add(Histogram, "wait_seconds", "wait before the first step", "version")
        self._add(Gauge, "edits_in_flight", "edits waiting or running").set_function(in_flight)

    def _add(self, kind: Any, name: str, description: str, *labels: str) -> Any:
        return kind(f"ip2p_serve_{name}", description, labels, registry=self.registry)

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path if path in KNOWN_PATHS else "other", status).inc()

    def count_edit(self, version: str, seconds: float, waited: float) -> None:
        """Count an edit that took `seconds`, of which it waited `waited` for its first step."""
        self._edits.labels(version).inc()
        self._seconds.labels(version).observe(seconds)
        self._waited.labels(version).observe(waited)

    def count_retry(self, version: str) -> None:
        self._retries.labels(version).inc()
