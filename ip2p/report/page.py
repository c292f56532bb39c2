"""report.html: one file that shows what a run made and how good it is. No network, no scripts, light and dark."""

import math
from pathlib import Path

import jinja2
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup

from ip2p.evaluate.bootstrap import Estimate
from ip2p.evaluate.calibrate import MIN_RECALL
from ip2p.evaluate.sweep import is_editor
from ip2p.recipe import Recipe
from ip2p.report import charts
from ip2p.report.benchmark import summarize_benchmark
from ip2p.report.pictures import (
    accepted_pairs,
    comparison,
    failed_candidates,
    guidance_grids,
    judged_cases,
    rejected_pairs,
    shown_rows,
)
from ip2p.report.summary import Curve, Row, Summary, name_of, summarize
from ip2p.workspace import Workspace

TEMPLATES = Path(__file__).parent / "templates"


def write_report(recipe: Recipe, workspace: Workspace) -> Summary:
    """Write `report.html` into the workspace, from whatever stages have run, and return its numbers."""
    summary = summarize(recipe, workspace)
    with workspace.open_out("report.html") as file:
        file.write(render(recipe, workspace, summary).encode())
    return summary


def template(name: str) -> jinja2.Template:
    """A page of ours; what it is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def render(recipe: Recipe, workspace: Workspace, summary: Summary) -> str:
    """The report as HTML."""
    helpers = {
        "percent": percent, "points": points, "interval_text": interval_text, "heat": heat,
        "number": number, "min_recall": MIN_RECALL,
        "finite": lambda value: value if math.isfinite(value) else 0.0,
    }  # fmt: skip
    rows = shown_rows(workspace)
    run = workspace.run()
    return template("report.html.j2").render(
        **helpers,
        recipe=recipe,
        name_of=name_of,
        is_editor=is_editor,
        truth=recipe.truth == "oracle",
        title=f"InstructPix2Pix, {recipe.name}",
        subtitle=f"seed {recipe.seed} · every number below is from this run",
        headline=headline(summary),
        answers=summary.answers,
        funnel=summary.funnel,
        funnel_note=funnel_note(summary),
        accepted=accepted_pairs(workspace),
        rejected=rejected_pairs(workspace),
        failures=failed_candidates(workspace),
        pair_truth=summary.pair_truth,
        pair_truth_note=pair_truth_note(recipe, summary),
        grids=guidance_grids(recipe, workspace, rows),
        **curve_section(summary),
        accuracies=summary.accuracies,
        accuracy_note=accuracy_note(recipe),
        kinds=sorted({kind for result in summary.accuracies for kind in result.by_kind}),
        attributes=sorted({name for result in summary.accuracies for name in result.by_attribute}),
        predictions=summary.predictions,
        calibration=summary.calibration,
        marks=summary.marks,
        judged=judged_cases(recipe, workspace),
        comparison=comparison(recipe, workspace, rows),
        benchmark=summarize_benchmark(workspace),
        training=training_section(workspace),
        seconds=[(stage, duration(value)) for stage, value in summary.seconds.items()],
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        versions=run.get("versions", {}),
    )


def percent(value: float) -> str:
    return f"{100 * value:.0f}%" if math.isfinite(value) else "–"


def interval_text(rate: Estimate) -> str:
    if not math.isfinite(rate.mean):
        return "no samples"
    return f"{percent(rate.mean)} ({100 * rate.low:.0f}–{100 * rate.high:.0f}), n {rate.count}"


def number(mean: Estimate) -> str:
    """A mean of three digits with its interval."""
    return f"{mean.mean:.3f} ({mean.low:.3f}–{mean.high:.3f})" if math.isfinite(mean.mean) else "–"


def points(gain: Estimate) -> str:
    """A difference of rates in percentage points."""
    if not math.isfinite(gain.mean):
        return "an unknown amount (no samples)"
    return f"{100 * gain.mean:+.0f} points ({100 * gain.low:+.0f} … {100 * gain.high:+.0f})".replace("-", "−")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def heat(rate: Estimate) -> Markup:
    """A cell's background: the more, the stronger."""
    share = 55 * rate.mean if math.isfinite(rate.mean) else 0
    return Markup(f"background:color-mix(in srgb, var(--s0) {share:.0f}%, transparent)")


def headline(summary: Summary) -> list[tuple[str, str]]:
    """The few numbers to see first, as (value, what it is)."""
    found = []
    if funnel := summary.funnel:
        found.append(
            (f"{funnel.pairs:,}", f"pairs kept of {funnel.candidates:,} candidates for {funnel.captions:,} captions")
        )
        if funnel.device_seconds_per_pair:
            cost = f"{funnel.device_seconds_per_pair:.2g} s"
            samples = funnel.unet_samples_per_pair or 0
            found.append((cost, f"of a device for each pair kept: {samples:,.0f} samples through the UNet"))
    if truth := summary.pair_truth:
        kept, drawn, plain = (
            truth.rates[way].mean for way in ("shared, filtered", "shared attention", "same noise only")
        )
        found.append(
            (
                percent(kept),
                f"of kept pairs are right; {percent(drawn)} of candidates, {percent(plain)} without attention sharing",
            )
        )
    for result in summary.accuracies:
        if is_editor(result.model) and result.success:
            others = ", ".join(
                f"{name_of(other.model)} {percent(other.success.mean)}"
                for other in summary.accuracies
                if not is_editor(other.model) and other.success
            )
            found.append((percent(result.success.mean), f"of edits right with {name_of(result.model)} ({others})"))
    if summary.seconds:
        found.append((duration(sum(summary.seconds.values())), "for all stages together"))
    return found


def funnel_note(summary: Summary) -> str:
    funnel = summary.funnel
    if funnel is None:
        return ""
    note = f"{funnel.pairs:,} pairs kept"
    if funnel.examples:
        note += " (" + ", ".join(f"{split} {count:,}" for split, count in funnel.examples.items()) + ")"
    if funnel.device_seconds_per_pair:
        note += f"; a kept pair cost {funnel.device_seconds_per_pair:.2g} s"
    if funnel.unet_samples_per_pair:
        note += f" and {funnel.unet_samples_per_pair:,.0f} UNet samples"
    return note + "."


def pair_truth_note(recipe: Recipe, summary: Summary) -> str:
    if summary.pair_truth is None:
        return ""
    captions, candidates = summary.pair_truth.captions, recipe.evaluate.pair_candidates
    return (
        f"For {captions} captions, {candidates} candidates each were made again, with "
        "attention sharing and without, from the same seeds, so that all four ways are judged on the same captions."
    )


def accuracy_note(recipe: Recipe) -> str:
    note = (
        "The same test images and noise for every model. SDEdit is shown at its best strength. By the edited "
        "caption it is told what the whole result shows, which the editors have to find out from the image; by the "
        "instruction it is told what they are told."
    )
    if recipe.truth == "oracle":
        note = (
            "Held-out scenes, instructions in wordings that training never saw. An edit counts when the oracle finds "
            "it carried out and everything else as it was. " + note
        )
    return note


def curve_section(summary: Summary) -> dict:
    """The curves, their legend, and a line for each trend that the paper claims."""
    curves = summary.image_guidance
    if not curves:
        return {"charts": [], "trends": [], "curve_legend": ""}
    plane = [plane_series(curve, "s_I") for curve in curves]
    plane += [plane_series(curve, "strength") for curve in summary.sdedit]
    image = [scale_series(curve, curve.image.means) for curve in curves]
    text = [scale_series(curve, curve.direction.means) for curve in summary.text_guidance]
    drawn = [
        (plane, "CLIP image similarity", "CLIP directional similarity",
         "The paper's Figure 8: s_I swept at a fixed s_T (SDEdit: its strength). Up and to the right is better."),
        (image, "image guidance s_I", "CLIP image similarity", "More image guidance, closer to the input."),
        (text, "text guidance s_T", "CLIP directional similarity", "More text guidance, more of the edit."),
    ]  # fmt: skip
    if all(curve.success for curve in curves):
        truth = [scale_series(curve, curve.success or []) for curve in curves]
        drawn.append((truth, "image guidance s_I", "oracle: edit right", "Carried out and all else preserved."))
    trends = [
        {"model": name_of(curve.model), "scale": scale, "metric": metric, "of": getattr(curve, attribute)}
        for curves, scale, metric, attribute in (
            (summary.image_guidance, "s_I", "image similarity", "image"),
            (summary.text_guidance, "s_T", "direction", "direction"),
        )
        for curve in curves
    ]
    return {
        "charts": [
            {"svg": Markup(charts.line_chart(s, x, y, f"{y} against {x}")), "caption": c} for s, x, y, c in drawn if s
        ],
        "curve_legend": Markup(charts.legend(plane)),
        "trends": trends,
    }


def scale_series(curve: Curve, means: list[Estimate]) -> charts.Series:
    found = [charts.Point(scale, mean) for scale, mean in zip(curve.scales, means, strict=True)]
    return charts.Series(name_of(curve.model), found)


def plane_series(curve: Curve, scale_name: str) -> charts.Series:
    """Image similarity against directional similarity, the ends labelled with their scale."""
    found = []
    for n, (scale, x, y) in enumerate(zip(curve.scales, curve.image.means, curve.direction.means, strict=True)):
        label = f"{scale_name} {scale:g}" if n in (0, len(curve.scales) - 1) else ""
        found.append(charts.Point(x.mean, y, label, (x.low, x.high)))
    return charts.Series(name_of(curve.model), found)


def training_section(workspace: Workspace) -> dict | None:
    """The losses against the step, from model/training.parquet; None before training."""
    if not workspace.exists("model", "training.parquet"):
        return None
    # Not read_table: the folder holds a model as well.
    with workspace.open_in("model", "training.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    losses = [loss_series("training", rows, "loss"), loss_series("held-out pairs", rows, "validation_loss")]
    return {
        "svg": Markup(charts.line_chart(losses, "step", "loss", "loss against step")),
        "legend": Markup(charts.legend(losses)),
        "caption": "Mean squared error. On held-out pairs it is that of the averaged weights, the ones exported.",
    }


def loss_series(name: str, rows: list[Row], column: str) -> charts.Series:
    exact = [
        charts.Point(row["step"], Estimate(row[column], row[column], row[column], 1)) for row in rows if row[column]
    ]
    return charts.Series(name, exact)
