"""What the tests of the endpoint share: a tiny editor's recipe, a free port, keys, pictures."""

import hashlib
import io
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from ray import serve

from ip2p.workspace import Workspace
from serve.app import start
from serve.keys import Key
from tests.evaluate.synthetic import make_recipe

TOKEN = "a key of the tests"


def make_key(name: str, token: str, **limits: int) -> Key:
    return Key(name=name, sha256=hashlib.sha256(token.encode()).hexdigest(), **limits)


@pytest.fixture(scope="session")
def recipe(tiny_sd, tiny_editor):
    return make_recipe(
        device="cpu",
        models={
            "text_to_image": {"path": str(tiny_sd)},
            "clip": {"name": "ViT-B-32", "pretrained": "openai"},
            "llm": {"path": str(tiny_sd)},
            "editor": {"path": str(tiny_editor)},
        },
        sampling={"steps": 2, "max_side": 64},
        serve={"batch_size": 4, "queue": 16, "upload_s": 2, "ingresses": 1},
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(recipe, workspace: Workspace | None, keys: list[Key] | None) -> Iterator[str]:
    """The endpoint's address."""
    port = free_port()
    start(recipe, workspace, "127.0.0.1", port, keys)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def replicas(deployment: str = "[A-Za-z]+") -> dict[int, psutil.Process]:
    """The replicas of this process's Ray, by pid."""
    processes = psutil.Process().children(recursive=True)
    title = re.compile(rf"ServeReplica:ip2p:{deployment}\b|SERVE_REPLICA::ip2p#{deployment}#")
    return {process.pid: process for process in processes if title.search("".join(_title(process)))}


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
