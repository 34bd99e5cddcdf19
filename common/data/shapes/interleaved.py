"""What the shapes world gives to read: interleaved samples, and texts for a language model.

An interleaved sample is a list of pages, each some pictures and a text that belongs to them:
{"images": [[frame, ...], ...], "texts": [(told, learned), ...]}: one clip or picture (a clip of one
frame) a text, but for texts that "shown" says have none. told is what a prompt says, learned what
is to be said: ("output:", " a red circle").

A language model reads the same samples with every picture in words, so that it knows how such a
page goes on before it ever sees one, and lists of names said again, from which it learns to recall.

    sample = interleaved("episode", random.Random(0))
    print(reading(random.Random(0)))
"""
import math

from common.prompts import ANSWER, OUTPUT
from common.data.shapes import stories
from common.data.shapes.scene import COLOURS, PAIRS, SHAPES, describe, listed, phrase, sample
from common.data.shapes.questions import candidates, pick, worded

KINDS = ("caption", "album", "names", "question", "document", "episode", "glossary", "clip")
# How often a language model reads each. Recall is learned all at once, late or never, and what is
# said again word for word brings it soonest: hence the lists, and episodes in three forms.
READ = {"list": 20, "episode": 20, "names": 5, "caption": 10, "question": 30, "document": 10,
        "clip": 5}
FORMS = ("phrase", "word", "bare")        # of an episode in words: what stands before a label
ENDS = (".", ",", ";", "!", "?", "")      # of a label: recall must not hang on what follows it
# What a list names; never colours beside shapes, which could make a pair that is held out.
LISTED = (stories.LABELS, (*stories.LABELS, *COLOURS), (*stories.LABELS, *SHAPES))
ASKED = ("colour", "shape", "count", "existence", "relation")
SHOTS = (2, 4, 6, 8)                      # of an episode in training


def interleaved(kind, /, rng, split="train", side=32, **more):
    """A sample of one of KINDS; split "test" asks in wordings that training never uses.

    {"images", "texts"} as above, "source": the Scene of each picture or clip, "answer": of the last
    text. more: of `stories.episode` (shots, classes, shuffled), `stories.clip` (frames, kind),
    `stories.document` (images, kind) or of `sample` (objects, pairs, ...).
    """
    return {"caption": caption, "album": album, "names": names, "question": question,
            "document": document, "episode": episode, "glossary": glossary,
            "clip": clip}[kind](rng, split, side, **more)


def made(scenes, images, texts, **more):
    """A sample from its parts; images: a list of frames for each text."""
    return {"images": images, "texts": texts, "source": tuple(scenes), "answer": texts[-1][1][1:],
            **more}


def caption(rng, split, side, **dial):
    """One picture and its caption."""
    scene = sample(rng, **dial)
    return made([scene], [stories.pictures((scene,), side)], [(OUTPUT, f" {describe(scene, rng)}")])


def album(rng, split, side, images=None, **dial):
    """Two or three pictures, each with its caption."""
    scenes = [sample(rng, **dial) for _ in range(images or rng.randint(2, 3))]
    return made(scenes, [stories.pictures((scene,), side) for scene in scenes],
                [(OUTPUT, f" {describe(scene, rng)}") for scene in scenes])


def names(rng, split, side, images=None, by=None):
    """Single objects, each with the name of its colour, or each of its shape (by).

    Which of the two is told with the first picture and not to be learned: it could not be known.
    As on a web page no prompt asks for a name; so it is with the labels of an episode.
    """
    by = by or rng.choice(("colour", "shape"))
    scenes = [sample(rng, 1, pairs=(rng.choice(PAIRS),))
              for _ in range(images or rng.randint(4, 8))]
    said = [f" {getattr(scene.items[0], by)}" for scene in scenes]
    return made(scenes, [stories.pictures((scene,), side) for scene in scenes],
                [(said[0], ""), *(("", name) for name in said[1:])])


def question(rng, split, side, asks=None, **dial):
    """One picture and questions of several kinds, each with its answer: asks, default 1.

    In training up to three. "shown": only the first has a picture before it; "kind": the last's.
    """
    asks, texts = asks or (rng.randint(1, 3) if split == "train" else 1), []
    while not texts:
        scene = sample(rng, **dial)
        for kind in rng.sample(ASKED, asks):
            option = pick(candidates(scene, kind), rng)
            if option:
                asked = worded(option, rng, kind, split, scene)
                texts, last = [*texts, (ANSWER.format(asked), f" {option[1]}")], kind
    return made([scene], [stories.pictures((scene,), side)], texts, kind=last,
                shown=[True] + [False] * (len(texts) - 1))


def document(rng, split, side, images=None, kind=None, **dial):
    """Two to four pictures, each with a true text; one is a question that the others would mislead.

    "at": the text that is the question; "answer": its answer, wherever it stands.
    """
    record = stories.document(rng, images=images or rng.randint(2, 4), kind=kind, split=split,
                              side=side, **dial)
    words = [part["text"] for part in record["segments"] if "text" in part]
    at, texts = record["image"], []
    for number in range(len(record["source"])):
        if number == at:
            texts.append((ANSWER.format(words.pop(0)), f" {words.pop(0)}"))
        else:
            texts.append((OUTPUT, f" {words.pop(0)}"))
    return made(record["source"], [[p] for p in record["images"]], texts) | {
        "answer": record["answer"], "at": at, "kind": record["kind"]}


def episode(rng, split, side, shots=None, **more):
    """Labelled pictures and one more: few-shot learning (`stories.episode`)."""
    record = stories.episode(rng, shots=rng.choice(SHOTS) if shots is None else shots, side=side,
                             **more)
    labels = [part["text"] for part in record["segments"] if "text" in part]
    return made(record["source"], [[p] for p in record["images"]],
                [("", f" {label}") for label in labels], candidates=record["candidates"])


def glossary(rng, split, side, classes=None, shots=None):
    """An episode whose shots are in words, "circle dax", but for the last picture.

    Of two to four classes, each told once. What is told in words is not to be learned. "shown":
    whether a text has a picture before it. Here one picture must come to mean what its class's word
    means; among pictures alone both sides of the match would have to be learned at once.
    """
    classes = classes or rng.randint(2, 4)
    told = episode(rng, split, None, shots or classes, classes=classes)
    *words, _ = [(f"{said}{label}", "") for said, label in labels_in_words(told, "bare")]
    scenes = told["source"][-1:]
    return made(scenes, [stories.pictures(scenes, side)], [*words, told["texts"][-1]],
                candidates=told["candidates"], shown=[False] * len(words) + [True])


def clip(rng, split, side, **more):
    """A clip and a question that its order decides (`stories.clip`)."""
    record = stories.clip(rng, side=side, **more)
    asks = record["turns"][0]["text"]
    texts = [(ANSWER.format(asks), f" {record['answer']}")]
    return made(record["source"], [record["images"]], texts, kind=record["kind"])


# ------------------------------------------------------------------ in words alone

def in_words(kind, sample, rng):
    """What stands before each text of a sample for its picture: its objects, named, or nothing."""
    if kind == "clip":                    # nothing short tells a clip: its answer does
        return [f"the answer is {sample['answer']}. "]
    told = [f"{listed([phrase(item) for item in rng.sample(scene.items, len(scene.items))])}. "
            for scene in sample["source"]]
    return told + [""] * (len(sample["texts"]) - len(told))


def paged(kind, sample, rng):
    """A sample in words as [(what is said of a picture and its prompt, its answer), ...]."""
    prompt = OUTPUT if kind == "names" else ""       # else a name would follow words as if of them
    return [(f"{words}{prompt}{told}", learned) for words, (told, learned)
            in zip(in_words(kind, sample, rng), sample["texts"])]


def labels_in_words(sample, form):
    """An episode's pictures in words, [(what is said before a label, the label), ...].

    form: one of FORMS, "a red circle. output:", "circle output:" or "circle", where the classes
    are shapes; where they are colours, "red".
    """
    items = [scene.items[0] for scene in sample["source"]]
    by = "colour" if len({item.colour for item in items}) > 1 else "shape"
    said = {"phrase": lambda item: f"{phrase(item)}. {OUTPUT}",
            "word": lambda item: f"{getattr(item, by)} {OUTPUT}",
            "bare": lambda item: getattr(item, by)}[form]
    return [(said(item), label) for item, (_, label) in zip(items, sample["texts"])]


def reading(rng):
    """A text for a language model: a caption, a list, or a sample with its pictures in words.

    reading(rng) -> "a red circle. output: dax. a red star. output: wug. a red circle. output: dax."
    """
    kind, = rng.choices(list(READ), weights=READ.values())
    end = rng.choice(ENDS) if kind in ("list", "episode") else "."
    if kind == "list":
        words = rng.sample(rng.choice(LISTED), rng.randint(3, 8))
        return " ".join(3 * [f"{' '.join(words)}{end}"])
    if kind == "caption" and rng.random() < 0.5:
        return describe(sample(rng, (1, 3)), rng)
    told = interleaved(kind, rng, side=None)
    parts = paged(kind, told, rng) if kind != "episode" else \
        labels_in_words(told, rng.choice(FORMS))
    return " ".join(f"{words}{learned}{end}" for words, learned in parts)


def labelled(rng, form="bare"):
    """An episode of 8 shots in words, [(text, whether a label of known odds), ...], and its nats.

    The nats of the labels together: a label told before is certain, 0; that of the second class can
    be any but the first's, ln 11. The first label of all is left out: what comes there may be a
    list too. A label's full stop goes with it because a vocabulary cuts the two together.
    """
    parts, known, nats, told = [], set(), 0.0, episode(rng, "train", None, shots=8)
    for words, label in labels_in_words(told, form):
        if known and label not in known:
            nats += math.log(len(stories.LABELS) - len(known))
        parts += [(f"{' ' if parts else ''}{words}", False), (f"{label}.", bool(known))]
        known.add(label)
    return parts, nats
