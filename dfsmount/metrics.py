"""A mount's metrics in the text format of Prometheus: ``.dfs/metrics``."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metaserver.exposition import families
from metaserver.timings import Timing

if TYPE_CHECKING:
    from dfsmount.telling import Stats


class _Mount(Collector):
    def __init__(self, stats: "Stats", timings: Mapping[str, Timing]) -> None:
        self._stats = stats
        self._timings = timings

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield from families(self._timings, "dfsmount_operation", "operation", "operations of the kernel")
        yield CounterMetricFamily("dfsmount_read_bytes", "Bytes that programs have read", stats.read_bytes)
        yield CounterMetricFamily("dfsmount_written_bytes", "Bytes that programs have written", stats.written_bytes)
        yield CounterMetricFamily("dfsmount_chunk_reads", "Requests for blocks", stats.chunk_requests)
        yield CounterMetricFamily("dfsmount_hedged_reads", "Asked elsewhere because slow", stats.hedged_requests)
        yield CounterMetricFamily("dfsmount_failed_reads", "Requests for blocks that failed", stats.failed_requests)
        yield CounterMetricFamily("dfsmount_reconnects", "Connections to the metaserver lost", stats.reconnects)
        yield GaugeMetricFamily("dfsmount_connected", "1 while the metaserver answers", float(stats.connected))
        yield GaugeMetricFamily("dfsmount_dirty_bytes", "Written and not yet stored", stats.dirty_bytes)
        yield GaugeMetricFamily("dfsmount_cached_bytes", "Kept of what was read", stats.cached_bytes)
        yield GaugeMetricFamily("dfsmount_open_files", "Files and directories open", stats.open_files)
        yield GaugeMetricFamily("dfsmount_operations_in_progress", "Operations in progress", stats.in_progress)


def text(stats: "Stats", timings: Mapping[str, Timing]) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Mount(stats, timings))
    return generate_latest(registry).decode()
