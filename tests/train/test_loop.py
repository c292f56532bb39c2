import io
from dataclasses import replace

import pytest
import torch

from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef
from ip2p.train.latents import share
from ip2p.train.loop import averaged_weights, draw, learning_rate, train, validation_loss
from ip2p.train.unet import widen_conv_in


class Recorder:
    """Keeps what the loop reports; states as a checkpoint file would."""

    def __init__(self):
        self.metrics, self.states = [], {}

    def __call__(self, metrics, state):
        self.metrics.append(metrics)
        if state is not None:
            file = io.BytesIO()
            torch.save(state, file)
            self.states[state["step"]] = file

    def state(self, step):
        self.states[step].seek(0)
        return torch.load(self.states[step], weights_only=True)


def fresh(tiny_sd):
    model = load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu")
    widen_conv_in(model.unet)
    return model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.unet.named_parameters()}


@pytest.mark.parametrize(
    "other", [{}, {"precision": "bfloat16"}, {"precision": "float16"}, {"lora_rank": 2}, {"micro_batch": 3}]
)
def test_resumed_weights_equal_the_uninterrupted_run_bit_by_bit(tiny_sd, pairs, recipe, other):
    recipe = recipe.model_copy(update=other)
    whole, resumed = fresh(tiny_sd), fresh(tiny_sd)
    record = Recorder()
    ema = train(whole, pairs, recipe, seed=3, report=record)
    assert list(record.states) == [3, 6]
    again = Recorder()
    ema_again = train(resumed, pairs, recipe, seed=3, report=again, state=record.state(3))
    assert list(again.states) == [6]
    for a, b in zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ema.shadow_params, ema_again.shadow_params, strict=True):
        assert torch.equal(a, b)
    other = fresh(tiny_sd)
    train(other, pairs, recipe, seed=4, report=Recorder())
    assert not torch.equal(other.unet.conv_in.weight, whole.unet.conv_in.weight)


def test_an_editor_and_velocities_are_trained_on_as_well(tiny_editor, pairs, recipe):
    """From 8 channels as they are; and what the model is to predict is what its scheduler says."""
    losses = {}
    for kind in ("epsilon", "v_prediction"):
        model = load_text_to_image(ModelRef(path=str(tiny_editor)), device="cpu")
        before = widen_conv_in(model.unet).conv_in.weight.clone()
        model = replace(model, schedule=replace(model.schedule, prediction_type=kind))
        record = Recorder()
        train(model, pairs, recipe, seed=3, report=record)
        assert before.shape[1] == 8 and not torch.equal(model.unet.conv_in.weight, before)
        losses[kind] = [metrics["loss"] for metrics in record.metrics]
    assert losses["epsilon"] != losses["v_prediction"]


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(tiny_sd, pairs, recipe):
    plain, compiled = Recorder(), Recorder()
    recipe = recipe.model_copy(update={"steps": 3})
    train(fresh(tiny_sd), pairs, recipe, seed=3, report=plain, validation=pairs)
    train(fresh(tiny_sd), pairs, recipe.model_copy(update={"compile": True}), seed=3, report=compiled, validation=pairs)
    assert compiled.states.keys() == plain.states.keys()
    assert compiled.state(3)["unet"].keys() == plain.state(3)["unet"].keys()
    for name in ("loss", "grad_norm", "validation_loss"):
        assert compiled.metrics[-1][name] == pytest.approx(plain.metrics[-1][name], rel=1e-3)


def test_validation_does_not_disturb_training(tiny_sd, pairs, recipe):
    plain, validated = fresh(tiny_sd), fresh(tiny_sd)
    train(plain, pairs, recipe, seed=3, report=Recorder())
    record = Recorder()
    train(validated, pairs, recipe, seed=3, report=record, validation=pairs)
    assert all(metrics["validation_loss"] > 0 for metrics in record.metrics if metrics["step"] in (3, 6))
    assert torch.equal(plain.unet.conv_in.weight, validated.unet.conv_in.weight)


def test_learns_and_the_image_reaches_the_unet(base, pairs, recipe):
    recipe = recipe.model_copy(update={"steps": 60, "checkpoint_every": 60, "batch_size": 8, "learning_rate": 3e-3})
    null = base.encode_text([""])[0]
    untrained = validation_loss(base, pairs, null, recipe, seed=0)
    ema = train(base, pairs, recipe, seed=0, report=lambda *_: None)
    with averaged_weights(base.unet, list(base.unet.parameters()), ema):
        assert validation_loss(base, pairs, null, recipe, seed=0) < 0.95 * untrained
    assert base.unet.conv_in.weight[:, 4:].abs().max() > 0
    assert not any(parameter.requires_grad for parameter in base.text_encoder.parameters())


def test_reports_what_a_person_wants_to_see(base, pairs, recipe):
    record = Recorder()
    train(base, pairs, recipe.model_copy(update={"steps": 12, "checkpoint_every": 12}), seed=0, report=record)
    assert [metrics["step"] for metrics in record.metrics] == [10, 12]
    last = record.metrics[-1]
    assert last["eta_seconds"] == 0 and last["samples_per_second"] > 0 and last["grad_norm"] > 0
    assert last["learning_rate"] == recipe.learning_rate


def test_warm_up_is_linear_then_constant(recipe):
    recipe = recipe.model_copy(update={"warmup_steps": 4, "learning_rate": 1.0})
    assert [learning_rate(recipe, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    recipe = recipe.model_copy(update={"steps": 10, "cooldown_steps": 4})
    assert [learning_rate(recipe, step) for step in range(3, 10)] == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("other", [{"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}])
def test_less_memory_gives_the_same_weights(tiny_sd, pairs, recipe, other):
    whole, frugal = fresh(tiny_sd), fresh(tiny_sd)
    record, again = Recorder(), Recorder()
    train(whole, pairs, recipe, seed=3, report=record)
    train(frugal, pairs, recipe.model_copy(update=other), seed=3, report=again)
    for metric in ("loss", "grad_norm"):
        assert again.metrics[0][metric] == pytest.approx(record.metrics[0][metric], rel=1e-4)
    for a, b in zip(whole.unet.parameters(), frugal.unet.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)


def test_an_adapter_leaves_the_rest_as_it_was(tiny_sd, pairs, recipe):
    model = fresh(tiny_sd)
    before = weights(model)
    train(model, pairs, recipe.model_copy(update={"lora_rank": 2}), seed=3, report=Recorder())
    after = weights(model)
    kept = {name.replace(".base_layer", ""): parameter for name, parameter in after.items()}
    changed = {name for name in before if not torch.equal(before[name], kept[name])}
    assert changed == {"conv_in.weight", "conv_in.bias"}
    adapters = [parameter for name, parameter in after.items() if "lora_B" in name]
    assert len(adapters) == 128, "four matrices of each of 16 layers, with two attentions each"
    assert sum(parameter.abs().max() > 0 for parameter in adapters) > 100, "one place alone attends to itself, always"


def test_weighing_timesteps_changes_the_loss_and_not_its_measure(tiny_sd, pairs, recipe):
    plain, weighed = Recorder(), Recorder()
    recipe = recipe.model_copy(update={"steps": 1, "checkpoint_every": 1, "batch_size": 8, "learning_rate": 1e-12})
    train(fresh(tiny_sd), pairs, recipe, seed=3, report=plain, validation=pairs)
    train(
        fresh(tiny_sd),
        pairs,
        recipe.model_copy(update={"min_snr_gamma": 1.0}),
        seed=3,
        report=weighed,
        validation=pairs,
    )
    assert weighed.metrics[0]["loss"] < 0.9 * plain.metrics[0]["loss"]
    assert weighed.metrics[0]["validation_loss"] == pytest.approx(plain.metrics[0]["validation_loss"], rel=1e-5)


def test_a_look_sees_the_averaged_weights_and_disturbs_nothing(tiny_sd, pairs, recipe):
    plain, looked_at = fresh(tiny_sd), fresh(tiny_sd)
    train(plain, pairs, recipe, seed=3, report=Recorder())
    seen = {}

    def look(step):
        assert not looked_at.unet.training
        seen[step] = weights(looked_at)

    ema = train(looked_at, pairs, recipe, seed=3, report=Recorder(), look=look)
    assert list(seen) == [3, 6]
    assert all(torch.equal(a, b) for a, b in zip(seen[6].values(), ema.shadow_params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.unet.parameters(), looked_at.unet.parameters(), strict=True))


def test_a_sample_is_drawn_alike_whoever_trains_on_it_and_no_two_alike(pairs, recipe):
    drawn = {
        place: one
        for step in (0, 1)
        for rank in range(3)
        for places in [share(step, recipe.batch_size, rank, 3)]
        for place, one in zip(places, _each(draw(places, pairs, recipe, 1000, seed=3)), strict=True)
    }
    assert sorted(drawn) == list(range(2 * recipe.batch_size))
    alone = _each(draw(range(2 * recipe.batch_size), pairs, recipe, 1000, seed=3))
    assert all(torch.equal(drawn[place].noise, one.noise) for place, one in enumerate(alone))
    assert all(drawn[place].timesteps == one.timesteps for place, one in enumerate(alone))
    assert len({one.noise.sum().item() for one in alone}) == len(alone)


def _each(drawn):
    return [drawn[slice(row, row + 1)] for row in range(len(drawn.noise))]
