import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ip2p.captions.prompt import answer, tuned_prompt
from ip2p.miniature.instructions import read_slots
from ip2p.miniature.language import read_caption, vocabulary
from ip2p.miniature.models import language_model, language_model_data
from ip2p.miniature.triplets import consistent, draw_triplet

SHIPPED = language_model.Path(language_model.__file__).parents[1] / "weights" / "language_model"


@pytest.fixture(scope="module")
def tokenizer():
    return language_model.build_tokenizer(vocabulary())


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(language_model_data, "BATCH_SIZE", 4)
    monkeypatch.setattr(language_model, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(language_model_data, "COPY_STEPS", 2)
    monkeypatch.setattr(language_model, "DEEPEN_AT", 3)


def test_every_word_is_one_token_with_and_without_a_space(tokenizer):
    for word in vocabulary():
        assert len(tokenizer(word)["input_ids"]) == 2, word
        assert len(tokenizer(f"a {word}")["input_ids"]) == 3, word


@pytest.mark.parametrize(
    "text",
    [
        '{"instruction": "say \\"hi\\", please", "edited_caption": "a  dog"}',
        "Füße 🙂\n\t…",
        " <s> {} , . \\n",
        "I'm a dog-lover",
    ],
)
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_a_caption_has_the_same_tokens_in_prompt_and_answer(tokenizer):
    caption, instruction, *_ = draw_triplet(random.Random(0))
    prompt = tokenizer(tuned_prompt(caption))["input_ids"][1:-1]
    reply = tokenizer(answer(instruction, caption), add_special_tokens=False)["input_ids"]
    assert reply[-len(prompt) - 1 : -1] == prompt, "copying is copying tokens"


def test_only_the_answer_is_learned(tokenizer):
    rows = [draw_triplet(random.Random(seed))[:3] for seed in range(3)]
    ids, labels = language_model._collate(tokenizer, rows, "cpu")
    for row, (caption, instruction, edited_caption) in enumerate(rows):
        learned = labels[row] != language_model.IGNORED
        assert torch.equal(ids[row][learned], labels[row][learned])
        assert tokenizer.decode(ids[row][learned]) == answer(instruction, edited_caption) + "</s>"
        start = int(learned.nonzero()[0])
        assert ids[row, :start].tolist() == tokenizer(tuned_prompt(caption))["input_ids"], "as in generation"


def test_instructions_use_the_words_of_the_captions_and_mean_the_same():
    rng = random.Random(0)
    for _ in range(300):
        caption, instruction, edited_caption = draw_triplet(rng)[:3]
        said = language_model_data.same_words(caption, instruction, edited_caption)
        assert consistent(caption, said, edited_caption) is None, (instruction, said)


def test_things_are_named_in_full_first_and_in_all_ways_later():
    def named_in_full(step: int) -> float:
        rows = [row for part in range(4) for row in language_model_data.draw_rows(0, step + part, vocabulary())]
        said = [set(read_slots(instruction)["thing"]) for _, instruction, _ in rows]
        named = [features for features in said if features]
        assert len(named) > 50
        return sum(features == {"size", "colour", "shape"} for features in named) / len(named)

    early, late = language_model_data.VARIED_AT - 4, language_model_data.VARIED_AT
    assert named_in_full(early) > 0.85, "but where things differ in their place alone"
    assert named_in_full(late) < 0.6


def test_things_that_look_alike_are_in_half_of_the_scenes_first_and_in_more_later():
    def confused(step: int) -> float:
        rows = [row for part in range(4) for row in language_model_data.draw_rows(0, step + part, vocabulary())]
        scenes = [read_caption(caption).scene for caption, _, _ in rows]
        return sum(map(language_model_data.confusable, scenes)) / len(scenes)

    early, late = language_model_data.CONFUSABLE_AT - 4, language_model_data.CONFUSABLE_AT
    assert 0.4 < confused(early) < 0.7 < confused(late)


def test_same_words_puts_the_right_article():
    caption = "a big red star in the top left, on a white background"
    edited = "a big azure star in the top left, on a white background"
    assert language_model_data.same_words(caption, "give the crimson star a blue colour", edited) == (
        "give the red star an azure colour"
    )


def test_deepening_changes_nothing_until_it_is_trained():
    shallow = language_model.build_model(50, layers=language_model.SHALLOW_LAYERS).eval()
    deep = language_model.deepen(shallow).eval()
    assert len(deep.model.layers) == language_model.LAYERS
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(deep(ids).logits, shallow(ids).logits)


def test_training_goes_on_from_its_checkpoint_as_if_nothing_had_happened(tmp_path, small_steps, monkeypatch):
    language_model.train(tmp_path / "whole", steps=5, seed=3)
    draw = language_model.draw_rows
    drawn = []

    def draw_and_die(*args):
        drawn.append(args)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(language_model, "draw_rows", draw_and_die)
    state = tmp_path / "checkpoints" / "state"
    with pytest.raises(KeyboardInterrupt):
        language_model.train(tmp_path / "resumed", steps=5, seed=3, checkpoint=state)
    language_model.train(tmp_path / "resumed", steps=5, seed=3, checkpoint=state)
    assert len(drawn) == 4 + 3, "steps 2, 3 and 4 are done after the checkpoint at 2"
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_saved_directory_loads_by_the_ordinary_names(tmp_path, tokenizer):
    language_model.save(language_model.build_model(len(tokenizer)), tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float16
    assert model.config.head_dim == 32, "vLLM's CPU attention takes no smaller heads"
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2
    assert (tmp_path / "model.safetensors").stat().st_size < 3_000_000


def test_rates_count_what_is_valid_and_what_is_true():
    caption = "a large red star in the top left and a small blue circle in the top right, on a white background"
    edited = caption.replace("red", "green")
    texts = [
        answer("make the star green", edited),
        answer("make the star yellow", edited),
        answer("make it fly", edited),
        answer("make the star red", caption),
        "no json",
    ]
    rates = language_model._rates([caption] * 5, texts)
    assert rates["valid"] == 3 / 5
    assert rates["consistent"] == 1 / 5
    assert rates["consistent.recolour"] == 1 / 2
    assert rates["share.unreadable"] == 1 / 5


@pytest.mark.skipif(not SHIPPED.exists(), reason="weights not trained yet")
def test_the_shipped_model_writes_consistent_edits():
    rates = language_model.measure(SHIPPED, 60, seed=1)
    assert rates["valid"] >= 0.95
    assert rates["consistent"] >= 0.88
