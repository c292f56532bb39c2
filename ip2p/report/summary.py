"""What a run came to, as numbers: computed from the tables of a workspace alone, for the report and the closing table.

A part whose stage has not run is None, so that a report can be made of a run half way.
"""

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

from ip2p.errors import UserError
from ip2p.evaluate.bootstrap import Estimate, Trend, auc, by_case, difference, estimate, trend
from ip2p.evaluate.calibrate import MIN_RECALL, Calibration, calibrate, judged_candidates
from ip2p.evaluate.judge import MARKS
from ip2p.evaluate.sweep import METRICS, SDEDITS, TRUTHS, UNCHANGED, editors_of, is_editor
from ip2p.miniature.oracle import ATTRIBUTES
from ip2p.pairs.filter import ACCEPTED
from ip2p.pairs.funnel import COLUMNS, funnel
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace

Row = dict
NAMES = {
    "workspace": "this run's editor",
    "shipped": "the shipped editor",
    "unchanged": "input unchanged",
    "sdedit": "SDEdit by the edited caption",
    "sdedit_instruction": "SDEdit by the instruction",
}


def name_of(model: str) -> str:
    """What people read: those of `evaluate.models` go by the names that the recipe gives them."""
    return NAMES.get(model, model)


@dataclass(frozen=True)
class Funnel:
    """How many came through each stage, and why the others did not: counts by reason, commonest first."""

    captions: int
    instructions: int
    candidates: int
    accepted: int
    pairs: int
    captions_with_pairs: int
    no_instruction: dict[str, int]
    failures: dict[str, int]
    not_accepted: dict[str, int]
    examples: dict[str, int]  # rows of each split of the dataset
    device_seconds_per_pair: float | None
    unet_samples_per_pair: float | None


@dataclass(frozen=True)
class Answers:
    """What the language model asked for, of the answers that passed; counts in the order to be shown."""

    edit_types: dict[str, int]
    instruction_words: dict[str, int]  # by length
    edited_caption_words: dict[str, int]
    attempts: dict[str, int]  # captions by how often they were asked, whatever came of it
    reasons: dict[str, int]  # why the others did not pass


@dataclass(frozen=True)
class PairTruth:
    """Oracle rate of 'carried out and all else preserved' among generated pairs."""

    captions: int
    rates: dict[str, Estimate]  # by way of making pairs
    filter_gain: Estimate  # shared and filtered minus shared, paired over captions
    sharing_gain: Estimate  # shared minus same noise only
    by_kind: dict[str, list[Estimate]]  # edit kind -> in the order of `rates`


@dataclass(frozen=True)
class Accuracy:
    """One model on the test set at the default scales (SDEdit: its best strength). Without truth there are no rates."""

    model: str
    setting: str
    clip_sim_image: Estimate
    clip_sim_dir: Estimate
    success: Estimate | None
    carried_out: Estimate | None
    preserved: Estimate | None
    valid: Estimate | None
    by_kind: dict[str, Estimate]
    by_attribute: dict[str, Estimate]  # of what the edit leaves alone; empty without truth
    by_seed: list[tuple[Estimate, Estimate, Estimate | None]]  # image similarity, direction, success of each draw


@dataclass(frozen=True)
class Prediction:
    """How well a similarity tells right from wrong: the AUC."""

    of: str
    by: str
    auc: Estimate


@dataclass(frozen=True)
class Marks:
    """A judge's marks, 1 to 5, for one model, where `Accuracy` is measured; failed: edits without marks."""

    model: str
    setting: str
    means: dict[str, Estimate]
    failed: int


@dataclass(frozen=True)
class Curve:
    """One model along one swept scale."""

    model: str
    scales: list[float]
    image: Trend
    direction: Trend
    success: list[Estimate] | None


@dataclass(frozen=True)
class Summary:
    answers: Answers | None
    funnel: Funnel | None
    pair_truth: PairTruth | None
    accuracies: list[Accuracy]
    image_guidance: list[Curve]  # s_I swept
    text_guidance: list[Curve]  # s_T swept
    sdedit: list[Curve]  # strength swept
    predictions: list[Prediction]
    calibration: Calibration | str | None  # or why there is none, where truth is known
    marks: list[Marks]
    seconds: dict[str, float]


def summarize(recipe: Recipe, workspace: Workspace) -> Summary:
    """All numbers of a workspace; the parts that have not run are None or empty."""
    rows = metric_rows(workspace)
    sweep = recipe.evaluate
    models = editors_of(rows)
    stages = workspace.run().get("stages", {})
    return Summary(
        answers=summarize_answers(workspace),
        funnel=summarize_funnel(workspace),
        pair_truth=summarize_pair_truth(workspace),
        accuracies=accuracies(recipe, rows),
        image_guidance=[
            curve(
                rows, m, "image_guidance_scale", sweep.image_guidance_scale, guidance_scale=sweep.fixed_guidance_scale
            )
            for m in models
            if len(sweep.image_guidance_scale) > 1  # one value is no curve
        ],
        text_guidance=[
            curve(
                rows, m, "guidance_scale", sweep.guidance_scale, image_guidance_scale=sweep.fixed_image_guidance_scale
            )
            for m in models
            if len(sweep.guidance_scale) > 1
        ],
        sdedit=[curve(rows, m, "strength", sweep.sdedit_strengths) for m in SDEDITS if rows and sweep.sdedit_strengths],
        predictions=predictions(workspace, rows),
        calibration=summarize_calibration(recipe, workspace),
        marks=judge_marks(recipe, workspace),
        seconds={stage: facts["seconds"] for stage, facts in stages.items() if "seconds" in facts},
    )


def metric_rows(workspace: Workspace) -> list[Row]:
    """The rows of evaluation/metrics.parquet without the images; empty when there are none."""
    if not workspace.exists("evaluation", "metrics.parquet"):
        return []
    columns = [name for name in METRICS.names if name != "image"]
    return workspace.read_table("evaluation", "metrics.parquet", columns=columns).to_pylist()


def summarize_funnel(workspace: Workspace) -> Funnel | None:
    """None until pairs have been generated."""
    if not workspace.exists("pairs"):
        return None
    counts = funnel(workspace.read_table("pairs", columns=COLUMNS).to_batches())
    names = {field.name for field in fields(Funnel)} & counts.keys()
    return Funnel(
        **{name: counts[name] for name in names},
        examples={
            split: workspace.read_table("dataset", split, columns=["pair_id"]).num_rows
            for split in ("train", "validation", "test")
            if workspace.exists("dataset", split)
        },
    )


def summarize_answers(workspace: Workspace) -> Answers | None:
    """None until the language model was asked."""
    if not any(path.endswith(".parquet") for path in workspace.files("instructions")):
        return None
    columns = ["edit_prompt", "edited_prompt", "edit_type", "attempts", "status", "reason"]
    rows = workspace.read_table("instructions", columns=columns).to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    types = Counter(row["edit_type"] or "unknown" for row in ok)
    return Answers(
        edit_types=dict(types.most_common()),
        instruction_words=lengths([row["edit_prompt"] for row in ok], width=2),
        edited_caption_words=lengths([row["edited_prompt"] for row in ok], width=5),
        attempts={times(n): count for n, count in sorted(Counter(row["attempts"] for row in rows).items())},
        reasons=dict(Counter(row["reason"] for row in rows if row["reason"]).most_common()),
    )


def times(n: int) -> str:
    return {0: "not asked", 1: "once", 2: "twice"}.get(n, f"{n} times")


def lengths(texts: list[str], width: int) -> dict[str, int]:
    """How many texts have how many words, in classes of `width`: {"1-2 words": 7, "3-4 words": 0, ...}."""
    found = Counter((len(text.split()) - 1) // width for text in texts)
    return {f"{k * width + 1}–{(k + 1) * width} words": found[k] for k in range(max(found, default=-1) + 1)}


PAIR_WAYS = ("same noise only", "same noise, filtered", "shared attention", "shared, filtered")


def summarize_pair_truth(workspace: Workspace) -> PairTruth | None:
    """None where there is no oracle. Each way of making pairs is a condition on the same captions and seeds."""
    if not workspace.exists("evaluation", "pair_truth.parquet"):
        return None
    rows = []
    for caption in workspace.read_table("evaluation", "pair_truth.parquet").to_pylist():
        for candidate in caption["candidates"]:
            row = {key: caption[key] for key in ("caption_id", "edit_kind")} | candidate
            way = 2 if row["shared"] else 0
            rows += [row | {"way": way}] + ([row | {"way": way + 1}] if row["verdict"] == ACCEPTED else [])

    def rates(some: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        return by_case(some, "success", list(range(4)), lambda row: row["way"])

    sums, counts = rates(rows)
    kinds = sorted({row["edit_kind"] for row in rows} - {None})  # None: the instruction can not be read
    return PairTruth(
        captions=len({row["caption_id"] for row in rows}),
        rates=dict(zip(PAIR_WAYS, estimate(sums, counts), strict=True)),
        filter_gain=difference(sums, counts, 3, 2),
        sharing_gain=difference(sums, counts, 2, 0),
        by_kind={kind: estimate(*rates([row for row in rows if row["edit_kind"] == kind])) for kind in kinds},
    )


def default_rows(recipe: Recipe, rows: list[Row], model: str) -> tuple[str, list[Row]]:
    """(setting, rows) that speak for a model: the recipe's sampling scales, and for SDEdit its best strength.

    Best by truth, without truth by direction: the baseline gets the benefit of the choice.
    """
    rows = [row for row in rows if row["model"] == model]
    if is_editor(model):
        s_text, s_image = recipe.sampling.guidance_scale, recipe.sampling.image_guidance_scale
        at = [row for row in rows if (row["guidance_scale"], row["image_guidance_scale"]) == (s_text, s_image)]
        return f"s_T {s_text:g}, s_I {s_image:g}", at
    if model not in SDEDITS or not rows:
        return "", rows

    def score(strength: float) -> float:
        at = [row for row in rows if row["strength"] == strength]
        return np.mean([row["clip_sim_dir"] if row["success"] is None else row["success"] for row in at]).item()

    best = max(sorted({row["strength"] for row in rows}), key=score)
    return f"strength {best:g}", [row for row in rows if row["strength"] == best]


def accuracies(recipe: Recipe, rows: list[Row]) -> list[Accuracy]:
    """Every model that was evaluated, editors first."""
    results = []
    for model in (*editors_of(rows), *SDEDITS, UNCHANGED):
        if not any(row["model"] == model for row in rows):
            continue
        setting, at = default_rows(recipe, rows, model)
        truth = {name: _mean(at, name) for name in TRUTHS}
        results.append(
            Accuracy(
                model,
                setting,
                clip_sim_image=_mean(at, "clip_sim_image") or _nothing(),
                clip_sim_dir=_mean(at, "clip_sim_dir") or _nothing(),
                **truth,
                by_kind={
                    kind: mean
                    for kind in sorted({row["edit_kind"] for row in at} - {None})
                    if (mean := _mean([row for row in at if row["edit_kind"] == kind], "success"))
                },
                by_attribute={name: mean for name in ATTRIBUTES if (mean := _mean(at, f"preserved_{name}"))},
                by_seed=[
                    (
                        _mean(mine, "clip_sim_image") or _nothing(),
                        _mean(mine, "clip_sim_dir") or _nothing(),
                        _mean(mine, "success"),
                    )
                    for draw in sorted({row["draw"] for row in at})
                    if (mine := [row for row in at if row["draw"] == draw])
                ],
            )
        )
    return results


def predictions(workspace: Workspace, rows: list[Row]) -> list[Prediction]:
    """AUCs of the similarities as predictors of truth: on the edits of every editor's sweep, and on generated pairs."""
    of = {f"edits by {name_of(model)}": [row for row in rows if row["model"] == model] for model in editors_of(rows)}
    if workspace.exists("evaluation", "pair_truth.parquet"):
        of["generated pairs"] = judged_candidates(workspace)
    by = {"direction": "clip_sim_dir", "image similarity": "clip_sim_image", "agreement with the caption": "clip_sim_1"}
    return [
        Prediction(what, name, auc(some, column, "success"))
        for what, some in of.items()
        if any(row["success"] is not None for row in some)
        for name, column in by.items()
    ]


def summarize_calibration(recipe: Recipe, workspace: Workspace) -> Calibration | str | None:
    """The filter that the judged pairs would choose, or why they can't; None where truth is not known."""
    if not workspace.exists("evaluation", "pair_truth.parquet"):
        return None
    try:
        return calibrate(judged_candidates(workspace), recipe.pairs, MIN_RECALL)
    except UserError as error:
        return str(error)


def judge_marks(recipe: Recipe, workspace: Workspace) -> list[Marks]:
    """Every model's marks; none without a judge."""
    if not workspace.exists("evaluation", "judged.parquet"):
        return []
    rows = workspace.read_table("evaluation", "judged.parquet").to_pylist()
    found = []
    for model in (*editors_of(rows), *SDEDITS, UNCHANGED):
        setting, at = default_rows(recipe, [row for row in rows if row["model"] == model], model)
        if at:
            means = {name: _mean(at, f"judge_{name}") or _nothing() for name in MARKS}
            found.append(Marks(model, setting, means, sum(row["judge_status"] != "ok" for row in at)))
    return found


def curve(rows: list[Row], model: str, scale: str, values: list[float], **fixed: float) -> Curve:
    """The means of `model` along `scale`, all rows at the `fixed` scales."""
    rows = [row for row in rows if row["model"] == model and all(row[key] == value for key, value in fixed.items())]
    values = sorted(values)

    def table(name: str) -> tuple[np.ndarray, np.ndarray]:
        return by_case(rows, name, values, lambda row: row[scale])

    known = any(row["success"] is not None for row in rows)
    return Curve(
        model,
        values,
        image=trend(*table("clip_sim_image")),
        direction=trend(*table("clip_sim_dir")),
        success=estimate(*table("success")) if known else None,
    )


def _mean(rows: list[Row], name: str) -> Estimate | None:
    sums, counts = by_case(rows, name, [True], lambda _: True)
    return estimate(sums, counts)[0] if counts.sum() else None


def _nothing() -> Estimate:
    return Estimate(float("nan"), float("nan"), float("nan"), 0)
