"""Dashboard and alerts: their queries against what a live run exports, and traces of a request that was served."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from ray import serve
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES

from ip2p import images
from ip2p.pairs.filter import ACCEPTED
from ip2p.pairs.funnel import COLUMNS, count
from ip2p.recipe import REPOSITORY
from ip2p.records import PAIRS
from ip2p.workspace import Workspace
from jobs import edit_captions
from runtime.board import Board
from runtime.connect import connect
from runtime.progress import StageCounters
from serve.app import start
from tests.evaluate.synthetic import make_recipe

DASHBOARDS = REPOSITORY / "cluster" / "dashboards"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")

needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool (Debian: prometheus) is not installed")
needs_prometheus = pytest.mark.skipif(not PROMETHEUS, reason="prometheus is not installed")


def panels() -> dict[str, list[str]]:
    """The queries of the dashboard, by title."""
    content = json.loads((DASHBOARDS / "ip2p.json").read_text())
    return {p["title"]: [t["expr"] for t in p["targets"]] for p in content["panels"] if p["type"] != "row"}


def alerts() -> dict[str, str]:
    (group,) = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def queries() -> list[str]:
    return [query for of_panel in panels().values() for query in of_panel] + list(alerts().values())


def names(query: str) -> set[str]:
    """Of the metrics in a query."""
    return set(re.findall(r"\bray_\w+", query))


def test_every_alert_is_in_the_runbook_and_panels_do_not_overlap():
    runbook = (REPOSITORY / "cluster" / "RUNBOOK.md").read_text()
    assert all(f"`{alert}`" in runbook for alert in alerts())
    places = set()
    content = json.loads((DASHBOARDS / "ip2p.json").read_text())
    for panel in content["panels"]:
        p = panel["gridPos"]
        area = {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        assert not area & places and p["x"] + p["w"] <= 24, panel["title"]
        places |= area
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])


def test_names_of_gpu_metrics_are_rays():
    """No GPU, no such metric: so Ray's own table of them is asked."""
    asked = {name for query in queries() for name in names(query)}
    of_nodes = {name.removeprefix("ray_") for name in asked if name.startswith("ray_node_")}
    assert of_nodes and of_nodes <= set(METRICS_GAUGES)
    assert "GpuIndex" in GPU_TAG_KEYS


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    for command in (["check", "rules", str(DASHBOARDS / "alerts.yaml")], ["test", "rules", "alerts_test.yaml"]):
        ran = subprocess.run(
            [PROMTOOL or "", *command],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
def test_prometheus_accepts_the_configuration():
    config = str(DASHBOARDS / "prometheus.yaml")
    ran = subprocess.run([PROMTOOL or "", "check", "config", config], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# --- live


class Collector(BaseHTTPRequestHandler):
    """Keeps the spans that it is sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def collector():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def spans(collector) -> list:
    sent = [resource for request in collector.requests for resource in request.resource_spans]
    return [span for resource in sent for scope in resource.scope_spans for span in scope.spans]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def live(tmp_path_factory, collector, tiny_sd, tiny_editor):
    """Address of the metrics of a Ray on which stages have counted, training has reported and edits were served."""
    if ray.is_initialized():
        ray.shutdown()
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "serve.tracing:exporter")
    patch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "1")
    patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "500")
    patch.setenv("PYTHONPATH", str(REPOSITORY))
    connect()
    place = str(tmp_path_factory.mktemp("board"))

    @ray.remote(num_cpus=0)
    class Worker:
        def train(self) -> None:
            board = Board(Workspace(place), "train", 0)
            for step in itertools.count():
                board.scalars({"loss": 0.5, "validation_loss": 0.6, "samples_per_second": 3.0}, step)
                if step % 10 == 0:
                    board.publish()
                time.sleep(1)

    worker = Worker.remote()
    worker.train.remote()
    count_stages()
    ref = {"path": str(tiny_sd)}
    models = {"text_to_image": ref, "clip": {"name": "ViT-B-32", "pretrained": "openai"}, "llm": ref}
    models["editor"] = {"path": str(tiny_editor)}
    recipe = make_recipe(device="cpu", models=models, sampling={"steps": 2, "max_side": 64})
    port = free_port()
    start(recipe, None, "127.0.0.1", port)
    picture = images.encode(np.zeros((64, 64, 3), np.uint8))
    for data, status in ((picture, 200), (b"no picture", 400)):
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/images/edits", files={"image": ("a.png", data)}, data={"prompt": "night"},
            headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, timeout=200,
        )  # fmt: skip
        assert answer.status_code == status
    (node,) = ray.nodes()
    yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    serve.shutdown()
    ray.shutdown()
    patch.undo()
    del worker


def count_stages() -> None:
    """As the stages count their rows, with one of each outcome."""
    schema = pa.schema([PAIRS.field(name) for name in COLUMNS])
    drawn = [dict.fromkeys(field.name for field in schema.field("candidates").type.value_type) for _ in range(2)]
    drawn[0]["verdict"], drawn[1]["verdict"] = ACCEPTED, "direction"
    row = {"edit_prompt": "make it red", "unet_samples": 64, "seconds": 0.5}
    ok = row | {"status": "ok", "reason": "", "candidates": drawn}
    failed = row | {"status": "failed", "reason": "killed its worker", "candidates": []}
    StageCounters("generate_pairs").add(count(pa.Table.from_pylist([ok, failed], schema=schema)))
    statuses = pa.table({"status": ["ok", "rejected", "failed"]})
    StageCounters("edit_captions").add(edit_captions.count(statuses))
    StageCounters("evaluate").add({"rows": 3})


def exported(address: str) -> set[str]:
    text = httpx.get(f"http://{address}/metrics", timeout=60).text
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_query_asks_for_what_a_live_run_exports(live):
    asked = {name for query in queries() for name in names(query)}
    asked = {name for name in asked if not name.startswith(("ray_node_gpus", "ray_node_gram"))}
    # Of answers 5xx there are none here; 400 is counted by the same name.
    deadline = time.monotonic() + 240
    while asked - exported(live):
        assert time.monotonic() < deadline, f"not exported: {sorted(asked - exported(live))}"
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_prometheus
def test_prometheus_answers_every_query_of_the_dashboard(live, tmp_path):
    """A real Prometheus that scrapes the live run; queries of GPUs are empty here, and no query is wrong."""
    port = free_port()
    config = {"scrape_configs": [{"job_name": "ray", "scrape_interval": "1s", "static_configs": [{"targets": [live]}]}]}
    (tmp_path / "prometheus.yaml").write_text(yaml.dump({"rule_files": [str(DASHBOARDS / "alerts.yaml")], **config}))
    server = subprocess.Popen(
        [PROMETHEUS or "", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        empty = None
        deadline = time.monotonic() + 200
        while empty != set() and time.monotonic() < deadline:
            time.sleep(3)
            empty = {
                (title, query) for title, queries in panels().items() for query in queries
                if "node_g" not in query and not answer(port, query)
            }  # fmt: skip
        assert empty == set()
        for query in queries():
            answer(port, query)
    finally:
        server.kill()
        server.wait()


def answer(port: int, query: str) -> list:
    try:
        got = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=30)
    except httpx.HTTPError:
        return []  # it is not up yet
    if got.status_code == 503:
        return []
    assert got.json()["status"] == "success", f"{query}: {got.json()}"
    return got.json()["data"]["result"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_served_request_is_a_trace(live, collector):
    deadline = time.monotonic() + 120
    while not (mine := [span for span in spans(collector) if span.trace_id.hex() == TRACE]):
        assert time.monotonic() < deadline, [span.name for span in spans(collector)]
        time.sleep(1)
    time.sleep(2)
    mine = [span for span in spans(collector) if span.trace_id.hex() == TRACE]
    ids = {span.span_id for span in mine}
    assert any(span.parent_span_id.hex() == "b7ad6b7169203331" for span in mine), "the client's span is the parent"
    assert any(span.parent_span_id in ids for span in mine), "the replica's span is within the proxy's"
    assert any("EditService" in str(span) for span in mine)
