"""The world of shapes as a source of records: splits, classes, tasks, texts, tokenizer corpus.

    record = Shapes().record("test", 0)
    record["images"][0].show(); print(record["texts"])
"""
import random
import re

from common.data.files import usable_text
from common.data.safe_read import open_text, parse_json, printable
from common.data.shapes import texts as plain_texts
from common.data.shapes.captions import noisy_caption
from common.data.shapes.interleaved import TASKS
from common.data.shapes.scene import HELD_OUT, PAIRS, STYLES, Item, draw, sample
from common.data.shapes.words import describe, is_true, listed, names_an_object, phrase


class Shapes:
    """Records of the shapes world. The splits are the same for every seed of a run.

    train: a fresh scene for each rng. test: 1,000 scenes of the same kind. single: 1,008 scenes of
    one object, each class equally often. composition: 300 scenes of one object, of colour-shape
    pairs that training never shows. shifted: the scenes of single, drawn in other styles. human:
    4,096 fixed scenes as of train, each with up to five true texts. web: 12,288 more, each with one
    text from the web, which is true of another scene at the rate web_noise.

    objects: the most objects in a scene. noise: pixel noise, its standard deviation, where 1 is the
    range of a pixel. clutter: strokes in the background. image_size: pixels of a side. style: the
    rendering of every split. texts: a JSON-lines file of BLIP's CapFilt, {"scene": 17, "text":
    "..."} in each line; web then has the scenes of the file, each with the texts of its lines.
    Raises ValueError for more objects than fit, no such style, no fraction, an unusable file.
    """
    name = "shapes"
    vocab_size = 1024                     # of the tokenizer
    zero_shot = "single"                  # the split for zero-shot classification
    splits = {"train": 65536, "test": 1000, "single": 1008, "composition": 300, "shifted": 1008,
              "human": 4096, "web": 12288}
    has_web = True
    templates = ("a picture of {}", "a photo of {}", "there is {}", "an image with {}", "{}")
    tasks = tuple(TASKS)
    # Functions of words.py and texts.py, documented there.
    is_true = staticmethod(is_true)       # (text, scene) -> bool
    text = staticmethod(plain_texts.text)       # rng -> a record for a language model
    labelled = staticmethod(plain_texts.labelled)     # rng -> a text with words of known odds
    corpus = staticmethod(plain_texts.corpus)   # -> the texts for the tokenizer

    def __init__(self, *, objects=2, noise=0.0, clutter=0, image_size=32, style="plain",
                 web_noise=0.4, texts=""):
        if not 1 <= objects <= 6:
            raise ValueError(f"objects={objects}: a scene has 1 to 6")
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise}: a deviation, from 0 to 1")
        if style not in STYLES:
            raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
        if not 0 <= web_noise <= 1:
            raise ValueError(f"web_noise={web_noise}: a fraction, from 0 to 1")
        self.objects, self.noise, self.clutter = objects, noise, clutter
        self.image_size, self.style, self.web_noise = image_size, style, web_noise
        self.web_texts = read_texts(texts, self.size("web")) if texts else []
        if texts:
            self.splits = self.splits | {"web": len(self.web_texts)}
        self.all_classes = [phrase(Item(colour, shape, "small", 0.5, 0.5))
                            for colour, shape in (*PAIRS, *sorted(HELD_OUT))]
        self.classes = self.all_classes[:len(PAIRS)]

    def size(self, split):
        """The number of records in a split (for train: in an epoch)."""
        return self.splits[split]

    def scene(self, split, index, rng=None):
        """The Scene of a record. In train with an rng it is fresh; elsewhere it never changes."""
        if split == "web" and self.web_texts:
            index, _ = self.web_texts[index]
        if split != "train" or rng is None:
            rng = random.Random(f"shapes/{'single' if split == 'shifted' else split}/{index}")
        objects, pairs, style = (1, self.objects), PAIRS, self.style
        if split in ("single", "composition", "shifted"):
            allowed = sorted(HELD_OUT) if split == "composition" else PAIRS
            objects, pairs = 1, (allowed[index % len(allowed)],)
        if split == "shifted":
            style = STYLES[1 + index // len(PAIRS) % 3]
        return sample(rng, objects, pairs, self.noise, self.clutter, style)

    def record(self, split, index, rng=None):
        """{"images": [RGB picture], "texts": [a true sentence], "source": Scene}.

        In human and web an rng changes nothing. In web "truth" says whether the text is true, and
        "hardness" how it is false, see `captions.noisy_caption`; texts of a file have neither.
        """
        scene, fixed = self.scene(split, index, rng), random.Random(f"words/{split}/{index}")
        if split == "web" and not self.web_texts:
            return noisy_caption(scene, fixed, self.web_noise, side=self.image_size)
        if split == "web":
            _, texts = self.web_texts[index]
        elif split == "human":
            texts = list(dict.fromkeys(describe(scene, fixed) for _ in range(5)))
        else:
            texts = [describe(scene, rng or fixed)]
        return {"images": [draw(scene, self.image_size)], "texts": texts, "source": scene}

    def task(self, kind, /, rng, split="train", **more):
        """A record of one of `tasks`, with this world's objects, noise, clutter and image size.

        more: arguments of the function of that name in interleaved.py.
        """
        if kind not in ("names", "episode", "glossary", "clip", "reading"):
            dial = {"objects": (1, self.objects), "noise": self.noise, "clutter": self.clutter}
            more = dial | more
        return TASKS[kind](rng, split, self.image_size, **more)

    def describes(self, text, scene):
        """Whether the text is true and names at least one object by colour and shape."""
        return is_true(text, scene) and names_an_object(text)

    def label(self, scene):
        """The index in all_classes of a scene of one object."""
        return self.all_classes.index(phrase(scene.items[0]))

    def named_pictures(self):
        """Yield (file name, picture) of 100 test pictures, named by what they show."""
        for index in range(100):
            record = self.record("test", index)
            name = listed([phrase(item) for item in record["source"].items])
            yield f"{index:03d}-{re.sub('[^a-z]+', '-', name)}.png", record["images"][0]


def read_texts(path, scenes):
    """[(scene, [its texts]), ...] in order of scene, from lines {"scene": 17, "text": "..."}.

    scenes: how many there are. Raises ValueError for a line that is none, and for no line at all.
    """
    found = {}
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line, kind=dict)
                scene = row.get("scene")
                if type(scene) is not int or not 0 <= scene < scenes:      # True is no scene
                    raise ValueError(f"no usable 'scene', a number from 0 to {scenes - 1}")
                found.setdefault(scene, []).append(usable_text(row.get("text")))
            except ValueError as error:
                raise ValueError(f"{printable(path)}: line {number}: {error}") from None
    if not found:
        raise ValueError(f"{printable(path)}: no texts in it")
    return sorted(found.items())
