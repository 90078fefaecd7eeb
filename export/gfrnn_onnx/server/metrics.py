"""What the server counts, for Prometheus; a registry of its own for each server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_STEP_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512)
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters, gauges and histograms; `text` has them as Prometheus reads them."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("gfrnn_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.request_seconds = Histogram(
            "gfrnn_request_seconds", "From a request's head to its answer's end.", buckets=_SECONDS, registry=registry
        )
        self.first_seconds = Histogram(
            "gfrnn_first_symbol_seconds",
            "From a streamed request to the first text that the model wrote.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.symbols = Counter("gfrnn_symbols", "Bytes written.", registry=registry)
        self.prompt_symbols = Counter("gfrnn_prompt_symbols", "Bytes of prompts read.", registry=registry)
        self.cached_symbols = Counter(
            "gfrnn_cached_symbols", "Bytes of prompts whose state was known.", registry=registry
        )
        self.rows = Gauge("gfrnn_rows", "Sequences that have a row.", registry=registry)
        self.waiting = Gauge("gfrnn_waiting", "Sequences that wait for a row.", registry=registry)
        self.step_seconds = Histogram(
            "gfrnn_step_seconds", "A run over all rows.", buckets=_STEP_SECONDS, registry=registry
        )
        self.step_rows = Counter("gfrnn_step_rows", "Rows of all runs.", registry=registry)

    def step(self, rows: int, seconds: float) -> None:
        """Counts one run."""
        self.step_seconds.observe(seconds)
        self.step_rows.inc(rows)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
