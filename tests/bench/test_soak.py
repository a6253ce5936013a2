"""When memory counts as flat and a gateway as clean."""

import pytest

from bench import soak

METRICS = """# HELP thinkgate_held_tokens tokens held
# TYPE thinkgate_held_tokens gauge
thinkgate_held_tokens{scope="key"} 12.0
thinkgate_held_tokens{scope="org"} 30
thinkgate_inflight_requests 0.0
thinkgate_held_tokens_total 99
"""


def memory(*mb):
    readings = soak.Memory()
    for block, value in enumerate(mb):
        readings.add(block * 1000, value)
    return readings


def test_warming_up_is_not_leaking():
    """Pools and arenas fill in the first blocks; the line is fitted after them."""
    found = memory(50, 80, 90, 90, 90.1, 90, 90.1, 90).verdict()
    assert found["flat"]
    assert found["growth_mb"] < 0.1
    assert (found["start_mb"], found["end_mb"], found["peak_mb"]) == (50, 90, 90.1)


def test_a_steady_climb_is_a_leak():
    """A megabyte per thousand requests is about a kilobyte each, and not flat."""
    found = memory(*range(50, 61)).verdict()
    assert not found["flat"]
    assert found["growth_bytes_per_request"] == pytest.approx(1024**2 / 1000, abs=0.01)


def test_too_few_readings_prove_nothing():
    """Flatness needs at least three readings after the warm-up."""
    assert not memory(50, 50, 50).verdict()["flat"]


def test_shrinking_is_flat():
    """Only growth is a leak."""
    assert memory(90, 89, 88, 80, 70, 60, 50).verdict()["flat"]


def test_a_metric_is_summed_over_its_labels_and_not_over_its_namesakes():
    """A gauge per scope has as many lines as scopes; `_total` is another metric."""
    assert soak.parse_metric(METRICS, "thinkgate_held_tokens") == 42
    assert soak.parse_metric(METRICS, "thinkgate_inflight_requests") == 0
    assert soak.parse_metric(METRICS, "thinkgate_missing") is None


def test_a_block_holds_every_request_once():
    """Plain answers and whole streams make up the requests; hang-ups come on top."""
    block = soak.Block.of(5000, 500)
    assert block.plain + block.streams == 5000
    assert (block.streams, block.hangups) == (1000, 500)


def test_failures_of_all_kinds_count():
    """Refused, broken, short and unfinished answers are bad; hang-ups of ours are not."""
    count = soak.Count()
    client = {"ok": 7, "hangups": 2, "bad": 1, "errors": 1, "short": 1, "unfinished": 1, "sample": "no"}
    count.add(client)
    count.add(client | {"sample": "later"})
    assert (count.requests, count.disconnects, count.bad, count.sample) == (14, 4, 8, "no")
