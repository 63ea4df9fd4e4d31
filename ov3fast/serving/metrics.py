"""The metrics at /metrics, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's metrics, in a registry of their own, so that two servers in a process don't mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry, "namespace": "ov3fast"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **own)
        self.refused = Counter("refused", "Requests refused, by the error's code.", ["code"], **own)
        self.disconnected = Counter("disconnected", "Clients that left before their response.", **own)
        self.seconds = Histogram(
            "request_seconds", "Time from a request's head to its response.", ["path"], buckets=SECONDS, **own
        )
        self.items = Counter("items", "Images and texts run through the model.", ["job"], **own)
        self.batch = Histogram("batch_size", "Images or texts per batch.", ["job"], buckets=SIZES, **own)
        self.model_seconds = Counter("model_seconds", "Time in the model.", ["job"], **own)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge evaluated when /metrics is read."""
        Gauge(name, help, namespace="ov3fast", registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
