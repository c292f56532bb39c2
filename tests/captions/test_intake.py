"""What becomes of captions before the language model is asked."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.captions import intake
from ip2p.captions.source import file_captions
from ip2p.miniature.captions import grammar_captions
from ip2p.recipe import REPOSITORY, ClipRef, FileCaptions, GrammarCaptions, Instructions, ModelRef, Models, Recipe
from ip2p.records import CAPTIONS, caption_id
from ip2p.workspace import Workspace

WEIGHTS = REPOSITORY / "ip2p" / "miniature" / "weights"


def make_recipe(captions: GrammarCaptions | FileCaptions) -> Recipe:
    ref = ModelRef(path=str(WEIGHTS / "text_to_image"))
    models = Models(text_to_image=ref, clip=ClipRef(name=f"local-dir:{WEIGHTS / 'clip'}"), llm=ref, editor=ref)
    return Recipe(name="smallest", models=models, captions=captions, instructions=Instructions(max_caption_words=42))


def write_captions(path: Path, captions: list[str | None]) -> FileCaptions:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"TEXT": captions}), path)
    # Captions of miniature scenes are near-duplicates of one another.
    return FileCaptions(path=str(path), column="TEXT", near_duplicates=1)


def take_in(recipe: Recipe, workspace: Workspace) -> dict[str, int]:
    source = recipe.captions
    captions = file_captions(source) if isinstance(source, FileCaptions) else grammar_captions(source, recipe.seed)
    return intake.write_captions(recipe, workspace, captions)


def test_each_caption_is_kept_once_and_a_limit_holds(tmp_path):
    source = write_captions(tmp_path / "in" / "a.parquet", ["a dog", "a cat", "a dog", None, ""])
    workspace = Workspace(tmp_path / "run")
    counts = take_in(make_recipe(source), workspace)
    assert counts == {"captions": 3, "duplicates": 2, "refused": 1}
    table = workspace.read_table("captions")
    assert table.schema.equals(CAPTIONS, check_metadata=False)
    assert table.to_pylist() == [
        {"caption_id": caption_id(caption), "caption": caption, "refusal": refusal}
        for caption, refusal in (("a dog", ""), ("a cat", ""), ("", "empty caption"))
    ]

    fewer = make_recipe(source.model_copy(update={"limit": 1}))
    assert take_in(fewer, workspace) == {"captions": 1, "duplicates": 0, "refused": 0}
    assert workspace.read_table("captions").num_rows == 1


def test_near_duplicates_are_rows_that_the_model_never_sees(tmp_path):
    captions = ["a dog", "A dog.", "a  dog", "<b>a dog</b>", "a cat"]
    source = write_captions(tmp_path / "in.parquet", captions).model_copy(update={"near_duplicates": 0.9})
    workspace = Workspace(tmp_path / "run")
    counts = take_in(make_recipe(source), workspace)
    assert counts == {"captions": 5, "duplicates": 0, "refused": 3}
    refusals = [row["refusal"] for row in workspace.read_table("captions").to_pylist()]
    assert refusals == ["", "near-duplicate", "near-duplicate", "html", ""]

    exact = make_recipe(source.model_copy(update={"near_duplicates": 1}))
    assert take_in(exact, workspace)["refused"] == 1


def test_drawn_captions_are_alike_on_purpose_and_none_is_refused(tmp_path):
    recipe = make_recipe(GrammarCaptions(count=200))
    counts = take_in(recipe, Workspace(tmp_path))
    assert counts == {"captions": 200, "duplicates": 0, "refused": 0}


def test_captions_may_lie_beside_the_folder_that_is_written(tmp_path):
    source = write_captions(tmp_path / "captions.parquet", ["a dog"])
    assert take_in(make_recipe(source), Workspace(tmp_path))["captions"] == 1


def test_a_caption_that_the_text_encoder_would_cut_is_refused(tmp_path):
    words = " ".join(f"word{n}" for n in range(40))
    source = write_captions(tmp_path / "in.parquet", [words, "a large star"])
    recipe = make_recipe(source)
    workspace = Workspace(tmp_path / "run")
    assert take_in(recipe, workspace)["refused"] == 1
    refusals = workspace.read_table("captions")["refusal"].to_pylist()
    assert refusals == ["longer than 48 tokens", ""]
