"""The emoji world: the archive, the splits, the records, what is true of an emoji."""
import hashlib
import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.emoji import build as build_emoji, world as emoji
from common.data.emoji.world import Emoji

WORLDS = Path(emoji.__file__).parent
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}


@pytest.fixture(scope="module")
def world():
    return Emoji()


@pytest.fixture(scope="module")
def archive():
    return zipfile.ZipFile(WORLDS / "emoji.zip")


@pytest.fixture(scope="module")
def train_texts(world):
    drawn = random.Random(7)
    varied = (text for i in range(0, world.size("train"), 2)
              for text in world._captions(world.entries[world._splits["train"][i]], drawn))
    return {*world.corpus(), *varied}


def entries_of(world, split):
    return [world.entries[number] for number in world._splits[split]]


def named(world, name):
    return next(entry for entry in world.entries if entry["name"] == name)


def statements(entry):
    return {template.format(name) for template in Emoji.templates
            for name in (entry["name"], entry["phrase"])}


# The archive

def test_archive_is_small_flat_and_reproducible(archive):
    assert (WORLDS / "emoji.zip").stat().st_size < 6_000_000
    assert sum(info.file_size for info in archive.infolist()) < 8_000_000
    for info in archive.infolist():
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
        parts = info.filename.split("/")
        assert ".." not in parts and "" not in parts and "\\" not in info.filename
        assert len(parts) == 1 or parts[0] == "licences"
        if info.filename.endswith(".png"):
            assert info.compress_type == zipfile.ZIP_STORED
    assert archive.testzip() is None


def test_every_picture_is_64_pixels_and_unlike_all_others(world, archive):
    seen = {}
    for number, entry in enumerate(world.entries):
        with Image.open(io.BytesIO(archive.read(entry["file"]))) as picture:
            assert picture.size == (64, 64) and picture.format == "PNG", entry["name"]
        pixels = world._plain(number, 64).tobytes()
        assert pixels not in seen, (entry["name"], seen[pixels])
        assert min(pixels) < 250, entry["name"]                    # something is there
        seen[pixels] = entry["name"]
    pictures = {name for name in archive.namelist() if name.endswith(".png")}
    assert pictures == {entry["file"] for entry in world.entries}


def test_licences_lie_inside_and_beside(archive):
    inside = "".join(archive.read(name).decode() for name in archive.namelist()
                     if name.startswith("licences/"))
    beside = (WORLDS / "LICENSES-emoji.txt").read_text(encoding="utf-8")
    for text in (inside, beside):
        for phrase in ("SIL OPEN FONT LICENSE Version 1.1", "Apache License",
                       "Version 2.0, January 2004", "COPYRIGHT AND PERMISSION NOTICE",
                       "Unicode, Inc.", "Google Inc."):
            assert phrase in text, phrase


def test_index(archive, world):
    index = json.loads(archive.read("index.json"))
    assert 3500 < len(index) < 4000
    for field in ("name", "phrase", "file", "codepoints"):
        assert len({entry[field] for entry in index}) == len(index), field
    for entry in index:
        assert set(entry) == {"file", "codepoints", "name", "phrase", "keywords", "group",
                              "subgroup", "base", "tones"}
        assert {TONES[c] for c in entry["codepoints"].split() if c in TONES} == set(entry["tones"])
        assert "; " not in entry["name"] and entry["name"] == entry["name"].strip()
        assert all(word and ", " not in word and "; " not in word for word in entry["keywords"])
    assert len({entry["group"] for entry in index}) == 9


# The splits

def test_sizes_and_disjointness(world):
    train, test, composition = (world._splits[s] for s in ("train", "test", "composition"))
    assert len(test) == len(set(test)) == world.size("test") == 400
    assert sorted(train + test) == list(range(len(world.entries)))
    assert composition == [i for i in test if world.entries[i]["held_out"] == "combination"]
    assert {entry["held_out"] for entry in entries_of(world, "train")} == {None}
    toned = sum(bool(entry["tones"]) for entry in world.entries)
    bases = {entry["base"] for entry in world.entries if entry["tones"]}
    toneless = sum(entry["base"] not in bases for entry in world.entries)
    assert world.size("composition") == round(400 * toned / (toned + toneless))


def test_splits_never_change():
    names = "\n".join(entry["name"] for entry in entries_of(Emoji(), "test"))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "7f718b0399086620"


def test_held_out_names_are_nowhere_in_training(world):
    bases = {entry["base"] for entry in entries_of(world, "train")}
    for entry in entries_of(world, "test"):
        if entry["held_out"] == "name":
            assert not entry["tones"] and entry["base"] not in bases


def test_held_out_combinations_have_both_parts_in_training(world):
    train = [entry for entry in entries_of(world, "train") if entry["tones"]]
    bases = {entry["base"] for entry in train}
    tones = {tuple(entry["tones"]) for entry in train}
    pairs = {(entry["base"], tuple(entry["tones"])) for entry in train}
    for entry in entries_of(world, "composition"):
        base, tone = entry["base"], tuple(entry["tones"])
        assert tone and base in bases and tone in tones and (base, tone) not in pairs


def test_a_greedy_split_leaves_every_base_and_tone_in_training(monkeypatch):
    monkeypatch.setattr(emoji, "TEST", 6)
    entries = [{"name": f"{base}: {tone}", "base": base, "tones": [tone]}
               for base in ("cook", "pilot") for tone in ("light", "medium", "dark")]
    train = [entries[i] for i in emoji.make_splits(entries)["train"]]
    assert {entry["base"] for entry in train} == {"cook", "pilot"}
    assert {tone for entry in train for tone in entry["tones"]} == {"light", "medium", "dark"}
    assert len(train) < 6


def test_training_says_no_test_name(world, train_texts):
    for entry in entries_of(world, "test"):
        assert not statements(entry) & train_texts
    held_out = {entry["name"] for entry in entries_of(world, "test")}
    for entry in entries_of(world, "train"):
        assert not held_out & set(entry["keywords"])


# Records

@pytest.mark.parametrize("split", ["train", "test", "composition"])
def test_records_are_valid(world, split):
    for index in range(0, world.size(split), 9):
        for rng in (None, random.Random(index)):
            record = world.record(split, index, rng)
            (picture,) = record["images"]
            assert picture.mode == "RGB" and picture.size == (32, 32)
            assert record["texts"][0] == record["source"]["name"]
            assert len(set(record["texts"])) == len(record["texts"]) >= 1
            for text in record["texts"]:
                assert world.is_true(text, record["source"]), text
    with pytest.raises(IndexError):
        world.record(split, world.size(split))


def same(a, b):
    return a["texts"] == b["texts"] and a["images"][0].tobytes() == b["images"][0].tobytes()


def test_records_depend_on_the_rng_in_train_alone(world):
    for index in range(0, world.size("train"), 200):
        first = world.record("train", index, random.Random(3))
        assert same(first, world.record("train", index, random.Random(3)))
        assert not same(first, world.record("train", index, random.Random(4)))
        assert same(world.record("train", index), Emoji().record("train", index))
    for split in ("test", "composition"):
        assert same(world.record(split, 5), world.record(split, 5, random.Random(3)))


def test_plain_pictures_are_whole_and_on_white(world):
    entry = named(world, "grinning face")
    picture = np.asarray(world._plain(world.entries.index(entry), 32))
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert picture[10, 16, 0] > 200 and picture[10, 16, 2] < 120         # a yellow forehead


def test_variation_is_small_and_never_mirrors(world):
    rng = random.Random(0)
    for name in ("flag: United States", "open file folder", "pencil", "speaking head", "satellite"):
        number = world.entries.index(named(world, name))
        plain = np.asarray(world._plain(number, 32), dtype=float)
        drawn = np.mean([np.asarray(world._varied(number, rng)) for _ in range(40)], axis=0)
        shapes = [image - image.mean() for image in (drawn, plain, plain[:, ::-1])]
        upright, mirrored = (np.mean(shapes[0] * other) for other in shapes[1:])
        assert upright > 1.15 * mirrored and upright > 0, name


@pytest.mark.parametrize("size", [16, 48, 224])
def test_image_size(size):
    world = Emoji(image_size=size)
    for rng in (None, random.Random(0)):
        assert world.record("train", 11, rng)["images"][0].size == (size, size)


def test_pickle(world):
    world.record("train", 0)
    copy = pickle.loads(pickle.dumps(Emoji(image_size=48)))
    assert copy.image_size == 48 and len(pickle.dumps(world)) < 1000
    assert same(pickle.loads(pickle.dumps(world)).record("test", 3), world.record("test", 3))


def test_corpus(world):
    texts = list(world.corpus())
    assert texts == list(Emoji().corpus()) and len(texts) > 2 * world.size("train")
    assert all(isinstance(text, str) and text.strip() for text in texts)


def test_classes(world):
    assert len(world.classes) == world.size("test")
    assert all("{}" in template for template in world.templates)
    assert (world.tasks, world.vocab_size) == ((), 2048)
    for index in (0, 211, 399):
        source = world.record("test", index)["source"]
        assert world.label(source) == index
        assert world.is_true(world.templates[1].format(world.classes[index]), source)


# What is true

def test_a_statement_is_true_of_one_emoji_only(world):
    said = [text for entry in world.entries for text in statements(entry)]
    assert len(said) == len(set(said))
    sources = entries_of(world, "test")
    for i in range(0, 400, 11):
        name = world.record("test", i)["texts"][0]
        assert [j for j in range(400) if world.is_true(name, sources[j])] == [i]


def test_is_true(world):
    astronaut = named(world, "woman astronaut: dark skin tone")
    for text in ("woman astronaut: dark skin tone", "woman astronaut with dark skin tone",
                 "the woman astronaut with dark skin tone emoji", "rocket, woman",
                 "woman astronaut: dark skin tone; rocket"):
        assert world.is_true(text, astronaut), text
    for text in ("", "woman", "woman astronaut", "woman astronaut: light skin tone", "rocket, man",
                 "man astronaut: dark skin tone", "woman astronaut: dark skin tone; guitar",
                 "woman astronaut: dark skin tone; ", "the woman astronaut emoji", "woman, "):
        assert not world.is_true(text, astronaut), text
    assert not world.is_true("cat", named(world, "grinning cat"))


# Extracting and building

def test_named_pictures(world):
    names = set()
    for name, picture in world.named_pictures():
        names.add(name)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        if name == "grinning-cat.png":
            assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert names == {entry["file"] for entry in world.entries}


@pytest.mark.parametrize("name, phrase, base, tones", [
    ("grinning cat", "grinning cat", "grinning cat", []),
    ("flag: Japan", "flag of Japan", "flag: Japan", []),
    ("keycap: 7", "keycap 7", "keycap: 7", []),
    ("family: man, woman, girl, boy", "family of man, woman, girl and boy",
     "family: man, woman, girl, boy", []),
    ("man: dark skin tone, bald", "man with dark skin tone and bald head", "man: bald", ["dark"]),
    ("kiss: woman, man, light skin tone, dark skin tone",
     "kiss of woman and man with light skin tone and dark skin tone", "kiss: woman, man",
     ["light", "dark"]),
])
def test_entry(name, phrase, base, tones):
    entry = build_emoji.entry("1F9D1", name, [], "group", "subgroup")
    assert (entry["phrase"], entry["base"], entry["tones"]) == (phrase, base, tones)


def test_file_names():
    for name, file in (("flag: St. Barthélemy", "flag-st-barthelemy"), ("woman's hat", "womans-hat"),
                       ("keycap: #", "keycap-hash"), ("keycap: *", "keycap-asterisk")):
        assert build_emoji.entry("", name, [], "", "")["file"] == file + ".png"
