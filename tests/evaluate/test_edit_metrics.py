import numpy as np
import pytest
import torch
from transformers import ViTModel

from ip2p.evaluate.benchmark.layouts import METRICS
from ip2p.evaluate.edit_metrics import Picture, cosine, direction, embed_by_dino, l1, l2, measure
from ip2p.models import load_dino
from ip2p.recipe import ModelRef


def plain(value: int, height: int = 2, width: int = 2) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_distances_of_pixels_by_hand():
    assert l1(plain(51), plain(0)) == pytest.approx(0.2)
    assert l2(plain(51), plain(0)) == pytest.approx(0.04)
    assert l1(plain(0), plain(255)) == l2(plain(0), plain(255)) == 1, "uint8 does not wrap around"
    one = plain(0)
    one[0, 1, 2] = 102  # one of 12 values differs by 0.4
    assert l1(one, plain(0)) == pytest.approx(0.4 / 12)
    assert l2(one, plain(0)) == pytest.approx(0.16 / 12)


def test_the_edited_image_is_compared_at_the_size_of_the_other():
    assert l1(plain(51, 7, 5), plain(0, 4, 9)) == pytest.approx(0.2)
    left_white = plain(0, 8, 8)
    left_white[:, :4] = 255
    assert l1(left_white, left_white[::2, ::2]) < 0.1 < l1(left_white, left_white[::2, ::-2])


def test_cosines_by_hand():
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(0.96)
    assert cosine(None, torch.tensor([4.0, 3.0])) is None


def test_direction_by_hand():
    x, y = torch.eye(2)
    assert direction(x, y, x, y) == pytest.approx(1)
    assert direction(x, y, y, x) == pytest.approx(-1)
    assert direction(x, -x, x, y) == pytest.approx(0.5**0.5)  # (-2, 0) against (-1, 1)
    assert direction(x, x, x, y) == 0, "nothing changed"
    assert direction(x, y, None, y) is None


def test_each_metric_compares_what_it_says():
    x, y, z = torch.eye(3)
    source, edited, target = Picture(plain(0), x, y), Picture(plain(51), y, y), Picture(plain(102), y, z)
    found = measure(source, edited, target, before=x, after=z)
    assert found == pytest.approx(
        {
            "l1": 0.2, "l2": 0.04, "clip_i": 1, "dino": 0, "clip_t": 0, "clip_dir": 0.5,
            "input_l1": 0.2, "input_clip_i": 0, "input_dino": 1,
        },
        abs=1e-6,
    )  # fmt: skip
    assert list(found) == METRICS.names


def test_what_there_is_nothing_to_compare_with_is_null():
    x, y = torch.eye(2)
    found = measure(Picture(plain(0), x, None), Picture(plain(51), y, None), None, None, y)
    known = {"clip_t": 1, "input_l1": 0.2, "input_clip_i": 0}
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(known)


def test_dino_is_the_class_token_of_the_last_layer(tiny_dino):
    dino = load_dino(ModelRef(path=str(tiny_dino)), "cpu")
    pictures = [np.random.default_rng(n).integers(0, 256, (32, 32, 3), np.uint8) for n in range(2)]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    model = ViTModel.from_pretrained(tiny_dino, add_pooling_layer=False)
    with torch.no_grad():
        tokens = model((x - 0.5) / 0.5).last_hidden_state[:, 0]
    torch.testing.assert_close(embed_by_dino(dino, pictures), tokens / tokens.norm(dim=-1, keepdim=True))


def test_dino_reads_images_of_any_sizes(tiny_dino):
    dino = load_dino(ModelRef(path=str(tiny_dino)), "cpu")
    pictures = [np.random.default_rng(n).integers(0, 256, (*s, 3), np.uint8) for n, s in enumerate([(3, 50), (64, 40)])]
    together = embed_by_dino(dino, pictures)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(together, torch.cat([embed_by_dino(dino, [picture]) for picture in pictures]))


def test_a_dino_that_is_none_is_refused(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match=r"models\.dino\.path: .* is a CLIPTextModel, no vision transformer"):
        load_dino(ModelRef(path=str(tiny_sd / "text_encoder")), "cpu")
    with pytest.raises(ValueError, match=r"models\.dino\.path: can't load"):
        load_dino(ModelRef(path=str(tmp_path)), "cpu")
