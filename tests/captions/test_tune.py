"""Tuning by triplets, on tiny untrained models in the layouts of Llama and Qwen."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from ip2p.captions.prompt import answer, tuned_prompt
from ip2p.captions.triplets import TRIPLETS, Triplet
from ip2p.captions.tune import export, make_trainer, split, usable
from ip2p.miniature.language import vocabulary
from ip2p.miniature.models import language_model
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Recipe, Tune

GOOD = Triplet("a red star", "make it blue", "a blue star", "colour")
BAD = Triplet("a red star", "make it red", "a red star", "colour")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Directory of an untrained model of Qwen's architecture."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tokenizer = language_model.build_tokenizer(vocabulary())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,  # 32 a head: vLLM's attention on the CPU knows no smaller ones
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe(llm: Path, **tune) -> Recipe:
    ref = ModelRef(path=str(llm))
    return Recipe(
        name="smallest",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        tune=Tune(**({"epochs": 2, "batch_size": 8, "learning_rate": 3e-3} | tune)),
    )


def drawn(count: int) -> list[Triplet]:
    rng = random.Random(0)
    triplets = [draw_triplet(rng, "recolour", held_out=False) for _ in range(count)]
    return [Triplet(one.caption, one.instruction, one.edited_caption) for one in triplets]


class StopAfterSaving(TrainerCallback):
    def on_save(self, *_, **__):
        raise InterruptedError


def losses(trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_what_cannot_be_trained_on_is_left_out_or_told():
    assert usable([GOOD] * 12, names_type=True) == [GOOD]
    others = [GOOD._replace(caption=f"a red star and {n} moons") for n in range(11)]
    assert BAD not in usable([BAD, *others], names_type=True)
    with pytest.raises(ValueError, match=r"2 of 3 can't be trained on \('a red star': edited_caption is the caption"):
        usable([BAD, BAD, GOOD], names_type=True)
    with pytest.raises(ValueError, match="edit_type is missing, and answers are to name it"):
        usable([GOOD._replace(edit_type=None)], names_type=True)
    with pytest.raises(ValueError, match="the file is empty"):
        usable([], names_type=False)
    assert len(usable(TRIPLETS, names_type=True)) == len(TRIPLETS)


def test_no_caption_is_on_both_sides():
    twice = [*TRIPLETS, *(triplet._replace(instruction=f"{triplet.instruction} now") for triplet in TRIPLETS)]
    chosen, held_out = split(twice, Tune(validation_fraction=0.1))
    assert len(chosen) + len(held_out) == len(twice)
    assert 0.05 < len(held_out) / len(twice) < 0.15
    assert not {triplet.caption for triplet in chosen} & {triplet.caption for triplet in held_out}
    with pytest.raises(ValueError, match="all of one caption"):
        split([GOOD], Tune())


def test_the_loss_is_that_of_the_answer_and_its_end(qwen, tmp_path):
    triplets = drawn(4)
    trainer = make_trainer(make_recipe(qwen), triplets, triplets, tmp_path)
    (batch,) = trainer.get_eval_dataloader()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learnt = trainer.processing_class.decode(ids[labels != -100])
        triplet = next(one for one in triplets if answer(*one[1:]) in learnt)
        assert learnt == answer(*triplet[1:]) + trainer.processing_class.eos_token
        asked = trainer.processing_class.decode(ids[labels == -100], skip_special_tokens=True)
        assert asked == tuned_prompt(triplet.caption)


@pytest.mark.parametrize("rank", [4, None])
def test_tuning_learns_and_is_exported_whole(qwen, tmp_path, rank):
    recipe = make_recipe(qwen, lora_rank=rank)
    trainer = make_trainer(recipe, drawn(64), drawn(80)[64:], tmp_path / "run")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before - 0.1 > losses(trainer)[0] > losses(trainer)[1]

    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "adapter_config.json").exists() == (rank is not None)
    export(recipe, checkpoint, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert "lora" not in "".join(model.state_dict()), "merged: vLLM needs no adapter"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a red star\n", return_tensors="pt").input_ids
    with torch.no_grad():
        tuned = trainer.model.eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, tuned, atol=1e-4, rtol=1e-4)
        untuned = AutoModelForCausalLM.from_pretrained(qwen).eval()(ids).logits
    assert (tuned - untuned).abs().max() > 0.1


def test_goes_on_from_a_checkpoint_as_if_never_stopped(qwen, tmp_path):
    whole = make_trainer(make_recipe(qwen), drawn(16), drawn(20)[16:], tmp_path / "whole")
    whole.train()

    stopped = make_trainer(make_recipe(qwen), drawn(16), drawn(20)[16:], tmp_path / "stopped", [StopAfterSaving()])
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed = make_trainer(make_recipe(qwen), drawn(16), drawn(20)[16:], tmp_path / "stopped")
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
