"""The user's own data: each format by a tiny example, the splits, the order, what is refused."""
import itertools
import json
import random
import re
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data import files
from common.data.files import FORMATS, Files, Refusals, all_records, make_splits, usable_name
from common.data.files import shards as tar_files
from tests.fuzz import limit, mutations, one_line
from tests.helpers import colour, listed, names, picture, shard, shards

SIDE = 7


def found(kind, path):
    """(records, refusals) of a generator; a record of one picture as (its name, texts)."""
    refused = []
    records = list(FORMATS[kind](str(path), refused.append))
    assert all(r["source"] == r["images"][0] for r in records) or kind == "tar", records
    return [(*r["images"], r["texts"]) for r in records], refused


def written(folder, kind, count, bad=()):
    """The file of a format of `count` pictures, of which some are missing."""
    listed(folder, count, bad)
    shards(folder, [count])
    rows = [(f"{n}.png", f"number {n}") for n in range(count)]
    (folder / "coco").write_text(json.dumps({
        "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(rows)],
        "annotations": [{"image_id": n, "caption": text} for n, (_, text) in enumerate(rows)]}))
    dialogue(folder / "llava", *[talk("what is it?\n<image>", text, image=name)
                                 for name, text in rows])
    (folder / "interleaved").write_text("\n".join(
        json.dumps({"images": [name, None], "texts": [None, text]}) for name, text in rows))
    (folder / "flickr").write_text("\n".join(map(",".join, [("image", "caption"), *rows])))
    return folder / {"jsonl": "data.jsonl", "tar": "00.tar"}.get(kind, kind)


def talk(*values, **more):
    """A sample of LLaVA-Instruct, human first."""
    return {"conversations": [{"from": ("human", "gpt")[k % 2], "value": value}
                              for k, value in enumerate(values)], **more}


def dialogue(path, *samples):
    """The file of some samples, as a list or in lines."""
    lines = path.suffix == ".jsonl"
    path.write_text("\n\n".join(map(json.dumps, samples)) if lines else json.dumps(samples))
    return str(path)


def parts(record):
    """(pictures, captions or answers) of a record of either kind."""
    turns = record.get("turns", [])
    return record.get("images", [one for turn in turns for one, in turn["images"]]), \
        record.get("texts", [turn["answer"] for turn in turns])


def opened(folder, *more, count=30, **options):
    """The Files of `count` pictures, and of more rows or broken lines."""
    listed(folder, count)
    with open(folder / "data.jsonl", "a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in more)
    return Files("jsonl", f"{folder}/data.jsonl", image_size=SIDE, **options)


class TestRefusals:
    @pytest.mark.parametrize("tried, most", [(7, 5), (100, 5), (119, 5), (120, 6), (1000, 50)])
    def test_it_stops_past_the_fraction_of_at_least_a_hundred(self, tried, most):
        refused = Refusals(0.05)
        for number in range(most + 1):
            refused.check(tried)
            refused.add(f"why {number}\n\x1b[2J\ud800" + "x" * 9999)
        with one_line(f"^{most + 1} of {tried:,} .*why 0.* 0.05 "):
            refused.check(tried)
        assert [reason[:6] for reason in refused.reasons] == ["why 0?", "why 1?", "why 2?"]


class TestCoco:
    def test_annotations_are_joined_to_their_picture_by_id(self, tmp_path):
        images = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 2},
                  {"id": 5, "file_name": "c.jpg"}, {"id": [3], "file_name": "d.jpg"}, 4]
        annotations = [{"id": 3, "image_id": 3, "caption": "an a"}, {"image_id": 1}, "words",
                       {"id": 7, "image_id": 7, "caption": "a b"}, {"image_id": 9, "caption": "x"},
                       {"image_id": {}, "caption": "x"}, {"id": 5, "image_id": 3, "caption": "and"}]
        (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        records, refused = found("coco", tmp_path / "c.json")
        assert records == [("b.jpg", ["a b"]), ("a.jpg", ["an a", "and"]), ("c.jpg", [])]
        places = [re.search(r"c.json: (\w)\w+ (\d)", reason).groups() for reason in refused]
        assert places == [("a", "1"), ("a", "2"), ("a", "5"), ("i", "2"), ("i", "4"), ("i", "5")]

    @pytest.mark.parametrize("text", ["[]", '{"images": []}', '{"images": 3, "annotations": 3}'])
    def test_another_file_is_refused_in_one_line(self, tmp_path, text):
        (tmp_path / "c.json").write_text(text)
        with one_line("c.json: "):
            found("coco", tmp_path / "c.json")


class TestFlickr:
    def test_of_30k_with_bars_and_quotes_that_mean_nothing(self, tmp_path):
        (tmp_path / "results.csv").write_text(
            'Image_Name| comment_number| comment\na.jpg| 0| A "dog , runs .\n'
            "b.jpg| 0|\" Two cats .\nc.jpg| 4   the missing bar\na.jpg | 1| A brown dog .\n"
            "c.jpg| 0| one | bar too many\n")
        records, refused = found("flickr", tmp_path / "results.csv")
        assert records == [("a.jpg", [' A "dog , runs .']), ("b.jpg", ['" Two cats .']),
                           ("a.jpg", [" A brown dog ."])]
        assert [re.search(r"line (\d)", reason)[1] for reason in refused] == ["4", "6"]

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_of_8k_with_commas_in_quotes_odd_bytes_and_an_endless_quote(self, tmp_path, end):
        rows = ["\ufeffimage,caption", 'a.jpg,"a ""dog"", brown"', "b.jpg,\udcff", 'c.jpg,"a dog',
                'runs"', 'd.jpg,"' + "x" * 200_000, "e.jpg,two", ""]
        (tmp_path / "c.csv").write_bytes(end.join(rows).encode(errors="surrogateescape"))
        records, refused = found("flickr", tmp_path / "c.csv")
        assert [(name, text.split()) for name, (text,) in records] == [
            ("a.jpg", ["a", '"dog",', "brown"]), ("b.jpg", ["\udcff"]),
            ("c.jpg", ["a", "dog", "runs"]), ("e.jpg", ["two"])]
        assert len(refused) == 1 and "line 6: " in refused[0]

    @pytest.mark.parametrize("first", ["", "a;b", "image,text", "image_name| number"])
    def test_another_first_line_is_refused_by_name(self, tmp_path, first):
        (tmp_path / "c.csv").write_text(first + "\na,b\n")
        with one_line("c.csv: .*image_name.*image,caption"):
            found("flickr", tmp_path / "c.csv")


class TestJsonl:
    def test_one_text_or_several_under_either_name(self, tmp_path):
        rows = [{"image": "a.jpg", "text": "one"}, {"image": "b.jpg", "caption": "two"},
                {"image": "c.jpg", "texts": ["three", "four"], "more": None},
                {"images": ["d.jpg", "e.jpg"], "captions": "five"}]
        (tmp_path / "c.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
        assert found("jsonl", tmp_path / "c.jsonl") == ([
            ("a.jpg", ["one"]), ("b.jpg", ["two"]), ("c.jpg", ["three", "four"]),
            ("d.jpg", "e.jpg", ["five"])], [])

    def test_broken_lines_are_refused_by_their_number(self, tmp_path):
        rows = [b'{"image": "a.jpg", "text": "one"}', b'{"image": "a.jpg"', b"[]", b"\xff\xfe",
                b'{"image": 3, "text": "x"}', b'{"image": "b.jpg"}', b"[" * 100_000,
                b'{"image": "' + b"x" * 2_500_000 + b'"}', b'{"image": "c.jpg", "text": "two"}']
        (tmp_path / "c.jsonl").write_bytes(b"\n".join(rows))
        records, refused = found("jsonl", tmp_path / "c.jsonl")
        assert records == [("a.jpg", ["one"]), ("c.jpg", ["two"])]
        assert [int(re.search(r"line (\d)", r)[1]) for r in refused] == [2, 3, 4, 5, 6, 7, 8]


    def test_web_marks_a_pair_and_is_a_bool(self, tmp_path):
        rows = [{"image": "a.jpg", "text": "x"} | more for more in (
            {"web": True}, {"web": False}, {}, {"web": 1}, {"web": "true"}, {"web": None})]
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
        refused = []
        records = list(FORMATS["jsonl"](f"{tmp_path}/c.jsonl", refused.append))
        assert [record["web"] for record in records] == [True, False, False]
        assert [int(re.search(r"line (\d): .*'web'", r)[1]) for r in refused] == [4, 5, 6]


class TestTar:
    def test_members_of_one_name_are_a_record(self, tmp_path):
        shard(tmp_path / "s.tar", [
            ("a/1.jpg", picture(1)), ("a/1.json", b'{"caption": "wrong"}'), ("a/1.txt", b"one"),
            ("2.seg.png", b"not the picture"), ("2.PNG", picture(2)), ("2.webp", b"another"),
            ("2.json", b'{"caption": "two", "width": 9}'), ("b.c/1.txt", "drei ü".encode()),
            ("b.c/1.webp", picture(3)), ("2.cls", b"77"), ("2.JSON", b"the first counts"),
            ("x.jpg", tarfile.SYMTYPE), ("x.txt", b"linked"), ("y.jpg", picture(4))])
        refused = []
        records = list(FORMATS["tar"](str(tmp_path / "s.tar"), refused.append))
        assert [(r["source"], r["texts"]) for r in records] == [
            ("s.tar/a/1", ["one"]), ("s.tar/2", ["two"]), ("s.tar/b.c/1", ["drei ü"]),
            ("s.tar/x", ["linked"]), ("s.tar/y", [])]
        assert [len(r["images"]) for r in records] == [1, 1, 1, 0, 1] and not refused
        for number, record in zip((1, 2, 3), records):
            (path, offset, size), = record["images"]
            assert Path(path).read_bytes()[offset:offset + size] == picture(number)

    @pytest.mark.parametrize("name, data", [
        ("1.json", b"{}"), ("1.json", b"{{"), ("1.json", b'{"caption": 7}'), ("1.txt", b"\xff\0")])
    def test_an_incomplete_record_is_refused_alone(self, tmp_path, name, data):
        shard(tmp_path / "s.tar", [("1.jpg", picture(1)), (name, data), ("2.jpg", picture(2)),
                                   ("2.txt", b"two")])
        records, refused = found("tar", tmp_path / "s.tar")
        assert [texts for _, texts in records] == [["two"]]
        assert len(refused) == 1 and "s.tar: 1: " in refused[0]


class TestLlava:
    @pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
    def test_a_conversation_is_a_record_without_its_image_marks(self, tmp_path, name):
        path = dialogue(
            tmp_path / name, talk("<image>\nwhat?", "a cat", "why?", "a cat", image="a.jpg"),
            talk("how\n<image>", "so", image="./b/a.jpg", id="7"), talk("hi", "ho", id="x"),
            talk("one\n<image>\ntwo", "<image> is it", images=["c.jpg", "d.jpg"]),
            talk("say", "no", image=None), talk("a", "here: <image>", image=["e.jpg"]))
        refused = []
        records = list(FORMATS["llava"](path, refused.append))
        assert [(r["images"], r["texts"], r["source"]) for r in records] == [
            (["a.jpg"], ["what?", "a cat", "why?", "a cat"], "a.jpg"),
            (["b/a.jpg"], ["how", "so"], "b/a.jpg"), ([], ["hi", "ho"], "x"),
            (["c.jpg", "d.jpg"], ["one\ntwo", "is it"], "c.jpg"), ([], ["say", "no"], "5"),
            (["e.jpg"], ["a", "here:"], "e.jpg")] and not refused
        assert [r["counts"] for r in records] == [[1, 0], [1], [0], [2], [0], [1]]

    @pytest.mark.parametrize("sample, why", [
        (talk(), "order , not human"), (talk("a"), "order human, not human, gpt"),
        (talk("a", "b", "c"), "order human, gpt, human, not"), ([], "conversations"),
        ({"conversations": talk("a", "b", "c")["conversations"][1:]}, "order gpt, human, not"),
        ({"conversations": [{"from": role, "value": "a"} for role in (
            "human", "gpt", "gpt", "human", "human", "gpt")]}, "gpt, human, human, gpt, not"),
        (talk("a", "b", image="a.jpg"), "0 .* 1 "), (talk("<image> a", "b"), "1 .* 0 "),
        (talk("<image>", "<image> b", image="a.jpg"), "2 .* 1 "), (talk("", "a"), "empty"),
        (talk("a", "\n<image>", image="a.jpg"), "empty"), (talk("a", 3), "'value'"),
        (talk("<image> a", "b", image=3), "'image'"), (talk("a", "\ud800"), "UTF-8"),
        (talk("<image> a", "b", image="../a.jpg"), "'../a.jpg'"),
        (talk("<image> a", "b", images=[3]), "3 is no name")])
    def test_a_broken_one_is_refused_alone_by_its_number(self, tmp_path, sample, why):
        refused, fine = [], talk("a", "b")
        path = dialogue(tmp_path / "d.json", fine, sample, fine)
        assert len(list(FORMATS["llava"](path, refused.append))) == 2
        assert len(refused) == 1 and re.search(f"d.json: conversation 2: .*{why}", refused[0])

    @pytest.mark.parametrize("text", ["{}", "3", "["])
    def test_another_file_is_refused_in_one_line(self, tmp_path, text):
        (tmp_path / "d.json").write_text(text)
        with one_line("d.json: "):
            list(FORMATS["llava"](f"{tmp_path}/d.json", None))


class TestShards:
    @pytest.mark.parametrize("pattern, wanted", [
        ("a-{08..11}.tar", "a-08.tar a-09.tar a-10.tar a-11.tar"), ("{5..4}", ""),
        ("{1..2}-{3..4}", "1-3 1-4 2-3 2-4"), ("*{3..4}", "1-3 2-3 1-4 2-4"), ("a{}", "a{}")])
    def test_braces_are_numbers_and_stars_are_globs(self, tmp_path, monkeypatch, pattern, wanted):
        monkeypatch.chdir(tmp_path)
        for name in wanted.split():
            (tmp_path / name).write_bytes(b"")
        assert tar_files(pattern) == wanted.split()

    def test_a_missing_file_is_refused_at_once(self, tmp_path):
        for pattern, name in (("{0..99999999999}", "/0: "), ("*.tgz", r"\*.tgz")):
            with limit(5), one_line(name):
                tar_files(f"{tmp_path}/{pattern}")


class TestUsableName:
    @pytest.mark.parametrize("name, want", [
        ("a.png", "a.png"), ("./b//a.png", "b/a.png"), ("b\\a.png", "b/a.png"),
        ("c ..png", "c ..png"), (("s.tar", 512, 9), ("s.tar", 512, 9)),
        *[(name, None) for name in (
            "../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "", ".", "C:\\a.png",
            "C:a.png", "\\\\host\\a", None, 7, ["a.png"])]])
    def test_a_name_inside_the_folder_loses_its_detours_and_others_are_refused(self, name, want):
        with nullcontext() if want else one_line(re.escape(f"{name!r}")):
            assert usable_name(name) == want


class TestFiles:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_every_format_opens_the_same_pictures_in_any_order(self, tmp_path, kind):
        path = written(tmp_path, kind, 40)
        world = Files(kind, str(path), image_size=SIDE)
        assert (world.size("train"), world.size("test"), world.name) == (35, 5, path.name)
        order = world.order(torch.Generator().manual_seed(3)).tolist()
        assert sorted(order) == list(range(35)) != order
        said = {}
        for record in all_records(world, "train") + all_records(world, "test"):
            (image,), (text,) = parts(record)
            assert image.size == (SIDE, SIDE)
            said[text] = image.getpixel((3, 3))
            assert world.is_true(text, record["source"])
            assert not world.is_true("number 40", record["source"])
        assert said == {f"number {n}": colour(n) for n in range(40)}

    @pytest.mark.parametrize("count, options, value", [
        (20, {"skip": 1}, "--skip 1"), (20, {"skip": -0.1}, "--skip -0.1"),
        (20, {"shuffle": 0}, "--shuffle 0"), (20, {"images": "none"}, "--images none"),
        (20, {"kind": "tar", "images": "."}, "--images ."), (19, {}, "data.jsonl: 19 .* 20 "),
        (20, {"kind": "tar", "where": "{5..4}"}, ": 0 "), (20, {"skip": 0, "shuffle": 1}, None)])
    def test_impossible_options_are_one_line(self, tmp_path, count, options, value):
        listed(tmp_path, count)
        options = {"kind": "jsonl", "where": f"{tmp_path}/data.jsonl", "image_size": SIDE} | options
        with one_line(value) if value else nullcontext():
            Files(**options)

    def test_the_folder_of_pictures_is_the_files_own_or_the_one_named(self, tmp_path):
        opened(tmp_path / "in").record("train", 0)
        (tmp_path / "in/data.jsonl").rename(tmp_path / "a")
        with one_line("png"):
            Files("jsonl", f"{tmp_path}/a", image_size=SIDE).record("train", 0)
        Files("jsonl", f"{tmp_path}/a", image_size=SIDE, images=tmp_path / "in").record("train", 0)

    def test_records_of_one_picture_are_one_and_test_texts_are_not_in_the_corpus(self, tmp_path):
        again = [{"image": f"./{n}.png", "texts": [f"again {n} " + "x" * 2000, f"number {n}"]}
                 for n in range(60)]
        world = opened(tmp_path, *again, count=60)
        assert world.size("train") + world.size("test") == 60
        assert not set(names(world, "train")) & set(names(world, "test"))
        held = {text[:1000] for record in world.records("test") for text in record["texts"]}
        corpus = list(world.corpus())
        assert len(held) == 2 * world.size("test")                           # none of them twice
        assert len(set(corpus)) == len(corpus) == 2 * world.size("train") and not held & set(corpus)
        assert max(map(len, corpus)) == 1000

    def test_training_cuts_at_random_and_measuring_in_the_middle(self, tmp_path):
        world = opened(tmp_path)
        ramp = Image.linear_gradient("L").resize((40, 120)).convert("RGB")
        for path in tmp_path.glob("*.png"):
            ramp.save(path)
        world._splits["web"], rng = world._splits["human"][:1], random.Random(0)
        *training, test = ([world.record(split, 0, rng)["images"][0].getpixel((3, 3))[0]
                            for _ in range(30)] for split in ("train", "web", "human", "test"))
        plain = world.record("train", 0)["images"][0].getpixel((3, 3))[0]
        assert all(min(drawn) < 80 and max(drawn) > 170 for drawn in training)
        assert {*test, plain} <= {126, 127, 128}

    def test_blank_is_the_record_in_grey_and_reads_nothing(self, tmp_path):
        rows = [{"images": [f"{n}.png", "none.png"], "text": f"two {n}"} for n in range(30)]
        world = opened(tmp_path, *rows, count=0)
        blank = world.blank("train", 3)
        assert blank["texts"] == blank["source"]["texts"]
        assert [(image.size, image.getpixel((0, 0))) for image in blank["images"]] == [
            ((SIDE, SIDE), (128, 128, 128))] * 2

    def test_the_turns_of_conversations_have_their_pictures_and_lengths(self, tmp_path):
        listed(tmp_path, 40)
        path = dialogue(tmp_path / "d.json", *(
            talk(f"<image>\nwhat {n}?", f"{n}", f"<image>\nand {n}?", "a b " * n, id="x",
                 images=[f"{n % 40}.png", "0.png"]) for n in range(1, 120)), *(
            talk(f"hello {n}", "yes", id=f"{n}") for n in range(40)))
        world = Files("llava", path, image_size=SIDE)
        assert world.has_turns and world.size("train") + world.size("test") == 159
        assert world.size("human") == world.size("train") == len(world.lengths)
        corpus, pictures = {*world.corpus()}, {"train": set(), "test": set()}
        for index, length in enumerate(world.lengths):
            record = world.record("train", index, random.Random(0))
            first, *later = record["turns"]
            images = [[frames[0].getpixel((3, 3)) for frames in turn["images"]]
                      for turn in record["turns"]]
            if not later:
                assert (length, images, first["answer"]) == (-3, [[]], "yes")
                continue
            n = int(first["answer"])
            assert first["prompt"] == f"what {n}?" and length == 2 + 1 + 2 + 2 * n
            assert images == [[colour(n % 40)], [colour(0)]]
            said = {key: later[0][key] for key in ("prompt", "answer")}
            assert said == {"prompt": f"and {n}?", "answer": ("a b " * n)[:-1]} and len(later) == 1
            assert {first["prompt"], first["answer"], later[0]["prompt"]} <= corpus
            said = first["answer"], later[0]["answer"], first["prompt"]
            assert [world.is_true(t, record["source"]) for t in said] == [True, True, False]
            grey = world.blank("train", index)
            assert [i.getpixel((0, 0)) for i in parts(grey)[0]] == [(128, 128, 128)] * 2
            assert [len(turn["images"]) for turn in grey["turns"]] == [1, 1]
        for split, seen in pictures.items():
            seen |= {name for name in names(world, split) if "png" in name}
        assert pictures["train"] and pictures["test"] and not pictures["train"] & pictures["test"]
        captions = opened(tmp_path)
        assert (captions.has_turns, captions.lengths) == (False, None)

    def test_conversations_on_few_pictures_are_refused(self, tmp_path):
        few = [talk("<image> a", "b", image=f"{n % 19}.png") for n in range(99)]
        with one_line(" 19 usable records of different names, .* 20 .*; 1 of 100 .* 0 pictures"):
            Files("llava", dialogue(tmp_path / "d.json", *few, talk("<image> a", "b")),
                  image_size=SIDE)

    def test_whole_pictures_keep_their_size(self, tmp_path):
        worlds = [opened(tmp_path, whole=whole) for whole in (True, False)]
        for rng in (None, random.Random(0)):
            sizes = [world.record(split, 0, rng)["images"][0].size
                     for world in worlds for split in ("train", "test")]
            assert sizes == [(9, 11)] * 2 + [(SIDE, SIDE)] * 2

    def test_large_whole_pictures_are_shrunk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "LONGEST", 10)
        assert opened(tmp_path, whole=True).record("train", 0)["images"][0].size == (8, 10)

    def test_unusable_rows_are_counted_and_left_out(self, tmp_path):
        rows = [{"image": "../0.png", "text": "x"}, {"image": "0.png", "texts": []},
                {"image": [], "text": "x"},
                {"image": "1.png", "texts": ["", None, "half a pair \ud800", " fine "]}]
        world = opened(tmp_path, *rows, skip=0.06)
        assert (world.refused.count, world.tried) == (6, 37)         # records, or texts of one
        texts = [world.blank(split, i)["texts"] for split in ("train", "test")
                 for i in range(world.size(split))]
        assert sorted(texts) == sorted([f"number {n}"] + ["fine"] * (n == 1) for n in range(30))
        with one_line("^6 of 37 .* 0.05 "):
            opened(tmp_path, *rows)

    def test_pairs_from_the_web_are_a_split_and_no_picture_of_test_is_in_training(self, tmp_path):
        rows = [{"image": f"./{n}.png", "text": f"web {n}", "web": True} for n in range(99)]
        plain, world = opened(tmp_path, count=60), opened(tmp_path, *rows, count=60)
        assert names(world, "test") == names(plain, "test") and world.has_web > plain.has_web
        assert names(world, "human") == names(plain, "human") == names(plain, "train")
        assert plain.size("web") == 0
        said = {split: [text for i in range(world.size(split)) for text in world.blank(
            split, i)["texts"]] for split in ("train", "test", "web", "human")}
        assert {text.split()[0] for text in said["web"]} == {"web"} and len(said["web"]) > 80
        assert {text.split()[0] for text in said["human"] + said["test"]} == {"number"}
        numbers = {split: {text.split()[1] for text in said[split]} for split in said}
        assert not numbers["test"] & numbers["train"]
        assert len(numbers["web"] & numbers["human"]) > 40, "a picture may have both kinds"
        assert sorted(said["train"]) == sorted(said["web"] + said["human"])
        assert {*world.corpus()} == {*said["train"]}

    def test_the_web_alone_has_no_human_pairs_and_of_both_the_human_ones_are_tested(self, tmp_path):
        rows = [{"image": f"{n}.png", "text": f"web {n}", "web": True} for n in range(20)]
        world = opened(tmp_path, *rows, count=0)
        assert [world.size(split) for split in ("human", "web", "train", "test")] == [0, 15, 15, 5]
        with one_line("data.jsonl: 19 human .* 20 "):
            opened(tmp_path, *rows, count=19)
        assert opened(tmp_path, *rows, count=20).size("human") == 15

    def test_a_link_to_outside_is_refused_when_it_is_opened(self, tmp_path):
        world = opened(tmp_path / "in")
        outside, inside, other = (tmp_path / "in" / name for name in names(world, "train")[:3])
        (tmp_path / "inner.png").write_bytes(picture(3))
        for link, target in ((outside, "../inner.png"), (inside, other.name)):
            link.unlink()
            link.symlink_to(target)
        with one_line(f"in/{outside.name}: "):
            world.record("train", 0)
        assert world.record("train", 1)["images"][0].getpixel((0, 0)) == colour(int(other.stem))

    def test_unreadable_test_pictures_are_left_out_and_counted(self, tmp_path):
        world, strict = (opened(tmp_path, count=60, skip=skip) for skip in (0.05, 0))
        held = names(world, "test")
        (tmp_path / held[1]).write_bytes(b"")
        for _ in range(2):
            found = [record["source"]["source"] for record in all_records(world, "test")]
            assert found == held[:1] + held[2:]
            assert world.refused.count == 1, "counted once, however often they are asked for"
        with one_line(f"1 of {len(held)} "):
            strict.records("test")

    def test_a_picture_in_a_tar_is_refused_by_the_name_of_its_record(self, tmp_path):
        shard(tmp_path / "s.tar", [(f"{n}.{suffix}", b"number %d" % n) for n in range(20)
                                   for suffix in ("jpg", "txt")])
        world = Files("tar", f"{tmp_path}/s.tar", image_size=SIDE)
        with one_line(f"s.tar: {names(world, 'train')[3]}"):
            world.record("train", 3)

    @pytest.mark.parametrize("text, size", [
        (lambda n: [f"w{n}v{k}" for k in range(400)], 512 + 1 + 15 * 401),
        (lambda n: [f"w{n}v{k}" for k in range(700)], 8192),             # words, up to 8192
        (lambda n: ["".join(map(chr, range(0x4e00 + 900 * n, 0x4e00 + 900 * n + 900)))],
         512 + 15 * 900 + len({*"number 0123456789"}))])                 # every letter
    def test_the_vocabulary_has_room_for_words_and_letters(self, tmp_path, text, size):
        rows = [{"image": f"{n}.png", "texts": text(n)} for n in range(20)]
        assert opened(tmp_path, *rows, count=20).vocab_size == pytest.approx(size, abs=3)

    @pytest.mark.parametrize("shuffle", [1, 2, 7, 29, 10_000])
    def test_shards_change_places_and_then_samples_in_a_window(self, tmp_path, shuffle):
        where = shards(tmp_path / "in", (31, 17, 23, 41, 13)).partition(":")[2]
        worlds = [Files("tar", where, image_size=SIDE, shuffle=window) for window in (1, shuffle)]
        sources = [worlds[0].blank("train", i)["source"] for i in range(worlds[0].size("train"))]
        seen = set()
        for seed in range(5):
            plain, order = (world.order(torch.Generator().manual_seed(seed)).tolist()
                            for world in worlds)
            assert sorted(plain) == sorted(order) == list(range(len(sources)))
            runs = [name for name, _ in itertools.groupby(
                sources[index]["images"][0][0] for index in plain)]
            assert len(runs) == 5 and sum(b != a + 1 for a, b in zip(plain, plain[1:])) <= 4
            moved = [abs(place - plain.index(index)) for place, index in enumerate(order)]
            assert min(shuffle / 2 - 1, 50) <= max(moved) < shuffle
            assert sum(m > 0 for m in moved) > len(moved) / 10 or shuffle == 1
            seen |= {tuple(order)}
        assert len(seen) > 3

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_damaged_file_is_read_or_refused_in_one_line_and_nothing_is_written(
            self, tmp_path, kind):
        path = written(tmp_path, kind, 25, bad=(3, 4))
        before, refused = sorted(tmp_path.rglob("*")), []
        for k, data in enumerate(mutations(path.read_bytes(), 100)):
            path.write_bytes(data)
            with limit(5), one_line(maybe=True) as said:
                world = Files(kind, str(path), image_size=SIDE, skip=0.9 if k % 3 else 0.05)
                for record in world.records("test") + world.records("train"):
                    images, texts = parts(record)
                    assert {image.size for image in images} <= {(SIDE, SIDE)}
                    assert images or kind == "llava"
                    assert texts and all(text.strip() for text in texts)
            refused += said
        assert 10 < len(refused) < 90 and sorted(tmp_path.rglob("*")) == before


class TestMakeSplits:
    def test_one_in_twenty_is_held_out_by_its_name_alone_from_5_to_1000(self):
        for count, low, high in ((20, 5, 5), (60, 5, 5), (5000, 200, 300), (40_000, 1000, 1000)):
            entries = [{"source": f"{k}.jpg", "web": False} for k in range(count)]
            entries.append({"source": "\ud800", "web": False})
            splits = make_splits(entries)
            assert low <= len(splits["test"]) <= high, count
            both = sorted(entry["source"] for entry in splits["train"] + splits["test"])
            assert both == sorted(entry["source"] for entry in entries)
        held = {entry["source"] for entry in make_splits(entries[:5000])["test"]}
        more = make_splits(entries[4999::-1] + [{"source": f"more {n}", "web": False}
                                                for n in range(3000)])
        assert held <= {entry["source"] for entry in more["test"]}
