import numpy as np
import pyarrow as pa
import pytest
import torch
from skimage import data

from ip2p import images
from ip2p.records import DATASET
from ip2p.train.encode import LATENTS, PairEncoder, names_a_side, random_squares, square


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("move it to the left", True),
        ("Left: a dog", True),
        ("the right-hand house", True),
        ("the leftmost tree", True),
        ("rotate it counterclockwise", True),
        ("face westward", True),
        ("make it brighter", False),
        ("an upright piano", False),
        ("swap the two objects", False),
        ("", False),
    ],
)
def test_names_a_side(text, expected):
    assert names_a_side(text) is expected


def test_square_crops_the_centre_and_never_squashes():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    assert square(image, 40).min() == 255
    assert square(image, 20).shape == (20, 20, 3)
    assert square(square(image, 64), 64).shape == (64, 64, 3)
    assert np.array_equal(square(image[:, :40], 40), image[:, :40])


def test_random_squares_are_cut_alike_from_both_images():
    photo = data.coffee()
    corners = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        before, after = random_squares([photo, 255 - photo], 64, (64, 96), rng)
        assert before.shape == after.shape == (64, 64, 3)
        assert np.abs(255 - after.astype(int) - before).max() <= 2, "but for rounding"
        corners.add(before.tobytes())
    assert len(corners) == 20
    exact = random_squares([photo, photo], 400, (400, 400), np.random.default_rng(0))[0]
    assert any(np.array_equal(exact, photo[:, left : left + 400]) for left in range(201)), "not resized, whole height"


FILE = "run/dataset/validation/part.parquet"
SPLITS = {FILE: "validation"}


def dataset_row(pair_id, instruction, original, edited):
    empty = dict.fromkeys(DATASET.names)
    pictures = {"original_image": {"bytes": original}, "edited_image": {"bytes": edited}}
    return (
        empty
        | {
            "path": FILE,
            "pair_id": pair_id,
            "caption_id": pair_id,
            "edit_prompt": instruction,
        }
        | pictures
    )


def test_one_row_out_for_each_in(full_recipe):
    photo, other = images.encode(data.astronaut()), images.encode(data.coffee()[:, :400], format="jpeg")
    rows = [
        dataset_row("a", "make it night", photo, other),
        dataset_row("b", "put a hat on the left", photo, photo),
        dataset_row("c", "make it night", photo, b""),
    ]
    encoder = PairEncoder(full_recipe, SPLITS)
    table = encoder(pa.Table.from_pylist(rows, schema=DATASET.append(pa.field("path", pa.string()))))
    assert table.schema == LATENTS
    both, single, broken = table.to_pylist()
    assert both["split"] == "validation"
    assert (both["status"], both["shape"]) == ("ok", [2, 4, 8, 8])
    assert (single["status"], single["shape"]) == ("ok", [1, 4, 8, 8])
    assert broken["status"] == "failed" and "original_image is missing" not in broken["reason"]
    assert "edited_image is missing" in broken["reason"]

    # The image latents are the VAE's mode, not scaled; the target's are scaled; view 1 is the mirror image.
    pixels = images.to_tensor(square(data.astronaut(), 64)[None])
    mode = encoder.model.vae.encode(pixels).latent_dist.mode()
    mirrored = encoder.model.vae.encode(pixels.flip(-1)).latent_dist.mode()
    found = torch.from_numpy(np.frombuffer(both["image_latents"], np.float16).reshape(both["shape"]).copy()).float()
    assert torch.allclose(found, torch.cat([mode, mirrored]), atol=2e-3)
    target = torch.from_numpy(np.frombuffer(single["target_latents"], np.float16).reshape(1, 4, 8, 8).copy()).float()
    assert torch.allclose(target, 0.18215 * mode, atol=2e-3)


def test_every_crop_is_a_view_and_depends_on_the_pair_alone(full_recipe):
    photo = images.encode(data.astronaut())
    section = full_recipe.train.model_copy(update={"random_resize": (64.0, 80.0), "crops": 3})
    encoder = PairEncoder(full_recipe.model_copy(update={"train": section}), SPLITS)
    first, again, other = (encoder.encode_row(dataset_row(id_, "make it night", photo, photo)) for id_ in "aab")
    assert first["shape"] == [6, 4, 8, 8], "three crops and their mirror images"
    assert first["image_latents"] == again["image_latents"] != other["image_latents"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"edit_prompt": None}, "edit_prompt is missing"),
        ({"edit_prompt": "  "}, "edit_prompt is missing"),
        ({"original_image": None}, "original_image is missing"),
        ({"edited_image": {"bytes": None, "path": None}}, "edited_image is missing"),
        ({"edited_image": {"bytes": None, "path": "a/b.png"}}, "edited_image is only the path 'a/b.png'"),
        ({"edited_image": b""}, "edited_image is missing"),
        ({"edited_image": b"version https://git-lfs"}, "not an image"),
        ({"edit_prompt": None, "caption_id": None, "pair_id": None, "edited_image": None}, "edit_prompt is missing"),
    ],
)
def test_a_row_that_cannot_be_trained_on_has_a_reason(full_recipe, change, reason):
    photo = images.encode(data.astronaut())
    row = PairEncoder(full_recipe, SPLITS).encode_row(dataset_row("a", "make it night", photo, photo) | change)
    assert row["status"] == "failed" and reason in row["reason"]


def test_raw_bytes_are_images_as_well(full_recipe):
    photo = images.encode(data.astronaut())
    row = dataset_row("a", "make it night", photo, photo)
    encoder = PairEncoder(full_recipe, SPLITS)
    raw = encoder.encode_row(row | {"original_image": photo, "edited_image": photo})
    assert raw == encoder.encode_row(row)
