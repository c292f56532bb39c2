"""Stage 2: Stable Diffusion with Prompt-to-Prompt makes candidate image pairs; CLIP keeps the good ones.

instructions/ -> PairGenerator (draw, generate, score, judge) -> pairs/, one row for every caption, come what may
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext, SaveMode
from ray.data.checkpoint import CheckpointConfig

from ip2p.cli import RowStageFlags, load_settings
from ip2p.pairs.funnel import COLUMNS, funnel, show
from ip2p.pairs.generate import PairGenerator, failed
from ip2p.recipe import Recipe
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect, uses_gpu
from runtime.guard import Guarded, Ledger
from runtime.job import job
from runtime.progress import Counted, Tally, time_left

TASK_CPUS = 0.2
CHECKPOINT_FILTER_BYTES = 64 * 2**20  # at least; Ray asks for more when the ids need more
# Of each generator: captions that kill it are given up long before, and one that can't start must not try for ever.
RESTARTS = 100
REJECTED = "rejected: "  # what a count of candidates by reason begins with


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False, retry_failed: bool = False) -> None:
    """Write `pairs/`. The same call resumes an interrupted run and does nothing when all is done.

    Raises `UserError` when there are no instructions, and when `pairs/` was made with another recipe.
    """
    stage = Stage(workspace, "pairs", recipe)
    if not stage.begin(overwrite, retry_failed):
        print(f"generate_pairs: {workspace.uri('pairs')} is complete\n{show(workspace.counts('pairs'))}")
        return
    connect()
    generate(recipe, workspace)
    counts = funnel(read_pairs(workspace))
    print(f"generate_pairs: done\n{show(counts)}")
    stage.finish(counts, rows=counts["captions"], failed=counts["failed"], example=next(iter(counts["failures"]), ""))


def generate(recipe: Recipe, workspace: Workspace) -> None:
    """Make candidates for every caption that has no row yet and append the rows to `pairs/`."""
    settings = recipe.pairs
    context = DataContext.get_current()
    context.checkpoint_config = checkpoints(workspace)
    light: dict[str, Any] = {"num_cpus": TASK_CPUS}
    tally = Tally("generate_pairs")
    to_do = workspace.counts("instructions")["captions"] - sum(batch.num_rows for batch in read_pairs(workspace))
    try:
        with tally.shown(lambda counts, seconds: progress_line(counts, seconds, to_do, settings.replicas)):
            (
                # A source that is not read_parquet would write checkpoints and never apply them.
                ray.data.read_parquet(workspace.path("instructions"), filesystem=workspace.fs, num_cpus=TASK_CPUS)
                .repartition(target_num_rows_per_block=settings.rows_per_block)
                .map_batches(
                    Counted,  # pyright: ignore[reportArgumentType]
                    fn_constructor_args=(Guarded, (PairGenerator, (recipe,), Ledger(), failed), tally, count),
                    batch_format="pyarrow",
                    batch_size=settings.rows_per_block,
                    compute=ActorPoolStrategy(size=settings.replicas),
                    max_restarts=RESTARTS,
                    **generator_resources(recipe),
                )
                .write_parquet(
                    workspace.path("pairs"), filesystem=workspace.fs, mode=SaveMode.APPEND, ray_remote_args=light
                )
            )
    finally:
        context.checkpoint_config = None  # it is the whole process's, and other stages have other ids


def count(rows: pa.Table) -> dict[str, float]:
    """What `Tally` is told of some rows of PAIRS."""
    found = funnel(rows.select(COLUMNS).to_batches())
    told = {name: found[name] for name in ("captions", "candidates", "accepted", "pairs", "failed", "unet_samples")}
    reasons = {REJECTED + reason: number for reason, number in found["not_accepted"].items()}
    return {**told, "device_seconds": found["device_seconds"], **reasons}


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


def checkpoints(workspace: Workspace) -> CheckpointConfig:
    """Captions whose rows are written are not done again."""
    config = CheckpointConfig(
        id_column="caption_id",
        checkpoint_path=workspace.path("checkpoints", "pairs"),
        override_filesystem=workspace.fs,
        delete_checkpoint_on_success=False,
    )
    config.checkpoint_actor_pool_max_size = 1
    config.checkpoint_actor_memory_bytes = CHECKPOINT_FILTER_BYTES
    return config


def generator_resources(recipe: Recipe) -> dict[str, Any]:
    """A GPU for each generator where the recipe and the cluster have them.

    No CPU is reserved: in a resumed run the checkpoint's filter holds one to the end, and Ray's own listing and
    repartitioning tasks want a whole one. On two cores a generator that holds a third would wait for ever.
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
