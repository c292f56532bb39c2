"""The job on a small benchmark: all but Ray in one process, then once on a real local Ray."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.edit.names import SHIPPED
from ip2p.evaluate.benchmark.layouts import BENCHMARK, MULTI, SINGLE, benchmark_files, detect
from ip2p.evaluate.benchmark.scorer import BenchmarkScorer
from ip2p.evaluate.sweep import UNCHANGED
from ip2p.report.benchmark import summarize_benchmark
from ip2p.report.page import write_report
from ip2p.workspace import Workspace
from jobs import evaluate_benchmark
from tests.evaluate.benchmark.synthetic_benchmarks import EMU_EDIT, emu_edit_row, magicbrush_row, write
from tests.evaluate.synthetic import make_recipe
from tests.report.test_page import Page, read

TURNS = [("1", 1), ("2", 2), ("2", 1), ("3", 1), ("1", 2), ("1", 3)]


@pytest.fixture(scope="module")
def recipe(tiny_sd, tiny_editor, tiny_clip, tiny_dino):
    models = {
        "text_to_image": {"path": str(tiny_sd)},
        "clip": {"name": f"local-dir:{tiny_clip}"},
        "dino": {"path": str(tiny_dino)},
        "llm": {"path": str(tiny_sd)},
        "editor": {"path": str(tiny_editor)},
    }
    return make_recipe(device="cpu", truth="none", max_failed=0.5, models=models, sampling={"steps": 2, "max_side": 64})


@pytest.fixture
def benchmark_folder(tmp_path):
    """MagicBrush's columns; of session 3 the image is broken."""
    broken = {"source_img": {"bytes": b"broken", "path": None}}
    rows = [magicbrush_row(id_, turn, **(broken if id_ == "3" else {})) for id_, turn in TURNS]
    return str(write(tmp_path / "magicbrush", rows[:3], rows[3:]))


def in_one_process(recipe, workspace: Workspace, folder: str) -> dict[str, int]:
    """What the job does, without Ray."""
    source = Workspace(folder)
    files = benchmark_files(source)
    evaluate_benchmark.group(workspace, source, files, detect(source, files))
    scorer = BenchmarkScorer(recipe, workspace, [SHIPPED], (SINGLE, MULTI))
    with workspace.open_out("benchmark", "edits", "0.parquet") as file:
        pq.write_table(scorer(workspace.read_table("benchmark", "sessions")), file)
    return evaluate_benchmark.write_metrics(workspace)


def check_metrics(workspace: Workspace) -> None:
    metrics = workspace.read_table("benchmark", "metrics.parquet")
    assert metrics.schema.names == BENCHMARK.names
    keys = sorted(tuple(row[key] for key in ("model", "mode", "id", "turn")) for row in metrics.to_pylist())
    wanted = [(m, mode, *turn) for m in (SHIPPED, UNCHANGED) for mode in (MULTI, SINGLE) for turn in sorted(TURNS)]
    assert keys == wanted
    failed = metrics.filter(pa.compute.not_equal(metrics["status"], "ok"))
    assert set(failed["id"].to_pylist()) == {"3"}
    assert all(reason.startswith("source_img: ") for reason in failed["reason"].to_pylist())


def test_every_edit_becomes_one_row_and_the_means_are_those_of_the_rows(recipe, benchmark_folder, tmp_path, capsys):
    workspace = Workspace(tmp_path / "run")
    assert in_one_process(recipe, workspace, benchmark_folder) == {"edits": 24, "failed": 4}
    check_metrics(workspace)
    rows = workspace.read_table("benchmark", "metrics.parquet").to_pylist()
    single, multi, last = summarize_benchmark(workspace)
    assert single.models == ["the shipped editor", "input unchanged"]
    assert (single.edits, single.failed) == ([5, 5], [1, 1])
    assert (last.edits, last.failed) == ([2, 2], [1, 1]), "the last turns of sessions 1 and 2"
    values = [r["l1"] for r in rows if (r["model"], r["mode"], r["status"]) == (SHIPPED, SINGLE, "ok")]
    assert single.means["L1 ↓"][0].mean == pytest.approx(sum(values) / 5)
    values = [
        r["dino"]
        for r in rows
        if (r["model"], r["mode"]) == (UNCHANGED, MULTI) and (r["id"], r["turn"]) in (("1", 3), ("2", 2))
    ]
    assert last.means["DINO"][1].mean == pytest.approx(sum(values) / 2)
    assert "CLIP-T" not in single.means, "MagicBrush has no captions"

    evaluate_benchmark.show([single, multi, last])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{single.means['CLIP-I'][0].mean:.3f}" in said
    write_report(recipe, workspace)
    page = Page(read(workspace))
    assert "On a benchmark" in page.headings
    assert f"{single.means['CLIP-I'][0].mean:.3f}" in read(workspace)
    assert "nan" not in read(workspace)


def test_sessions_are_grouped_once(recipe, benchmark_folder, tmp_path):
    workspace, source = Workspace(tmp_path / "run"), Workspace(benchmark_folder)
    files = benchmark_files(source)
    layout = detect(source, files)
    evaluate_benchmark.group(workspace, source, files, layout)
    assert workspace.counts("benchmark/sessions") == {"sessions": 3, "turns": 6}
    evaluate_benchmark.group(workspace, Workspace(tmp_path / "gone"), files, layout)
    empty = Workspace(write(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="have no rows"):
        evaluate_benchmark.group(Workspace(tmp_path / "other"), empty, benchmark_files(empty), layout)


def test_what_is_wrong_is_told_before_ray_starts(recipe, benchmark_folder, tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        evaluate_benchmark.run(recipe, Workspace(tmp_path / "run"), str(tmp_path / "nowhere"))
    without = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"shipped": False})})
    with pytest.raises(ValueError, match=r"run jobs\.train"):
        evaluate_benchmark.run(without, Workspace(tmp_path / "run"), benchmark_folder)
    workspace = Workspace(tmp_path / "run")
    started = evaluate_benchmark.stage_of(recipe, workspace, Workspace(benchmark_folder), [SHIPPED])
    assert started.begin()
    in_one_process(recipe, workspace, benchmark_folder)
    other = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 3})})
    with pytest.raises(ValueError, match=r"sampling\.steps: 2 before, 3 now.*--overwrite"):
        evaluate_benchmark.run(other, workspace, benchmark_folder)
    emu = str(write(tmp_path / "emu", [emu_edit_row(1)], schema=EMU_EDIT))
    with pytest.raises(ValueError, match=r"--benchmark: .*files .* before, .*files"):
        evaluate_benchmark.run(recipe, workspace, emu)


@pytest.mark.timeout(900)  # Ray takes its time on a machine that does other things as well
def test_the_job_on_ray_and_once_more(recipe, benchmark_folder, tmp_path, local_ray, capsys):
    workspace = Workspace(tmp_path / "run")
    tables = evaluate_benchmark.run(recipe, workspace, benchmark_folder)
    check_metrics(workspace)
    assert len(tables) == 3
    assert workspace.counts("benchmark") == {"sessions": 3, "turns": 6, "edits": 24, "failed": 4}
    with workspace.open_in("report.html") as file:
        assert b"On a benchmark" in file.read()
    capsys.readouterr()
    assert evaluate_benchmark.run(recipe, workspace, benchmark_folder) == tables
    assert "the benchmark is complete" in capsys.readouterr().out
