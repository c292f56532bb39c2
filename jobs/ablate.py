"""The paper's ablations in one command: all data, no CLIP filter, a tenth and a hundredth of the data, the same steps.

pairs/ -> for each kind of data and seed: train -> evaluate, under ablations/ -> one table, ablations/report.html

For data without a filter, each caption's first `pairs.max_pairs` candidates are made again with every one accepted, by
jobs.generate_pairs; of their captions as many are trained on as give the same number of pairs. The same call goes on
where a killed one stopped.
"""

import dataclasses
import json

import numpy as np
import pyarrow.fs as pafs
from pydantic import Field
from rich.console import Console
from rich.table import Table

from ip2p import images
from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.evaluate.truth import judge
from ip2p.recipe import Recipe, Thresholds
from ip2p.report.ablations import Result, Setting, over_runs, page, results
from ip2p.report.page import percent
from ip2p.report.summary import metric_rows
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from jobs import evaluate, export_dataset, generate_pairs, train
from runtime.connect import connect
from runtime.job import job

JUDGED_PAIRS = 1000
UNFILTERED = "no filter"
SHARES = {"all data": 1.0, "10% of the data": 0.1, "1% of the data": 0.01}


class Flags(StageFlags):
    seeds: int = Field(3, ge=1, description="runs of each kind of data; intervals need two, and are wide below five")


def run(recipe: Recipe, workspace: Workspace, seeds: int = 3, overwrite: bool = False) -> list[Result]:
    """Write `ablations/`, and print the table after each round of seeds.

    Raises `UserError` when there are no pairs, or no oracle to judge by.
    """
    if recipe.truth != "oracle":
        raise UserError(f"truth: {recipe.truth}: ablations are judged by the oracle; use a miniature recipe")
    stage = Stage(workspace, "ablations", recipe, amount={"--seeds": seeds})
    unfinished = stage.begin(overwrite)
    connect()
    export_dataset.run(recipe, workspace)
    bare = without_filter(recipe, workspace)
    data = {UNFILTERED: bare} | dict.fromkeys(SHARES, workspace)
    pairs = {}
    for name, source in data.items():
        train.encode(train.with_base(recipe), source)
        pairs[name] = source.counts("latents")["train"]
    right = {name: right_share(source) for name, source in ((UNFILTERED, bare), ("all data", workspace))}
    as_many = min(1.0, pairs["all data"] / pairs[UNFILTERED])
    fractions = {"all data": SHARES["all data"], UNFILTERED: as_many} | SHARES
    runs: dict[str, list[Workspace]] = {name: [] for name in fractions}
    found: list[Result] = []
    for k in range(seeds):
        for name, fraction in fractions.items():
            print(f"ablate: {name}, run {k + 1} of {seeds}", flush=True)
            one, settings = workspace_of(workspace, name, k), recipe_of(recipe, fraction, k)
            train.run(settings, one, data[name])
            evaluate.run(settings, one)
            runs[name].append(one)
        found = results(recipe, [setting(name, runs[name], right.get(name, right["all data"])) for name in runs])
        write(recipe, workspace, found)
    if unfinished:
        stage.finish({"seeds": seeds})
    return found


def without_filter(recipe: Recipe, workspace: Workspace) -> Workspace:
    """A workspace with a dataset of the same instructions, every candidate of which was accepted."""
    bare = Workspace(workspace.uri("ablations", "unfiltered"))
    if not bare.done("instructions"):
        made_with = [path for path in workspace.files("made_with") if path.endswith("/instructions.json")]
        copied = made_with + workspace.files("instructions")
        for path in sorted(copied, key=lambda path: path.endswith("_SUCCESS")):  # the mark of completion last
            to = bare.path(path.removeprefix(workspace.path("")))
            bare.fs.create_dir(to.rpartition("/")[0], recursive=True)
            pafs.copy_files(path, to, source_filesystem=workspace.fs, destination_filesystem=bare.fs)
    everything = Thresholds(image=-1, direction=-1, agreement=-1)
    free = {"candidates": recipe.pairs.max_pairs, "adaptive": None, "early_look": None, "quality": None}
    pairs = recipe.pairs.model_copy(update={**free, "thresholds": everything})
    recipe = recipe.model_copy(update={"pairs": pairs})
    generate_pairs.run(recipe, bare)
    export_dataset.run(recipe, bare)
    return bare


def right_share(data: Workspace) -> float:
    """Share of the pairs to train on, of the first JUDGED_PAIRS, that the oracle calls right."""
    columns = ["original_image", "edit_prompt", "edited_image"]
    rows = data.read_table("dataset", "train", columns=columns).slice(0, JUDGED_PAIRS).to_pylist()
    before, after = ([images.decode(row[key]["bytes"]) for row in rows] for key in ("original_image", "edited_image"))
    return float(np.mean([judgement.success for judgement in judge(before, [r["edit_prompt"] for r in rows], after)]))


def workspace_of(workspace: Workspace, name: str, k: int) -> Workspace:
    """Where run `k` on a kind of data lies."""
    folder = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Workspace(workspace.uri("ablations", f"{folder}-{k}"))


def recipe_of(recipe: Recipe, fraction: float, k: int) -> Recipe:
    """Run `k`: its own seed, this share of the captions, and its editor alone to be evaluated."""
    return recipe.model_copy(
        update={
            "seed": recipe.seed + k,
            "train": recipe.train.model_copy(update={"fraction": fraction}),
            "evaluate": recipe.evaluate.model_copy(update={"shipped": False, "sdedit_strengths": [], "grid_images": 1}),
        }
    )


def setting(name: str, runs: list[Workspace], right_pairs: float) -> Setting:
    return Setting(
        name, over_runs([one.counts("model")["pairs"] for one in runs]), right_pairs, [metric_rows(one) for one in runs]
    )


def write(recipe: Recipe, workspace: Workspace, found: list[Result]) -> None:
    """ablations/report.html and ablations/results.json, and the table on the terminal."""
    with workspace.open_out("ablations", "report.html") as file:
        file.write(page(recipe, found).encode())
    with workspace.open_out("ablations", "results.json") as file:
        file.write(json.dumps([dataclasses.asdict(result) for result in found], indent=2).encode())
    table = Table(
        title=f"{found[0].success.count} runs each of {recipe.train.steps:,} steps; 95% intervals over runs",
        title_justify="left",
    )
    for column in ("trained on", "pairs", "right", "edits right", "against all data", "image sim.", "direction"):
        table.add_column(column)
    for result in found:
        success, less = result.success, result.less_than_first
        table.add_row(
            result.name,
            f"{result.pairs.mean:,.0f}",
            percent(result.right_pairs),
            f"{percent(success.mean)} ({percent(success.low)} to {percent(success.high)})",
            "" if result is found[0] else f"{100 * less.mean:+.1f} ({100 * less.low:+.1f} to {100 * less.high:+.1f})",
            f"{result.image.mean:.3f} ({result.image.low:.3f} to {result.image.high:.3f})",
            f"{result.direction.mean:.3f} ({result.direction.low:.3f} to {result.direction.high:.3f})",
        )
    Console(width=150).print(table)
    print(f"ablate: {workspace.uri('ablations', 'report.html')} is written", flush=True)


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.text_to_image", "models.clip")
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=needs)
    assert workspace is not None
    with job("ablate", workspace):
        run(recipe, workspace, flags.seeds, flags.overwrite)


if __name__ == "__main__":
    main()
