"""Hostile data: a thousand broken inputs, and what may come of each: a record, or one line.

No traceback, no hang, and nothing written but what a run writes into its own folder.
"""
import csv
import functools
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from common.data.batches import Batches, DataSource, open_world, world_tokenizer
from common.data.images import open_image
from common.training import options
from tests.fuzz import limit
from tests.training.runs import SIZES, Command

WORDS = "a red green blue large small dog cat runs sits on the grass hill".split()
NASTY = [None, True, -1, 1.5, 2 ** 63, 10 ** 30, "", " \t\n", "x", "../x.png", "/etc/passwd",
         "a\nb\x1b[2J", "a\0b", "\ud800", "\u200b", "\ufeff", "n" * 5000, "w " * 9000, [], {}, [[]],
         [1, "x"], float("nan"), float("inf"), [["a.png"]], "a.png/", "C:\\x.png", "猫" * 30]
RECORDS = 40


def outcome(function):
    """"fine", or "refused" by a ValueError of one printable line; all else is an error."""
    with limit(5):
        try:
            function()
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            text = str(error)
            assert text.isprintable() and 0 < len(text) < 2000, text
            return "refused"
    return "fine"


def mutated(data, draw):
    """Bytes with bits flipped, cut off, a part repeated, dropped or overwritten, or untouched."""
    at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    to = min(to, at + 200)
    kind = draw.randrange(6)
    if kind == 0:
        data = bytearray(data)
        for _ in range(draw.choice([1, 3, 30])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    return [data, data[:at], data[:to] + data[at:], data[:at] + data[to:],
            data[:at] + draw.choice([b"\0", b"\xff", b"\x7f", b"9"]) * (to - at) + data[to:]][kind - 1]


def saved(picture, form, **more):
    out = io.BytesIO()
    picture.save(out, form, **more)
    return out.getvalue()


@functools.cache
def pictures():
    """One file of every kind, name -> bytes."""
    values = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    plain, exif = Image.fromarray(values), Image.Exif()
    exif[274], exif[305] = 6, "a program"
    palette = plain.quantize(17)
    wide = Image.fromarray((values[..., 0].astype(np.uint16) * 257))
    floats = Image.fromarray(values[..., 0].astype(np.float32) * np.nan)
    frames = {"save_all": True, "append_images": [plain.rotate(180), plain]}
    return {"jpg": saved(plain, "JPEG"), "progressive": saved(plain, "JPEG", progressive=True),
            "cmyk": saved(plain.convert("CMYK"), "JPEG"), "turned": saved(plain, "JPEG", exif=exif),
            "mpo": saved(plain, "MPO", **frames), "png": saved(plain, "PNG"),
            "png exif": saved(plain, "PNG", exif=exif), "png 16": saved(wide, "PNG"),
            "palette": saved(palette, "PNG", transparency=3), "bit": saved(plain.convert("1"), "PNG"),
            "key": saved(plain, "PNG", transparency=(1, 2, 3)), "apng": saved(plain, "PNG", **frames),
            "rgba": saved(plain.convert("RGBA"), "PNG"), "grey": saved(plain.convert("LA"), "PNG"),
            "gif": saved(palette, "GIF", transparency=3), "moving": saved(plain, "GIF", **frames),
            "webp": saved(plain, "WEBP"), "moving webp": saved(plain, "WEBP", **frames),
            "bmp": saved(plain, "BMP"), "ppm": saved(plain, "PPM"), "pgm 16": saved(wide, "PPM"),
            "tiff": saved(plain, "TIFF", compression="tiff_lzw"), "nan": saved(floats, "TIFF"),
            "tiff 16": saved(wide, "TIFF"), "tiff cmyk": saved(plain.convert("CMYK"), "TIFF")}


def rows(draw):
    return [(f"{number:02d}.png", " ".join(draw.choices(WORDS, k=5)) + f" {number}")
            for number in range(RECORDS)]


def spoiled(value, draw):
    """A JSON value with one of its values, wherever it stands, replaced or gone."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copy = draw.choice(keys), value.copy()
        if draw.random() < 0.15:
            del copy[key]
        else:
            copy[key] = spoiled(value[key], draw)
        return copy
    return draw.choice(NASTY)


def coco(draw):
    made = rows(draw)
    data = {"images": [{"id": k, "file_name": name} for k, (name, _) in enumerate(made)],
            "annotations": [{"image_id": k, "caption": text} for k, (_, text) in enumerate(made)]}
    for _ in range(draw.randrange(6)):
        data = spoiled(data, draw) if isinstance(data, dict) else data
    return json.dumps(data).encode()


def jsonl(draw):
    made = [{"image": name, "text": text} for name, text in rows(draw)]
    for _ in range(draw.randrange(6)):
        made = spoiled(made, draw) if isinstance(made, list) and made else made
    deep = "[" * 100_000
    broken = ["{", "nonsense", '{"image": "00.png"}', "[]", "1" * 5000, deep, '{"image":' + deep]
    lines = [json.dumps(row) for row in (made if isinstance(made, list) else [made])]
    lines += draw.sample(broken, draw.randrange(3))
    return "\n".join(lines).encode()


def flickr(draw):
    out, made = io.StringIO(), rows(draw)
    bars = draw.random() < 0.5
    if bars:
        out.write("image_name| comment_number| comment\n")
        out.writelines(f"{name}| {draw.randrange(5)}| {text}\n" for name, text in made)
    else:
        csv.writer(out).writerows([("image", "caption"), *made])
    text = out.getvalue()
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(text))
        nasty = draw.choice(['"', "|", ",", "\r", "\0", "\n", '""', *map(str, NASTY)])
        text = text[:at] + nasty + text[at:]
    return text.encode(draw.choice(["utf-8", "utf-8", "utf-16", "latin-1"]), "replace")


def tar(draw):
    out, odd = io.BytesIO(), set(draw.sample(range(RECORDS), draw.randrange(4)))
    form = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for number, (name, text) in enumerate(rows(draw)):
            for suffix, data in ((".png", pictures()["png"]), (".txt", text.encode())):
                member = tarfile.TarInfo(name[:2] + suffix)
                if number in odd:
                    nasty = draw.choice(["../../out", "/out", "a" * 90, "..", "x\n", "é" * 9, "."])
                    member.name = nasty + draw.choice(["", suffix])
                    member.type = draw.choice([*b"0123456g", *b"LKSx0000"]).to_bytes(1, "big")
                    member.linkname = draw.choice(["", "/etc/passwd", "../x"])
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    data = bytearray(out.getvalue())
    for _ in range(draw.randrange(3)):               # a header with another byte, its sum right
        at = draw.randrange(len(data) // 512) * 512
        place = draw.randrange(at, at + 512)
        data[place] = draw.randrange(256)
        if draw.random() < 0.3:                      # a size in base 256, negative or huge
            data[at + 124:at + 136] = draw.choice([b"\xff", b"\x80"]) + draw.randbytes(11)
        block = bytes(data[at:at + 148]) + b" " * 8 + bytes(data[at + 156:at + 512])
        data[at + 148:at + 156] = b"%06o\0 " % sum(block)
    return bytes(data)


MAKERS = {"coco": coco, "flickr": flickr, "jsonl": jsonl, "tar": tar}


def use(kind, path, folder, draw):
    """All that training asks of files: the index, two batches, the test split, the vocabulary."""
    world = open_world(f"{kind}:{path}", 8, None if kind == "tar" else folder,
                       skip=draw.choice([0.05, 0.9]), shuffle=draw.choice([1, 7, 100]))

    def texts(records, rngs):
        assert all(picture.size == (8, 8) for r in records for picture in r["images"])
        assert all(text.strip() for r in records for text in r["texts"])
        return {"texts": [rng.choice(r["texts"]) for r, rng in zip(records, rngs)]}
    batches = Batches([DataSource(world, texts)], batch_size=3)
    said = [text for step in range(2) for text in batches[step][0]["texts"]]
    said += [text for record in world.records("test") for text in record["texts"]]
    if draw.random() < 0.1:
        assert world_tokenizer(world).batch(said, 11).shape[0] == len(said)


def listing(folder):
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of pictures, of which some are damaged; the process works in an empty one."""
    (tmp_path / "images").mkdir(), (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    draw = random.Random(1)
    for number in range(RECORDS):
        data = draw.choice(list(pictures().values()))
        (tmp_path / f"images/{number:02d}.png").write_bytes(
            data if number % 20 else data[:len(data) // 2])
    return tmp_path / "images"


class TestAThousandInputs:
    def test_pictures(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        draw, kinds, counts = random.Random(0), list(pictures().items()), {"fine": 0, "refused": 0}
        for number in range(500):
            kind, data = kinds[number % len(kinds)]
            data = mutated(data, draw)
            if draw.random() < 0.2:
                data = mutated(data + draw.choice(kinds)[1], draw)
            (tmp_path / "picture").write_bytes(data)
            source = [data, tmp_path / "picture"][number % 2]

            def opened():
                picture = open_image(source, f"number {number}")
                assert picture.mode == "RGB" and min(picture.size) > 0, kind
            counts[outcome(opened)] += 1
        assert min(counts.values()) > 100
        assert [path.name for path in tmp_path.iterdir()] == ["picture"]

    @pytest.mark.parametrize("kind", MAKERS)
    def test_files_of_records(self, tmp_path, images, kind):
        draw, counts = random.Random(kind), {"fine": 0, "refused": 0}
        path = tmp_path / "data"
        path.write_bytes(b"")
        before = listing(tmp_path)
        for number in range(125):
            data = MAKERS[kind](draw)
            if draw.random() < 0.4:
                data = mutated(data, draw)
            if draw.random() < 0.03:
                data = gzip.compress(data)
            path.write_bytes(data)
            counts[outcome(lambda: use(kind, path, images, draw))] += 1
        assert min(counts.values()) > 12, counts
        after = listing(tmp_path)
        assert {**after, path: 0} == {**before, path: 0}


class TestTheCommandLine:
    """What a person sees: one line that says what is wrong, exit status 2, and no run folder."""

    @pytest.fixture
    def data(self, tmp_path):
        for number in range(RECORDS):
            (tmp_path / f"{number:02d}.png").write_bytes(pictures()["png"])
        lines = [json.dumps({"image": name, "text": text}) for name, text in rows(random.Random(0))]
        (tmp_path / "good.jsonl").write_text("\n".join(lines))
        (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n{" * 9)
        (tmp_path / "empty.jsonl").write_bytes(b"")
        (tmp_path / "few.jsonl").write_text("\n".join(lines[:9]))
        (tmp_path / "deep.json").write_text("[" * 100_000)
        (tmp_path / "names.csv").write_text("picture;words\n")
        (tmp_path / "not.tar").write_bytes(b"\x1f\x8b" * 5000)
        os.mkfifo(tmp_path / "pipe")
        return tmp_path

    @pytest.mark.parametrize("spec, words", [
        ("jsonl:missing.jsonl", "missing.jsonl: no such file"),
        ("jsonl:.", "a folder, not a file"),
        ("jsonl:pipe", "pipe: a pipe or a device, not a file"),
        ("jsonl:/dev/zero", "/dev/zero: a pipe or a device, not a file"),
        ("jsonl:empty.jsonl", "empty.jsonl: 0 usable records, at least 20 are needed"),
        ("jsonl:few.jsonl", "few.jsonl: 9 usable records"),
        ("jsonl:broken.jsonl", r"9 of 49 records refused, e.g. .*broken.jsonl: line 41: not readable"),
        ("jsonl:not.tar", "line 1: not readable JSON"),
        ("coco:deep.json", "deep.json: not readable JSON"),
        ("coco:good.jsonl", "good.jsonl: not readable JSON"),
        ("flickr:names.csv", "names.csv: its first line names neither"),
        ("tar:not.tar", "not.tar: 0 usable records"),
        ("tar:{00000..99999}{0..9}.tar", "000000.tar: no such tar file"),
        ("tar:{0..3}.tar", "0.tar: no such tar file"), ("tar:*.tgz", "[*].tgz: no such tar file"),
        ("jsonl:good.jsonl --images missing", "--images missing: no such folder"),
        ("tar:good.tar --images .", "--images .: a tar holds its own pictures"),
        ("jsonl:good.jsonl --shuffle 0", "--shuffle 0: must be at least 1"),
        ("jsonl:good.jsonl --skip 1", "--skip 1.0: a fraction"),
        ("shapes --images .", "shapes draws its own pictures")])
    def test_a_mistake_in_the_data_is_one_line(self, data, monkeypatch, capsys, spec, words):
        monkeypatch.chdir(data)
        monkeypatch.setattr(sys, "argv", ["train.py", "clip", "--data", *spec.split(), "--steps",
                                          "1", "--batch_size", "3", "--runs", "made"])
        with limit(10), pytest.raises(SystemExit, match="2"):
            options.run_main(train.main)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("error: "), err
        assert re.search(words, err), err
        assert not (data / "made").exists()

    def test_the_real_command_says_the_same(self, data):
        command = [sys.executable, str(Path(train.__file__)), "clip", "--data", "jsonl:pipe"]
        done = subprocess.run(command, cwd=data, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: --data jsonl:pipe: pipe: a pipe or a device, not a file\n"

    def test_a_run_with_a_little_damage_trains_and_writes_into_its_folder_alone(self, data):
        (data / "03.png").unlink(), (data / "04.png").write_bytes(b"")
        before = listing(data)
        argv = ["clip", "--data", f"jsonl:{data / 'good.jsonl'}", "--batch_size", "5", "--steps",
                "9", "--out", str(data / "run")]
        argv += [word for size in SIZES for word in ("--set", size)]
        Command(argv, data / "said.txt").end()
        after = {path: seen for path, seen in listing(data).items()
                 if data / "run" not in path.parents and path.name != "said.txt"}
        assert after == before
        assert 0 < json.loads((data / "run/result.json").read_text())["refused"] < 9
