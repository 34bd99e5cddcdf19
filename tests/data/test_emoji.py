"""The emoji world: the archive, the splits, the records, what is true of an emoji."""
import hashlib
import itertools
import pickle
import random

import numpy as np
import pytest

from common.data.emoji import build
from common.data.emoji.world import Emoji


@pytest.fixture(scope="module")
def world():
    return Emoji()


@pytest.fixture(scope="module")
def records(world):
    """{split: its plain records}."""
    return {split: [world.record(split, index) for index in range(world.size(split))]
            for split in ("train", "test", "composition")}


@pytest.fixture(scope="module")
def entries(records):
    """{split: the entries of its emoji}."""
    return {split: [record["source"] for record in own] for split, own in records.items()}


def statements(entry):
    return {template.format(name) for template in Emoji.templates
            for name in (entry["name"], entry["phrase"])}


class TestArchive:
    def test_every_emoji_has_a_picture_and_a_name_of_its_own(self, world):
        pictures = dict(world.named_pictures())
        assert {*pictures} == {entry["file"] for entry in world.entries}
        assert len(pictures) == len({p.tobytes() for p in pictures.values()}) > 3500
        assert {p.size for p in pictures.values()} == {(64, 64)}
        assert pictures["grinning-cat.png"].getpixel((0, 0)) == (255, 255, 255)
        for field in ("name", "phrase", "codepoints"):
            assert len({entry[field] for entry in world.entries}) == len(pictures), field


class TestMakeSplits:
    def test_the_splits_are_all_emoji_and_never_change(self, world, entries):
        train, test = ([entry["name"] for entry in entries[split]] for split in ("train", "test"))
        assert len(test) == 400 and sorted(train + test) == sorted(e["name"] for e in world.entries)
        assert hashlib.sha256("\n".join(test).encode()).hexdigest()[:16] == "7f718b0399086620"
        assert {entry["held_out"] for entry in entries["train"]} == {None}
        combinations = [entry for entry in entries["test"] if entry["held_out"] == "combination"]
        assert entries["composition"] == combinations
        toned = [entry["base"] for entry in world.entries if entry["tones"]]
        toneless = sum(entry["base"] not in toned for entry in world.entries)
        assert world.size("composition") == round(400 * len(toned) / (len(toned) + toneless))

    def test_a_name_is_new_as_a_whole_and_a_combination_only_as_a_combination(self, entries):
        for entry in entries["test"]:
            alike = [e["tones"] for e in entries["train"] if e["base"] == entry["base"]]
            if entry["held_out"] == "name":
                assert not entry["tones"] and not alike
            else:
                assert any(alike) and entry["tones"] and entry["tones"] not in alike
                assert any(e["tones"] == entry["tones"] for e in entries["train"])

    def test_training_says_no_test_name(self, world, records, entries):
        varied = [world.record("train", i, random.Random(i)) for i in range(world.size("train"))]
        said = {text for record in records["train"] + varied for text in record["texts"]}
        assert {*world.corpus()} <= said
        words = {word for entry in entries["train"] for word in entry["keywords"]}
        for entry in entries["test"]:
            assert not statements(entry) & said and entry["name"] not in words, entry["name"]


class TestRecord:
    @pytest.mark.parametrize("split", ["train", "test", "composition"])
    def test_it_is_a_picture_and_true_texts(self, world, records, split):
        varied = [world.record(split, i, random.Random(i)) for i in range(0, world.size(split), 9)]
        for record in records[split][::9] + varied:
            (picture,), texts = record["images"], record["texts"]
            assert picture.mode == "RGB" and picture.size == (32, 32)
            assert texts[0] == record["source"]["name"] and len(set(texts)) == len(texts)
            assert all(world.is_true(text, record["source"]) for text in texts)
        few = sum(len(record["texts"]) for record in varied) < 4.1 * len(varied)
        assert few == (split == "train")         # one template each time, and some of the keywords
        with pytest.raises(IndexError):
            world.record(split, world.size(split))

    def test_only_a_training_record_depends_on_its_rng(self, world, records):
        for split, index in itertools.product(records, range(0, 80, 9)):
            one, again, other = (world.record(split, index, random.Random(n)) for n in (3, 3, 4))
            plain = records[split][index]
            assert one == again and world.record(split, index) == plain
            assert (one != other) == (one != plain) == (split == "train")

    @pytest.mark.parametrize("name", ["flag: United States", "open file folder", "satellite",
                                      "speaking head"])
    def test_a_variation_is_small_and_never_mirrored(self, world, records, name):
        index, rng = [r["texts"][0] for r in records["train"]].index(name), random.Random(0)
        plain = np.asarray(records["train"][index]["images"][0], float)
        varied = [np.asarray(world.record("train", index, rng)["images"][0]) for _ in range(60)]
        mean = np.mean(varied, axis=0)
        shown, upright, mirrored = (p - p.mean() for p in (mean, plain, plain[:, ::-1]))
        assert (shown * upright).mean() > max(0, 1.15 * (shown * mirrored).mean())
        assert len({tuple(p[0, 0]) for p in varied}) > 20                # a background of its own

    @pytest.mark.parametrize("size", [16, 48, 224])
    def test_its_picture_is_whole_on_a_light_background_in_the_worlds_size(self, size, records):
        index = [record["texts"][0] for record in records["train"]].index("grinning face")
        for rng in (None, random.Random(0)):
            picture = np.asarray(Emoji(image_size=size).record("train", index, rng)["images"][0])
            assert picture.shape == (size, size, 3)
            corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners == 255).all() if rng is None else (corners >= 159).all()
            forehead = picture[size // 3, size // 2]
            assert forehead[0] > 190 and forehead[2] < 140                     # yellow


class TestEmoji:
    def test_a_copy_for_a_worker_is_small_and_gives_the_same_records(self, world, records):
        assert len(pickle.dumps(world)) < 1000
        assert pickle.loads(pickle.dumps(world)).record("test", 3) == records["test"][3]

    def test_the_corpus_is_every_training_text_in_a_fixed_order(self, world, records):
        assert [*world.corpus()] == [text for r in records["train"] for text in r["texts"]]

    def test_classes_are_the_phrases_of_the_test_emoji(self, world, entries):
        assert [world.label(source) for source in entries["test"]] == list(range(400))
        assert world.classes == world.all_classes == [e["phrase"] for e in entries["test"]]

    def test_a_statement_is_true_of_one_emoji_only(self, world, entries):
        said = [text for entry in world.entries for text in statements(entry)]
        assert len(said) == len(set(said))
        for name in [entry["name"] for entry in entries["test"][::11]]:
            assert [e["name"] for e in entries["test"] if world.is_true(name, e)] == [name]

    def test_names_phrases_and_several_keywords_are_true(self, world):
        source, = (e for e in world.entries if e["name"] == "woman astronaut: dark skin tone")
        for text in ("NAME", "woman astronaut with dark skin tone", "rocket, woman", "NAME; rocket",
                     "the woman astronaut with dark skin tone emoji"):
            assert world.is_true(text.replace("NAME", source["name"]), source), text
        for text in ("", "woman", "woman astronaut", "woman astronaut: light skin tone", "woman, ",
                     "man astronaut: dark skin tone", "rocket, man", "the woman astronaut emoji",
                     "NAME; guitar", "NAME; rocket, guitar", "NAME; "):
            assert not world.is_true(text.replace("NAME", source["name"]), source), text


class TestEntry:
    @pytest.mark.parametrize("name, phrase, base, tones, file", [
        ("flag: Réunion", "flag of Réunion", "flag: Réunion", [], "flag-reunion"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy",
         "family: man, woman, girl, boy", [], "family-man-woman-girl-boy"),
        ("man: dark skin tone, bald", "man with dark skin tone and bald head", "man: bald",
         ["dark"], "man-dark-skin-tone-bald")])
    def test_a_name_becomes_a_phrase_a_base_tones_and_a_file(self, name, phrase, base, tones, file):
        entry = build.entry("1F9D1", name, [], "group", "subgroup")
        assert (entry["phrase"], entry["base"], entry["tones"]) == (phrase, base, tones)
        assert entry["file"] == f"{file}.png"
