from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import skimage
import torch
from PIL import Image

from ip2p import images
from ip2p.clip_similarity import ClipSimilarity, similarities
from ip2p.models import ClipModel, load_clip
from ip2p.recipe import ClipRef

PHOTOS = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def clip(tiny_clip) -> ClipModel:
    return load_clip(ClipRef(name=f"local-dir:{tiny_clip}"), "cpu")


@pytest.mark.parametrize("photo", ["chelsea.png", "rocket.jpg", "astronaut.png"])
@pytest.mark.parametrize("size", [16, 32, 224, 600])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocessing_is_open_clips(clip, photo, size, resize_mode):
    image = images.decode((PHOTOS / photo).read_bytes())
    transform = open_clip.image_transform(size, False, clip.mean, clip.std, resize_mode)
    theirs = transform(Image.fromarray(image))
    ours = ClipSimilarity(replace(clip, size=(size, size), resize_mode=resize_mode)).preprocess(image[None])[0]
    assert ours.shape == theirs.shape
    # In steps of the 8-bit image.
    steps = (ours - theirs).abs() * torch.tensor(clip.std).view(3, 1, 1) * 255
    assert steps.max() < 2.01
    assert steps.mean() < 0.01


def test_a_loaded_model_brings_its_preprocessing(clip, tiny_clip):
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    image = images.decode((PHOTOS / "chelsea.png").read_bytes())
    torch.testing.assert_close(
        ClipSimilarity(clip).preprocess(image[None])[0], theirs(Image.fromarray(image)), atol=0.05, rtol=0
    )


def test_an_image_of_the_models_size_is_only_normalised(clip):
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = (image / 255 - np.array(clip.mean)) / np.array(clip.std)
    got = ClipSimilarity(clip).preprocess(image)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32).permute(0, 3, 1, 2))


def test_embeddings_are_open_clips_normalised(clip, tiny_clip):
    reference, _ = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    judge = ClipSimilarity(clip)
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        theirs = reference.encode_image(judge.preprocess(image), normalize=True)
        texts = reference.encode_text(clip.tokenizer(["a cat", "a dog"]), normalize=True)
    torch.testing.assert_close(judge.embed_images(image), theirs)
    torch.testing.assert_close(judge.embed_texts(["a cat", "a dog"]), texts)


def test_an_embedding_does_not_depend_on_its_neighbours(clip):
    judge = ClipSimilarity(clip)
    image = np.random.default_rng(0).integers(0, 256, (4, 40, 32, 3), dtype=np.uint8)
    torch.testing.assert_close(judge.embed_images(image)[2:3], judge.embed_images(image[2:3]))


def test_half_precision_judges_nearly_the_same(clip, tiny_clip):
    half = load_clip(ClipRef(name=f"local-dir:{tiny_clip}", dtype="float16"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for method, argument in (("embed_images", image), ("embed_texts", ["a cat", "a dog"])):
        ours = getattr(ClipSimilarity(half), method)(argument)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, getattr(ClipSimilarity(clip), method)(argument), atol=5e-3, rtol=0)


def test_floats_are_refused(clip):
    with pytest.raises(AssertionError):
        ClipSimilarity(clip).embed_images(np.zeros((1, 32, 32, 3), dtype=np.float32))


def test_the_four_similarities():
    def unit(*values):
        return torch.nn.functional.normalize(torch.tensor([values]), dim=-1)

    i0, i1, t0, t1 = unit(1.0, 0.0), unit(1.0, 1.0), unit(0.0, 1.0), unit(-1.0, 1.0)
    found = {name: value.item() for name, value in similarities(i0, i1, t0, t1).items()}
    # By hand: i1 - i0 = (.7071 - 1, .7071), t1 - t0 = (-.7071, .7071 - 1).
    assert found == pytest.approx(
        {"clip_sim_0": 0.0, "clip_sim_1": 0.0, "clip_sim_dir": 0.0, "clip_sim_image": 0.7071}, abs=1e-4
    )
    found = similarities(i0, t1, i0, t1)
    assert found["clip_sim_dir"].item() == pytest.approx(1)
    assert found["clip_sim_0"].item() == pytest.approx(1)


def test_no_change_has_no_direction():
    e = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    found = similarities(e, e, e, e.flip(0))
    assert found["clip_sim_dir"].tolist() == [0, 0, 0]
    assert found["clip_sim_image"].tolist() == pytest.approx([1, 1, 1])
