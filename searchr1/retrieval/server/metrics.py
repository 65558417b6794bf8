"""Counters of a server, for Prometheus. Several processes share a folder (PROMETHEUS_MULTIPROC_DIR)."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTED_PATHS = {"/", "/health", "/ready", "/retrieve", "/access", "/metrics", "/rerank"}
"""Any other path is counted as `other`, so that clients cannot make up counters."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """One server's counters."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "searchr1_retrieval"
        self.requests = Counter(f"{prefix}_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            f"{prefix}_request_seconds", "Time per HTTP request", ["path"], buckets=SECONDS, registry=registry
        )
        self.queries = Counter(f"{prefix}_queries", "Queries by where they were answered", ["source"], registry=registry)
        self.batch_queries = Histogram(
            f"{prefix}_batch_queries", "Queries searched together", buckets=BATCHES, registry=registry
        )
        self.batch_seconds = Histogram(f"{prefix}_batch_seconds", "Time per batch", buckets=SECONDS, registry=registry)
        self.pending = Gauge(
            f"{prefix}_pending_queries", "Waiting or being searched", registry=registry, multiprocess_mode="livesum"
        )

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count one request."""
        label = path if path in COUNTED_PATHS else "other"
        self.requests.labels(label, str(status)).inc()
        self.request_seconds.labels(label).observe(seconds)

    def observe_batch(self, queries: int, seconds: float) -> None:
        """Count one batch."""
        self.batch_queries.observe(queries)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return the counters in Prometheus' text format; with several processes, their sum."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return bytes(generate_latest(self._registry))
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return bytes(generate_latest(together))
