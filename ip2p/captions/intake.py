"""Captions as they are -> captions/, each once, with the reason of those that the language model is not asked."""

from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.captions.answers import too_long
from ip2p.captions.screen import NearDuplicates, refuse
from ip2p.errors import UserError
from ip2p.models import load_tokenizer
from ip2p.recipe import FileCaptions, GrammarCaptions, Recipe
from ip2p.records import CAPTIONS, caption_id
from ip2p.workspace import Workspace

ROWS_PER_FILE = 5000


def check_source(recipe: Recipe, workspace: Workspace) -> None:
    """Raise `UserError` when the recipe's captions lie in the folder that `write_captions` replaces."""
    folder = workspace.path("captions")
    if isinstance(recipe.captions, FileCaptions) and Workspace(recipe.captions.path).path("").startswith(f"{folder}/"):
        raise UserError(f"captions.path: {folder} is written by this job; keep {recipe.captions.path!r} elsewhere")


def write_captions(recipe: Recipe, workspace: Workspace, captions: Iterable[str]) -> dict[str, int]:
    """Write `captions/` (CAPTIONS) from the start; returns counts. The same recipe gives the same files."""
    if workspace.exists("captions"):
        workspace.fs.delete_dir(workspace.path("captions"))
    screen = screening(recipe)
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    duplicates = refused = files = 0

    for caption in captions:
        name = caption_id(caption)
        if name in seen:
            duplicates += 1
            continue
        seen.add(name)
        refusal = screen(caption)
        refused += bool(refusal)
        rows.append({"caption_id": name, "caption": caption, "refusal": refusal})
        if len(rows) == ROWS_PER_FILE:
            _write_part(workspace, files, rows)
            rows, files = [], files + 1

    if rows:
        _write_part(workspace, files, rows)
    if not seen:
        raise UserError(f"captions: there are none in {recipe.captions}")
    return {"captions": len(seen), "duplicates": duplicates, "refused": refused}


def screening(recipe: Recipe) -> Callable[[str], str]:
    """Return a function of a caption: why the model is not asked, or "". It remembers earlier captions."""
    max_words = recipe.instructions.max_caption_words
    tokenizer = load_tokenizer(recipe.models.text_to_image)
    # Scenes of the grammar differ in single words, and the grammar draws no caption twice.
    alike = 1.0 if isinstance(recipe.captions, GrammarCaptions) else recipe.captions.near_duplicates
    earlier = NearDuplicates(alike) if alike < 1 else None

    def screen(caption: str) -> str:
        refusal = refuse(caption, max_words)
        if not refusal and too_long(tokenizer, caption):
            return f"longer than {tokenizer.model_max_length} tokens"
        if not refusal and earlier is not None and earlier.add(caption):
            return "near-duplicate"
        return refusal

    return screen


def _write_part(workspace: Workspace, part: int, rows: list[dict[str, str]]) -> None:
    with workspace.open_out("captions", f"part-{part:05d}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=CAPTIONS), file)
