"""The world of shapes as a source of records: splits, classes, tasks, texts, tokenizer corpus.

    world = Shapes()
    record = world.record("test", 0)
    record["images"][0].show()
    world.is_true(record["texts"][0], record["source"])
"""
import random
import re
from pathlib import Path

from common.data.shapes import texts
from common.data.shapes.interleaved import TASKS
from common.data.shapes.scene import HELD_OUT, PAIRS, STYLES, Item, draw, restyled, sample
from common.data.shapes.words import describe, is_true, listed, names_an_object, phrase


class Shapes:
    """Records of the shapes world. The splits are the same for every seed of a run.

    train: a fresh scene for each rng. test: 1,000 scenes of the same kind. single: 1,008 scenes of
    one object, each class equally often. composition: 300 scenes of one object, of colour-shape
    pairs that training never shows. shifted: the scenes of single, drawn in other styles.

    objects: the most objects in a scene. noise: pixel noise, its standard deviation, where 1 is the
    range of a pixel. clutter: strokes in the background. image_size: pixels of a side. style: the
    rendering of every split. Raises ValueError for more objects than fit.
    """
    name = "shapes"
    vocab_size = 1024                     # of the tokenizer
    zero_shot = "single"                  # the split for zero-shot classification
    splits = {"train": 65536, "test": 1000, "single": 1008, "composition": 300, "shifted": 1008}
    templates = ("a picture of {}", "a photo of {}", "there is {}", "an image with {}", "{}")
    tasks = tuple(TASKS)
    # Functions of words.py and texts.py, documented there.
    is_true = staticmethod(is_true)       # (text, scene) -> bool
    text = staticmethod(texts.text)       # rng -> a record for a language model
    labelled = staticmethod(texts.labelled)     # rng -> a text with words of known odds
    corpus = staticmethod(texts.corpus)   # -> the texts for the tokenizer

    def __init__(self, *, objects=2, noise=0.0, clutter=0, image_size=32, style="plain"):
        if not 1 <= objects <= 6:
            raise ValueError(f"objects={objects}: a scene has 1 to 6")
        self.objects, self.noise, self.clutter = objects, noise, clutter
        self.image_size, self.style = image_size, style
        self.all_classes = [phrase(Item(colour, shape, "small", 0.5, 0.5))
                            for colour, shape in (*PAIRS, *sorted(HELD_OUT))]
        self.classes = self.all_classes[:len(PAIRS)]

    def size(self, split):
        """The number of records in a split (for train: in an epoch)."""
        return self.splits[split]

    def scene(self, split, index, rng=None):
        """The Scene of a record. In train with an rng it is fresh; elsewhere it never changes."""
        if split == "train" and rng is not None:
            return self._sample(rng, (1, self.objects))
        fixed = random.Random(f"shapes/{'single' if split == 'shifted' else split}/{index}")
        if split in ("train", "test"):
            return self._sample(fixed, (1, self.objects))
        pairs = sorted(HELD_OUT) if split == "composition" else PAIRS
        scene = self._sample(fixed, 1, pairs=(pairs[index % len(pairs)],))
        style = STYLES[1 + index // len(pairs) % 3] if split == "shifted" else self.style
        return restyled(scene, style)

    def _sample(self, rng, objects, pairs=PAIRS):
        scene = sample(rng, objects, pairs, noise=self.noise, clutter=self.clutter)
        return restyled(scene, self.style)

    def record(self, split, index, rng=None):
        """{"images": [RGB picture], "texts": [a true sentence], "source": Scene}."""
        scene = self.scene(split, index, rng)
        words = rng or random.Random(f"words/{split}/{index}")
        sentences = [describe(scene, words)]
        return {"images": [draw(scene, self.image_size)], "texts": sentences, "source": scene}

    def task(self, kind, /, rng, split="train", **more):
        """A record of one of `tasks`, with this world's objects, noise, clutter and image size.

        more: arguments of the function of that name in interleaved.py.
        """
        if kind in ("caption", "album", "question", "document"):
            more = {"objects": (1, self.objects), "noise": self.noise,
                    "clutter": self.clutter} | more
        return TASKS[kind](rng, split, self.image_size, **more)

    def describes(self, text, scene):
        """Whether the text is true and names at least one object by colour and shape."""
        return is_true(text, scene) and names_an_object(text)

    def label(self, scene):
        """The index in all_classes of a scene of one object."""
        return self.all_classes.index(phrase(scene.items[0]))

    def extract(self, folder, count=100):
        """Write test pictures as PNG files named by what they show; returns their number."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            record = self.record("test", index)
            name = listed([phrase(item) for item in record["source"].items])
            name = f"{index:03d}-{re.sub('[^a-z]+', '-', name)}.png"
            record["images"][0].save(folder / name)
        return count
