"""Run every benchmark and write the table that the README shows.

    python -m bench.table            # runs all, writes docs/results/*.json and README.md
    python -m bench.table --quick    # runs all quickly, prints the table, writes nothing
    python -m bench.table --show     # the table of the results that are already there

The table stands between two markers in README.md; everything else in that file is left alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import figures
from bench.claims import BENCHES, CLAIMS

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
PEER_COLUMNS = {"us/request": ("ns32", "us_per_request", 0), "us/token": ("gap200", "us_per_token", 1)}


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line of a benchmark's output; None if it printed none."""
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def run_bench(name: str, *, quick: bool) -> dict[str, Any] | None:
    """One benchmark in a process of its own; its progress goes to our standard error."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    found = last_object(done.stdout)
    print(done.stdout if found is None else done.stdout.rpartition("\n{")[0])
    if found is None:
        print(f"bench.{name} printed no result (exit {done.returncode})", file=sys.stderr)
    return found


def claim_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every claim with what was measured."""
    rows = []
    for claim in CLAIMS:
        mark = {True: "yes", False: "NO", None: ""}[claim.is_met(results)] if claim.goal() else ""
        command = f"`python -m bench.{claim.bench}`"
        rows.append([claim.text, claim.shown(claim.value(results)), claim.goal(), mark, command])
    return figures.table(["claim", "measured", "goal", "met", "command"], rows)


def peer_table(overhead: Mapping[str, Any]) -> str:
    """Processor time of every gateway of the run."""
    scenarios, versions = overhead["scenarios"], overhead["versions"]
    names: list[str] = []
    for by_target in scenarios.values():
        names += [name for name in by_target if name not in names]
    rows = []
    for name in names:
        cells = []
        for scenario, key, digits in PEER_COLUMNS.values():
            cells.append(figures.shown(scenarios.get(scenario, {}).get(name, {}).get(key), digits))
        fraction = scenarios.get("gap200", {}).get(name, {}).get("delivered")
        cells.append("-" if fraction is None else f"{100 * fraction:.0f} %")
        rows.append([f"{name} {versions.get(name) or ''}".strip(), *cells])
    return figures.table(["one core, same run", *PEER_COLUMNS, "delivered"], rows)


def provenance(results: Mapping[str, Mapping[str, Any]]) -> str:
    """On what, when, with what."""
    lines = []
    for name, found in results.items():
        machine, versions = found["machine"], found["versions"]
        lines.append(
            f"{name}: {found['measured_at'][:10]}, commit {versions['commit'] or 'unknown'}, "
            f"{machine['cores']} x {machine['cpu']}, Linux {machine['kernel']}, Python {versions['python']}; "
            f"`{found['command']}` -> [{name}.json](docs/results/{name}.json)"
        )
    return "\n".join(f"- {line}" for line in lines)


def document(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands between the markers."""
    parts = [claim_table(results)]
    if "overhead" in results:
        parts.append(peer_table(results["overhead"]))
    return "\n\n".join([*parts, provenance(results)])


def put_between(text: str, block: str) -> str:
    """`text` with `block` between its markers.

    Raises: ValueError if the markers are missing or in the wrong order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md has no place for the table: {START} and {END}")
    return f"{before}{START}\n{block}\n{END}{after}"


def stored() -> dict[str, dict[str, Any]]:
    """The results worth keeping, as they are in docs/results."""
    files = {name: RESULTS / f"{name}.json" for name in BENCHES}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def store(results: Mapping[str, Mapping[str, Any]]) -> None:
    """One file per benchmark."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, found in results.items():
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Run, print, write; fails if a goal is missed or a benchmark did not run."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="all of them quickly; nothing is written")
    flags.add_argument("--show", action="store_true", help="print the table of the stored results")
    flags.add_argument("--only", help="benchmarks, comma separated; the others' stored results stay")
    given = flags.parse_args()
    names = [] if given.show else (given.only.split(",") if given.only else BENCHES)
    fresh = {name: found for name in names if (found := run_bench(name, quick=given.quick)) is not None}
    results = fresh if given.quick else {**stored(), **fresh}
    print(document(results))
    if fresh and not given.quick:
        store(fresh)
        README.write_text(put_between(README.read_text(), document(results)))
    is_missed = any(claim.is_met(results) is False for claim in CLAIMS)
    return 1 if is_missed or len(fresh) < len(names) else 0


if __name__ == "__main__":
    raise SystemExit(main())
