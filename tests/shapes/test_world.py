"""Shapes: its splits, its dials, its tasks and texts, and the command that writes pictures."""
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from common.data.shapes import texts
from common.data.shapes.interleaved import TASKS
from common.data.shapes.scene import HELD_OUT, PAIRS, STYLES
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
                assert all(world.is_true(text, scene) for text in record["texts"])
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
            assert {labels.count(n) for n in labels} == {times} and len(scenes) == times * len(pairs)
            assert all(world.is_true(world.all_classes[n], s) for n, s in zip(labels, scenes))
        assert min(labels) == len(world.classes)

    def test_shifted_shows_the_scenes_of_single_in_every_other_style(self):
        world, styles = Shapes(), set()
        for index in range(world.size("shifted")):
            shifted = world.scene("shifted", index)
            assert replace(shifted, style="plain") == world.scene("single", index)
            styles.add((world.label(shifted), shifted.style))
        assert len(styles) == 3 * 42 and {style for _, style in styles} == set(STYLES[1:])
        assert Shapes(style="outline").scene("test", 1).style == "outline"

    def test_a_caption_describes_when_it_is_true_and_names_an_object(self):
        world = Shapes()
        scene, other = (world.scene("single", index) for index in (0, 1))
        name = world.all_classes[world.label(scene)]
        assert world.describes(f"there is {name}", scene) and world.is_true("one object", scene)
        assert not world.describes("one object", scene)
        assert not world.describes(f"there is {name}", other)

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_task_has_the_worlds_dials_split_and_size(self, kind):
        world, more = Shapes(objects=4, noise=0.25, clutter=3, image_size=20), {}
        if kind in ("caption", "album", "question", "document"):
            more = {"objects": (1, 4), "noise": 0.25, "clutter": 3}
        for i, split in enumerate(("train", "test", "train")):
            record = world.task(kind, random.Random(i), split)
            assert record == TASKS[kind](random.Random(i), split, 20, **more)
        assert world.tasks == tuple(TASKS)

    def test_arguments_of_a_task_come_before_the_worlds_dials(self):
        record = Shapes(objects=4).task("caption", random.Random(0), "test", objects=(3, 3))
        assert len(record["source"].items) == 3
        record = Shapes().task("clip", random.Random(0), "test", kind="growth", frames=4)
        assert record["kind"] == "growth" and len(record["turns"][0]["images"][0]) == 4

    def test_its_texts_are_those_of_texts(self):
        for name in ("text", "labelled"):
            assert getattr(Shapes(), name)(random.Random(3)) == getattr(texts, name)(random.Random(3))
        assert next(Shapes().corpus()) == next(texts.corpus())

    @pytest.mark.parametrize("setting, words", [({"objects": 0}, "objects=0.*1 to 6"),
                                                ({"objects": 7}, "objects=7.*1 to 6"),
                                                ({"style": "sketch"}, "sketch.*outline")])
    def test_more_objects_than_fit_and_no_such_style_are_refused(self, setting, words):
        with pytest.raises(ValueError, match=words):
            Shapes(**setting)

    def test_pictures_are_named_by_what_they_show(self):
        world, files = Shapes(image_size=20), []
        for index, (file, picture) in enumerate(world.named_pictures()):
            shown = re.fullmatch(rf"{index:03d}-([a-z-]+)\.png", file)[1].replace("-", " ")
            assert world.is_true(shown, world.scene("test", index)), shown
            assert shows({"images": [picture]}, [world.scene("test", index)], 20)
            files.append(file)
        assert len(files) == 100


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "common.data", *map(str, arguments)],
                          capture_output=True, text=True, cwd=Path(__file__).parents[2])


class TestTheCommand:
    def test_it_writes_pictures(self, tmp_path):
        done = command("shapes", tmp_path / "new")
        assert (done.returncode, done.stdout) == (0, f"100 pictures in {tmp_path / 'new'}\n")
        with Image.open(sorted((tmp_path / "new").iterdir())[99]) as picture:
            assert picture.size == (96, 96) and picture.format == "PNG"

    @pytest.mark.parametrize("arguments, message", [
        ([], "usage: "), (["shapes"], "usage: "), (["moon", "x"], "usage: "),
        (["emoji", "x", "y"], "usage: "), (["emoji", __file__], "cannot write to ")])
    def test_it_says_in_one_line_what_is_wrong(self, arguments, message):
        done = command(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(f"{message}.*\n", done.stderr), done.stderr
