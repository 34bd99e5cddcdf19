"""Pictures and texts in turn: pages, questions, few-shot episodes and clips.

A record of TASKS is {"turns": [{"images", "prompt", "answer"}, ...], "source": the Scene of each
picture or frame}; the last turn's answer is the answer. Only "caption" is {"images", "texts",
"source": Scene}. Split "test" asks in wordings that training never uses; side=None leaves the
pictures out; dial: arguments of `sample`.

    record = episode(random.Random(0), shots=4)
    print([turn["answer"] for turn in record["turns"]])     # "wug", "dax", "dax", "wug", "dax"
"""
from dataclasses import replace

from common.data.shapes.questions import decidable, pick, wording
from common.data.shapes.scene import (BACKGROUNDS, COLOURS, PAIRS, SHAPES, SIZES, Item, Scene,
                                      dialogue_turns, pictures, sample, turn)
from common.data.shapes.words import describe, phrase, vague

QUESTION_KINDS = ("colour", "shape", "count", "existence", "relation")
DOCUMENT_KINDS = ("colour", "shape", "count", "existence")
CLIP_KINDS = ("direction", "first", "growth")
SHOTS = (2, 4, 6, 8)                      # of an episode in training
LABELS = ("dax", "wug", "blick", "fep", "toma", "zup", "kiv", "gorp", "mell", "sanu", "pif", "lorn")


def page(scenes, texts, side, **more):
    """A record with one picture and one text a turn, and no prompts."""
    return {"turns": [turn("", text, (scene,), side) for scene, text in zip(scenes, texts)],
            "source": tuple(scenes), **more}


def caption(rng, split="train", side=32, **dial):
    """One picture and its caption."""
    scene = sample(rng, **dial)
    return {"images": pictures((scene,), side), "texts": [describe(scene, rng)], "source": scene}


def album(rng, split="train", side=32, images=None, **dial):
    """Two or three pictures, each with its caption."""
    scenes = [sample(rng, **dial) for _ in range(images or rng.randint(2, 3))]
    return page(scenes, [describe(scene, rng) for scene in scenes], side)


def names(rng, split="train", side=32, images=None, by=None):
    """Single objects, each with the name of its colour, or each with that of its shape (by).

    The first name is not learned: nothing before it decides between colour and shape.
    """
    by = by or rng.choice(("colour", "shape"))
    scenes = [sample(rng, 1, pairs=(rng.choice(PAIRS),))
              for _ in range(images or rng.randint(4, 8))]
    record = page(scenes, [getattr(scene.items[0], by) for scene in scenes], side)
    record["turns"][0]["learn"] = False
    return record


def question(rng, split="train", side=32, asks=None, **dial):
    """One picture and `asks` questions of different kinds: one to three in training, else one.

    "kind": that of the last question.
    """
    asks, pairs = asks or (rng.randint(1, 3) if split == "train" else 1), []
    while not pairs:
        scene = sample(rng, **dial)
        for kind in rng.sample(QUESTION_KINDS, asks):
            option = pick(decidable(scene, kind), rng)
            if option:
                pairs.append((wording(option, rng, kind, split, scene), option[1]))
                last = kind
    return {"turns": dialogue_turns(pairs, scene, side), "source": (scene,), "kind": last}


def document(rng, split="train", side=32, images=None, kind=None, **dial):
    """Two to four pictures: one with a question on it, the others with a vague true caption.

    "asked": the index of the question's turn. The same question on any other picture has another
    answer. The captions are vague because a "yes" could be read off exact ones.
    """
    images = images or rng.randint(2, 4)
    kind = kind or rng.choice(DOCUMENT_KINDS)
    option = None
    while not option:
        scene = sample(rng, **dial)
        option = pick(decidable(scene, kind), rng)
    form, answer, slots = option
    asked = rng.randrange(images)
    scenes = []
    while len(scenes) < images:
        other = scene if len(scenes) == asked else sample(rng, **dial)
        if other is scene or any((f, s) == (form, slots) and a != answer
                                 for f, a, s in decidable(other, kind)):
            scenes.append(other)
    record = page(scenes, map(vague, scenes), side, kind=kind, asked=asked)
    record["turns"][asked] |= {"prompt": wording(option, rng, kind, split, scene), "answer": answer}
    return record


def episode(rng, split="train", side=32, shots=None, classes=2, by=None, shuffled=False):
    """Few-shot learning: labelled pictures, the shots, and one more whose label is asked.

    The classes are colours or shapes (by). The labels are nonsense words, drawn anew for each
    episode, so only the shots give them; nothing else differs between the classes. shots: of all
    classes together, equally many of each. shuffled: the shots' labels are permuted at random;
    then accuracy must fall to chance, 1 / classes. "candidates": the labels.
    """
    shots = rng.choice(SHOTS) if shots is None else shots
    if shots % classes:
        raise ValueError(f"{shots} shots cannot be shared evenly by {classes} classes")
    by = by or rng.choice(("colour", "shape"))
    same = rng.choice(SHAPES if by == "colour" else tuple(COLOURS))
    pairs = rng.sample([p for p in PAIRS if same in p], classes)
    labels = dict(zip(pairs, rng.sample(LABELS, classes)))
    order = rng.sample(pairs * (shots // classes), shots) + [rng.choice(pairs)]
    scenes = [sample(rng, 1, pairs=(pair,)) for pair in order]
    texts = [labels[pair] for pair in order]
    if shuffled:
        texts[:-1] = rng.sample(texts[:-1], shots)
    return page(scenes, texts, side, by=by, candidates=rng.sample(list(labels.values()), classes))


def class_names(record):
    """The colours of an episode's pictures if these are its classes, else the shapes."""
    return [getattr(scene.items[0], record["by"]) for scene in record["source"]]


def glossary(rng, split="train", side=32, classes=None, shots=None):
    """An episode whose shots are words, "circle dax", and whose last turn alone has a picture.

    Two to four classes, each given once; the words are not learned. A model must match a picture
    with a word here; in an episode it has to learn both sides of the match at once.
    """
    classes = classes or rng.randint(2, 4)
    record = episode(rng, split, None, shots or classes, classes=classes)
    *shots, last = record["turns"]
    words = [turn("", f"{name} {shot['answer']}") | {"learn": False}
             for name, shot in zip(class_names(record), shots)]
    scenes = record["source"][-1:]
    return record | {"turns": [*words, turn("", last["answer"], scenes, side)], "source": scenes}


# ------------------------------------------------------------------ clips

_MOVES = {"x": ("left", "right"), "y": ("up", "down")}


def moving(rng, pairs, frames):
    """Two objects cross the picture, each in its lane and direction; the question is on one."""
    axis = rng.choice(tuple(_MOVES))
    lanes, forward = rng.sample((0.25, 0.75), 2), [rng.random() < 0.5 for _ in pairs]
    tracks = []
    for (colour, shape), lane, ahead in zip(pairs, lanes, forward):
        start, end = rng.uniform(0.24, 0.34), rng.uniform(0.66, 0.76)
        steps = [start + (end - start) * t / (frames - 1) for t in range(frames)]
        tracks.append([Item(colour, shape, "small", *((v, lane) if axis == "x" else (lane, v)))
                       for v in steps[::1 if ahead else -1]])
    back, forth = _MOVES[axis]
    prompt = f"did {phrase(tracks[0][0], article='the')} move {back} or {forth}?"
    return list(zip(*tracks)), prompt, forth if forward[0] else back


def appearing(rng, pairs, frames):
    """One object in the first half of the frames, another in the second half."""
    one, other = (sample(rng, 1, pairs=(pair,)).items for pair in pairs)
    first, second = rng.sample([pair[0] for pair in pairs], 2)
    prompt = f"which colour did the picture show first, {first} or {second}?"
    return [one] * (frames // 2) + [other] * (frames - frames // 2), prompt, pairs[0][0]


def growing(rng, pairs, frames):
    """One object that changes its size at a random frame."""
    before, after = rng.sample(tuple(SIZES), 2)
    item = sample(rng, 1, pairs=pairs[:1]).items[0]
    item = replace(item, size=before, x=0.25 + item.x / 2, y=0.25 + item.y / 2)   # room to grow
    moment = rng.randint(1, frames - 1)
    prompt = f"did {phrase(item, article='the')} grow or shrink?"
    items = [(item,)] * moment + [(replace(item, size=after),)] * (frames - moment)
    return items, prompt, "shrank" if before == "large" else "grew"


def clip(rng, split="train", side=32, frames=8, kind=None):
    """Frames of moving shapes and a question, of CLIP_KINDS, that only their order decides.

    The same frames backwards have the other answer, so without the order the chance is 1/2.
    "did the red circle move left or right?" -> "left". {"kind", "source": a Scene a frame}
    """
    if frames < 2:
        raise ValueError(f"frames {frames} have no order; at least 2 are needed")
    kind = kind or rng.choice(CLIP_KINDS)
    background = rng.choice(tuple(BACKGROUNDS))
    pairs = rng.sample(PAIRS, 2)
    while pairs[0][0] == pairs[1][0]:
        pairs = rng.sample(PAIRS, 2)
    play = {"direction": moving, "first": appearing, "growth": growing}[kind]
    items, prompt, answer = play(rng, pairs, frames)
    scenes = tuple(Scene(tuple(own), background) for own in items)
    images = [pictures(scenes, side)] if side else []
    return {"turns": [turn(prompt, answer) | {"images": images}], "kind": kind, "source": scenes}


TASKS = {f.__name__: f for f in
         (caption, album, names, question, document, episode, glossary, clip)}
