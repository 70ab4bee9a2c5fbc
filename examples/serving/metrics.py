"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector

# Seconds, from a small model on a GPU to a queue on a CPU.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, in_flight: Callable[[], int], waiting: Callable[[], int], max_batch: int) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("classify_requests", "Requests by the status of their answer", ["status"], registry=registry)
        times = {
            "request": "From a request's arrival to its answer, with status 200",
            "decode": "Waiting for a decoding thread, and decoding",
            "wait": "An image's wait for its batch",
            "model": "A call of the model",
        }
        self.seconds = {
            name: Histogram(f"classify_{name}_seconds", text, buckets=SECONDS, registry=registry)
            for name, text in times.items()
        }
        sizes = sorted({1, 2, 4, 8, 16, 32, 64, 128, max_batch})
        self.batch_size = Histogram("classify_batch_size", "Images in a call of the model", buckets=sizes, registry=registry)
        self.model = Info("classify_model", "What is served", registry=registry)
        gauges = {"in_flight": "Requests that have arrived and aren't answered", "waiting": "Images that wait for their batch"}
        for (name, text), value in zip(gauges.items(), (in_flight, waiting), strict=True):
            Gauge(f"classify_{name}", text, registry=registry).set_function(value)

    def batch(self, size: int, waits: list[float], seconds: float) -> None:
        """Notes a call of the model."""
        self.batch_size.observe(size)
        self.seconds["model"].observe(seconds)
        for wait in waits:
            self.seconds["wait"].observe(wait)
