"""The repository keeps its own rules: layout, sizes, import weight, bans, pins."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("gateway", "router", "budget", "kernels")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}

# The bans of pyproject.toml (TID251), and the files that may use each.
PERMITTED = {
    r"asyncio\.(create_task|ensure_future)\b": set(),
    r"\btime\.time\b": {"gateway/app.py"},
    r"\bos\.(environ|getenv)\b": {"gateway/config/load.py"},
    r"\bhttpx\.AsyncClient\b": {"gateway/backends/probe.py", "gateway/webhook.py"},
    r"\bhttpx\.Client\b": set(),
    r"^import requests\b": set(),
}

# Written apart, so that this file does not contain what it looks for.
FOREIGN_ADDRESSES = tuple(
    "".join(parts)
    for parts in (
        ("pypi.", "org"),
        ("pythonhosted.", "org"),
        ("registry.npmjs.", "org"),
        ("deb.debian.", "org"),
    )
)
MACHINE_PATHS = tuple("".join(parts) for parts in (("/opt", "/wheels"), ("/opt", "/pypi"), ("/work", "/main")))


def listed_files():
    """Every file of the repository that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()})


def python_files(*folders):
    """The Python files below `folders`, or all."""
    files = [path for path in listed_files() if path.suffix == ".py"]
    return [path for path in files if not folders or path.relative_to(ROOT).parts[0] in folders]


def relative(path):
    """A path as it is named in messages."""
    return path.relative_to(ROOT).as_posix()


def functions_of(path):
    """Every function definition in a file."""
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_file_is_longer_than_the_gate():
    """A Python file has at most 400 lines."""
    lengths = {relative(path): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_gate():
    """A function has at most 60 lines, its docstring included."""
    lengths = {
        f"{relative(path)}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in python_files()
        for node in functions_of(path)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_every_module_says_what_it_owns():
    """Every module with code in it has a docstring."""
    silent = [
        relative(path)
        for path in python_files(*PACKAGES, "bench")
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


def test_every_test_states_a_behaviour():
    """Every test function has a docstring of one paragraph that ends as a sentence."""
    wrong = [
        f"{relative(path)}:{node.name}"
        for path in python_files("tests")
        for node in functions_of(path)
        if node.name.startswith("test_")
        and not re.fullmatch(r"\S[^\n]*(\n[^\n]+)*[.!?]", ast.get_docstring(node) or "")
    ]
    assert wrong == []


def test_no_module_is_called_after_nothing():
    """A module is named after its concept, so none is called utils or common."""
    names = {relative(path): {path.stem, *path.relative_to(ROOT).parts[:-1]} for path in python_files(*PACKAGES)}
    assert {name for name, parts in names.items() if parts & FORBIDDEN_NAMES} == set()


def test_top_level_is_the_documented_one():
    """The folders at the top are those of the table in docs/architecture.md."""
    documented = set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE))
    present = {path.relative_to(ROOT).parts[0] for path in listed_files() if path.parent != ROOT}
    assert {name for name in present if not name.startswith(".")} <= documented
    assert {name for name in documented if not (ROOT / name).is_dir()} == set()


def test_no_foreign_distribution_owns_our_names():
    """No other installed distribution brings a package called gateway, router, budget or kernels."""
    owners = importlib.metadata.packages_distributions()
    foreign = {name: set(owners.get(name, ())) - {"thinkgate"} for name in PACKAGES}
    assert not any(foreign.values()), foreign


def test_everything_but_the_kernels_imports_without_tensors():
    """Importing all of gateway, router and budget loads no tensor library."""
    code = """
import importlib, pkgutil, sys
for name in ("gateway", "router", "budget"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
heavy = {"torch", "transformers", "numpy", "triton", "tokenizers", "gguf", "accelerate", "vllm"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("banned", PERMITTED)
def test_banned_calls_stay_in_their_files(banned):
    """What pyproject.toml bans is used in its permitted files only, whatever a comment says to ruff."""
    users = {relative(path) for path in python_files(*PACKAGES) if re.search(banned, path.read_text(), re.MULTILINE)}
    assert users <= PERMITTED[banned]


def test_ignored_bans_are_the_permitted_files():
    """pyproject.toml lifts the ban of TID251 for no file that PERMITTED does not name."""
    ignores = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    lifted = {name for name, rules in ignores.items() if "TID251" in rules} - {"tests/**", "bench/**"}
    assert lifted <= set().union(*PERMITTED.values())


def test_every_lint_ignore_states_its_reason():
    """Each rule switched off in pyproject.toml has a comment on its line."""
    text = (ROOT / "pyproject.toml").read_text()
    ruff = text[text.index("[tool.ruff]") : text.index("[tool.mypy]")]
    after_select = ruff[ruff.index("\nignore = ") :]
    codes = [line for line in after_select.splitlines() if re.match(r'\s+"[A-Z]+\d*",', line)]
    assert codes
    assert [line for line in codes if "#" not in line] == []


def test_constraints_pin_every_dependency():
    """Each dependency but the vllm extra's is pinned, torch first, at a version the project allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    project = PYPROJECT["project"]
    groups = [
        project["dependencies"],
        *(v for k, v in project["optional-dependencies"].items() if k != "vllm"),
    ]
    wanted = [Requirement(text) for group in groups for text in group]
    assert pins[0].name == "torch"
    assert [r.name for r in wanted if not r.specifier.contains(versions.get(canonicalize_name(r.name), "0"))] == []


def test_versions_agree():
    """The project, the chart and the application in it carry one version."""
    chart = yaml.safe_load((ROOT / "deploy/helm/thinkgate/Chart.yaml").read_text())
    assert PYPROJECT["project"]["version"] == chart["version"] == chart["appVersion"]


def test_continuous_integration_runs_checks_and_tests():
    """.ci/run is executable and ends in `make check test`."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check test" in script.read_text()


@pytest.mark.parametrize("needle", [*FOREIGN_ADDRESSES, *MACHINE_PATHS])
def test_no_file_names_a_registry_or_a_machine(needle):
    """Files name packages, never the registries or the machine they once came from."""
    naming = [relative(path) for path in listed_files() if needle.encode() in path.read_bytes()]
    assert naming == []
