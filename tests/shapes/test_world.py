"""Shapes: its splits, its dials, its tasks and texts, and the command that writes pictures."""
import json
import pickle
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
from tests.fuzz import one_line
from tests.helpers import command
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
            if split in ("human", "web"):            # their texts are fixed as well
                assert world.record(split, 5, random.Random(1)) == world.record(split, 5)
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

    def test_human_has_up_to_five_true_texts_of_scenes_as_train_has_them(self):
        world = Shapes(objects=3, noise=0.02, image_size=8)
        records, counts = [world.record("human", i) for i in range(300)], Counter()
        for record in records:
            scene, texts = record["source"], record["texts"]
            assert shows(record, [scene], 8) and not pairs_in(scene) & HELD_OUT
            assert all(world.describes(text, scene) for text in texts)
            assert len(set(texts)) == len(texts) and scene.noise == 0.02
            counts.update([f"{len(texts)} texts", len(scene.items)])
        assert {1, 2, 3, "5 texts"} < set(counts) and "6 texts" not in counts
        assert sum(len(record["texts"]) for record in records) > 3.5 * 300
        assert len({record["source"] for record in records}) == 300 and world.size("human") == 4096

    @pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
    def test_a_text_of_web_is_false_at_the_rate_of_web_noise_and_says_so(self, rate):
        world = Shapes(web_noise=rate, image_size=8)
        records = [world.record("web", i) for i in range(400)]
        for index, record in enumerate(records):
            (text,), scene = record["texts"], record["source"]
            assert scene == Shapes().scene("web", index) and shows(record, [scene], 8)
            assert world.is_true(text, scene) == record["truth"]
            assert (record["hardness"] is None) == record["truth"]
        false = sum(not record["truth"] for record in records) / 400
        assert false == pytest.approx(rate, abs=0.06 if 0 < rate < 1 else 0)
        assert Shapes().web_noise == 0.4 and Shapes().size("web") == 12288

    def test_texts_of_a_file_are_the_web_and_nothing_else_changes(self, tmp_path):
        rows = [(17, "a red circle"), (3, " a dog "), (12287, "x"), (17, "a blue star"), (3, "a")]
        lines = [json.dumps({"scene": scene, "text": text, "more": 1}) for scene, text in rows]
        (tmp_path / "out.jsonl").write_text("\n".join(lines) + "\n")
        plain, world = Shapes(), Shapes(texts=f"{tmp_path}/out.jsonl")
        for world in (world, pickle.loads(pickle.dumps(world))):
            wanted = [(3, ["a dog", "a"]), (17, ["a red circle", "a blue star"]), (12287, ["x"])]
            assert world.size("web") == 3
            for index, (scene, texts) in enumerate(wanted):
                record = plain.record("web", scene)
                assert world.record("web", index, random.Random(0)) == {
                    "images": record["images"], "texts": texts, "source": record["source"]}
            for split in {*Shapes.splits} - {"web"}:
                assert world.record(split, 7) == plain.record(split, 7)
                assert world.size(split) == plain.size(split)
        assert plain.size("web") == 12288

    @pytest.mark.parametrize("line, words", [
        ('{"scene": 1, "text": "x"', "line 2: "), ('[1, "x"]', "line 2: .*object"),
        ("", "line 2: "), *[(f'{{"scene": {scene}, "text": "x"}}', "line 2: .*0 to 12287")
                            for scene in ("12288", "-1", "true", "1.0", '"1"', "null")],
        *[(f'{{"scene": 1, "text": {text}}}', "line 2: ") for text in (
            '" "', "null", "[]", r'"\ud800"', '"\udcff"')], ('{"text": "x"}', "line 2: ")])
    def test_a_line_that_is_no_scene_and_text_is_refused_by_its_number(self, tmp_path, line, words):
        lines = ['{"scene": 1, "text": "x"}', line, ""]
        (tmp_path / "a").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        with one_line(f"^{tmp_path}/a: {words}"):
            Shapes(texts=f"{tmp_path}/a")
        (tmp_path / "a").write_bytes(b"")
        with one_line(f"^{tmp_path}/a: no texts"):
            Shapes(texts=f"{tmp_path}/a")

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_task_has_the_worlds_dials_unless_arguments_change_them(self, kind):
        world = Shapes(objects=4, noise=0.25, clutter=3, image_size=20)
        has_dials = kind not in ("names", "episode", "glossary", "clip", "reading")
        dials = {"objects": (1, 4), "noise": 0.25, "clutter": 3} if has_dials else {}
        for split, more in (("train", {}), ("test", {"noise": 0.5} if has_dials else {})):
            record = world.task(kind, random.Random(7), split, **more)
            assert record == TASKS[kind](random.Random(7), split, 20, **dials | more)
        assert world.tasks == tuple(TASKS)

    @pytest.mark.parametrize("setting, words", [
        ({"objects": 0}, "objects=0.*1 to 6"), ({"objects": 7}, "objects=7.*1 to 6"),
        ({"style": "sketch"}, "sketch.*outline"), ({"web_noise": -0.1}, "web_noise=-0.1.*0 to 1"),
        ({"web_noise": 1.1}, "1.1.*0 to 1"), ({"web_noise": float("nan")}, "nan.*0 to 1")])
    def test_more_objects_than_fit_and_no_such_style_are_refused(self, setting, words):
        with pytest.raises(ValueError, match=words):
            Shapes(**setting)


class TestTheCommand:
    def test_it_writes_pictures_named_by_what_they_show(self, tmp_path, capsys):
        main(["shapes", str(tmp_path / "new")])
        assert capsys.readouterr().out == f"100 pictures in {tmp_path / 'new'}\n"
        for index, file in enumerate(sorted((tmp_path / "new").iterdir())):
            scene = Shapes().scene("test", index)
            shown = re.fullmatch(rf"{index:03d}-([a-z-]+)\.png", file.name)[1].replace("-", " ")
            assert Shapes().is_true(shown, scene), shown
            assert shows({"images": [Image.open(file)]}, [scene], 96)

    @pytest.mark.parametrize("arguments, words", [
        ([], "world, folder"), (["shapes"], "folder"), (["moon", "x"], "'moon'"),
        (["emoji", "x", "y"], "y"), (["emoji", __file__], "test_world.py")])
    def test_it_says_in_one_line_what_is_wrong(self, arguments, words):
        status, _, err = command("common/data/__main__.py", *arguments)
        assert status == 2 and words in err.splitlines()[-1] and "Traceback" not in err
