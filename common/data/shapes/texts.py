"""What a language model reads of the shapes world, and the texts for its tokenizer.

A language model reads the records of `interleaved.py` with every picture described in words, so it
knows how such a page continues before it sees one. It learns to recall from lists of names that are
repeated three times.
"""
import math
import random

from common.data.shapes.captions import noisy_caption, swapped_attributes, swapped_order
from common.data.shapes.conversations import (TEACHERS, dialogue, instruction, multiple_choice,
                                              two_scenes)
from common.data.shapes.grounding import glyphs, referring
from common.data.shapes.interleaved import (CLIPS, LABELS, TASKS, caption, class_names, clip,
                                            document, episode, page)
from common.data.shapes.questions import probes, questions
from common.data.shapes.scene import COLOURS, SHAPES, sample
from common.data.shapes.words import describe, listed, phrase

# The percentage of each kind of text. Recall is learned suddenly and late, or never; texts that
# repeat words exactly bring it soonest: hence the lists, and episodes in three forms. Half of the
# texts are five questions on one description: yes or no and counts are learned late, too, and what
# a model cannot answer in words it cannot answer on pictures.
READ = {"list": 10, "episode": 15, "names": 5, "caption": 5, "questions": 50, "document": 10,
        "clip": 5}
FORMS = ("phrase", "word", "bare")        # of an episode: what stands for a picture
ENDS = (".", ",", ";", "!", "?", "")      # after a label: recall must not depend on one of them
# What a list may name; colours and shapes together could form a held-out pair.
LISTED = (LABELS, (*LABELS, *COLOURS), (*LABELS, *SHAPES))


def descriptions(kind, record, rng):
    """One description of each turn's picture: "a red circle and a blue star", "" without one."""
    if kind == "clip":                    # no short sentence describes a clip: give its answer
        return [f"the answer is {record['turns'][0]['answer']}"]
    found = [listed([phrase(item) for item in rng.sample(scene.items, len(scene.items))])
             for scene in record["source"]]
    return found + [""] * (len(record["turns"]) - len(found))


def bare(record):
    """An episode as its class names and labels: [("circle", "dax"), ("square", "wug"), ...]."""
    return [(name, turn["answer"]) for name, turn in zip(class_names(record), record["turns"])]


def text(rng):
    """A text for a language model: {"texts": [plain text]}, or a page of a kind of READ in words.

    A page: {"turns": [{"images": [], "description": "a red circle", "prompt": "", "answer": "dax"},
    ...], "end": one of ENDS}; the model writes each turn in its own wording.
    """
    kind, = rng.choices(list(READ), weights=READ.values())
    end = rng.choice(ENDS) if kind in ("list", "episode") else "."
    if kind == "list":
        words = rng.sample(rng.choice(LISTED), rng.randint(3, 8))
        return {"texts": [" ".join(3 * [f"{' '.join(words)}{end}"])]}
    if kind == "caption" and rng.random() < 0.5:
        return {"texts": [describe(sample(rng, (1, 3)), rng)]}
    record = TASKS[kind](rng, side=None)
    if kind == "caption":
        record = page((record["source"],), record["texts"], None)
    form = rng.choice(FORMS) if kind == "episode" else "phrase"
    if form == "bare":
        return {"texts": [" ".join(f"{name} {label}{end}" for name, label in bare(record))]}
    described = class_names(record) if form == "word" else descriptions(kind, record, rng)
    return {"turns": [{"images": [], "description": words, "prompt": turn["prompt"],
                       "answer": turn["answer"]}
                      for words, turn in zip(described, record["turns"])], "end": end}


def labelled(rng):
    """An episode of 8 shots in words, [(text, counted), ...], and the entropy of its labels, nats.

    counted: whether the text is a label of known odds. A label that came before is certain: 0 nats;
    that of the second class is any but the first's: ln 11. The first label is not counted, because
    a list may stand there too. A label has its full stop because a vocabulary merges the two.
    """
    parts = []
    for name, label in bare(episode(rng, side=None, shots=8)):
        parts += [(f"{' ' if parts else ''}{name}", False), (f" {label}.", bool(parts))]
    return parts, math.log(len(LABELS) - 1)


def examples(rng, side=32):
    """A list of training records of every kind, in a fixed order."""
    one, two, three = (sample(rng, n) for n in (1, 2, (2, 4)))
    found = [caption(rng, side=side), *questions(two, rng, side=side),
             *probes(two, rng, side)[1::2], swapped_attributes(three, rng, side),
             swapped_order(two, rng, "reversed", side), noisy_caption(one, rng, 1.0, side=side),
             referring(two, rng, side=side), glyphs(rng),
             *(instruction(three, rng, kind, side) for kind in TEACHERS),
             multiple_choice(three, rng, side), dialogue(two, rng, side=side),
             two_scenes(two, three, rng, side), document(rng, side=side), episode(rng, side=side),
             *(clip(rng, side=side, kind=kind) for kind in CLIPS)]
    return [record for record in found if record]        # some scenes do not allow all kinds


def texts_of(record):
    """Every text of a record without repeats, a prompt and its answer in one line."""
    found = [*record.get("texts", ()), record.get("caption", ""), record.get("context", "")]
    found += [f"{turn['prompt']} {turn['answer']}".strip() for turn in record.get("turns", ())]
    found += [*record.get("candidates", ()), record.get("explanation", "")]
    return list(dict.fromkeys(filter(None, found)))


def corpus():
    """Training texts of every kind for the tokenizer, always the same: no test wording."""
    for index in range(4000):
        rng = random.Random(f"corpus/{index}")
        yield describe(sample(rng, (1, 3)), rng, None if index % 4 else "full")
    for index in range(200):
        for record in examples(random.Random(f"stories/{index}"), side=None):
            yield from texts_of(record)
    for index in range(500):              # so often that each label becomes one piece
        yield f"{LABELS[index % len(LABELS)]}."
