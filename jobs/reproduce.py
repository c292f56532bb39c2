"""The whole paper in one command: the five stages in order, each going on where it stopped, then the results.

captions -> instructions -> pairs -> dataset -> editor -> evaluation -> report.html
"""

import time
from types import ModuleType

from rich.console import Console
from rich.table import Table

from ip2p.cli import load_settings
from ip2p.evaluate.bootstrap import Estimate
from ip2p.recipe import Recipe
from ip2p.report.page import duration, percent, points
from ip2p.report.summary import Summary, name_of, summarize
from ip2p.workspace import Workspace
from jobs import edit_captions, evaluate, export_dataset, generate_pairs, train
from runtime.connect import connect
from runtime.job import job

STAGES: dict[ModuleType, str] = {
    edit_captions: "a language model writes instructions and edited captions",
    generate_pairs: "Stable Diffusion with Prompt-to-Prompt draws pairs, CLIP keeps the good ones",
    export_dataset: "the accepted pairs become a dataset",
    train: "the UNet learns to follow instructions",
    evaluate: "the guidance scales are swept, edits and pairs are judged",
}


def run(recipe: Recipe, workspace: Workspace) -> Summary:
    """Run what has not been done yet of the five stages, and print the results."""
    evaluate.check(recipe)  # the last stage's models: better told now than after an hour
    connect()
    console = Console(highlight=False)
    for number, (stage, what) in enumerate(STAGES.items(), 1):
        name = stage.__name__.removeprefix("jobs.")
        console.rule(f"[bold]{number}/{len(STAGES)} {name}[/bold]: {what}", align="left")
        started = time.perf_counter()
        stage.run(recipe, workspace)
        console.print(f"[dim]{name} took {duration(time.perf_counter() - started)}[/dim]\n")
    summary = summarize(recipe, workspace)
    for table in results(summary):
        console.print(table)
    console.print(f"[bold]report:[/bold] {workspace.uri('report.html')}", soft_wrap=True)
    return summary


def results(summary: Summary) -> list[Table]:
    """What was measured, as tables for the terminal."""
    tables = []
    if funnel := summary.funnel:
        table = new_table("from captions to pairs", "", "count")
        for name in ("captions", "instructions", "candidates", "pairs"):
            table.add_row(name, f"{getattr(funnel, name):,}")
        tables.append(table)
    if truth := summary.pair_truth:
        table = new_table(
            "pairs: edit carried out and the rest preserved (oracle)", "made with", "right", "95% interval", "n"
        )
        for way, rate in truth.rates.items():
            table.add_row(way, *cells(rate))
        table.caption = f"sharing {points(truth.sharing_gain)}, filter on top {points(truth.filter_gain)}"
        tables.append(table)
    if curves := [(c, "s_I", "image similarity", c.image) for c in summary.image_guidance] + [
        (c, "s_T", "direction", c.direction) for c in summary.text_guidance
    ]:
        table = new_table("the two guidance scales", "editor", "scale", "raises", "from", "to", "monotone within error")
        for curve, scale, metric, trend in curves:
            ends = (f"{mean.mean:.3f}" for mean in (trend.means[0], trend.means[-1]))
            table.add_row(name_of(curve.model), scale, metric, *ends, "yes" if trend.monotone else "no")
        tables.append(table)
    if summary.accuracies and summary.accuracies[0].success:
        table = new_table(
            "editors on held-out scenes: both carried out and preserved (oracle)", "model", "right", "95% interval", "n"
        )
        for result in summary.accuracies:
            if result.success:
                table.add_row(name_of(result.model), *cells(result.success))
        tables.append(table)
    return tables


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right")
    return table


def cells(rate: Estimate) -> tuple[str, str, str]:
    return percent(rate.mean), f"{percent(rate.low)} to {percent(rate.high)}", str(rate.count)


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "captions", "models.text_to_image", "models.clip", "models.llm")
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=needs)
    assert workspace is not None
    with job("reproduce", workspace):
        run(recipe, workspace)


if __name__ == "__main__":
    main()
