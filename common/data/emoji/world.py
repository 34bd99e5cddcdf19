"""The emoji world: real pictures with real names, shipped in emoji.zip (built by build.py)."""
import hashlib
import io
import json
import math
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image

SIDE = 64           # pixels of a side in the archive
TEST = 400          # emoji held out from training


class Emoji:
    """Records of the emoji world. The splits are the same for every seed of a run.

    test: 400 emoji of which training sees neither picture nor name. source["held_out"] is "name"
    (unseen in any skin tone) or "combination" (training has its base in other tones, and its tone
    on other bases). composition: the combinations alone. train: all others. image_size: pixels of
    a side; pictures are resampled once, from the archive's size.
    """
    name = "emoji"
    vocab_size = 2048                     # of the tokenizer
    zero_shot = "test"                    # the split for zero-shot classification
    tasks = ()
    has_web = False
    templates = ("{}", "the {} emoji", "a picture of the {} emoji", "an emoji: {}",
                 "{}, drawn as an emoji", "a small drawing: {}")

    def __init__(self, image_size=32):
        self.image_size = image_size
        # In memory, because workers forked from this process would share an open file's position.
        archive = io.BytesIO(Path(__file__).with_name("emoji.zip").read_bytes())
        self._archive, self._pictures = zipfile.ZipFile(archive), {}
        self.entries = json.loads(self._archive.read("index.json"))
        self._splits = make_splits(self.entries)
        held_out = {entry["name"] for entry in self.entries if entry["held_out"]}
        for entry in self.entries:
            # Training must not contain a test name, not even as the keyword of another emoji.
            entry["keywords"] = [word for word in entry["keywords"]
                                 if word not in held_out and word != entry["name"]]
        self.classes = [self.entries[number]["phrase"] for number in self._splits["test"]]
        self.all_classes = self.classes

    def __reduce__(self):
        return Emoji, (self.image_size,)    # a worker process opens its own archive

    def size(self, split):
        """The number of records in a split."""
        return len(self._splits[split])

    def record(self, split, index, rng=None):
        """{"images": [RGB picture], "texts": [name, other true captions], "source": entry}.

        In train, rng (a random.Random) varies picture and texts; else the record never changes.
        """
        number, rng = self._splits[split][index], rng if split == "train" else None
        picture = self._varied(number, rng) if rng else self._plain(number, self.image_size)
        entry = self.entries[number]
        return {"images": [picture], "texts": self._captions(entry, rng), "source": entry}

    def is_true(self, text, source):
        """Whether the text is this emoji's name or phrase, plain or in a template.

        Some of its keywords may follow. Two or more keywords alone are true as well; a single one
        is not: "cat", a keyword of "grinning cat", is the name of another emoji.
        """
        name_part, _, keywords = text.partition("; ")
        if any(name_part == template.format(name) for template in self.templates
               for name in (source["name"], source["phrase"])):
            return name_part == text or set(keywords.split(", ")) <= set(source["keywords"])
        words = text.split(", ")
        return len(words) > 1 and set(words) <= set(source["keywords"])

    def label(self, source):
        """The index in `classes`, the phrases of the test emoji in the split's order."""
        return self.classes.index(source["phrase"])

    def corpus(self):
        """Every training text, for the tokenizer and the language model, in a fixed order."""
        for number in self._splits["train"]:
            yield from self._captions(self.entries[number])

    def named_pictures(self):
        """Yield (file name, picture) of all emoji, 64 x 64 on white: "grinning-cat.png"."""
        for number, entry in enumerate(self.entries):
            yield entry["file"], self._plain(number, SIDE)

    def _captions(self, entry, rng=None):
        """[name, its phrase in templates, "cat, face, smile", "grinning cat; cat, face, smile"].

        With an rng one template and some of the keywords, in random order.
        """
        templates, words = self.templates, entry["keywords"]
        if rng:
            templates = (rng.choice(templates),)
            words = rng.sample(words, rng.randint(min(2, len(words)), min(5, len(words))))
        phrases = [template.format(entry["phrase"]) for template in templates]
        texts = list(dict.fromkeys([entry["name"], *phrases]))
        listed = ", ".join(words)
        return texts + [listed] * (len(words) > 1) + [f"{entry['name']}; {listed}"] * bool(words)

    def _picture(self, number):
        """The picture of the archive, 64 x 64 RGBA, decoded once."""
        if number not in self._pictures:
            data = io.BytesIO(self._archive.read(self.entries[number]["file"]))
            self._pictures[number] = Image.open(data).convert("RGBA")
        return self._pictures[number]

    def _plain(self, number, size):
        """The whole picture on white."""
        picture = self._picture(number)
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, mask=picture)
        return canvas.resize((size, size), Image.Resampling.LANCZOS)

    def _varied(self, number, rng):
        """Turned, scaled and moved a little, on a light background; never mirrored (arrows)."""
        size, angle = self.image_size, rng.uniform(-0.2, 0.2)
        scale = SIDE / size * rng.uniform(0.95, 1.3)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        # Pixel (x, y) is read from (cos x - sin y + left, sin x + cos y + top) in the archive.
        left = SIDE * rng.uniform(0.43, 0.57) - (cos - sin) * size / 2
        top = SIDE * rng.uniform(0.43, 0.57) - (sin + cos) * size / 2
        picture = self._picture(number).transform(
            (size, size), Image.Transform.AFFINE, (cos, -sin, left, sin, cos, top),
            Image.Resampling.BILINEAR)
        # The square keeps most backgrounds near white, as plain pictures have it.
        background = tuple(255 - int(96 * rng.random() ** 2) for _ in "rgb")
        canvas = Image.new("RGB", (size, size), background)
        canvas.paste(picture, mask=picture)
        return canvas


def make_splits(entries):
    """{"train", "test", "composition"}: positions in entries; sets "held_out" in each entry.

    The emoji are sorted by the hashes of their names, and both kinds of test emoji are taken from
    the front, in proportion to their numbers. The plain form of a toned emoji ("astronaut") stays
    in train, because its name is part of the toned names.
    """
    queue = sorted(range(len(entries)), key=lambda number: hashlib.sha256(
        entries[number]["name"].encode()).digest())
    toned = [i for i in queue if entries[i]["tones"]]
    bases = Counter(entries[i]["base"] for i in toned)              # what train still has
    tones = Counter(tuple(entries[i]["tones"]) for i in toned)
    toneless = [i for i in queue if entries[i]["base"] not in bases]
    wanted = round(TEST * len(toned) / (len(toned) + len(toneless)))
    held_out = dict.fromkeys(toneless[:TEST - wanted], "name")
    for i in toned:
        base, tone = entries[i]["base"], tuple(entries[i]["tones"])
        if len(held_out) < TEST and bases[base] > 1 and tones[tone] > 1:
            held_out[i] = "combination"
            bases[base], tones[tone] = bases[base] - 1, tones[tone] - 1
    for i, entry in enumerate(entries):
        entry["held_out"] = held_out.get(i)
    return {"train": [i for i in range(len(entries)) if i not in held_out],
            "test": [i for i in queue if i in held_out],
            "composition": [i for i in queue if held_out.get(i) == "combination"]}
