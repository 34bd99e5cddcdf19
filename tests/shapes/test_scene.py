"""Scenes: how they are sampled and drawn."""
import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest

from common.data.shapes.scene import (BACKGROUNDS, COLOURS, HELD_OUT, PAIRS, SHAPES, SIZES, STYLES,
                                      Item, Scene, draw, sample, sample_centres)
from common.data.shapes.words import describe, is_true
from tests.shapes.judge import many

RED = Item("red", "circle", "large", 0.25, 0.3)
BLUE = Item("blue", "square", "small", 0.75, 0.5)
PAIR = Scene((RED, BLUE), "grey")


def pixels(scene, size=96):
    """The picture as integers, (size, size, 3)."""
    return np.asarray(draw(scene, size)).astype(int)


def ink(item, size=200, **look):
    """Where an item alone on white is drawn: boolean (size, size)."""
    picture = pixels(Scene((item,), **look), size)
    return np.abs(picture - BACKGROUNDS["white"]).sum(-1) > 60


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", ("red", "cyan"))
def test_an_object_has_its_colour_at_its_place(shape, colour):
    for background, size in (("white", "large"), ("cream", "small")):
        item = Item(colour, shape, size, 0.3, 0.65, (5, -7, 3))
        picture = pixels(Scene((item,), background), 96)
        column = 0.3 + 0.75 * SIZES[item.size] if shape == "ring" else 0.3
        row = 0.65
        inside = picture[int(row * 96), int(column * 96)]
        assert np.abs(inside - np.add(COLOURS[colour], item.tint)).max() <= 1
        assert tuple(picture[48, 90]) == BACKGROUNDS[background]
        if shape == "ring":               # hollow
            assert tuple(picture[int(0.65 * 96), int(0.3 * 96)]) == BACKGROUNDS[background]


# Points in units of the radius from the centre (x to the right, y down): inside, outside.
OUTLINES = {"circle": ([(0.68, 0.68), (0.94, 0)], [(0.75, 0.75)]),
            "square": ([(0.75, 0.75), (-0.75, -0.75)], [(0.9, 0)]),
            "triangle": ([(0, -0.8), (0.75, 0.62), (-0.75, 0.62)], [(0.6, -0.6), (0, 0.8)]),
            "star": ([(0, -0.98), (0.9, -0.3)], [(0.45, -0.6), (0, 0.6), (0.8, 0.2)]),
            "cross": ([(0.9, 0), (0, 0.9), (-0.9, 0.25)], [(0.5, 0.5), (-0.5, 0.5)]),
            "ring": ([(0.6, 0), (0, -0.9)], [(0, 0), (0.4, 0), (0.75, 0.75)])}


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines(shape):
    drawn = ink(Item("red", shape, "large", 0.5, 0.5), 400)
    inside, outside = OUTLINES[shape]
    r = SIZES["large"]

    def at(u, v):
        return drawn[int(400 * (0.5 + r * v)), int(400 * (0.5 + r * u))]

    assert all(at(u, v) for u, v in inside) and not any(at(u, v) for u, v in outside)


def test_the_box_is_what_is_drawn():
    for scene, _ in many(100, (1, 4)):
        for item in scene.items:
            rows, columns = np.nonzero(ink(item, 200))
            drawn = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)) / 200
            assert np.abs(drawn - item.box).max() < 0.013, (item, drawn, item.box)
            assert 0 <= min(item.box) and max(item.box) <= 1
    for size, r in SIZES.items():
        box = Item("red", "circle", size, 0.5, 0.5).box
        assert box == pytest.approx((0.5 - r, 0.5 - r, 0.5 + r, 0.5 + r))


def test_objects_lie_inside_and_apart():
    for scene, _ in many(500, (2, 5)):
        for n, a in enumerate(scene.items):
            assert SIZES[a.size] <= a.x <= 1 - SIZES[a.size] and SIZES[a.size] <= a.y <= 1 - SIZES[a.size]
            for b in scene.items[:n]:
                assert np.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
    assert sample_centres(random.Random(0), [0.45, 0.45]) is None


def test_equal_scenes_give_equal_pictures():
    for scene, _ in many(30, noise=0.05, clutter=3):
        np.random.seed(1)
        one = draw(scene, 40)
        np.random.seed(2)
        assert one.tobytes() == draw(replace(scene), 40).tobytes()
        assert one.size == (40, 40) and one.mode == "RGB"
        assert one.tobytes() != draw(replace(scene, grain=scene.grain + 1), 40).tobytes()
    assert draw(PAIR, 32).tobytes() != draw(replace(PAIR, items=PAIR.items[:1]), 32).tobytes()


def test_sampling_depends_on_the_rng_alone():
    first = [scene for scene, _ in many(50, noise=0.1, clutter=2)]
    random.seed(7)
    state = random.getstate()
    assert [scene for scene, _ in many(50, noise=0.1, clutter=2)] == first
    assert random.getstate() == state
    assert len(set(first)) == 50


def test_styles_look_different_and_keep_the_truth():
    for scene, rng in many(60, (1, 3)):
        text = describe(scene, rng)
        styled = [replace(scene, style=style) for style in STYLES]
        assert len({draw(other, 64).tobytes() for other in styled}) == len(STYLES)
        assert all(is_true(text, other) for other in styled)
        assert [sample(random.Random(3), style=style).style for style in STYLES] == list(STYLES)


@pytest.mark.parametrize("colour", COLOURS)
def test_what_each_style_changes(colour):
    item = Item(colour, "square", "large", 0.5, 0.5)
    looks = {style: pixels(Scene((item,), style=style), 100) for style in STYLES}
    assert tuple(looks["plain"][55, 52]) == COLOURS[colour]
    assert tuple(looks["outline"][50, 50]) == BACKGROUNDS["white"]              # only its edge
    edge = int(100 * (0.5 + 0.8 * SIZES[item.size]))
    assert np.abs(looks["outline"][50, edge] - COLOURS[colour]).max() < 60
    column = looks["texture"][35:65, 50]                                        # stripes
    assert np.ptp(column, axis=0).max() > 20
    assert (column == COLOURS[colour]).all(-1).any()
    hue, dull = (colorsys.rgb_to_hsv(*(looks[s][55, 52] / 255)) for s in ("plain", "palette"))
    turn = abs(hue[0] - dull[0])
    assert min(turn, 1 - turn) < 0.02 and dull[2] < hue[2]                      # darker, same hue


def test_the_dial_of_objects():
    assert {len(s.items) for s, _ in many(300, (1, 5))} == {1, 2, 3, 4, 5}
    assert all(len(s.items) == 3 for s, _ in many(50, 3))
    assert all(len({(i.colour, i.shape) for i in s.items}) == 5 for s, _ in many(100, 5))
    assert {i.size for s, _ in many(50, 5) for i in s.items} == {"small"}       # else no room
    assert {i.size for s, _ in many(50, 4) for i in s.items} == set(SIZES)
    for what in ("colour", "shape"):
        assert len({getattr(i, what) for s, _ in many(300) for i in s.items}) == len(
            COLOURS if what == "colour" else SHAPES)
    assert {s.background for s, _ in many(50)} == set(BACKGROUNDS)


def test_the_dial_of_noise_and_clutter():
    scene = sample(random.Random(3), 1)
    clean, rough = (pixels(replace(scene, noise=n, background="grey"), 64) for n in (0, 0.05))
    corner = [p[:6, :6] for p in (clean, rough)]
    everywhere = rough - clean
    assert corner[0].std() == 0 or scene.items[0].box[0] < 0.1
    assert 0.8 < everywhere.std() / (255 * 0.05) < 1.1
    crowded = sample(random.Random(3), 1, clutter=4)
    assert crowded.items == scene.items and len(crowded.clutter) == 4
    assert crowded.noise == 0 and sample(random.Random(3), 1, noise=0.1).noise == 0.1
    changed = (pixels(crowded, 96) != pixels(replace(crowded, clutter=()), 96)).any(-1)
    assert 0.005 < changed.mean() < 0.3
    item = replace(crowded.items[0], shape="square")
    covered = replace(crowded, items=(item,), clutter=((0, 0, 1, 1), (0, 1, 1, 0)))
    assert tuple(pixels(covered)[int(item.y * 96), int(item.x * 96)]) == tuple(
        np.add(COLOURS[item.colour], item.tint).clip(0, 255))      # strokes lie behind the objects


def test_held_out_pairs():
    assert len(HELD_OUT) == 6 and len({s for _, s in HELD_OUT}) == 6
    assert len(PAIRS) + len(HELD_OUT) == len(COLOURS) * len(SHAPES) and not HELD_OUT & set(PAIRS)
    assert not any((i.colour, i.shape) in HELD_OUT for s, _ in many(800, (1, 4)) for i in s.items)
