"""Scenes: how they are sampled and drawn."""
import colorsys
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from common.data.shapes.scene import (BACKGROUNDS, COLOURS, HELD_OUT, PAIRS, SHAPES, SIZES, STYLES,
                                      Item, Scene, draw, sample, sample_centres)
from tests.shapes.judge import many, pair, pairs_in


def pixels(scene, size=96):
    """The picture as integers, (size, size, 3)."""
    return np.asarray(draw(scene, size)).astype(int)


class TestItem:
    def test_its_box_is_what_is_drawn_of_it(self):
        for scene, _ in many(100, (1, 4)):
            for item in scene.items:
                alone = pixels(Scene((item,)), 200)
                rows, columns = np.nonzero(np.abs(alone - BACKGROUNDS["white"]).sum(-1) > 60)
                drawn = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                assert np.abs(np.divide(drawn, 200) - item.box).max() < 0.013, item
                assert 0 <= min(item.box) and max(item.box) <= 1


class TestSample:
    def test_objects_lie_inside_and_apart(self):
        for scene, _ in many(400, (2, 5)):
            for n, a in enumerate(scene.items):
                assert all(SIZES[a.size] <= v <= 1 - SIZES[a.size] for v in (a.x, a.y))
                for b in scene.items[:n]:
                    assert np.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
        assert sample_centres(random.Random(0), [0.45, 0.45]) is None

    def test_everything_that_a_scene_may_hold_is_drawn(self):
        scenes = [scene for scene, _ in many(400, (1, 5))]
        assert {len(scene.items) for scene in scenes} == {1, 2, 3, 4, 5}
        assert {scene.background for scene in scenes} == set(BACKGROUNDS)
        assert pairs_in(*scenes) == set(PAIRS) == {*product(COLOURS, SHAPES)} - HELD_OUT
        assert all(len(pairs_in(scene)) == len(scene.items) for scene in scenes)
        for count, sizes in ((4, set(SIZES)), (5, {"small"})):      # five large ones find no room
            assert {item.size for scene, _ in many(50, count) for item in scene.items} == sizes
        assert len({shape for _, shape in HELD_OUT}) == len(HELD_OUT) == 6
        assert {v for scene in scenes for i in scene.items for v in i.tint} == {*range(-12, 13)}

    def test_noise_clutter_and_style_change_no_object(self):
        plain = sample(random.Random(3), 2)
        rough = sample(random.Random(3), 2, noise=0.1, clutter=4, style="outline")
        assert (rough.noise, len(set(rough.clutter)), rough.style) == (0.1, 4, "outline")
        assert replace(rough, noise=0, clutter=(), style="plain", grain=plain.grain) == plain


# Points in units of the radius from the centre (x to the right, y down): inside, outside.
OUTLINES = {"circle": ([(0.68, 0.68), (0.94, 0)], [(0.75, 0.75)]),
            "square": ([(0.75, 0.75), (-0.75, -0.75)], [(0.9, 0)]),
            "triangle": ([(0, -0.8), (0.75, 0.62), (-0.75, 0.62)], [(0.6, -0.6), (0, 0.8)]),
            "star": ([(0, -0.98), (0.9, -0.3)], [(0.45, -0.6), (0, 0.6), (0.8, 0.2)]),
            "cross": ([(0.9, 0), (0, 0.9), (-0.9, 0.25)], [(0.5, 0.5), (-0.5, 0.5)]),
            "ring": ([(0.6, 0), (0, -0.9)], [(0, 0), (0.4, 0), (0.75, 0.75)])}


class TestDraw:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_an_object_has_its_outline_and_colour_at_its_place(self, shape):
        for colour, size, background in (("red", "large", "white"), ("cyan", "small", "cream")):
            item, r = Item(colour, shape, size, 0.4, 0.65, (5, -7, 3)), SIZES[size]
            picture = pixels(Scene((item,), background), 400)
            for points, wanted in zip(OUTLINES[shape], (np.add(COLOURS[colour], item.tint),
                                                        BACKGROUNDS[background])):
                for u, v in points:
                    got = picture[int(400 * (0.65 + r * v)), int(400 * (0.4 + r * u))]
                    assert np.abs(got - wanted).max() <= 1, (shape, u, v)

    def test_equal_scenes_give_equal_pictures(self):
        for scene, _ in many(30, noise=0.05, clutter=3):
            one, again, other = (draw(s, 40).tobytes() for s in (
                scene, replace(scene), replace(scene, grain=scene.grain + 1)))
            assert one == again != other

    def test_noise_has_its_standard_deviation_and_stays_in_range(self):
        noise = pixels(pair(noise=0.05), 64) - pixels(pair(), 64)
        assert 0.9 < noise.std() / (255 * 0.05) < 1.1 and np.abs(noise).max() < 80

    def test_strokes_lie_behind_the_objects(self):
        crossed = pixels(pair(clutter=((0, 0, 1, 1), (0, 1, 1, 0), (0.25, 0, 0.25, 1))))
        changed = (crossed != pixels(pair())).any(-1)
        assert 0.005 < changed.mean() < 0.3 and tuple(crossed[90, 24]) != BACKGROUNDS["grey"]
        for item in pair().items:
            assert tuple(crossed[int(96 * item.y), int(96 * item.x)]) == COLOURS[item.colour]

    @pytest.mark.parametrize("colour", COLOURS)
    @pytest.mark.parametrize("shape, reach", [("square", 0.8), ("circle", 1)])
    def test_what_each_style_changes(self, colour, shape, reach):
        scene = Scene((Item(colour, shape, "large", 0.5, 0.5),))
        looks = {style: pixels(replace(scene, style=style), 100) for style in STYLES}
        assert tuple(looks["plain"][55, 52]) == COLOURS[colour]
        assert tuple(looks["outline"][50, 50]) == BACKGROUNDS["white"]              # only its edge
        for way in (-1, 1):
            edge = looks["outline"][50, int(50 + way * (100 * reach * SIZES["large"] - 1))]
            assert np.abs(edge - COLOURS[colour]).max() < 60
        column = looks["texture"][35:65, 50]                                        # stripes
        assert np.ptp(column, axis=0).max() > 20 and (column == COLOURS[colour]).all(-1).any()
        hue, dull = (colorsys.rgb_to_hsv(*(looks[s][55, 52] / 255)) for s in ("plain", "palette"))
        assert min(abs(hue[0] - dull[0]), 1 - abs(hue[0] - dull[0])) < 0.02 and dull[2] < hue[2]
