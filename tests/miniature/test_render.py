import random

import numpy as np

from ip2p.miniature.render import cell_templates, encode_scenes, render, render_batch
from ip2p.miniature.scene import COLOURS, SHAPES, SIZES, Scene, Thing, draw_scene


def test_a_batch_is_its_scenes_one_by_one():
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(50)]
    images = render_batch(scenes)
    assert images.shape == (50, 32, 32, 3)
    assert images.dtype == np.uint8
    assert all(np.array_equal(image, render(scene)) for image, scene in zip(images, scenes, strict=True))


def test_an_object_changes_its_own_cell_only():
    without = render(Scene((Thing("circle", "red", "small", "top left"),), "white", "plain"))
    things = (Thing("circle", "red", "small", "top left"), Thing("star", "blue", "large", "bottom right"))
    changed = (render(Scene(things, "white", "plain")) != without).any(axis=2)
    assert changed[16:, 16:].any()
    assert not changed[:16].any()
    assert not changed[:, :16].any()


def test_no_object_touches_the_border_of_its_cell_by_more_than_a_trace():
    templates = cell_templates()
    border = np.abs(templates - templates[:, :1])
    edge = max(border[:, :, 0].max(), border[:, :, -1].max(), border[:, :, :, 0].max(), border[:, :, :, -1].max())
    assert edge < 0.35


def test_all_cells_can_be_told_apart_in_every_setting():
    for cells in cell_templates().reshape(15, 61, -1):
        distances = np.sqrt(np.mean((cells[:, None] - cells[None]) ** 2, axis=2)) + np.eye(len(cells))
        assert distances.min() > 0.02


def test_the_backgrounds_of_all_looks_and_the_colours_within_one_can_be_told_apart():
    backgrounds = cell_templates()[:, 0, 0, 0]
    distances = np.linalg.norm(backgrounds[:, None] - backgrounds[None], axis=2) + np.eye(15)
    assert distances.min() > 0.14
    squares = 1 + np.array(
        [(SHAPES.index("square") * len(COLOURS) + i) * len(SIZES) + SIZES.index("large") for i in range(len(COLOURS))]
    )
    for setting, background in zip(cell_templates()[:, squares, 8, 8], backgrounds, strict=True):
        paints = np.concatenate([setting, background[None]])
        distances = np.linalg.norm(paints[:, None] - paints[None], axis=2) + np.eye(len(paints))
        assert distances.min() > 0.2


def test_codes_index_the_templates():
    scene = Scene((Thing("cross", "green", "large", "top right"),), "teal", "fog")
    settings, cells = encode_scenes([scene])
    assert cells[0].tolist()[0::2] == [0, 0]
    assert cells[0, 1] > 0
    cell = np.round(255 * cell_templates()[settings[0], cells[0, 1]])
    assert np.array_equal(render(scene)[:16, 16:], cell.astype(np.uint8))
