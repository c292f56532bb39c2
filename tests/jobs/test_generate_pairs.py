"""Stage 2 on a real local Ray: one row per caption, whatever dies on the way."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from ip2p.pairs.candidates import draw_candidate
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Recipe, Sharing
from ip2p.records import INSTRUCTIONS, PAIRS
from ip2p.workspace import Workspace
from jobs import generate_pairs

CAPTIONS = 6
REJECTED = ("rejected", "not json")


@pytest.fixture
def recipe(smallest) -> Recipe:
    fewer = {"candidates": 2, "max_pairs": 1, "steps": 1, "rows_per_block": 1, "sharing": Sharing()}
    return smallest.model_copy(update={"max_failed": 0.2, "pairs": smallest.pairs.model_copy(update=fewer)})


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """With instructions for CAPTIONS captions, the last of which was rejected."""
    workspace = Workspace(tmp_path / "run")
    write_instructions(workspace, CAPTIONS)
    return workspace


def write_instructions(workspace: Workspace, count: int) -> None:
    rows = [(f"{k:04d}", f"a {k} dog", "make it red", f"a red {k} dog", "ok", "", "colour", 1) for k in range(count)]
    rows[-1] = (*rows[-1][:4], *REJECTED, "", 1)
    with workspace.open_out("instructions", "part.parquet") as file:
        pq.write_table(pa.Table.from_pylist([dict(zip(INSTRUCTIONS.names, row)) for row in rows], INSTRUCTIONS), file)
    workspace.mark_done("instructions", captions=count)


def check_complete(workspace: Workspace, recipe: Recipe, count: int) -> None:
    """Each caption once, with the candidates it must have."""
    table = workspace.read_table("pairs")
    assert set(table.schema.names) == set(PAIRS.names)
    rows = sorted(table.to_pylist(), key=lambda row: row["caption_id"])
    assert [row["caption_id"] for row in rows] == [f"{k:04d}" for k in range(count)]
    for row in rows[:-1]:
        drawn = [draw_candidate(recipe.pairs, recipe.seed, row["caption_id"], k).seed for k in range(2)]
        assert [candidate["seed"] for candidate in row["candidates"]] == drawn
        assert row["status"] == "ok" and len(row["pairs"]) == 1
    assert (rows[-1]["status"], rows[-1]["reason"]) == REJECTED and rows[-1]["candidates"] == []


def files(workspace: Workspace) -> dict[str, int]:
    return {path: Path(path).stat().st_mtime_ns for path in workspace.files("pairs") if path.endswith(".parquet")}


def test_whole_stage_then_nothing_more_to_do(recipe, workspace, local_ray, capsys):
    generate_pairs.run(recipe, workspace)
    check_complete(workspace, recipe, CAPTIONS)
    counts = workspace.counts("pairs")
    assert (counts["captions"], counts["instructions"], counts["candidates"], counts["pairs"]) == (6, 5, 10, 5)
    assert counts["no_instruction"] == {"not json": 1}
    recorded = workspace.run()["stages"]["generate_pairs"]
    assert (recorded["pairs"], recorded["unet_samples_per_pair"]) == (5, counts["unet_samples"] / 5)
    assert "5  pairs, of 5 captions" in capsys.readouterr().out

    before = files(workspace)
    generate_pairs.run(recipe, workspace)
    assert "is complete" in capsys.readouterr().out
    assert files(workspace) == before
    # Even without the mark nothing is done again: the files hold the ids.
    workspace.fs.delete_file(workspace.path("pairs", "_SUCCESS"))
    generate_pairs.run(recipe, workspace)
    assert files(workspace) == before
    assert workspace.counts("pairs") == counts

    # Another recipe has no place in it, but how fast is nobody's business.
    changed = recipe.pairs.model_copy(update={"candidates": 1, "batch_size": 2})
    with pytest.raises(ValueError, match=r"made with another recipe \(pairs\.candidates: 2 before, 1 now\)"):
        generate_pairs.run(recipe.model_copy(update={"pairs": changed}), workspace)
    generate_pairs.run(recipe.model_copy(update={"pairs": changed}), workspace, overwrite=True)
    assert workspace.counts("pairs")["candidates"] == 5


@pytest.mark.slow
def test_a_caption_that_kills_its_worker_is_failed_and_the_job_goes_on(recipe, workspace, local_ray, monkeypatch):
    marker = Path(workspace.path("deaths"))

    class Dying(PairGenerator):
        """Killed whenever it meets the poisoned caption."""

        def __call__(self, batch):
            if "0003" in batch["caption_id"].to_pylist():
                with marker.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr(generate_pairs, "PairGenerator", Dying)
    recipe = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"rows_per_block": 3})})
    generate_pairs.run(recipe, workspace)
    assert marker.read_text() == "xxx"
    rows = {row["caption_id"]: row for row in workspace.read_table("pairs").to_pylist()}
    poisoned = rows.pop("0003")
    assert (poisoned["status"], poisoned["reason"]) == ("failed", "killed its worker 3 times")
    assert poisoned["original_prompt"] == "a 3 dog" and poisoned["candidates"] == []
    assert sorted(rows) == ["0000", "0001", "0002", "0004", "0005"]
    assert [rows[key]["status"] for key in sorted(rows)] == ["ok"] * 4 + ["rejected"]
    assert workspace.counts("pairs")["failures"] == {"killed its worker 3 times": 1}


@pytest.fixture
def start_job():
    """Starts the stage in a process group of its own, which does not outlive the test."""
    started = []

    def start(recipe: Recipe, workspace: Workspace, **environment: str) -> subprocess.Popen:
        started.append(run_job(recipe, workspace, **environment))
        return started[-1]

    yield start
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def run_job(recipe: Recipe, workspace: Workspace, **environment: str) -> subprocess.Popen:
    file = Path(workspace.location, "recipe.json")
    file.write_text(recipe.model_dump_json())
    code = (
        "import pathlib; from ip2p.recipe import Recipe; from ip2p.workspace import Workspace;"
        "from jobs import generate_pairs;"
        f"recipe = Recipe.model_validate_json(pathlib.Path({str(file)!r}).read_text());"
        f"generate_pairs.run(recipe, Workspace({workspace.location!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, env={**os.environ, **environment})


def wait_for_files(job: subprocess.Popen, workspace: Workspace, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(committed := files(workspace)) < count:
        assert job.poll() is None and time.monotonic() < deadline, committed
        time.sleep(0.1)


@pytest.mark.slow
def test_a_driver_killed_three_times_is_resumed(recipe, tmp_path, start_job):
    """SIGKILL of the job and all its workers at three points, each time the same command again."""
    count, rng = 40, random.Random(0)
    workspace = Workspace(tmp_path / "run")
    write_instructions(workspace, count)
    for share in (0.1, 0.4, 0.7):
        job = start_job(recipe, workspace)
        wait_for_files(job, workspace, int(count * share) + rng.randrange(4))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        before = files(workspace)
        assert 0 < len(before) < count
    assert start_job(recipe, workspace).wait(timeout=300) == 0
    check_complete(workspace, recipe, count)
    kept = before.items() & files(workspace).items()
    assert len(kept) >= len(before) - 2  # a file that was being written is done again


@pytest.mark.slow
def test_a_node_that_dies_takes_no_row_with_it(recipe, tmp_path, start_job):
    """SIGKILL of a raylet, and so of all that runs on its node, in a cluster of a head and two nodes."""
    count = 24
    workspace = Workspace(tmp_path / "run")
    write_instructions(workspace, count)
    recipe = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"replicas": 2})})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        cluster.wait_for_nodes()
        job = start_job(recipe, workspace, RAY_ADDRESS=cluster.address)
        wait_for_files(job, workspace, 4)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert job.wait(timeout=400) == 0
    finally:
        cluster.shutdown()
    check_complete(workspace, recipe, count)


BAD_GPU = """
import sys
import ray
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace
from jobs import generate_pairs
from runtime.connect import connect

class BadGpu(PairGenerator):
    def __init__(self, recipe):
        self.batch_size, self.calls = 4, 0
    def generate(self, rows):
        self.calls += 1
        if self.calls > 1 and ray.get_gpu_ids() == [0]:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        for row in rows:
            yield {"status": "ok", "reason": "", "candidates": []}

ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False)
connect()
generate_pairs.PairGenerator = BadGpu
generate_pairs.generator_resources = lambda recipe: {"num_gpus": 1, "num_cpus": 0}
recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
generate_pairs.generate(recipe, Workspace(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_gpu_that_breaks_fails_no_caption(recipe, tmp_path):
    count = 24
    workspace = Workspace(tmp_path / "run")
    write_instructions(workspace, count)
    several = {"rows_per_block": 2, "replicas": 2}
    recipe = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update=several)})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", BAD_GPU, str(tmp_path / "recipe.json"), workspace.location]
    assert subprocess.run(command, timeout=400, check=False).returncode == 0
    rows = workspace.read_table("pairs").to_pylist()
    assert sorted(row["caption_id"] for row in rows) == [f"{k:04d}" for k in range(count)]
    assert Counter(row["status"] for row in rows) == {"ok": count - 1, "rejected": 1}


def test_files_hold_what_all_generators_have_at_work():
    assert generate_pairs.rows_per_file(8, 1) == 8
    assert generate_pairs.rows_per_file(8, 4) == 32
    assert generate_pairs.rows_per_file(8, 512) == 64
    assert generate_pairs.rows_per_file(100, 2) == 100


def test_what_the_line_of_generate_pairs_says():
    counts = Counter(captions=10, candidates=60, accepted=30, pairs=25, unet_samples=1920, device_seconds=9.0)
    counts |= {"rejected: direction < 0.8": 20, "rejected: image < 0.5": 10}
    line = generate_pairs.progress_line(counts, seconds=5.0, to_do=40, devices=2)
    assert line == (
        "10 of 40 captions, 25 pairs (5.0/s, 77 UNet samples each), 50% of 60 candidates accepted, "
        "33% direction < 0.8, 17% image < 0.5; devices 90% busy, 0:15 left"
    )
    assert generate_pairs.progress_line(Counter(), 1.0, 40, 1).endswith("? left")


def test_stages_out_of_order_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"run jobs\.edit_captions first"):
        generate_pairs.run(recipe, Workspace(tmp_path))


def test_overwrite_is_a_flag_of_its_own(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(generate_pairs, "run", lambda *arguments: given.append(arguments[2]))
    flags = ["--recipe", "recipes/miniature.yaml", "--workspace", str(tmp_path)]
    for argv in (flags, [*flags, "--overwrite"]):
        generate_pairs.main(argv)
    assert given == [False, True]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        generate_pairs.main(["--help"])
    assert end.value.code == 0
    assert "--pairs.candidates" in capsys.readouterr().out


def test_a_wrong_model_is_refused_before_ray_starts(tmp_path, capsys):
    flags = ["--models.text_to_image.path", str(tmp_path / "nothing")]
    with pytest.raises(SystemExit) as end:
        generate_pairs.main(["--recipe", "recipes/miniature.yaml", "--workspace", str(tmp_path), *flags])
    assert end.value.code == 2
    assert "models.text_to_image.path" in capsys.readouterr().err
