"""What a run will cost: GPU-hours, storage and money of each stage, by the paper's protocol and by the recipe's.

--pairs N says how many pairs are wanted (--pairs.steps and so on are keys of the recipe). Nothing is started or read
but the recipe; every assumption is printed with its source, and is a flag.
"""

import re
import sys
from collections.abc import Sequence

from pydantic import Field
from rich.console import Console
from rich.table import Table

from ip2p.cli import load_settings
from ip2p.cost import Assumptions, Protocol, Stage, gpu_types, protocols, stages
from ip2p.errors import UserError
from ip2p.recipe import Recipe
from runtime.exit import exit_statuses


class Flags(Assumptions):
    wanted: int = Field(1_000_000, gt=0, description="pairs to make; --pairs N says the same")


def run(recipe: Recipe, flags: Flags, console: Console) -> None:
    """Print a table for each protocol, and the assumptions. Raises `UserError` for a GPU that is half known."""
    gpus = gpu_types(flags)
    for protocol in protocols(recipe, flags):
        console.print(cost_table(protocol, stages(recipe, protocol, flags.wanted, flags), gpus, flags))
    console.print(assumption_table(flags))


def cost_table(
    protocol: Protocol, planned: Sequence[Stage], gpus: dict[str, tuple[float, float]], assumed: Assumptions
) -> Table:
    """A row for each stage and their sum; GPU-hours and money for each type of GPU."""
    table = Table(
        title=f"{protocol.name}; {protocol.unet_samples_per_pair:,.0f} UNet samples a pair",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("stage", "storage", *gpus):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in planned:
        table.add_row(stage.name, gigabytes(stage.gigabytes), *cells([stage], gpus))
    total = sum(stage.gigabytes for stage in planned)
    table.add_section()
    table.add_row("together", gigabytes(total), *cells(planned, gpus))
    cost = total * assumed.storage_price * assumed.months
    table.caption = f"hours of one GPU; storage, kept for --months {assumed.months:g}: ${cost:,.0f}"
    return table


def cells(planned: Sequence[Stage], gpus: dict[str, tuple[float, float]]) -> list[str]:
    """GPU-hours and $ of some stages, for each type."""
    hours = {name: sum(stage.gpu_hours(peak) for stage in planned) for name, (peak, _) in gpus.items()}
    return [f"{hours[name]:,.1f} h\n${hours[name] * price:,.0f}" for name, (_, price) in gpus.items()]


def gigabytes(value: float) -> str:
    return f"{value / 1000:,.2f} TB" if value >= 1000 else f"{value:,.1f} GB"


def assumption_table(assumed: Assumptions) -> Table:
    """Each with its value, and its source, as they are flags."""
    table = Table(title="assumptions", title_justify="left")
    for column in ("flag", "value", "what it is, and where from"):
        table.add_column(column, overflow="fold")
    for name, field in Assumptions.model_fields.items():
        value = getattr(assumed, name)
        changed = "" if value == field.default else " (changed)"
        shown = ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:g}"
        table.add_row(f"--{name}", shown + changed, field.description)
    return table


def pairs_wanted(argv: Sequence[str]) -> list[str]:
    """Return the flags with `--pairs N` as `--wanted N`: `--pairs` is a section of the recipe.

    Raises `UserError` for an N that is no number of pairs.
    """
    words = " ".join(argv).replace("--pairs=", "--pairs ").split()
    for at, word in enumerate(words):
        if word == "--pairs":
            count = words[at + 1] if at + 1 < len(words) else ""
            if not re.fullmatch("[1-9][0-9_]*", count):
                raise UserError(f"--pairs {count}: not a number of pairs; use a whole number of at least 1")
    return ["--wanted" + word.removeprefix("--pairs") if word.split("=")[0] == "--pairs" else word for word in argv]


def main(argv: list[str] | None = None) -> None:
    with exit_statuses():
        given = pairs_wanted(sys.argv[1:] if argv is None else argv)
        recipe, _, flags = load_settings(__doc__ or "", Flags, given, ())
        run(recipe, flags, Console(highlight=False))


if __name__ == "__main__":
    main()
