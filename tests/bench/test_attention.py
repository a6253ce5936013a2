"""The attention benchmark, on a batch too small to time, and what it counts."""

from bench.attention import Shape, measure


def test_every_figure_is_there_and_bytes_are_counted():
    """A small batch is measured all three ways, and the bytes saved are those of the prompt."""
    found = measure(Shape(rows=4, prompt=32, own=16, dtype="float32"), turns=1)
    assert found["bytes_ratio"] == 2.0
    assert min(found[name] for name in ("tree_ms", "apart_ms", "sdpa_ms", "plan_ms")) > 0


def test_unrelated_requests_share_nothing():
    """Without a prompt in common nothing is read less often."""
    assert measure(Shape(rows=2, prompt=0, own=20, dtype="bfloat16"), turns=1)["bytes_ratio"] == 1.0
