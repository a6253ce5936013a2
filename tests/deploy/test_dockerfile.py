"""The Dockerfile: linted, and the promises it makes about the image."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FINAL_STAGE = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


def test_hadolint_finds_nothing():
    """The linter has no finding, not even one of style."""
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_runs_as_a_user_with_a_number():
    """The user is numeric, so that Kubernetes can see it is not root, and it is the chart's."""
    assert "\nUSER 10001:10001\n" in FINAL_STAGE
    assert "runAsUser: 10001" in (ROOT / "deploy/helm/thinkgate/values.yaml").read_text()


def test_gateway_is_the_first_process():
    """ENTRYPOINT and CMD are in exec form, so that SIGTERM reaches the gateway and starts the drain."""
    commands = {
        line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1]
        for line in FINAL_STAGE.splitlines()
        if line.startswith(("ENTRYPOINT ", "CMD "))
    }
    assert json.loads(commands["ENTRYPOINT"]) == ["thinkgate"]
    assert json.loads(commands["CMD"])[0] == "serve"


def test_image_brings_no_torch_unless_asked():
    """The default image has what every store and index needs and no engine; other extras come by a build argument."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert 'ARG EXTRAS="redis,kv-events"' in DOCKERFILE
    assert not any(name.startswith("torch") for name in project["dependencies"])


def test_health_check_asks_the_live_route():
    """HEALTHCHECK asks the route that the chart's liveness probe asks."""
    assert "HEALTHCHECK" in FINAL_STAGE
    assert "/health/live" in FINAL_STAGE


def test_build_context_has_what_is_copied():
    """.dockerignore lets through every path that the Dockerfile copies."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied <= allowed
    assert all((ROOT / source).exists() for source in copied)
