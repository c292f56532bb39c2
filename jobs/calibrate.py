"""Choose the CLIP filter on generated pairs of which the truth is known.

evaluation/pair_truth.parquet (from jobs.evaluate) -> a table and the lines for the recipe. A filter belongs to a CLIP
model: calibrate again for another one. More --evaluate.pair_captions in jobs.evaluate make the choice surer.
"""

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.evaluate.calibrate import MIN_RECALL, Calibration, calibrate, judged_candidates
from ip2p.recipe import Recipe
from ip2p.report.page import percent
from ip2p.workspace import Workspace
from runtime.job import job


class Flags(BaseModel):
    min_recall: float = Field(MIN_RECALL, gt=0, le=1, description="share of the right candidates that must be accepted")


def run(recipe: Recipe, workspace: Workspace, min_recall: float) -> Calibration:
    """Print what the recipe's filter and the best ones do. Raises `UserError` where truth is not known."""
    if recipe.truth != "oracle":
        raise UserError(f"truth: {recipe.truth}: calibration needs pairs of which the truth is known (truth: oracle)")
    if not workspace.exists("evaluation", "pair_truth.parquet"):
        raise UserError(f"{workspace.uri('evaluation/pair_truth.parquet')} is not there: run jobs.evaluate first")
    candidates = judged_candidates(workspace)
    found = calibrate(candidates, recipe.pairs, min_recall)
    table = Table("filter", "accepted", "of the right ones", "right among accepted", "95% interval")
    for name, effect in (
        ("none", found.unfiltered),
        ("of the recipe", found.present),
        ("thresholds, chosen on other captions", found.by_thresholds),
        ("quality, chosen on other captions", found.by_quality),
    ):
        rate = effect.precision
        interval = f"{percent(rate.low)} to {percent(rate.high)}"
        table.add_row(name, percent(effect.accepted), percent(effect.recall), percent(rate.mean), interval)
    table.title = (
        f"{len(candidates)} candidates of {len({row['caption_id'] for row in candidates})} captions, attention shared"
    )
    Console().print(table)
    print(f"AUC of right against wrong: {found.direction_auc:.3f} by direction, {found.quality_auc:.3f} by quality")
    t = found.thresholds
    print(f"thresholds: {{image: {t.image:g}, direction: {t.direction:g}, agreement: {t.agreement:g}}}")
    print("quality: {" + ", ".join(f"{name}: {value:g}" for name, value in found.quality) + "}")
    return found


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv)
    assert workspace is not None
    with job("calibrate", workspace):
        run(recipe, workspace, flags.min_recall)


if __name__ == "__main__":
    main()
