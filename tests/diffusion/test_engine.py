"""The engine against diffusers' pipeline, against Prompt-to-Prompt written plainly, and itself in other company."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from ip2p.diffusion.attention import UNALIGNED, align_tokens
from ip2p.diffusion.blend import Blend
from ip2p.diffusion.engine import Conditioning, Engine, Link, Trajectory
from ip2p.diffusion.guidance import edit_weights, text_weights
from ip2p.diffusion.schedule import NoiseSchedule
from ip2p.diffusion.solvers import plan
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import ModelRef

SHAPE = (4, 8, 8)
PROMPTS = ("red dog", "blue dog on ice")


@pytest.fixture(scope="module")
def model(tiny_sd) -> TextToImage:
    return load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu")


@pytest.fixture(scope="module")
def editor(tiny_editor) -> TextToImage:
    return load_text_to_image(ModelRef(path=str(tiny_editor)), device="cpu")


def schedule_of(model: TextToImage) -> NoiseSchedule:
    return NoiseSchedule.from_config(model.schedule.alphas_cumprod, model.schedule.config)


def engine_of(model: TextToImage, batch_size: int = 8) -> Engine:
    return Engine(model.unet, schedule_of(model), batch_size)


def conditionings(model: TextToImage, prompt: str) -> list[Conditioning]:
    return [Conditioning(text) for text in model.encode_text(["", prompt])]


def sample(model, prompt, seed, **how) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    how = {"steps": 4, "solver": "ddim", "weights": text_weights(5.0), **how}
    return Trajectory(torch.randn(SHAPE, generator=generator), conditionings(model, prompt), generator=generator, **how)


def pair(model, source_prompt, edited_prompt, seed, self_fraction, cross_fraction, **how) -> list[Trajectory]:
    source, edited = sample(model, source_prompt, seed, **how), sample(model, edited_prompt, seed, **how)
    ids = model.tokenizer([source_prompt, edited_prompt], padding="max_length", max_length=77).input_ids
    alignment = torch.tensor(align_tokens(*ids, model.tokenizer.eos_token_id, "refine"))
    edited.link = Link(source, [None, alignment], self_fraction, cross_fraction)
    return [source, edited]


@pytest.mark.parametrize(
    ("solver", "scheduler"), [("ddim", DDIMScheduler), ("euler_ancestral", EulerAncestralDiscreteScheduler)]
)
@pytest.mark.parametrize("steps", [1, 5])
def test_text_to_image_is_diffusers_pipeline(model, tiny_sd, solver, scheduler, steps):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    config = {"clip_sample": False} if scheduler is DDIMScheduler else {}  # a bound for pixels, not for latents
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(
        PROMPTS[0], 64, 64, num_inference_steps=steps, guidance_scale=5.0, generator=generator, output_type="latent"
    ).images[0]
    [latents] = engine_of(model).run([sample(model, PROMPTS[0], 3, steps=steps, solver=solver)])
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


class MaterialisedProcessor(AttnProcessor):
    """Prompt-to-Prompt plainly: maps are computed, then carried over. Rows: (source, edited) per conditioning."""

    def __init__(self, alignment: list[list[int]]):
        self.alignment = alignment  # of each conditioning
        self.shares_self = self.shares_cross = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if encoder_hidden_states is not None and self.shares_cross:
            mixed = key.clone()
            for slot, alignment in enumerate(self.alignment):
                for j, a in enumerate(alignment):
                    if a != UNALIGNED:
                        mixed[2 * slot + 1, j] = key[2 * slot, a]
            key = mixed
        query, key, value = (attn.head_to_batch_dim(x, out_dim=4) for x in (query, key, value))
        if encoder_hidden_states is not None and self.shares_cross:
            query = query[[0, 0, 2, 2]]
        maps = (query @ key.mT * attn.scale).softmax(-1)
        if encoder_hidden_states is None and self.shares_self:
            maps = maps[[0, 0, 2, 2]]
        out = (maps @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral"])
@pytest.mark.parametrize("fractions", [(0.5, 0.0), (0.0, 0.7), (0.4, 0.8), (2.0, 2.0)])
def test_prompt_to_prompt_is_the_materialised_one(model, solver, fractions):
    steps, scale = 4, 5.0
    source, edited = pair(model, *PROMPTS, 7, *fractions, solver=solver)
    noise = source.latents.clone()
    ours = torch.stack(engine_of(model, 2).run([source, edited]))

    unet = copy.deepcopy(model.unet)
    processor = MaterialisedProcessor([list(range(77)), edited.link.alignments[1].tolist()])
    unet.set_attn_processor(processor)
    text = model.encode_text(["", "", *PROMPTS])
    way = plan(schedule_of(model), solver, steps)
    generator = torch.Generator().manual_seed(7)
    torch.randn(SHAPE, generator=generator)
    latents = torch.stack([noise, noise]) * way.initial_scale
    for i in range(steps):
        processor.shares_self, processor.shares_cross = (i / (steps - 1) < fraction for fraction in fractions)
        with torch.no_grad():
            output = unet(torch.cat([latents, latents]), way.timesteps[i].expand(4), text).sample
        output = output[:2] + scale * (output[2:] - output[:2])
        from_latents, from_output, _, keep, pull, spread = way.coefficients[i]
        latents = keep * latents + pull * (from_latents * latents + from_output * output)
        if spread:
            latents = latents + spread * torch.randn(SHAPE, generator=generator)
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "dpmsolver++"])
def test_identical_captions_give_identical_images(model, solver):
    source, edited = engine_of(model).run(pair(model, PROMPTS[0], PROMPTS[0], 1, 0.5, 0.5, solver=solver))
    torch.testing.assert_close(source, edited, atol=1e-5, rtol=1e-5)


def test_fraction_zero_is_plain_generation_from_the_same_noise(model):
    # In float64: a convolution's float32 rounding depends on the batch and the CPU, and steps amplify it.
    model = replace(model, unet=copy.deepcopy(model.unet).double())
    for steps in (1, 4):
        how = {"steps": steps, "solver": "euler_ancestral"}
        linked = engine_of(model).run(pair(model, *PROMPTS, 2, 0.0, 0.0, **how))
        alone = [engine_of(model).run([sample(model, prompt, 2, **how)])[0] for prompt in PROMPTS]
        torch.testing.assert_close(linked, alone, atol=1e-6, rtol=1e-6)


def test_sharing_matters_and_draws_the_images_together(model):
    distances = []
    for fraction in (0.0, 0.5, 2.0):
        source, edited = engine_of(model).run(pair(model, *PROMPTS, 2, fraction, fraction))
        distances.append(float((source - edited).norm()))
    assert distances[0] > distances[1] > distances[2]


def mixed_company(model) -> list[Trajectory]:
    return [
        *pair(model, *PROMPTS, 1, 0.5, 0.5, steps=5, solver="euler_ancestral"),
        sample(model, "a cat", 2, steps=3),
        *pair(model, "a cat", "a red cat", 3, 0.0, 1.0, steps=4, solver="dpmsolver++"),
        sample(model, "a hat", 4, steps=1, solver="euler", weights=text_weights(1.0)),
        sample(model, "a hat", 5, steps=6, solver="dpmsolver++", weights=text_weights(9.0)),
        *pair(model, *PROMPTS, 6, 1.0, 0.0, steps=6),
        sample(model, "a bat", 7, steps=6, start=4, solver="euler_ancestral"),
    ]


def test_neighbours_do_not_matter(model):
    together = engine_of(model, 8).run(mixed_company(model))
    for batch_size in (2, 5):
        torch.testing.assert_close(
            engine_of(model, batch_size).run(mixed_company(model)), together, atol=1e-4, rtol=1e-4
        )


def test_a_broken_sample_spoils_no_other(model):
    broken = sample(model, "nothing", 9, steps=3)
    broken.latents[:] = torch.nan
    company = mixed_company(model)
    expected = engine_of(model).run(mixed_company(model))
    *latents, lost = engine_of(model).run([*company, broken])
    assert lost.isnan().all()
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def test_unet_samples_count_only_what_was_needed(model):
    engine = engine_of(model)
    engine.run([sample(model, "a", 0, steps=3), sample(model, "b", 0, steps=2, weights=text_weights(1.0))])
    assert engine.unet_samples == 3 * 2 + 2 * 1
    pair_engine = engine_of(model)
    pair_engine.run(pair(model, *PROMPTS, 0, 0.5, 0.5, steps=3))
    assert pair_engine.unet_samples == 3 * 4


def test_editor_conditionings(editor):
    """Three conditionings with an image; both scales 1 leave the fully conditioned prediction."""
    image, [none, text] = torch.randn(SHAPE), editor.encode_text(["", "make it red"])
    slots = [Conditioning(none), Conditioning(none, image), Conditioning(text, image)]

    def run(weights, some=slots):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        return engine_of(editor).run([Trajectory(noise, some, weights, steps=3, solver="ddim")])[0]

    torch.testing.assert_close(run(edit_weights(1, 1)), run((1.0,), slots[2:]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(edit_weights(7.5, 1.5)), run(edit_weights(7.5, 3)), atol=1e-3)


def test_serving_adds_steps_and_removes(model):
    engine = engine_of(model, 2)
    first, second, third = (sample(model, "a", seed, steps=steps) for seed, steps in [(0, 2), (1, 3), (2, 2)])
    engine.add(first)
    assert engine.step() == [] and first.denoised.shape == SHAPE
    engine.add(second)
    engine.add(third)
    assert len(engine) == 3 and engine.step() == [first]
    engine.remove(second)
    assert len(engine) == 1
    assert engine.step() == [] and engine.step() == [third] and engine.step() == []
    [expected] = engine_of(model).run([sample(model, "a", 2, steps=2)])
    torch.testing.assert_close(third.latents, expected, atol=1e-4, rtol=1e-4)


def test_waiting_groups_join_as_there_is_room(model):
    engine = engine_of(model, 4)
    for seed in range(3):
        engine.add(*pair(model, *PROMPTS, seed, 0.5, 0.5, steps=2))
    found = []
    while len(engine):
        found.append((len(engine.step()), engine.unet_samples))
    assert found == [(0, 8), (4, 16), (0, 20), (2, 24)]  # two conditionings each


def test_half_precision_unet_keeps_float32_latents(model):
    half = copy.deepcopy(model.unet).to(torch.bfloat16)
    [latents] = Engine(half, schedule_of(model), 2).run([sample(model, "a", 0)])
    [expected] = engine_of(model).run([sample(model, "a", 0)])
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_errors_come_before_anything_runs(model):
    engine = engine_of(model, 2)
    source, edited = pair(model, *PROMPTS, 0, 0.5, 0.5)
    wrong = sample(model, "a", 0)
    wrong.latents = torch.randn(4, 16, 8)
    engine.add(sample(model, "a", 0))
    for group, message in [
        ((edited,), "together with its source"),
        ((source, edited, sample(model, "a", 1)), "batch_size 2 is too small"),
        ((wrong,), r"latents \(4, 16, 8\)"),
        ((sample(model, "a", 0, weights=(1.0,)),), "weights"),
        ((sample(model, "a", 0, start=4),), "start 4"),
        ((Trajectory(torch.randn(SHAPE), conditionings(model, "a"), (0, 1), 3, "euler_ancestral"),), "generator"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add(*group)
    assert len(engine) == 1


def blended(model, seed, start=0.2, threshold=0.5, **how) -> list[Trajectory]:
    """A pair whose first word alone differs, in both texts the token after the first."""
    group = pair(model, "red dog", "tan dog", seed, 0.5, 0.5, **how)
    first = torch.zeros(77, dtype=torch.bool)
    first[1] = True
    group[1].link = replace(group[1].link, blend=Blend(first, first, threshold, start))
    return group


def test_local_blend_is_prompt_to_prompts_with_materialised_maps(model):
    """Every cross-attention map is computed, gathered, made a mask and blended with, as the paper has it."""
    steps, start, threshold = 4, 0.3, 0.98  # random weights: maps are all but even
    source, edited = blended(model, 7, start, threshold, steps=steps, solver="ddim")
    noise = source.latents.clone()
    ours = torch.stack(engine_of(model, 2).run([source, edited]))

    unet = copy.deepcopy(model.unet)
    processor = MaterialisedProcessor([list(range(77)), edited.link.alignments[1].tolist()])
    maps: list[torch.Tensor] = []

    class Kept(MaterialisedProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            if encoder_hidden_states is not None:
                query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
                if (
                    processor.shares_cross
                ):  # the edited sample looks as the source does, at keys of its own for new words
                    query = query[[0, 0, 2, 2]]
                    for j, a in enumerate(processor.alignment[1]):
                        key[3, j] = key[3, j] if a == UNALIGNED else key[2, a]
                query, key = (attn.head_to_batch_dim(x, out_dim=4) for x in (query, key))
                seen = (query @ key.mT * attn.scale).softmax(-1).mean(1)[2:, :, 1]  # with the text, of the first word
                side = int(seen.shape[1] ** 0.5)
                maps.append(torch.nn.functional.interpolate(seen.view(2, 1, side, side), (8, 8), mode="bilinear")[:, 0])
            return processor(attn, hidden_states, encoder_hidden_states)

    unet.set_attn_processor(Kept([]))
    text = model.encode_text(["", "", "red dog", "tan dog"])
    way = plan(schedule_of(model), "ddim", steps)
    latents = torch.stack([noise, noise]) * way.initial_scale
    gathered = torch.zeros(2, 8, 8)
    for i in range(steps):
        processor.shares_self = processor.shares_cross = i / (steps - 1) < 0.5
        maps.clear()
        with torch.no_grad():
            output = unet(torch.cat([latents, latents]), way.timesteps[i].expand(4), text).sample
        output = output[:2] + 5.0 * (output[2:] - output[:2])
        from_latents, from_output, _, keep, pull, _ = way.coefficients[i]
        latents = keep * latents + pull * (from_latents * latents + from_output * output)
        gathered += torch.stack(maps).mean(0)
        if i / (steps - 1) >= start:
            grown = torch.stack([torch.nn.functional.max_pool2d(m[None], 3, 1, 1)[0] for m in gathered])
            mask = (grown[0] >= threshold * grown[0].max()) | (grown[1] >= threshold * grown[1].max())
            latents[1] = torch.where(mask, latents[1], latents[0])
    assert 0 < mask.sum() < mask.numel(), "or this proves nothing"
    assert (edited.mask == mask).all()
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)


def test_outside_its_mask_a_blended_sample_is_its_source(model):
    source, edited = blended(model, 3, threshold=0.98, steps=4, solver="euler_ancestral")
    engine_of(model, 2).run([source, edited])
    differs = (source.latents != edited.latents).any(0)
    assert not (differs & ~edited.mask).any()
    assert (differs == edited.mask).float().mean() > 0.9
    assert source.mask is None


def test_a_blend_of_neighbours_does_not_matter(model):
    def company():
        return [*blended(model, 1, steps=3), sample(model, "a cat", 2, steps=5), *blended(model, 4, steps=4)]

    together, apart = engine_of(model, 8).run(company()), engine_of(model, 2).run(company())
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
