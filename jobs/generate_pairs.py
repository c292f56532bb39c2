"""Stage 2: Stable Diffusion with Prompt-to-Prompt makes candidate image pairs; CLIP keeps the good ones.

instructions/ -> PairGenerator (draw, generate, score, judge) -> pairs/, one row for every caption
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy, Dataset

from ip2p.cli import RowStageFlags, load_settings
from ip2p.pairs.funnel import COLUMNS, REJECTED, count, funnel, show
from ip2p.pairs.generate import PairGenerator, failed
from ip2p.recipe import Recipe
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect, uses_gpu
from runtime.guard import CrashGuard, CrashLedger
from runtime.job import job
from runtime.progress import StageCounters, WithCounters, time_left
from runtime.rows import TASKS_PER_ACTOR, Written, chain, forget_failed, run_epoch

# Rows of several generators share a file: with one of each block's rows, 10 M captions would make a
# million files. Written at once, they are some 200 MB.
ROWS_PER_FILE = 64
# Of each generator. Captions that kill it are given up long before; one that can't start must not
# try for ever.
RESTARTS = 100


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False, retry_failed: bool = False) -> None:
    """Write `pairs/`. The same call resumes an interrupted run and does nothing when all is done.

    Raises `UserError` when there are no instructions, and when `pairs/` was made with another recipe.
    """
    stage = Stage(workspace, "pairs", recipe)
    if not stage.begin(overwrite, retry_failed):
        print(f"generate_pairs: {workspace.uri('pairs')} is complete\n{show(workspace.counts('pairs'))}")
        return
    if retry_failed:
        forget_failed(workspace, "pairs")
    connect()
    generate(recipe, workspace)
    counts = funnel(read_pairs(workspace))
    print(f"generate_pairs: done\n{show(counts)}")
    stage.finish(counts, rows=counts["captions"], failed=counts["failed"], example=next(iter(counts["failures"]), ""))


def generate(recipe: Recipe, workspace: Workspace) -> list[Written]:
    """Make candidates for every caption that has no row yet and append the rows to `pairs/`.

    Returns the files written, each with the `count` of its rows.
    """
    settings, ledger = recipe.pairs, CrashLedger()

    def steps(rows: Dataset, counters: StageCounters) -> Dataset:
        ledger.start_pass()
        return rows.map_batches(
            WithCounters,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(
                CrashGuard,
                (PairGenerator, (recipe,), ledger, failed),
                counters,
                count,
            ),
            batch_format="pyarrow",
            batch_size=settings.rows_per_block,
            compute=ActorPoolStrategy(size=settings.replicas, max_tasks_in_flight_per_actor=TASKS_PER_ACTOR),
            max_restarts=RESTARTS,
            **generator_resources(recipe),
        )

    def line(counts: Counter[str], seconds: float, to_do: int) -> str:
        return progress_line(counts, seconds, to_do, settings.replicas)

    return chain(
        workspace,
        "instructions",
        "pairs",
        "caption_id",
        settings.rows_per_block,
        steps,
        StageCounters("generate_pairs"),
        run_epoch(workspace, "pairs"),
        line=line,
        rows_per_file=rows_per_file(settings.rows_per_block, settings.replicas),
        count=count,
        # All that generators hold which leave a broken GPU; the last one does not leave.
        lost_blocks=TASKS_PER_ACTOR * (settings.replicas - 1),
    )


def rows_per_file(rows_per_block: int, replicas: int) -> int:
    """Return the rows collected for a file: what all generators have at work, within bounds."""
    return max(rows_per_block, min(rows_per_block * replicas, ROWS_PER_FILE))


def progress_line(counts: Counter[str], seconds: float, to_do: int, devices: int) -> str:
    """`counts` as `count` gives them, of the first `seconds` of a run."""
    rejected = Counter({name.removeprefix(REJECTED): n for name, n in counts.items() if name.startswith(REJECTED)})
    share = {name: n / max(counts["candidates"], 1) for name, n in rejected.most_common(3)}
    return (
        f"{counts['captions']:,} of {to_do:,} captions, {counts['pairs']:,} pairs ({counts['pairs'] / seconds:.1f}/s, "
        f"{counts['unet_samples'] / max(counts['pairs'], 1):,.0f} UNet samples each), "
        f"{counts['accepted'] / max(counts['candidates'], 1):.0%} of {counts['candidates']:,} candidates accepted"
        + "".join(f", {part:.0%} {reason}" for reason, part in share.items())
        + f"; devices {counts['device_seconds'] / (seconds * devices):.0%} busy, "
        + time_left(counts["captions"], to_do, seconds)
    )


def generator_resources(recipe: Recipe) -> dict[str, Any]:
    """A GPU for each generator where the recipe and the cluster have them.

    No CPU is reserved: tasks that read and cut want a whole one, and generators beside them have
    GPUs, or do most of the work anyway.
    """
    return {"num_gpus": 1 if uses_gpu(recipe.device) else 0, "num_cpus": 0}


def read_pairs(workspace: Workspace) -> Iterator[pa.RecordBatch]:
    """The rows of `pairs/` without their images."""
    for path in workspace.files("pairs"):
        if path.endswith(".parquet"):
            with pq.ParquetFile(workspace.fs.open_input_file(path)) as file:
                yield from file.iter_batches(columns=COLUMNS)


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.text_to_image", "models.clip")
    recipe, workspace, flags = load_settings(__doc__ or "", RowStageFlags, argv=argv, needs=needs)
    assert workspace is not None
    with job("generate_pairs", workspace):
        run(recipe, workspace, flags.overwrite, flags.retry_failed)


if __name__ == "__main__":
    main()
