"""The metrics of several processes as one: each writes its own into files, and whoever is scraped adds them up.

Owns: writing a process's families in the files of prometheus-client's multiprocess mode, and how gauges are merged.
Does not own: what is counted (metrics.py), when it is written and who is alive (workers.py). O(series) per write.

Counters and histograms outlive their process: its successor has the same number and goes on from what it finds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
    from prometheus_client.samples import Sample

Merge = Literal["livesum", "livemin", "livemax"]
MERGED: dict[str, Merge] = {
    "thinkgate_held_tokens": "livesum",
    "thinkgate_held_nano_usd": "livesum",
    "thinkgate_inflight_requests": "livesum",
    "thinkgate_settlements_waiting": "livesum",
    "thinkgate_backend_calls": "livesum",
    "thinkgate_store_reachable": "livemin",
    "thinkgate_backend_up": "livemin",
    "thinkgate_backend_breaker_open": "livemax",
    "thinkgate_prefix_trusted": "livemin",
    "thinkgate_kv_live": "livemin",
    "thinkgate_kv_blocks": "livemax",
    "thinkgate_queue_calls": "livesum",
    "thinkgate_backend_cap_binds": "livemin",
    "thinkgate_config_reload_failed": "livemax",
    "thinkgate_store_stale": "livemax",
}


class MetricFiles:
    """What one process writes.

    Args:
        metrics: what it counts.
        folder: where all of them write.
        number: of the process among them.
    """

    def __init__(self, metrics: Collector, folder: Path, number: int) -> None:
        self._metrics = metrics
        self._folder = folder
        self._number = number
        self._files = {kind: MmapedDict(str(folder / f"{kind}_{number}.db")) for kind in ("counter", "histogram")}
        self._before = {
            kind: {key: value for key, value, _ in file.read_all_values()} for kind, file in self._files.items()
        }

    def write(self) -> None:
        """Bring the files up to date."""
        gauges: defaultdict[Merge, list[tuple[str, float]]] = defaultdict(list)
        for family in self._metrics.collect():
            if family.type == "gauge":
                gauges[MERGED[family.name]] += [(_key(family, sample), sample.value) for sample in family.samples]
                continue
            file, before = self._files[family.type], self._before[family.type]
            for key, value in _own_values(family):
                file.write_value(key, before.get(key, 0.0) + value, 0.0)
        for merge in set(MERGED.values()):
            self._replace_gauges(merge, gauges[merge])

    def close(self) -> None:
        """Write for the last time."""
        self.write()
        for file in self._files.values():
            file.close()

    def _replace_gauges(self, merge: Merge, values: list[tuple[str, float]]) -> None:
        """Gauges come and go, so their file is written anew; a reader sees the old one or the new one."""
        path = _gauge_path(self._folder, merge, self._number)
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        file = MmapedDict(str(new))
        for key, value in values:
            file.write_value(key, value, 0.0)
        file.close()
        new.replace(path)


def forget_gauges(folder: Path, number: int) -> None:
    """A process is dead: what it was doing is over."""
    for merge in set(MERGED.values()):
        _gauge_path(folder, merge, number).unlink(missing_ok=True)


def registry_of(folder: Path) -> CollectorRegistry:
    """Reads what all processes wrote."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return registry


def _gauge_path(folder: Path, merge: Merge, number: int) -> Path:
    return folder / f"gauge_{merge}_{number}.db"


def _own_values(family: Metric) -> Iterator[tuple[str, float]]:
    """As the files have them: buckets count what fell into them alone, and their sum is the count."""
    below = 0.0
    for sample in family.samples:
        if sample.name.endswith("_count") and family.type == "histogram":
            below = 0.0
        elif sample.name.endswith("_bucket"):
            yield _key(family, sample), sample.value - below
            below = sample.value
        else:
            yield _key(family, sample), sample.value


def _key(family: Metric, sample: Sample) -> str:
    return mmap_key(family.name, sample.name, list(sample.labels), list(sample.labels.values()), family.documentation)
