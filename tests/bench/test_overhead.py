"""What the overhead object holds, and who is measured where."""

import argparse
import json

import pytest

from bench import harness, overhead, scenarios
from bench.figures import Run
from bench.targets import Cores, Place, Target, read_peers


def a_run(us):
    return Run(
        us_per_unit=us, units_per_s=10.0, delivered=1.0, added_p50_us=1.0, added_p99_us=2.0, bad=0,
        cpu_percent=50.0, noise_percent=1.0,
    )  # fmt: skip


def flags(**changed):
    return argparse.Namespace(**({"quick": False, "only": None, "scenarios": None, "rounds": None} | changed))


def test_figures_come_from_their_scenarios():
    """Requests from ns32, tokens from the paced streams; ratios are ours over theirs."""
    found = overhead.collect({
        "ns32": {"thinkgate": [a_run(140.0)], "smg": [a_run(280.0)], "vllm-router": [a_run(100.0)]},
        "st64": {"thinkgate": [a_run(9.0)]},
        "gap200": {"thinkgate": [a_run(55.0)], "smg": [a_run(44.0)]},
        "capped64": {"thinkgate": [a_run(12.0)]},
        "capped_gap200": {"thinkgate": [a_run(75.0)]},
    })  # fmt: skip
    assert found["us_per_request"] == 140
    assert (found["us_per_token"], found["us_per_token_saturated"]) == (55, 9)
    assert (found["us_per_capped_token"], found["us_per_capped_token_saturated"]) == (75, 12)
    assert (found["delivered"], found["delivered_capped"]) == (1.0, 1.0)
    assert (found["ratio_vs_smg"], found["ratio_vs_vllm_router"]) == (0.5, 1.4)
    assert (found["token_ratio_vs_smg"], found["ratio_vs_litellm"]) == (1.25, None)


def test_a_run_without_our_gateway_is_all_null():
    """Figures that were not measured are null, never zero."""
    found = overhead.collect({"ns32": {"smg": [a_run(280.0)], "nginx": []}})
    assert found["us_per_request"] is None
    assert found["ratio_vs_smg"] is None
    assert list(found["scenarios"]["ns32"]) == ["smg"]


def test_the_report_has_one_row_per_gateway():
    """Tables for people name every gateway and what was not measured."""
    found = overhead.collect({"ns32": {"smg": [a_run(280.0)]}, "gap200": {"smg": [a_run(44.0)]}})
    found["processes"] = {"smg": {"start_s": 0.5, "idle_mb": None, "peak_mb": 60.0}}
    text = overhead.report(found)
    assert text.count("| smg ") == 3
    assert "### gap200: streams of 100 tokens, 200 connection(s), 20 ms between tokens" in text


def test_a_quick_run_asks_others_for_plain_answers_alone():
    """A full run puts every scenario to every gateway."""
    full, quick = overhead.plan_of(flags()), overhead.plan_of(flags(quick=True))
    assert full.includes("capped64", "nginx")
    assert full.includes("gap200", "thinkgate")
    assert quick.includes("gap200", "thinkgate")
    assert not quick.includes("gap200", "nginx")
    assert quick.includes("ns32", "nginx")


def test_slow_starters_are_no_part_of_a_quick_run(capsys):
    """LiteLLM needs longer to start than a quick run takes, and a line says that it was left out."""
    names = [peer.name for peer in overhead.chosen(flags(quick=True))]
    assert names[0] == "thinkgate"
    assert "litellm" not in names
    assert "skip litellm" in capsys.readouterr().err
    assert "litellm" in [peer.name for peer in overhead.chosen(flags())]
    assert [peer.name for peer in overhead.chosen(flags(only="nginx"))] == ["nginx"]


def test_scenarios_agree_with_themselves():
    """What a complete stream delivers is what the upstream thinks, capped, plus its answer."""
    for name, scenario in scenarios.SCENARIOS.items():
        if not scenario.is_stream:
            continue
        think = min(scenario.think, scenarios.CAP - 1)
        assert think + scenario.answer == scenario.tokens, name


def test_bodies_are_valid_requests_on_disk(tmp_path):
    """The load generator sends what the scenarios say."""
    scenarios.write_bodies(tmp_path)
    assert json.loads((tmp_path / "plain.json").read_text()) == scenarios.PLAIN
    assert json.loads((tmp_path / "capped.json").read_text())["thinking_token_budget"] == scenarios.CAP


@pytest.fixture
def place(tmp_path):
    return Place(9100, 1, tmp_path, tmp_path / "peers")


def test_placeholders_of_every_peer_are_filled_in(place):
    """No command, header or rendered file reaches a process with a hole in it."""
    for peer in read_peers().values():
        target = Target(peer, place, Cores(gateway=0, clients=1))
        filled = [target.fill(part) for part in (*peer.cmd, *peer.env.values())] + target.headers
        assert not [part for part in filled if "{" in part], peer.name
    for rendered in place.scratch.iterdir():
        assert "@" not in rendered.read_text().replace('"@type"', ""), rendered


def test_ports_of_peers_do_not_collide(place):
    """All gateways of a run are up at once."""
    cores = Cores(gateway=0, clients=1)
    targets = [Target(peer, place, cores) for peer in read_peers().values()]
    ports = [port for t in targets for port in (t.port, t.metrics_port)]
    assert len(set(ports)) == len(ports)


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(place, capsys):
    """A missing gateway is no error, it is a gap in the table."""
    with harness.started([read_peers()["smg"]], place, Cores(gateway=0, clients=0)) as up:
        assert up == {}
    assert "skip smg: not installed" in capsys.readouterr().err


def test_versions_are_read_from_what_is_installed(place):
    """The object says which release it was measured against."""
    site = place.peers / "v" / "smg" / "lib" / "python3.11" / "site-packages"
    (site / "smg-1.13.0.dist-info").mkdir(parents=True)
    cores = Cores(gateway=0, clients=1)
    assert Target(read_peers()["smg"], place, cores).version() == "1.13.0"
    assert Target(read_peers()["vllm-router"], place, cores).version() is None
