"""A Ray cluster of processes of its own, with the Jobs server, as `ray start` makes it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ip2p.recipe import REPOSITORY


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def ray_head(folder: Path, cpus: int = 4) -> Iterator[str]:
    """Address of the Jobs server of a cluster of one machine."""
    gcs, dashboard, agent, grpc, client = free_ports(5)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--ray-client-server-port={client}", "--object-store-memory=200000000", "--disable-usage-stats",
    ]  # fmt: skip
    unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    env = {key: value for key, value in os.environ.items() if key not in unset} | {"RAY_AUTH_MODE": "disabled"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # jobs are `python -m ...`, as in the image
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            try:
                if httpx.get(f"{address}/api/jobs/", timeout=20).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def jobs_server() -> Iterator[str]:
    # Ray's sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory() as folder, ray_head(Path(folder)) as address:
        yield address
