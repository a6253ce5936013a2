"""How runs become figures."""

import pytest

from bench import figures
from bench.figures import Run, Spent
from bench.scenarios import SCENARIOS


def a_client(**changed):
    """What the load generator prints."""
    return {
        "ok": 100, "bad": 0, "errors": 0, "short": 0, "tokens_per_s": 10_000.0, "requests_per_s": 500.0,
        "all_ok": 120, "all_tokens": 12_000, "token_delay_us": {"p50": 90.0, "p99": 800.0},
        "latency_us": {"p50": 1000.0, "p99": 9000.0},
    } | changed  # fmt: skip


def a_run(us=100.0, noise=0.0, **changed):
    given = {
        "us_per_unit": us, "units_per_s": 1.0, "delivered": None, "added_p50_us": None, "added_p99_us": None,
        "bad": 0, "cpu_percent": 50.0, "noise_percent": noise,
    }  # fmt: skip
    return Run(**(given | changed))


SPENT = Spent(cpu_s=0.6, elapsed_s=2.0, others_s=0.1)


def test_cost_of_a_stream_is_processor_time_over_all_tokens_warm_up_included():
    """0.6 s of processor for 12,000 tokens are 50 us each."""
    run = Run.of(a_client(), SCENARIOS["gap200"], SPENT)
    assert run.us_per_unit == pytest.approx(50)
    assert run.cpu_percent == pytest.approx(30)
    assert run.noise_percent == pytest.approx(5)
    assert (run.added_p50_us, run.units_per_s) == (90.0, 10_000.0)


def test_cost_of_a_plain_answer_is_per_request():
    """0.6 s of processor for 120 answers are 5,000 us each, and latency is what the client waited."""
    run = Run.of(a_client(), SCENARIOS["ns32"], SPENT)
    assert run.us_per_unit == pytest.approx(5000)
    assert (run.added_p99_us, run.delivered) == (9000.0, None)


def test_a_gateway_that_answers_nothing_has_no_cost():
    """A division by nothing is null, not zero."""
    assert Run.of(a_client(all_ok=0), SCENARIOS["ns32"], SPENT).us_per_unit is None


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (a_client(), 1.0),
        (a_client(tokens_per_s=10_090.0), 1.0),
        (a_client(tokens_per_s=7_500.0), 0.75),
        (a_client(short=5), 0.95),
        (a_client(ok=90, errors=10), 0.9),
        (a_client(ok=0, tokens_per_s=0.0), 0.0),
    ],
)
def test_delivered_is_the_worse_of_tokens_and_complete_streams(client, expected):
    """Neither a high rate with broken streams nor whole streams too late count as delivered."""
    assert figures.delivered(client, 10_000.0) == pytest.approx(expected)


def test_delivered_needs_an_offered_rate():
    """A stream without a clock offers no rate to deliver."""
    assert figures.delivered(a_client(), None) is None


def test_medians_are_over_quiet_runs_where_there_are_any():
    """A disturbed run does not count beside a quiet one, and counts alone."""
    disturbed = a_run(us=900, noise=60)
    assert figures.median([a_run(us=100), a_run(us=120), disturbed], lambda r: r.us_per_unit) == 110
    assert figures.median([disturbed], lambda r: r.us_per_unit) == 900
    assert figures.median([a_run(us=None)], lambda r: r.us_per_unit) is None


def test_a_summary_has_units_in_its_keys_and_counts_every_failure():
    """Failures of disturbed runs are failures too."""
    runs = [a_run(us=61.234, delivered=0.99999), a_run(noise=50, bad=3)]
    found = figures.summary(runs, SCENARIOS["gap200"])
    assert found["us_per_token"] == 61.23
    assert (found["delivered"], found["bad"], found["runs"], found["quiet_runs"]) == (1.0, 3, 2, 1)
    assert "us_per_request" in figures.summary(runs, SCENARIOS["ns1"])
    assert "delivered" not in figures.summary(runs, SCENARIOS["ns1"])


def test_a_ratio_is_ours_over_theirs_or_nothing():
    """Below one we are cheaper; a peer that is not installed gives null."""
    assert figures.ratio(150, 300) == 0.5
    assert figures.ratio(150, None) is None
    assert figures.ratio(None, 300) is None


def test_a_slope_is_fitted_by_least_squares():
    """A line comes back exactly, and too few readings are flat."""
    assert figures.slope([0, 1000, 2000], [10.0, 10.5, 11.0]) == pytest.approx(0.0005)
    assert figures.slope([5], [10.0]) == 0
    assert figures.slope([5, 5], [1.0, 2.0]) == 0


def test_a_table_lines_up_and_right_aligns_figures():
    """The first column is text, the others are figures."""
    assert figures.table(["a", "us"], [["nginx", "21"], ["x", "1,000"]]).splitlines() == [
        "| a     |    us |",
        "| :---- | ----: |",
        "| nginx |    21 |",
        "| x     | 1,000 |",
    ]


@pytest.mark.parametrize(("value", "digits", "text"), [(None, 0, "-"), (1234.56, 1, "1,234.6"), ("x", 0, "x")])
def test_a_cell_shows_what_was_not_measured_as_a_dash(value, digits, text):
    """Null is visible as such."""
    assert figures.shown(value, digits) == text
