"""A fake upstream of its own for the tests that talk to it."""

import shutil
import socket
import subprocess
import time

import httpx
import pytest

from bench.compiled import compiled


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="session")
def upstream():
    """The base URL of a running fastup; skipped without a C compiler."""
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        pytest.skip("needs a C compiler")
    port = free_port()
    process = subprocess.Popen([compiled("fastup"), "-p", str(port)])
    try:
        end = time.monotonic() + 10
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < end
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def http(upstream):
    """One client for all tests: making one costs more than most of them."""
    with httpx.Client(base_url=upstream, verify=False) as client:
        yield client


@pytest.fixture
def client(http):
    """An HTTP client of the upstream, with its knobs as they are at the start."""
    http.get("/__cfg?think=50&answer=4&gap_us=0&first_us=0&burst=1")
    return http
