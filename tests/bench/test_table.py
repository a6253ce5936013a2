"""The table of the README."""

import pytest

from bench import table
from bench.claims import CLAIMS, Claim

RESULTS = {
    "overhead": {
        "us_per_request": 142.4,
        "us_per_token": 66.0,
        "delivered": 1.0,
        "ratio_vs_smg": None,
        "measured_at": "2026-11-23T05:00:00+00:00",
        "command": "python -m bench.overhead --json",
        "machine": {"cpu": "X", "cores": 2, "kernel": "6.1"},
        "versions": {"commit": "abc", "python": "3.11.7", "nginx": "1.22.1"},
        "scenarios": {
            "ns32": {"thinkgate": {"us_per_request": 142.4}, "nginx": {"us_per_request": 21.0}},
            "gap200": {"thinkgate": {"us_per_token": 66.0, "delivered": 1.0}},
        },
    }
}
LATENCY = Claim(bench="overhead", key="us_per_request", text="x", at_most=150, unit="us")


def test_a_goal_is_met_missed_or_unknown():
    """Null is neither."""
    assert LATENCY.is_met({"overhead": {"us_per_request": 150}}) is True
    assert LATENCY.is_met({"overhead": {"us_per_request": 151}}) is False
    assert LATENCY.is_met({"overhead": {"us_per_request": None}}) is None
    assert LATENCY.is_met({}) is None


def test_a_truth_is_a_goal_too():
    """Flat is yes or no."""
    flat = Claim(bench="soak", key="flat", text="x", at_least=True)
    assert (flat.is_met({"soak": {"flat": True}}), flat.is_met({"soak": {"flat": False}})) == (True, False)
    assert (flat.goal(), flat.shown(True), flat.shown(False)) == ("yes", "yes", "no")


@pytest.mark.parametrize(
    ("unit", "digits", "value", "text"),
    [
        ("us", 0, 1234.5, "1,234 us"),
        ("%", 1, 0.9994, "99.9 %"),
        ("", 2, 0.5, "0.50"),
        ("us", 0, None, "not measured"),
    ],
)
def test_a_figure_is_shown_in_its_unit(unit, digits, value, text):
    """Fractions are shown as per cent where the claim says so."""
    assert Claim(bench="b", key="k", text="x", unit=unit, digits=digits).shown(value) == text


def test_the_table_names_claims_goals_and_commands():
    """A reader sees what was claimed, measured, wanted, and how to check it."""
    lines = table.claim_table(RESULTS).splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    requests, tokens = lines[2], lines[3]
    assert "142 us" in requests
    assert "at most 150 us" in requests
    assert requests.split("|")[4].strip() == "yes"
    assert tokens.split("|")[4].strip() == "NO"
    assert "`python -m bench.overhead`" in tokens


def test_every_gateway_of_the_run_has_a_row_with_its_version():
    """Rivals are shown with what they cost in the same run, and dashes where they were not asked."""
    rows = table.peer_table(RESULTS["overhead"]).splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["thinkgate", "nginx"]
    assert "nginx 1.22.1" in rows[1]
    assert "100 %" in rows[0]
    assert rows[1].count(" - ") == 2


def test_the_document_says_on_what_it_was_measured():
    """Machine, date, commit and command stand under the table."""
    text = table.document(RESULTS)
    assert "2026-11-23, commit abc, 2 x X, Linux 6.1, Python 3.11.7" in text
    assert "[overhead.json](docs/results/overhead.json)" in text


def test_only_what_stands_between_the_markers_changes():
    """The rest of the README is somebody else's."""
    text = f"# a\n{table.START}\nold\n{table.END}\nrest\n"
    assert table.put_between(text, "new") == f"# a\n{table.START}\nnew\n{table.END}\nrest\n"
    assert table.put_between(table.put_between(text, "x"), "new") == table.put_between(text, "new")


@pytest.mark.parametrize("text", ["", table.START, f"{table.END}{table.START}"])
def test_a_readme_without_markers_is_left_alone(text):
    """A table is not put where nobody asked for it."""
    with pytest.raises(ValueError, match="no place for the table"):
        table.put_between(text, "new")


def test_the_object_is_the_last_line_of_the_output():
    """Tables for people come first, and output that ends otherwise holds no object."""
    assert table.last_object('### x\n{"not": "this"}\n{"us": 1}\n') == {"us": 1}
    assert table.last_object("no json") is None
    assert table.last_object("[1]") is None
    assert table.last_object("") is None
