"""The shapes world: endless pictures of coloured shapes with exact captions, nothing to download.

    world = Shapes()
    record = world.record("test", 0)
    record["images"][0].show()
    world.is_true(record["texts"][0], record["source"])

    python -m common.data.shapes.world FOLDER    # writes 100 test pictures as PNG files

How a scene is drawn, told and judged is in `scene.py`; what later papers ask of one scene
(questions, probes, boxes, letters) is in `tasks.py`, of several (documents, clips, dialogues,
episodes) in `stories.py`.
"""
import random
import re
import sys
from pathlib import Path

from common.prompts import ANSWER, OUTPUT
from common.data.shapes import interleaved as readings, stories
from common.data.shapes import scene as scenes


class Shapes:
    """Records of the shapes world. Splits are a function of the world, never of a run's seed.

    train: fresh scenes, one for each rng. test: 1,000 scenes of the same kind. single: 1,008
    one-object scenes, each class equally often. composition: 300 one-object scenes of colour-shape
    pairs that training never shows. shifted: the scenes of single, drawn in other styles.

    objects: most objects in a scene. noise: pixel noise, standard deviation of 1. clutter: strokes
    in the background. image_size: pixels of a side. style: a rendering for every split. Raises
    ValueError for more objects than fit.
    """
    name = "shapes"
    vocab_size = 1024                     # pieces of the tokenizer
    zero_shot = "single"                  # the split that classes are told apart on
    splits = {"train": 65536, "test": 1000, "single": 1008, "composition": 300, "shifted": 1008}
    templates = ("a picture of {}", "a photo of {}", "there is {}", "an image with {}", "{}")

    def __init__(self, *, objects=2, noise=0.0, clutter=0, image_size=32, style="plain"):
        if not 1 <= objects <= 6:
            raise ValueError(f"objects={objects}: a scene has 1 to 6")
        self.objects, self.noise, self.clutter = objects, noise, clutter
        self.image_size, self.style = image_size, style
        self.all_classes = [scenes.phrase(scenes.Item(colour, shape, "small", 0.5, 0.5))
                            for colour, shape in (*scenes.PAIRS, *sorted(scenes.HELD_OUT))]
        self.classes = self.all_classes[:len(scenes.PAIRS)]

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
        pairs = sorted(scenes.HELD_OUT) if split == "composition" else scenes.PAIRS
        scene = self._sample(fixed, 1, pairs=(pairs[index % len(pairs)],))
        style = scenes.STYLES[1 + index // len(pairs) % 3] if split == "shifted" else self.style
        return scenes.restyled(scene, style)

    def _sample(self, rng, objects, pairs=scenes.PAIRS):
        scene = scenes.sample(rng, objects, pairs, noise=self.noise, clutter=self.clutter)
        return scenes.restyled(scene, self.style)

    def record(self, split, index, rng=None):
        """{"images": [RGB picture], "texts": [sentences, all true], "source": Scene}."""
        scene = self.scene(split, index, rng)
        words = rng or random.Random(f"words/{split}/{index}")
        texts = [scenes.describe(scene, words)]
        return {"images": [scenes.draw(scene, self.image_size)], "texts": texts, "source": scene}

    def is_true(self, text, scene):
        """Whether every statement of the text holds in the scene; False for any other text."""
        return scenes.is_true(text, scene)

    def describes(self, text, scene):
        """Whether the text is true and names at least one object by colour and shape."""
        return scenes.is_true(text, scene) and scenes.names_an_object(text)

    def interleaved(self, kind, /, rng, split="train", **more):
        """A sample of pages, questions, episodes, clips: `readings.interleaved`, as this world's
        dials say."""
        if kind in ("caption", "album", "question", "document"):
            more = {"objects": (1, self.objects), "noise": self.noise,
                    "clutter": self.clutter} | more
        return readings.interleaved(kind, rng, split, self.image_size, **more)

    def reading(self, rng):
        """A text for a language model."""
        return readings.reading(rng)

    def labelled(self, rng):
        """A text with words of known odds: `readings.labelled`."""
        return readings.labelled(rng)

    def label(self, scene):
        """The index in all_classes of a one-object scene."""
        return self.all_classes.index(scenes.phrase(scene.items[0]))

    def corpus(self):
        """Sentences for the tokenizer, in a fixed order: captions, and what every task says."""
        for index in range(4000):
            rng = random.Random(f"corpus/{index}")
            yield scenes.describe(scenes.sample(rng, (1, 3)), rng, None if index % 4 else "full")
        yield from stories.corpus()
        for index in range(500):          # so often that the prompts' words become pieces
            yield f"{OUTPUT} {stories.LABELS[index % len(stories.LABELS)]}."
            yield ANSWER.format("what is it?")

    def extract(self, folder, count=100):
        """Write test pictures as PNG files named by what they show; returns their number."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            record = self.record("test", index)
            shown = scenes.listed([scenes.phrase(item) for item in record["source"].items])
            name = f"{index:03d}-{re.sub('[^a-z]+', '-', shown)}.png"
            record["images"][0].save(folder / name)
        return count


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m common.data.shapes.world FOLDER")
    try:
        print(f"{Shapes(image_size=96).extract(sys.argv[1])} pictures in {sys.argv[1]}")
    except OSError as error:
        sys.exit(f"cannot write to {sys.argv[1]}: {error.strerror}")
