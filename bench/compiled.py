"""The two native programs, compiled when they are first needed.

Owns: bench/native and its build folder. Python is too slow for both ends: a load generator in Python
would measure itself.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

NATIVE = Path(__file__).resolve().parent / "native"
BUILD = NATIVE / "build"
SOURCES = {"fastup": ("fastup.c", "shapes.c", "shapes.h", "heap.h"), "load": ("load.c",)}


def compiled(name: str) -> Path:
    """The path of an up-to-date executable.

    Raises: FileNotFoundError without a C compiler; CalledProcessError if the compiler refuses.
    """
    sources = [NATIVE / source for source in SOURCES[name]]
    executable = BUILD / name
    if executable.exists() and executable.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return executable
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("the benchmarks need a C compiler: apt-get install gcc libc6-dev")
    BUILD.mkdir(exist_ok=True)
    # into place by rename: another benchmark or test may be compiling, or running the old one
    fresh = BUILD / f"{name}.{id(executable):x}"
    units = [str(s) for s in sources if s.suffix == ".c"]
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(fresh), *units], check=True)
    fresh.replace(executable)
    return executable
