"""The paper's ablations (figure 10): how good is an editor without the filter, or with less data?

A *run* is one training, on data and with noise of a seed of its own, and its edits of test images of that seed. All
that is said is over runs: an interval holds chance in the choice of data, in training and in the test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from scipy import stats

from ip2p.edit.names import WORKSPACE
from ip2p.evaluate.bootstrap import Estimate
from ip2p.recipe import Recipe
from ip2p.report import charts
from ip2p.report.page import template
from ip2p.report.summary import Row, default_rows


@dataclass(frozen=True)
class Setting:
    """One kind of training data."""

    name: str
    pairs: Estimate  # trained on
    right_pairs: float  # share of them, by the oracle
    runs: list[list[Row]]  # rows of METRICS, by seed


@dataclass(frozen=True)
class Result:
    """A setting's editors: at the recipe's sampling scales, and along the two swept ones."""

    name: str
    pairs: Estimate
    right_pairs: float
    success: Estimate  # share of edits carried out with all else preserved
    less_than_first: Estimate  # success minus that of the first setting, by seed
    image: Estimate
    direction: Estimate
    along_image_guidance: list[tuple[float, Estimate, Estimate]]  # s_I, image similarity, direction
    along_guidance: list[tuple[float, Estimate, Estimate]]  # s_T, image similarity, direction


# x +- t(n - 1) s / sqrt(n)   (Student)
def over_runs(values: Sequence[float]) -> Estimate:
    """The mean over independent runs with its 95% interval; one run alone has none."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Estimate(mean, mean - half, mean + half, n)


def results(recipe: Recipe, settings: Sequence[Setting]) -> list[Result]:
    """What the settings came to, compared with the first one by seed."""
    sweep = recipe.evaluate
    fixed_text, fixed_image = sweep.fixed_guidance_scale, sweep.fixed_image_guidance_scale
    found = []
    first = _success(recipe, settings[0].runs)
    for setting in settings:
        at = [default_rows(recipe, rows, WORKSPACE)[1] for rows in setting.runs]
        success = _success(recipe, setting.runs)
        found.append(
            Result(
                setting.name,
                setting.pairs,
                setting.right_pairs,
                over_runs(success),
                over_runs([a - b for a, b in zip(success, first)]),
                _mean(at, "clip_sim_image"),
                _mean(at, "clip_sim_dir"),
                [
                    _along(setting.runs, s, guidance_scale=fixed_text, image_guidance_scale=s)
                    for s in sorted(sweep.image_guidance_scale)
                ],
                [
                    _along(setting.runs, s, guidance_scale=s, image_guidance_scale=fixed_image)
                    for s in sorted(sweep.guidance_scale)
                ],
            )
        )
    return found


def _success(recipe: Recipe, runs: list[list[Row]]) -> list[float]:
    return [float(np.mean([row["success"] for row in default_rows(recipe, rows, WORKSPACE)[1]])) for rows in runs]


def _mean(runs: list[list[Row]], name: str) -> Estimate:
    return over_runs([float(np.mean([row[name] for row in rows])) for rows in runs])


def _along(runs: list[list[Row]], scale: float, **scales: float) -> tuple[float, Estimate, Estimate]:
    at = [[r for r in rows if r["model"] == WORKSPACE and all(r[k] == v for k, v in scales.items())] for rows in runs]
    return scale, _mean(at, "clip_sim_image"), _mean(at, "clip_sim_dir")


def page(recipe: Recipe, found: list[Result]) -> str:
    """A table and charts, as one HTML file."""
    plane = [
        charts.Series(
            result.name,
            [
                charts.Point(image.mean, direction, f"s_I {s:g}", (image.low, image.high))
                for s, image, direction in result.along_image_guidance
            ],
        )
        for result in found
    ]
    text = [
        charts.Series(result.name, [charts.Point(s, direction) for s, _, direction in result.along_guidance])
        for result in found
    ]
    drawn = [
        (plane, "CLIP image similarity", "CLIP directional similarity", "s_I swept, as in the paper's figure 10."),
        (text, "text guidance s_T", "CLIP directional similarity", "s_T swept."),
    ]
    return template("ablations.html.j2").render(
        title=f"Ablations, {recipe.name}",
        steps=recipe.train.steps,
        results=found,
        legend=Markup(charts.legend(plane)),
        charts=[
            {"svg": Markup(charts.line_chart(s, x, y, f"{y} against {x}")), "caption": caption}
            for s, x, y, caption in drawn
        ],
    )
