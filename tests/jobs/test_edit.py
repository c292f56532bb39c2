"""The command line that edits one image, on real photographs."""

import io
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from skimage import data

from ip2p import images
from ip2p.workspace import Workspace
from jobs import edit


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_editor):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    ref = {"path": str(tiny_editor)}
    models = {"text_to_image": ref, "editor": ref, "llm": ref, "clip": {"name": "ViT-B-32", "pretrained": "openai"}}
    sampling = {"steps": 2, "max_side": 64, "guidance_scale": 3.0, "image_guidance_scale": 1.2}
    evaluate = {"guidance_scale": [1, 4], "image_guidance_scale": [1, 1.5, 2]}
    keys = {"name": "test", "device": "cpu", "models": models, "captions": {"kind": "grammar"}}
    path.write_text(yaml.safe_dump(keys | {"sampling": sampling, "evaluate": evaluate}))
    return path


def command(recipe, image, *flags):
    edit.main(["--recipe", str(recipe), "--image", str(image), "--instruction", "make it night", *map(str, flags)])


def test_keeps_the_size_and_prints_what_to_repeat_it_with(recipe, tmp_path, capsys):
    photo = tmp_path / "cat.jpg"
    Image.fromarray(data.chelsea()[:123, :201]).save(photo)
    command(recipe, photo)
    told = capsys.readouterr().out
    result = tmp_path / "cat-edited.png"
    assert Image.open(result).size == (201, 123)
    assert "guidance scale 3, image guidance scale 1.2, 2 steps" in told
    seed = told.strip().rpartition(" ")[2]
    command(recipe, photo, "--seed", seed, "--output", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == result.read_bytes()
    command(recipe, photo, "--seed", int(seed) + 1, "--output", tmp_path / "other.webp")
    assert not np.array_equal(Image.open(tmp_path / "other.webp"), Image.open(result))


def test_exif_orientation_and_alpha(recipe, tmp_path):
    upright = data.rocket()[:100, :60]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to view
    turned = Image.fromarray(np.rot90(upright).copy())
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        command(recipe, tmp_path / f"{name}.png", "--seed", 1)
    results = [np.asarray(Image.open(tmp_path / f"{name}-edited.png")) for name in ("turned", "upright")]
    assert results[0].shape == (100, 60, 3) and np.array_equal(*results)

    alpha = np.zeros(upright.shape[:2], np.uint8)
    alpha[20:50] = 180
    (tmp_path / "clear.png").write_bytes(images.encode(upright, alpha=alpha))
    command(recipe, tmp_path / "clear.png")
    result = Image.open(tmp_path / "clear-edited.png")
    assert result.mode == "RGBA" and np.array_equal(result.getchannel("A"), alpha)


def test_grid_shows_every_pair_of_scales(recipe, tmp_path, capsys):
    Image.fromarray(images.resize(data.coffee(), 48, 64)).save(tmp_path / "coffee.png")
    command(recipe, tmp_path / "coffee.png", "--grid", "--seed", 0, "--output", tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[0] > 3 * 96 and grid.shape[1] > 3 * 128
    assert "every pair" in capsys.readouterr().out


def test_edits_with_the_model_of_a_workspace_or_a_directory(recipe, tiny_editor, tmp_path):
    photo = tmp_path / "in.png"
    Image.fromarray(images.resize(data.coffee(), 64, 64)).save(photo)
    command(recipe, photo, "--seed", 1, "--model", tiny_editor, "--output", tmp_path / "model.png")
    command(recipe, photo, "--seed", 1, "--output", tmp_path / "recipe.png")
    assert (tmp_path / "model.png").read_bytes() == (tmp_path / "recipe.png").read_bytes()
    with pytest.raises(SystemExit):
        command(recipe, photo, "--workspace", tmp_path / "nothing")
    run = Workspace(tmp_path / "run")
    shutil.copytree(tiny_editor, tmp_path / "run" / "model")
    run.mark_done("model")
    command(recipe, photo, "--seed", 1, "--workspace", tmp_path / "run", "--output", tmp_path / "workspace.png")
    assert (tmp_path / "workspace.png").read_bytes() == (tmp_path / "recipe.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--output", "out.bmp"], "out.bmp"),
        (["--steps", "0"], "--steps"),
        (["--guidance-scale", "nan"], "guidance_scale nan"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--image", "missing.png"], "missing.png"),
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--output", "/not/there/out.png"], "there is no folder /not/there"),
        (["--output", "/dev/null/out.png"], "there is no folder /dev/null"),
        (["--instruction", "  "], "--instruction"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(recipe, tmp_path, capsys, flags, told):
    buffer = io.BytesIO()
    Image.fromarray(data.coffee()[:64, :64]).save(buffer, "png")
    (tmp_path / "in.png").write_bytes(buffer.getvalue())
    with pytest.raises(SystemExit) as exit:
        command(recipe, tmp_path / "in.png", *flags)
    assert exit.value.code == 2 and told in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        edit.main(["--help"])
    shown = capsys.readouterr().out
    assert "--image-guidance-scale" in shown and "keep the image" in shown
