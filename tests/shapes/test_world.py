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
from common.data.shapes.world import Shapes
from common.data.shapes.interleaved import TASKS
from common.data.shapes.scene import HELD_OUT, STYLES
from common.data.shapes.words import phrase
from tests.shapes.judge import held_out

ROOT = Path(__file__).parents[2]


def test_splits_of_the_world():
    world = Shapes(objects=3)
    for index in range(150):
        record = world.record("train", index, random.Random(index))
        for r in (record, world.record("train", index), world.record("test", index)):
            assert not {(i.colour, i.shape) for i in r["source"].items} & HELD_OUT
            assert not any(map(held_out, r["texts"]))
            assert all(world.is_true(t, r["source"]) for t in r["texts"])
    assert not any(map(held_out, world.corpus()))
    tested = [world.scene("composition", i) for i in range(world.size("composition"))]
    pairs = [(s.items[0].colour, s.items[0].shape) for s in tested]
    assert set(pairs) == HELD_OUT and {pairs.count(p) for p in HELD_OUT} == {50}
    assert all(len(s.items) == 1 for s in tested)


def test_single_has_each_class_equally_often():
    world = Shapes()
    labels = [world.label(world.scene("single", i)) for i in range(world.size("single"))]
    assert sorted(set(labels)) == list(range(len(world.classes)))
    assert {labels.count(n) for n in set(labels)} == {24}
    first = world.scene("single", 0).items[0]
    assert world.all_classes[labels[0]] == phrase(first)
    assert len(world.all_classes) == 48 and world.all_classes[:42] == world.classes


def test_records_of_the_world():
    world = Shapes(objects=2, noise=0.02, clutter=1, image_size=40)
    one, other = world.record("test", 5), world.record("test", 6)
    assert one["images"][0].size == (40, 40) and one["source"] != other["source"]
    assert one["texts"] == world.record("test", 5)["texts"]
    assert one["source"].noise == 0.02 and len(one["source"].clutter) == 1
    assert world.scene("test", 5, random.Random(1)) == one["source"]         # no rng moves a test
    fresh = [world.scene("train", 5, random.Random(n)) for n in (1, 1, 2)]
    assert fresh[0] == fresh[1] != fresh[2]
    assert Shapes(style="outline").scene("test", 1).style == "outline"
    for index in range(60):
        plain, shifted = world.scene("single", index), world.scene("shifted", index)
        assert shifted.style in STYLES[1:] and replace(shifted, style="plain") == plain


def test_the_tasks_have_the_worlds_dials_and_size():
    world = Shapes(objects=4, noise=0.25, clutter=3, image_size=20)
    assert world.tasks == tuple(TASKS)
    counts = set()
    for kind in ("caption", "album", "question", "document"):
        for i in range(12):
            record = world.task(kind, random.Random(i))
            scenes = (record["source"],) if kind == "caption" else record["source"]
            counts |= {len(scene.items) for scene in scenes}
            assert {(s.noise, len(s.clutter)) for s in scenes} == {(0.25, 3)}
            picture = record["images"][0] if kind == "caption" else \
                record["turns"][0]["images"][0][0]
            assert picture.size == (20, 20)
    assert max(counts) == 4 and min(counts) == 1
    for kind in ("names", "episode", "glossary", "clip"):
        assert world.task(kind, random.Random(0))["turns"][-1]["images"][0][0].size == (20, 20)


def test_arguments_of_a_task_come_before_the_worlds_dials():
    record = Shapes(objects=4).task("caption", random.Random(0), "test", objects=(3, 3))
    assert len(record["source"].items) == 3
    record = Shapes().task("clip", random.Random(0), "test", kind="growth", frames=4)
    assert record["kind"] == "growth" and len(record["turns"][0]["images"][0]) == 4


def test_the_split_and_the_texts_reach_their_functions():
    world = Shapes()
    for i in range(9):
        assert world.text(random.Random(i)) == texts.text(random.Random(i))
        assert world.labelled(random.Random(i)) == texts.labelled(random.Random(i))
        test = world.task("question", random.Random(i), "test")
        assert test == TASKS["question"](random.Random(i), "test", 32, objects=(1, 2))
        train = world.task("question", random.Random(i), asks=1)
        assert train["turns"][0]["prompt"] != test["turns"][0]["prompt"]
    assert next(world.corpus()) == next(texts.corpus())


def test_a_caption_describes_when_it_is_true_and_names_an_object():
    world = Shapes()
    record = world.record("single", 0)
    name = phrase(record["source"].items[0])
    assert world.describes(f"there is {name}", record["source"])
    assert world.is_true("one object", record["source"])
    assert not world.describes("one object", record["source"])
    other = next(world.record("single", i) for i in range(9)
                 if phrase(world.record("single", i)["source"].items[0]) != name)
    assert not world.describes(f"there is {name}", other["source"])


def test_more_objects_than_fit_and_no_such_style_are_refused():
    for objects in (0, 7):
        with pytest.raises(ValueError, match=f"objects={objects}: a scene has 1 to 6"):
            Shapes(objects=objects)
    with pytest.raises(ValueError, match="sketch.*outline"):
        Shapes(style="sketch")


def test_pictures_are_named_by_what_they_show():
    world = Shapes(image_size=20)
    for index, (file, picture) in enumerate(world.named_pictures()):
        assert file.startswith(f"{index:03d}-") and file.endswith(".png")
        shown = file[4:-4].replace("-", " ")
        assert world.is_true(shown, world.scene("test", index)), shown
        assert picture.tobytes() == world.record("test", index)["images"][0].tobytes()
    assert index == 99


def test_the_command_writes_pictures_and_says_in_one_line_what_is_wrong(tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "common.data", *map(str, arguments)],
                              capture_output=True, text=True, cwd=ROOT)
    done = command("shapes", tmp_path / "new")
    assert (done.returncode, done.stdout) == (0, f"100 pictures in {tmp_path / 'new'}\n")
    with Image.open(sorted((tmp_path / "new").iterdir())[99]) as picture:
        assert picture.size == (96, 96) and picture.format == "PNG"
    (tmp_path / "file").write_text("")
    for arguments, message in (((), "usage: "), (("shapes",), "usage: "),
                               (("moon", "x"), "usage: "), (("emoji", "x", "y"), "usage: "),
                               (("emoji", tmp_path / "file"), "cannot write to ")):
        done = command(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(f"{message}.*\n", done.stderr), done.stderr
