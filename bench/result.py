"""What every benchmark prints: one JSON object that says what was measured, on what, with what.

Owns: the envelope (machine, versions, command) and the flags all benchmarks share.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUR_PACKAGES = ("thinkgate", "uvicorn", "uvloop", "httptools", "msgspec", "fastapi", "pydantic")


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line with `--quick` and `--json`."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="under 50 s on two cores, with less certainty")
    flags.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    return flags


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory[1]) / 1024**2, 1) if memory else None,
        "kernel": platform.release(),
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    """Of what decides our own figures."""
    found: dict[str, str | None] = {"python": platform.python_version(), "commit": commit()}
    for package in OUR_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit measured, with `+` when the tree differs from it; None outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty=+", "--abbrev=12"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


def envelope(name: str, *, quick: bool) -> dict[str, Any]:
    """The part of a result that is the same for every benchmark."""
    return {
        "bench": name,
        "command": " ".join(["python", "-m", f"bench.{name}", *sys.argv[1:]]),
        "quick": quick,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def emit(result: dict[str, Any], *, as_json: bool) -> None:
    """Print the object as the last line, if asked to."""
    sys.stdout.flush()
    if as_json:
        print(json.dumps(result))
