"""Whether the server is well, and its figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields as fields_of
from time import time
from typing import TYPE_CHECKING, Any

from .errors import Refused
from .metrics import Stats
from .service import Call, Service
from .telling import Json

if TYPE_CHECKING:
    from prometheus_client.core import Metric

GAUGES = {"slots", "running", "waiting", "context", "cells_used", "cells_reserved"}


async def health(call: Call) -> Json:
    """Says ok as soon as requests are taken. Needs no key and tells nothing else."""
    if not call.service.ready:
        raise Refused("the server is shutting down", status=503, code="shutting_down", retry_after=5)
    return {"status": "ok"}


async def metrics(call: Call) -> bytes:
    """Counters and gauges in Prometheus' text format, for each loaded model."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import generate_latest

    registry = CollectorRegistry()
    registry.register(_Figures(call.service))
    return generate_latest(registry)


class _Figures:
    """What prometheus_client asks for figures at the time they are wanted."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        service = self._service
        yield GaugeMetricFamily("llmkit_uptime_seconds", "Since the server began.", value=time() - service.began)
        answered = CounterMetricFamily("llmkit_http_requests", "Requests answered.", labels=["route", "status"])
        for (route, status), count in sorted(service.requests.items()):
            answered.add_metric([route, str(status)], count)
        yield answered
        loaded = [(each.name, each.stats) for each in service.models.list() if each.stats is not None]
        for field in fields_of(Stats):
            kind: Any = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
            name, scale = f"llmkit_{field.name}", 1.0
            if field.name.endswith("_ms"):
                name, scale = name[:-3] + "_seconds", 1e-3
            family = kind(name, field.name.replace("_", " "), labels=["model"])
            for model, stats in loaded:
                family.add_metric([model], getattr(stats, field.name) * scale)
            yield family
