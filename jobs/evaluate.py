"""Stage 5: sweep the two guidance scales over held-out images, judge every edit and every pair, write the report.

test images x (editors, scales, seeds) -> EditScorer -> evaluation/metrics.parquet; where truth is known also
instructions/ -> sample -> PairTruth -> evaluation/pair_truth.parquet; with evaluate.judge also the same edits ->
a vision-language model -> evaluation/judged.parquet (jobs.judge_edits); then report.html
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Dataset

from ip2p.cli import StageFlags, load_settings
from ip2p.edit.names import SHIPPED, available
from ip2p.errors import UserError
from ip2p.evaluate.pair_truth import PairTruth, sample_captions
from ip2p.evaluate.scorer import EditScorer
from ip2p.evaluate.sweep import check_others, plan_edits, plan_grid, shown_editor
from ip2p.evaluate.truth import chosen_case, test_set
from ip2p.recipe import Recipe, locate
from ip2p.report.page import write_report
from ip2p.report.summary import Summary
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from jobs import judge_edits
from runtime.connect import connect
from runtime.job import job
from runtime.progress import StageCounters
from runtime.rows import chain, run_epoch, scored

CAPTIONS_PER_TASK = 4


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> Summary:
    """Write `evaluation/` and `report.html`. The same call resumes an interrupted run.

    Raises `UserError` when there is nothing to evaluate, and when `evaluation/` was made with another model or recipe.
    """
    check(recipe)
    names = editors(recipe, workspace)
    stage = Stage(workspace, "evaluation", recipe, also={"editors": names})
    if stage.begin(overwrite):
        sweep(recipe, workspace, names, stage)
    else:
        print("evaluate: the sweep is complete")
    if recipe.evaluate.judge is not None:
        judge_edits.run(recipe, workspace)
    summary = write_report(recipe, workspace)
    print(f"evaluate: {workspace.uri('report.html')} is written")
    return summary


def sweep(recipe: Recipe, workspace: Workspace, names: list[str], stage: Stage) -> None:
    """Make and score all edits, and judge pairs where truth is known."""
    test = test_set(recipe, workspace)
    edits = plan_edits(recipe, test, names)
    print(f"evaluate: {edits.num_rows} edits of {test.num_rows} test images by {', '.join(names)} and the baselines")
    write_part(workspace, test, "test")
    write_part(workspace, edits, "edits")
    connect()
    size = recipe.evaluate.batch_size
    score(recipe, workspace, "edits", "metrics.parquet", "edit_id", EditScorer, (recipe, workspace, test), size)
    counts: dict[str, Any] = {"edits": edits.num_rows, "test_images": test.num_rows}
    if recipe.evaluate.chosen is not None:
        case = chosen_case(recipe.evaluate.chosen)
        write_part(workspace, case, "chosen")
        write_part(workspace, plan_grid(recipe, case, shown_editor(names)), "grid")
        score(recipe, workspace, "grid", "grid.parquet", "edit_id", EditScorer, (recipe, workspace, case), size)
    if recipe.truth == "oracle" and workspace.exists("instructions"):
        captions = sample_captions(recipe, workspace)
        print(f"evaluate: pairs of {captions.num_rows} captions, with and without attention sharing, by the oracle")
        write_part(workspace, captions, "pair_captions")
        sink = "pair_truth.parquet"
        score(recipe, workspace, "pair_captions", sink, "caption_id", PairTruth, (recipe,), CAPTIONS_PER_TASK)
        counts["pair_captions"] = captions.num_rows
    stage.finish(counts)


def score(
    recipe: Recipe,
    workspace: Workspace,
    source: str,
    sink: str,
    id_column: str,
    actor: type,
    arguments: tuple,
    rows_per_task: int,
) -> None:
    """`evaluation/<source>` -> actors -> `evaluation/<sink>`."""

    def by_actors(rows: Dataset, counters: StageCounters) -> Dataset:
        return scored(rows, counters, recipe, actor, arguments, rows_per_task)

    chain(
        workspace,
        f"evaluation/{source}",
        f"evaluation/{sink}",
        id_column,
        rows_per_task,
        by_actors,
        StageCounters("evaluate"),
        run_epoch(workspace, f"evaluation/{sink}"),
    )


def check(recipe: Recipe) -> None:
    """Raises `UserError`, naming the key, when an editor to be evaluated, the judge or the image is not there."""
    if recipe.evaluate.shipped:
        locate(recipe.models.editor.path, "models.editor.path")
    check_others(recipe)
    if recipe.evaluate.judge is not None:
        locate(recipe.evaluate.judge.model.path, "evaluate.judge.model.path")
    if recipe.evaluate.chosen is not None:
        chosen_case(recipe.evaluate.chosen)


def editors(recipe: Recipe, workspace: Workspace) -> list[str]:
    """Names of the editors to evaluate."""
    names = [name for name in available(workspace) if recipe.evaluate.shipped or name != SHIPPED]
    names += recipe.evaluate.models
    if not names:
        raise UserError(
            f"{workspace.location} has no model: run jobs.train, or evaluate the shipped one (evaluate.shipped: true)"
        )
    return names


def write_part(workspace: Workspace, table: pa.Table, folder: str) -> None:
    with workspace.open_out("evaluation", folder, "part-0.parquet") as file:
        pq.write_table(table, file)


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.text_to_image", "models.clip")
    recipe, workspace, flags = load_settings(__doc__ or "", StageFlags, argv=argv, needs=needs)
    assert workspace is not None
    with job("evaluate", workspace):
        run(recipe, workspace, flags.overwrite)


if __name__ == "__main__":
    main()
