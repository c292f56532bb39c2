"""The continuous batcher with a tiny editor of SD 1.5's layout; no Ray."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from ip2p.edit.editor import Editor, EditRequest
from ip2p.models import load_text_to_image
from serve.batcher import Batcher, DeadEngineError, Job, LateError
from tests.serve.conftest import noise

SQUARE, WIDE = noise(64, 64, 3), noise(64, 128, 3)


@pytest.fixture(scope="module")
def editor(recipe):
    return Editor(load_text_to_image(recipe.models.editor, device="cpu"), batch_size=2, max_side=128)


@pytest.fixture
def batcher(editor):
    return Batcher(editor)


class Asked:
    """A job to wait for, which records its steps. `gate` holds the batcher at each step."""

    def __init__(self, request: EditRequest, gate: threading.Event | None = None, **options):
        self.steps: list[int] = []
        self.previews: list[np.ndarray] = []
        self.moving = threading.Event()
        self.result: Future = Future()
        self.gate = gate
        self.job = Job(request, done=self._done, moved=self._moved, **options)

    def _done(self, result) -> None:
        if isinstance(result, Exception):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)

    def _moved(self, step: int, preview) -> None:
        self.steps.append(step)
        if preview is not None:
            self.previews.append(preview)
        self.moving.set()
        if self.gate is not None:
            assert self.gate.wait(60)


def request(image=SQUARE, **settings) -> EditRequest:
    return EditRequest(image, **{"instruction": "make it night", "steps": 3, "seed": 1} | settings)


MIXED = [
    request(seed=1),
    request(seed=2, steps=5, guidance_scale=3.0),
    request(seed=3, steps=1, solver="ddim", image_guidance_scale=0.5),
    request(seed=4, steps=4, solver="dpmsolver++", negative_prompt="stars"),
    request(WIDE, seed=5, steps=2),
]


def test_mixed_batch_equals_single_edits(editor, batcher):
    asked = [Asked(one) for one in MIXED]
    for one in asked:
        batcher.submit(one.job)
    for one, wanted in zip(asked, MIXED, strict=True):
        (alone,) = editor.edit([wanted])
        assert np.abs(one.result.result(60).astype(int) - alone).max() <= 1
        assert one.steps == list(range(1, wanted.steps + 1))


def test_negative_prompt_changes_the_image(editor):
    one, other = editor.edit([request(), request(negative_prompt="a red star")])
    assert not np.array_equal(one, other)


def test_short_edit_joins_and_leaves_a_running_batch(batcher):
    gate = threading.Event()
    long = Asked(request(steps=20), gate)
    batcher.submit(long.job)
    assert long.moving.wait(60)
    short = Asked(request(steps=1))
    batcher.submit(short.job)
    gate.set()
    short.result.result(60)
    assert not long.result.done()
    long.result.result(60)


def test_cancelled_edit_frees_its_slot_at_the_next_step(batcher):
    gate = threading.Event()
    gone = [Asked(request(steps=900, solver="ddim"), gate) for _ in range(2)]
    for one in gone:
        batcher.submit(one.job)
    assert gone[0].moving.wait(60)
    waiting = Asked(request())
    batcher.submit(waiting.job)
    batcher.cancel(gone[0].job)
    batcher.cancel(gone[1].job)
    gate.set()
    waiting.result.result(60)
    assert max(gone[0].steps) < 900
    assert batcher.running == batcher.waiting == 0
    assert not gone[0].result.done()


def test_deadlines_end_running_and_waiting_edits(batcher, monkeypatch):
    gate = threading.Event()
    now = [0.0]
    monkeypatch.setattr("serve.batcher.time.monotonic", lambda: now[0])
    late = [Asked(request(steps=900, solver="ddim"), gate, deadline=10.0) for _ in range(3)]  # the third waits
    for one in late:
        batcher.submit(one.job)
    assert late[0].moving.wait(60)
    now[0] = 11.0
    gate.set()
    for one in late:
        with pytest.raises(LateError):
            one.result.result(60)
    fresh = Asked(request(), deadline=20.0)
    batcher.submit(fresh.job)
    fresh.result.result(60)


def test_sizes_share_the_device(batcher):
    """Of two long edits of different sizes, neither is done before the other has started."""
    gate = threading.Event()
    square, wide = Asked(request(steps=12), gate), Asked(request(WIDE, steps=12))
    batcher.submit(square.job)
    assert square.moving.wait(60)
    batcher.submit(wide.job)
    gate.set()
    square.result.result(60)
    assert wide.steps
    wide.result.result(60)


def test_previews_have_the_models_size(batcher):
    asked = Asked(request(WIDE, steps=5), preview_every=2)
    batcher.submit(asked.job)
    result = asked.result.result(60)
    assert [preview.shape for preview in asked.previews] == [result.shape] * 2
    assert result.shape == WIDE.shape


def test_impossible_edit_fails_alone(batcher):
    bad, good = Asked(request(steps=5000)), Asked(request())
    batcher.submit(bad.job)
    batcher.submit(good.job)
    with pytest.raises(ValueError, match="steps 5000"):
        bad.result.result(60)
    good.result.result(60)
    batcher.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_broken_engine_is_unhealthy_and_rejects_edits(batcher, monkeypatch):
    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("ip2p.diffusion.engine.Engine.step", broken)
    asked = Asked(request())
    batcher.submit(asked.job)
    with pytest.raises(DeadEngineError, match="illegal memory access"):
        asked.result.result(60)
    with pytest.raises(DeadEngineError):
        batcher.check()
    with pytest.raises(DeadEngineError):
        batcher.submit(Asked(request()).job)


def test_out_of_memory_halves_the_batch_and_restarts_its_edits(editor, batcher, monkeypatch):
    from ip2p.diffusion.engine import Engine

    step = Engine.step

    def tight(self):
        if len(self) > 1:
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return step(self)

    monkeypatch.setattr("ip2p.diffusion.engine.Engine.step", tight)
    asked = [Asked(one) for one in MIXED[:3]]
    for one in asked:
        batcher.submit(one.job)
    results = [one.result.result(60) for one in asked]
    monkeypatch.undo()
    for result, wanted in zip(results, MIXED, strict=False):
        assert np.abs(result.astype(int) - editor.edit([wanted])[0]).max() <= 1
    assert batcher.batch_size == 1
