"""The command that serves: how it starts beside another, and how it ends."""

import base64
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from ip2p import images
from ip2p.recipe import REPOSITORY
from tests.serve.conftest import free_port, noise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(port: int, *flags: object) -> list[str]:
    recipe = ["--recipe", "recipes/miniature.yaml"]
    return [sys.executable, "-m", "serve.app", *recipe, "--open", "--port", str(port), *map(str, flags)]


@contextmanager
def serving(tmp_path, port: int, *flags: object) -> Iterator[subprocess.Popen[str]]:
    """The command on the miniature, once it serves. Its output is in tmp_path/log."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(port, *flags), cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True
        )
    try:
        while "serving the" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_edits_finish_and_ends_with_status_0(tmp_path, number):
    port, answers = free_port(), []
    picture = base64.b64encode(images.encode(noise(32, 32, 3))).decode()
    body = {"image": picture, "edits": [{"instruction": "make it night", "num_inference_steps": 100}] * 4}

    def edit() -> None:
        answers.append(httpx.post(f"http://127.0.0.1:{port}/v1/edits", json=body, timeout=120))

    with serving(tmp_path, port) as process:
        client = threading.Thread(target=edit)
        client.start()
        time.sleep(1.0)
        assert not answers, "the edits are made already"
        process.send_signal(number)
        assert process.wait(120) == 0
        client.join(60)
    assert [answer.status_code for answer in answers] == [200]
    log = (tmp_path / "log").read_text()
    assert "edits in flight are finished first" in log
    for alarming in ("Traceback", "Aborted", "stack trace", "SIGTERM handler"):
        assert alarming not in log, log[-3000:]


def test_a_second_service_at_the_port_is_refused_before_it_loads_anything(tmp_path):
    port = free_port()
    with serving(tmp_path, port):
        second = subprocess.run(command(port), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert second.stderr.strip().splitlines()[-1] == (
        f"error: port {port} is in use; stop its service, or choose another --port"
    )
    assert "Started a local Ray instance" not in second.stderr


def test_https_is_served_with_a_certificate(tmp_path):
    port = free_port()
    made = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 1 -keyout key.pem -out cert.pem"
    made += " -addext subjectAltName=DNS:localhost"
    subprocess.run(made.split(), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    with serving(tmp_path, port, "--tls_cert", tmp_path / "cert.pem", "--tls_key", tmp_path / "key.pem"):
        answer = httpx.get(f"https://localhost:{port}/healthz", verify=context, timeout=60)
        assert answer.json()["status"] == "ok"
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/healthz", timeout=60)
