"""Metrics by Prometheus' conventions: what is measured in :mod:`metaserver.timings`, as histograms and counters."""

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from metaserver.timings import BOUNDS_SECONDS, Timing


def families(timings: Mapping[str, Timing], prefix: str, label: str, what: str) -> Iterable[Metric]:
    """``prefix_duration_seconds`` (a histogram) and ``prefix_failures_total``, by ``label``."""
    durations = HistogramMetricFamily(f"{prefix}_duration_seconds", f"How long {what} took", labels=[label])
    failures = CounterMetricFamily(f"{prefix}_failures", f"How many {what} ended in an error", labels=[label])
    for name, timing in sorted(timings.items()):
        durations.add_metric([name], _cumulative(timing), timing.total_ns / 1e9)
        failures.add_metric([name], timing.failed)
    return durations, failures


def _cumulative(timing: Timing) -> list[tuple[str, float]]:
    bounds = [*(repr(bound) for bound in BOUNDS_SECONDS), "+Inf"]
    shown, seen = [], 0
    for bound, count in zip(bounds, timing.buckets, strict=True):
        seen += count
        shown.append((bound, float(seen)))
    return shown
