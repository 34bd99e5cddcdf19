"""The user's own data: each format by a tiny example, the splits, the order, what is refused."""
import csv
import itertools
import json
import os
import random
import re
import tarfile

import pytest
import torch
from PIL import Image

from common.data.batches import Batches, DataSource, open_world, world_tokenizer
from common.data.files import shards as tar_files
from common.data.files import FORMATS, Files, Refusals, all_records, make_splits, usable_text
from tests.fuzz import limit, one_line
from tests.helpers import colour, listed, names, picture, shard, shards

SIDE = 7


def found(kind, path):
    """(records, refusals) of a generator."""
    refused = []
    return list(FORMATS[kind](str(path), refused.append)), refused


class TestCoco:
    def test_annotations_are_joined_to_their_picture_by_id(self, tmp_path):
        data = {"images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"},
                           {"id": 5, "file_name": "c.jpg"}],
                "annotations": [{"id": 3, "image_id": 3, "caption": "an a"},
                                {"id": 7, "image_id": 7, "caption": "a b"},
                                {"id": 5, "image_id": 3, "caption": "again"}]}
        (tmp_path / "c.json").write_text(json.dumps(data))
        assert found("coco", tmp_path / "c.json") == ([
            {"images": ["b.jpg"], "texts": ["a b"], "source": "b.jpg"},
            {"images": ["a.jpg"], "texts": ["an a", "again"], "source": "a.jpg"},
            {"images": ["c.jpg"], "texts": [], "source": "c.jpg"}], [])

    def test_what_cannot_be_joined_is_refused_alone(self, tmp_path):
        data = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, {"id": [3]}, 4],
                "annotations": [{"image_id": 1, "caption": "an a"}, {"image_id": 1}, "words",
                                {"image_id": {}, "caption": "x"}, {"image_id": 9, "caption": "x"}]}
        (tmp_path / "c.json").write_text(json.dumps(data))
        records, refused = found("coco", tmp_path / "c.json")
        assert [record["texts"] for record in records] == [["an a"]]
        assert len(refused) == 6 and "image 2: no usable 'id'" in refused[-2]

    @pytest.mark.parametrize("text, words", [
        ("", "not readable JSON"), ("[]", "a JSON object was expected"), ('{"images": []}', "not COCO"),
        ('{"images": [], "annotations": 3}', "not COCO"), ("[" * 100_000, "not readable JSON"),
        ("1" * 5000, "not readable JSON"), ("\xff", "not readable JSON")])
    def test_another_file_is_refused_in_one_line(self, tmp_path, text, words):
        (tmp_path / "c.json").write_text(text, encoding="latin-1")
        with one_line(f"c.json: {words}"):
            found("coco", tmp_path / "c.json")


class TestFlickr:
    def test_of_30k_with_bars_and_quotes_that_mean_nothing(self, tmp_path):
        (tmp_path / "results.csv").write_text(
            'image_name| comment_number| comment\na.jpg| 0| A "dog , runs .\n'
            "b.jpg| 0|\" Two cats .\nc.jpg| 4   the missing bar\na.jpg| 1| A brown dog .\n"
            "c.jpg| 0| one | bar too many\n")
        records, refused = found("flickr", tmp_path / "results.csv")
        assert records == [
            {"images": ["a.jpg"], "texts": [' A "dog , runs .'], "source": "a.jpg"},
            {"images": ["b.jpg"], "texts": ['" Two cats .'], "source": "b.jpg"},
            {"images": ["a.jpg"], "texts": [" A brown dog ."], "source": "a.jpg"}]
        assert len(refused) == 2 and "line 6: more than 3 cells" in refused[1]
        assert "line 4: no usable 'comment'" in refused[0]

    def test_of_8k_with_commas_in_quotes(self, tmp_path):
        with open(tmp_path / "captions.txt", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), ("a.jpg", 'a "dog", brown'),
                                        ("b.jpg", "cats"), ("a.jpg", "a dog\nruns")])
        assert found("flickr", tmp_path / "captions.txt") == ([
            {"images": ["a.jpg"], "texts": ['a "dog", brown'], "source": "a.jpg"},
            {"images": ["b.jpg"], "texts": ["cats"], "source": "b.jpg"},
            {"images": ["a.jpg"], "texts": ["a dog\nruns"], "source": "a.jpg"}], [])

    def test_other_line_ends_and_a_byte_order_mark_change_nothing(self, tmp_path):
        for end in ("\r\n", "\r"):
            text = end.join(["\ufeffimage,caption", "a.jpg,one", '"b.jpg","two, three"', ""])
            (tmp_path / "c.csv").write_bytes(text.encode())
            records, refused = found("flickr", tmp_path / "c.csv")
            assert [r["texts"] for r in records] == [["one"], ["two, three"]] and not refused

    def test_an_endless_quote_and_an_odd_byte_cost_what_they_touch(self, tmp_path):
        rows = [b"image,caption", b"a.jpg,one", b"b.jpg,\xff", b'c.jpg,"' + b"x" * 200_000,
                b'd.jpg,two', b"e.jpg,three"]
        (tmp_path / "c.csv").write_bytes(b"\n".join(rows))
        records, refused = found("flickr", tmp_path / "c.csv")
        assert [r["source"] for r in records] == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
        assert len(refused) == 1 and "line 4: field larger" in refused[0]
        with pytest.raises(UnicodeError):                # which Files refuses as not UTF-8
            usable_text(records[1]["texts"][0])


class TestJsonLines:
    def test_one_text_or_several_under_either_name(self, tmp_path):
        rows = [{"image": "a.jpg", "text": "one"}, {"image": "b.jpg", "caption": "two"},
                {"image": "c.jpg", "texts": ["three", "four"], "more": None},
                {"images": ["d.jpg", "e.jpg"], "captions": "five"}]
        text = "\ufeff" + "\n\n".join(map(json.dumps, rows))
        (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
        assert found("jsonl", tmp_path / "c.jsonl") == ([
            {"images": ["a.jpg"], "texts": ["one"], "source": "a.jpg"},
            {"images": ["b.jpg"], "texts": ["two"], "source": "b.jpg"},
            {"images": ["c.jpg"], "texts": ["three", "four"], "source": "c.jpg"},
            {"images": ["d.jpg", "e.jpg"], "texts": ["five"], "source": "d.jpg"}], [])

    def test_broken_lines_are_refused_by_their_number(self, tmp_path):
        long = b'{"image": "' + b"x" * 2_500_000 + b'"}'
        rows = [b'{"image": "a.jpg", "text": "one"}', b'{"image": "a.jpg"', b"[]", b"\xff\xfe",
                b'{"image": 3, "text": "x"}', b'{"image": "b.jpg"}', b"[" * 100_000, long,
                b'{"image": "c.jpg", "text": "two"}']
        (tmp_path / "c.jsonl").write_bytes(b"\n".join(rows))
        records, refused = found("jsonl", tmp_path / "c.jsonl")
        assert [record["source"] for record in records] == ["a.jpg", "c.jpg"]
        assert [int(re.search(r"line (\d)", r)[1]) for r in refused] == [2, 3, 4, 5, 6, 7, 8]


class TestTar:
    def test_members_of_one_name_are_a_record_and_are_found_where_they_lie(self, tmp_path):
        shard(tmp_path / "s.tar", [
            ("a/1.jpg", picture(1)), ("a/1.json", b'{"caption": "wrong"}'), ("a/1.txt", b"one"),
            ("2.seg.png", b"not the picture"), ("2.PNG", picture(2)),
            ("2.json", b'{"caption": "two", "width": 9}'), ("b/1.txt", "drei ü".encode()),
            ("b/1.webp", picture(3)), ("2.cls", b"77"), ("2.JSON", b"the first counts")])
        records, refused = found("tar", tmp_path / "s.tar")
        assert [(r["texts"], r["source"]) for r in records] == [
            (["one"], "s.tar/a/1"), (["two"], "s.tar/2"), (["drei ü"], "s.tar/b/1")]
        assert refused == []
        for number, record in enumerate(records, 1):
            (path, offset, size), = record["images"]
            assert (tmp_path / "s.tar").read_bytes()[offset:offset + size] == picture(number)

    def test_long_names_and_every_kind_of_tar(self, tmp_path):
        name = "folder/" + "n" * 150
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            shard(tmp_path / "s.tar", [(name + ".jpg", picture(1)), (name + ".txt", b"one")], form)
            (record,), refused = found("tar", tmp_path / "s.tar")
            assert record["source"] == f"s.tar/{name}" and refused == []

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                                      tarfile.FIFOTYPE])
    def test_only_plain_files_inside_the_tar_count(self, tmp_path, kind):
        shard(tmp_path / "s.tar", [("a.jpg", picture(1)), ("a.txt", b"one"), ("x.jpg", kind),
                                   ("../y.txt", kind), ("b.jpg", picture(1)), ("b.txt", b"two")])
        records, refused = found("tar", tmp_path / "s.tar")
        assert [r["source"] for r in records] == ["s.tar/a", "s.tar/b"] and not refused

    def test_a_record_without_its_picture_or_text_is_refused_too(self, tmp_path):
        members = [(f"{n}.{s}", d) for n in range(30) for s, d in (("jpg", picture(n)),
                                                                   ("txt", b"words %d" % n))]
        members += [("x.jpg", tarfile.SYMTYPE), ("x.txt", b"linked"), ("y.jpg", picture(3)),
                    ("y.txt", tarfile.SYMTYPE)]
        shard(tmp_path / "s.tar", members)
        world = open_world(f"tar:{tmp_path / 's.tar'}", SIDE)
        assert (world.refused.count, world.tried) == (2, 32)
        assert "s.tar/x: no picture" in world.refused.reasons[0]
        assert "s.tar/y: no caption" in world.refused.reasons[1]
        assert {len(world.blank(s, i)["images"]) for s in ("train", "test")
                for i in range(world.size(s))} == {1}

    @pytest.mark.parametrize("members, words", [
        ([("1.json", b"{}")], "caption"),
        ([("1.json", b"{{")], "not readable JSON"), ([("1.txt", b"\xff\xfe")], "not UTF-8")],
        ids=lambda value: value if isinstance(value, str) else "")
    def test_an_incomplete_record_is_refused_alone(self, tmp_path, members, words):
        shard(tmp_path / "s.tar", [("1.jpg", picture(1)), *members, ("2.jpg", picture(2)),
                                   ("2.txt", b"two")])
        records, refused = found("tar", tmp_path / "s.tar")
        assert [r["texts"] for r in records] == [["two"]]
        assert len(refused) == 1 and words in refused[0]

    def test_of_a_damaged_shard_what_comes_before_the_damage_is_kept(self, tmp_path):
        shards(tmp_path, [9])
        whole = (tmp_path / "00.tar").read_bytes()
        with tarfile.open(tmp_path / "00.tar") as archive:
            starts = {member.name: member.offset for member in archive}
        at = starts["00004.jpg"]
        damaged = {"cut in a header": whole[:at + 100], "a header of noise":
                   whole[:at] + b"x" * 512 + whole[at + 512:], "cut in a text":
                   whole[:starts["00004.txt"] + 515]}
        for kind, data in damaged.items():
            (tmp_path / "00.tar").write_bytes(data)
            records, refused = found("tar", tmp_path / "00.tar")
            texts = [r["texts"] for r in records if r["texts"]]
            assert texts == [[f"number {n}"] for n in range(4)], kind
            assert refused and "00.tar" in refused[0], kind
        (tmp_path / "00.tar").write_bytes(whole[:at])     # without an end, but nothing is missing
        records, refused = found("tar", tmp_path / "00.tar")
        assert len(records) == 4 and refused == []

    def test_a_picture_that_is_cut_off_is_no_record(self, tmp_path):
        shard(tmp_path / "s.tar", [("1.txt", b"one"), ("1.jpg", picture(1)), ("2.txt", b"two"),
                                   ("2.jpg", picture(2))])
        whole = (tmp_path / "s.tar").read_bytes()
        (tmp_path / "s.tar").write_bytes(whole[:whole.rindex(b"IEND") - 9])
        records, refused = found("tar", tmp_path / "s.tar")
        assert [r["texts"] for r in records if r["images"]] == [["one"]]
        assert any("2.jpg is cut off" in reason for reason in refused)

    @pytest.mark.parametrize("size", [2 ** 60, -512])
    def test_a_header_of_absurd_size_costs_the_rest_of_its_shard(self, tmp_path, size):
        spec = shards(tmp_path, [2])
        header = bytearray(tarfile.TarInfo("x").tobuf())
        header[156:157] = tarfile.XHDTYPE
        header[124:136] = b"\x80" + size.to_bytes(11, "big") if size > 0 \
            else size.to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "01.tar").write_bytes(bytes(header) + b"x" * 2048)
        records, refused = found("tar", spec.partition(":")[2])
        assert len(records) == 2 and len(refused) == 1 and "01.tar: not a tar file" in refused[0]

    def test_headers_in_headers_and_folders_cost_one_shard(self, tmp_path):
        spec = shards(tmp_path, [2])
        (tmp_path / "01.tar").mkdir()
        name = tarfile.TarInfo("long")
        name.type, name.size = tarfile.GNUTYPE_LONGNAME, 512
        (tmp_path / "02.tar").write_bytes((name.tobuf() + b"a" * 512) * 3000)
        records, refused = found("tar", spec.partition(":")[2])
        assert len(records) == 2
        assert [reason.split(":")[0][-6:] for reason in refused] == ["01.tar", "02.tar"]

    def test_a_size_that_goes_backwards_does_not_go_round_for_ever(self, tmp_path):
        shards(tmp_path, [3])
        data = bytearray((tmp_path / "00.tar").read_bytes())
        with tarfile.open(tmp_path / "00.tar") as archive:
            at = archive.getmembers()[2].offset
        data[at + 124:at + 136] = (-512).to_bytes(12, "big", signed=True)
        data[at + 148:at + 156] = b" " * 8
        data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
        (tmp_path / "00.tar").write_bytes(data)
        with limit(5):
            records, refused = found("tar", tmp_path / "00.tar")
        assert len(records) == 1 and refused

    def test_braces_stand_for_numbers(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for pattern, names in (("a-{08..11}.tar", "a-08.tar a-09.tar a-10.tar a-11.tar"),
                               ("{1..2}-{3..4}", "1-3 1-4 2-3 2-4"), ("plain{}", "plain{}")):
            for name in names.split():
                (tmp_path / name).write_bytes(b"")
            assert tar_files(pattern) == names.split()
        assert tar_files("*{3..4}") == ["1-3", "2-3", "1-4", "2-4"]
        with limit(5), one_line("/0: no such tar file"):         # at once, of many names
            found("tar", tmp_path / "{0..99999999999}")
        with one_line("0 usable records"):
            open_world(f"tar:{tmp_path}/{{5..4}}", SIDE)

    def test_braces_and_stars_choose_shards(self, tmp_path):
        spec = shards(tmp_path, [2, 3, 2])
        for pattern, count in (("*.tar", 7), ("{00..01}.tar", 5), ("0[12].tar", 5), ("01.tar", 3)):
            assert len(found("tar", tmp_path / pattern)[0]) == count
        assert spec.endswith("*.tar")
        with pytest.raises(ValueError, match="03.tar: no such tar file"):
            found("tar", tmp_path / "{00..03}.tar")


class TestRefusals:
    def test_it_stops_past_the_fraction_of_at_least_a_hundred(self):
        for tried, most in ((7, 5), (100, 5), (101, 5), (119, 5), (120, 6), (1000, 50)):
            refused = Refusals(0.05)
            refused.count = most
            refused.check(tried)
            refused.add("why")
            with one_line(f"^{most + 1} of {tried:,} records refused, e.g. why: "
                          "more than --skip 0.05 allows$"):
                refused.check(tried)
        Refusals(0).check(7)

    def test_reasons_are_lines_and_not_endless(self):
        refused = Refusals(0.5)
        for number in range(3000):
            refused.add(f"{number}\n\x1b[2J\ud800" + "x" * 9999)
        assert refused.count == 3000 and [r[:2] for r in refused.reasons] == ["0?", "1?", "2?"]
        assert all(r.isprintable() and len(r) < 600 for r in refused.reasons)


class TestFiles:
    def test_a_record_has_its_picture_its_texts_and_its_entry(self, tmp_path):
        world = open_world(listed(tmp_path / "a", 40), SIDE)
        for split in ("train", "test"):
            for index in range(world.size(split)):
                record = world.record(split, index)
                number = int(record["texts"][0].split()[1])
                assert record["images"][0].size == (SIDE, SIDE)
                assert record["images"][0].getpixel((3, 3)) == colour(number)
                assert world.is_true(f"number {number}", record["source"])
                assert not world.is_true(f"number {number + 1}", record["source"])

    def test_every_format_opens_the_same_pictures(self, tmp_path):
        listed(tmp_path, 40)
        rows = [(f"{n}.png", f"number {n}") for n in range(40)]
        (tmp_path / "c.json").write_text(json.dumps({
            "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(rows)],
            "annotations": [{"image_id": n, "caption": t} for n, (_, t) in enumerate(rows)]}))
        with open(tmp_path / "c.csv", "w") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
        shard(tmp_path / "c.tar", [(f"{n}.{s}", d) for n in range(40)
                                   for s, d in (("png", picture(n)), ("txt", rows[n][1].encode()))])
        for spec in ("coco:c.json", "flickr:c.csv", "jsonl:data.jsonl", "tar:c.tar"):
            kind, name = spec.split(":")
            world = open_world(f"{kind}:{tmp_path / name}", SIDE)
            assert (world.size("train"), world.size("test"), world.name) == (35, 5, name)
            said = {r["texts"][0]: r["images"][0].getpixel((0, 0))
                    for split in ("train", "test") for r in all_records(world, split)}
            assert said == {f"number {n}": colour(n) for n in range(40)}, spec

    def test_the_folder_of_pictures_is_the_files_own_or_the_one_named(self, tmp_path):
        spec = listed(tmp_path / "pictures", 20)
        (tmp_path / "pictures/data.jsonl").rename(tmp_path / "data.jsonl")
        spec = f"jsonl:{tmp_path / 'data.jsonl'}"
        with pytest.raises(ValueError, match="no such picture"):
            open_world(spec, SIDE).record("train", 0)
        open_world(spec, SIDE, str(tmp_path / "pictures")).record("train", 0)

    def test_one_in_twenty_is_held_out_by_its_name_alone(self, tmp_path):
        assert {n: len(make_splits([{"source": f"{k}.jpg"} for k in range(n)])["test"])
                for n in (20, 60, 40_000)} == {20: 5, 60: 5, 40_000: 1000}
        entries = [{"source": f"{number}.jpg"} for number in range(5000)]
        splits = make_splits(entries)
        assert 200 < len(splits["test"]) < 300
        assert splits["train"] + splits["test"] != entries
        assert sorted(e["source"] for e in splits["train"] + splits["test"]) \
            == sorted(e["source"] for e in entries)
        held = {entry["source"] for entry in splits["test"]}
        more = make_splits(entries[::-1] + [{"source": f"more {n}"} for n in range(3000)])
        assert held <= {entry["source"] for entry in more["test"]}

    def test_no_test_picture_or_sentence_reaches_training_or_vocabulary(self, tmp_path):
        spec = listed(tmp_path, 60)
        more = [{"image": f"./{n}.png", "texts": [f"again {n}", f"number {n}"]} for n in range(60)]
        with open(tmp_path / "data.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in more)
        world = open_world(spec, SIDE)
        assert world.size("train") + world.size("test") == 60    # one record for each picture
        assert not set(names(world, "train")) & set(names(world, "test"))
        held = {text for record in world.records("test") for text in record["texts"]}
        assert len(held) == 2 * world.size("test")
        assert {len(r["texts"]) for r in world.records("test")} == {2}       # none of them twice
        corpus = set(world.corpus())
        assert not held & corpus and len(corpus) == 2 * world.size("train")
        batches = Batches([DataSource(world, lambda records, rngs: {
            "t": [r["texts"] for r in records]})], batch_size=11, seed=4)
        said = {text for step in range(15) for texts in batches[step][0]["t"] for text in texts}
        assert said == corpus

    def test_training_cuts_at_random_and_measuring_in_the_middle(self, tmp_path):
        spec = listed(tmp_path, 20)
        ramp = Image.linear_gradient("L").resize((40, 120)).convert("RGB")
        for number in range(20):
            ramp.save(tmp_path / f"{number}.png")
        world = open_world(spec, SIDE)

        def middle(*arguments):
            return world.record(*arguments)["images"][0].getpixel((3, 3))[0]
        rng = random.Random(0)
        drawn = [middle("train", 0, rng) for _ in range(30)]
        assert min(drawn) < 80 and max(drawn) > 170
        assert middle("train", 0) == middle("test", 0) == middle("test", 0, rng) \
            == pytest.approx(127, abs=3)

    @pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "",
                                      "C:\\a.png", "."])
    def test_a_name_that_points_outside_is_refused_at_the_start(self, tmp_path, name):
        spec = listed(tmp_path, 30)
        with open(tmp_path / "data.jsonl", "a") as file:
            file.write(json.dumps({"image": name, "text": "x"}) + "\n")
        world = open_world(spec, SIDE)
        assert (world.refused.count, world.tried) == (1, 31)
        with pytest.raises(ValueError, match="^--data .*1 of 31 records refused"):
            open_world(spec, SIDE, skip=0)

    def test_a_link_to_outside_is_refused_when_it_is_opened(self, tmp_path):
        spec = listed(tmp_path / "inner", 20)
        (tmp_path / "secret.png").write_bytes(picture(3))
        for number in range(20):
            (tmp_path / f"inner/{number}.png").unlink()
            os.symlink(tmp_path / "secret.png", tmp_path / f"inner/{number}.png")
        with pytest.raises(ValueError, match="a link to outside the folder of pictures"):
            open_world(spec, SIDE).record("train", 0)
        open_world(spec, SIDE, str(tmp_path / "inner"))
        (tmp_path / "inner/deeper").mkdir()
        (tmp_path / "inner/deeper/x.png").write_bytes(picture(3))
        (tmp_path / "inner/0.png").unlink()
        os.symlink("deeper/x.png", tmp_path / "inner/0.png")       # a link inside is as good
        world = open_world(spec, SIDE)
        split, index = next((s, names(world, s).index("0.png")) for s in ("train", "test")
                            if "0.png" in names(world, s))
        assert world.record(split, index)["images"][0].getpixel((0, 0)) == colour(3)

    @pytest.mark.parametrize("text", ["", "  \n", None, 7, "\ud800", "half a pair \ud800"])
    def test_captions_that_say_nothing_are_refused(self, tmp_path, text):
        spec = listed(tmp_path, 30)
        with open(tmp_path / "data.jsonl", "a") as file:
            file.write(json.dumps({"image": "0.png", "texts": [text, " fine "]}) + "\n")
        world = open_world(spec, SIDE)
        assert world.refused.count == 1
        said = [world.blank(s, i)["texts"] for s in ("train", "test") for i in range(world.size(s))]
        assert ["number 0", "fine"] in said

    @pytest.mark.parametrize("bad, stops", [(5, False), (6, True)])
    def test_too_many_refused_at_the_start_are_one_line(self, tmp_path, bad, stops):
        spec = listed(tmp_path, 30)
        with open(tmp_path / "data.jsonl", "a") as file:
            file.write("{\n" * bad)
        if not stops:
            assert open_world(spec, SIDE).refused.count == bad
            return
        with pytest.raises(ValueError, match="6 of 36 records refused, e.g. .*line 31: not readable JSON"):
            open_world(spec, SIDE)

    def test_too_few_records_are_one_line(self, tmp_path):
        with pytest.raises(ValueError, match="19 usable records, at least 20 are needed"):
            open_world(listed(tmp_path, 19), SIDE)
        open_world(listed(tmp_path, 20), SIDE)

    def test_unreadable_test_pictures_are_left_out_and_counted(self, tmp_path):
        spec = listed(tmp_path, 60)
        held = names(open_world(spec, SIDE), "test")
        (tmp_path / held[1]).write_bytes(b"")
        world = open_world(spec, SIDE)
        assert [r["source"]["source"] for r in world.records("test")] == held[:1] + held[2:]
        assert world.records("test") and world.refused.count == 1
        with pytest.raises(ValueError, match=f"1 of {len(held)} records refused"):
            open_world(spec, SIDE, skip=0).records("test")
        for name in held[1:]:
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="no two of them readable in test"):
            open_world(spec, SIDE, skip=0.9).records("test")

    def test_any_script_has_a_vocabulary(self, tmp_path):
        spec = listed(tmp_path, 20)
        rows = [{"image": f"{n}.png", "text": "".join(map(chr, range(0x4e00 + 500 * n,
                 0x4e00 + 500 * n + 500)))} for n in range(20)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        world = open_world(spec, SIDE)
        tokenizer = world_tokenizer(world)
        assert world.vocab_size >= 512 + 500 * world.size("train")
        text = next(iter(world.corpus()))
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_world_that_nobody_can_read_aloud_is_one_line(self, tmp_path):
        rows = [{"image": f"{n}.png", "text": "\u2581" * (n + 1)} for n in range(20)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        world = open_world(f"jsonl:{tmp_path}/data.jsonl", SIDE)
        with pytest.raises(ValueError, match="data.jsonl: no vocabulary can be made of its texts"):
            world_tokenizer(world)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("order") / "shards", (31, 17, 23, 41, 13))


class TestOrder:
    def order(self, spec, shuffle, seed=0):
        world = open_world(spec, SIDE, shuffle=shuffle)
        order = world.order(torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(world.size("train")))
        return world, order.tolist()

    def where(self, world, order):
        """The shard of each sample in an order."""
        return [world.blank("train", index)["source"]["images"][0][0][-6:-4] for index in order]

    def test_without_a_window_whole_shards_change_places(self, spec):
        world, order = self.order(spec, 1)
        runs = [(shard, len(list(run))) for shard, run in itertools.groupby(
            self.where(world, order))]
        assert len(runs) == 5 and [shard for shard, _ in runs] != sorted(s for s, _ in runs)
        for _, run in itertools.groupby(order, key=lambda i: self.where(world, [i])):
            run = list(run)
            assert run == list(range(run[0], run[0] + len(run)))
        assert self.order(spec, 1, seed=1)[1] != order

    @pytest.mark.parametrize("shuffle", [2, 7, 29])
    def test_in_a_window_no_sample_moves_further(self, spec, shuffle):
        for seed in range(5):
            world, plain = self.order(spec, 1, seed)
            _, order = self.order(spec, shuffle, seed)
            moved = [abs(place - plain.index(index)) for place, index in enumerate(order)]
            assert max(moved) < shuffle and sum(m > 0 for m in moved) > len(moved) / 10
        if shuffle == 29:
            assert max(moved) > 14

    def test_a_window_as_large_as_the_data_is_any_order(self, spec):
        world, order = self.order(spec, 10_000)
        want = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        assert order == want.tolist()

    def test_other_formats_are_permuted_whole(self, tmp_path):
        world = open_world(listed(tmp_path, 40), SIDE, shuffle=1)
        want = torch.randperm(35, generator=torch.Generator().manual_seed(3))
        assert torch.equal(world.order(torch.Generator().manual_seed(3)), want)

    def steps(self, spec, start=0, stop=40, workers=0, ranks=1):
        """What all processes read in each step, in their order."""
        def told(records, rngs):
            return {"said": [r["texts"][0] for r in records], "drawn": [g.random() for g in rngs],
                    "images": torch.tensor([r["images"][0].getpixel((0, 0)) for r in records])}
        world = open_world(spec, SIDE, shuffle=9)
        loaders = [Batches([DataSource(world, told)], batch_size=6, seed=5, rank=rank,
                           world_size=ranks).loader(start, stop, workers) for rank in range(ranks)]
        return [[(said, drawn, tuple(image)) for part in parts for batch in part for
                 said, drawn, image in zip(batch["said"], batch["drawn"], batch["images"].tolist())]
                for parts in zip(*loaders)]

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    def test_workers_and_processes_and_a_later_start_change_nothing(self, spec):
        alone = self.steps(spec)
        assert alone == self.steps(spec, workers=1) == self.steps(spec, workers=3)
        assert alone == self.steps(spec, ranks=2) == self.steps(spec, ranks=3)
        assert alone[23:31] == self.steps(spec, 23, 31) == self.steps(spec, 23, 31, workers=2)
        said = [text for step in alone[:19] for text, _, _ in step]
        assert len(set(said)) == len(said) == 114                # 6 * 19 of 119 in an epoch
        assert alone[:19] != alone[19:38]

    def test_the_order_of_an_epoch_is_made_once(self, spec, monkeypatch):
        world, made = open_world(spec, SIDE), []
        batches = Batches([DataSource(world, lambda records, rngs: {})], batch_size=6)
        order = Files.order
        monkeypatch.setattr(Files, "order", lambda self, drawn: made.append(1) or order(self, drawn))
        for step in range(38):
            batches.keys(0, step)
        assert len(made) == 2
