"""Shapes: its splits, its dials, its tasks and texts, and the command that writes pictures."""
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from common.data.__main__ import main
from common.data.shapes.interleaved import TASKS
from common.data.shapes.scene import HELD_OUT, PAIRS, STYLES
from common.data.shapes.words import vague
from common.data.shapes.world import Shapes
from tests.shapes.judge import held_out, pairs_in, shows


class TestShapes:
    def test_a_record_is_a_picture_and_a_true_text_without_a_held_out_pair(self):
        world = Shapes(objects=3, noise=0.02, clutter=1, image_size=20)
        for index in range(100):
            rng = random.Random(index)
            for record in (world.record("train", index, rng), world.record("train", index),
                           world.record("test", index)):
                scene = record["source"]
                assert shows(record, [scene], 20) and not pairs_in(scene) & HELD_OUT
                assert all(world.describes(text, scene) for text in record["texts"])
                assert world.is_true(vague(scene), scene)
                assert not world.describes(vague(scene), scene)
                assert not any(map(held_out, record["texts"]))
                assert scene.noise == 0.02 and len(scene.clutter) == 1

    def test_only_training_scenes_depend_on_an_rng(self):
        world = Shapes()
        for split in world.splits:
            fresh = [world.record(split, 5, random.Random(n))["source"] for n in (1, 1, 2)]
            assert fresh[0] == fresh[1] and (fresh[0] != fresh[2]) == (split == "train")
            assert world.record(split, 5) == Shapes().record(split, 5) != world.record(split, 6)
        scenes = [world.scene("test", index) for index in range(world.size("test"))]
        assert len(set(scenes)) == 1000 and {len(scene.items) for scene in scenes} == {1, 2}

    def test_single_and_composition_have_each_of_their_classes_equally_often(self):
        world = Shapes(objects=3)
        assert len(world.all_classes) == 48 and world.all_classes[:42] == world.classes
        for split, pairs, times in (("single", set(PAIRS), 24), ("composition", HELD_OUT, 50)):
            scenes = [world.scene(split, index) for index in range(world.size(split))]
            assert pairs_in(*scenes) == pairs and all(len(scene.items) == 1 for scene in scenes)
            labels = [world.label(scene) for scene in scenes]
            assert [*Counter(labels).values()] == [times] * len(pairs)
            for n, label in enumerate(labels):
                assert world.describes(world.all_classes[label], scenes[n])
                assert not world.describes(world.all_classes[label], scenes[n - 1])
        assert min(labels) == len(world.classes)

    def test_shifted_shows_the_scenes_of_single_in_every_other_style(self):
        world, styles = Shapes(), set()
        for index in range(world.size("shifted")):
            shifted = world.scene("shifted", index)
            assert replace(shifted, style="plain") == world.scene("single", index)
            styles.add((world.label(shifted), shifted.style))
        assert len(styles) == 3 * 42 and {style for _, style in styles} == set(STYLES[1:])
        assert Shapes(style="outline").scene("test", 1).style == "outline"

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_task_has_the_worlds_dials_unless_arguments_change_them(self, kind):
        world = Shapes(objects=4, noise=0.25, clutter=3, image_size=20)
        has_dials = kind in ("caption", "album", "question", "document")
        dials = {"objects": (1, 4), "noise": 0.25, "clutter": 3} if has_dials else {}
        for split, more in (("train", {}), ("test", {"noise": 0.5} if has_dials else {})):
            record = world.task(kind, random.Random(7), split, **more)
            assert record == TASKS[kind](random.Random(7), split, 20, **dials | more)
        assert world.tasks == tuple(TASKS)

    @pytest.mark.parametrize("setting, words", [
        ({"objects": 0}, "objects=0.*1 to 6"), ({"objects": 7}, "objects=7.*1 to 6"),
        ({"style": "sketch"}, "sketch.*outline")])
    def test_more_objects_than_fit_and_no_such_style_are_refused(self, setting, words):
        with pytest.raises(ValueError, match=words):
            Shapes(**setting)


class TestTheCommand:
    def test_it_writes_pictures_named_by_what_they_show(self, tmp_path, capsys):
        main(["shapes", tmp_path / "new"])
        assert capsys.readouterr().out == f"100 pictures in {tmp_path / 'new'}\n"
        for index, file in enumerate(sorted((tmp_path / "new").iterdir())):
            scene = Shapes().scene("test", index)
            shown = re.fullmatch(rf"{index:03d}-([a-z-]+)\.png", file.name)[1].replace("-", " ")
            assert Shapes().is_true(shown, scene), shown
            assert shows({"images": [Image.open(file)]}, [scene], 96)

    @pytest.mark.parametrize("arguments, words", [
        ([], "usage: "), (["shapes"], "usage: "), (["moon", "x"], "usage: "),
        (["emoji", "x", "y"], "usage: "), (["emoji", __file__], f"cannot write to {__file__}")])
    def test_it_says_in_one_line_what_is_wrong(self, arguments, words):
        with pytest.raises(SystemExit, match=f"^{words}.*$"):
            main(arguments)
